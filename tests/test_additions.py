"""A quantized addition gives the same bytes whatever arithmetic the CPU's kernel uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import SPEC, pack
from torch import Tensor, nn

from edgecnn.stages.base import TorchModel
from edgecnn.targets.additions import STEPS, settle_additions
from edgecnn.targets.calibration import METHODS, collect, ranges
from edgecnn.targets.onnx import export_onnx
from edgecnn.targets.onnxruntime import KERNELS
from edgecnn.targets.qdq import Form, write_qdq


class Residual(nn.Module):
    """Additions of every kind: after pooling, in a chain, with ReLU behind, of two branches, and of two that earlier ones have settled."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(7)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four, five, six, seven = self.convolutions
        x = nn.functional.max_pool2d(torch.relu(one(x)), 2)
        first = torch.relu(x + two(x))
        second = first + three(first)
        third = second + four(second)
        forked = five(third) + six(third)
        return self.head(torch.relu(seven(forked + third)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("residual")
    export_onnx(TorchModel(Residual().eval(), SPEC, tuple("abcd"), {"name": "residual"}), made / "model.onnx")
    pack(made / "calibration", 16, seed=2)
    return made


def scales(path: Path) -> list[tuple[float, float, float]]:
    """Of each addition of a QDQ graph: of its inputs and of its output."""
    graph = onnx.load(str(path)).graph
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    takers = {name: node for node in graph.node for name in node.input}
    additions = [node for node in graph.node if node.op_type == "Add"]
    ends = [takers[n.output[0]] for n in additions]  # or a ReLU, which melts into the addition
    ends = [takers[n.output[0]] if n.op_type == "Relu" else n for n in ends]
    assert all(node.op_type == "QuantizeLinear" for node in ends)
    names = [[makers[n.input[0]].input[1], makers[n.input[1]].input[1], end.input[1]] for n, end in zip(additions, ends, strict=True)]
    return [(float(values[a]), float(values[b]), float(values[c])) for a, b, c in names]


def away_from_ties(a: float, b: float, c: float) -> float:
    """How near any of the 511 x 511 sums of two differences from the zero points comes to halfway between two integers."""
    x = np.arange(-255, 256, dtype=np.float64)
    sums = x[:, None] * (a / c) + x[None] * (b / c)
    return float(np.abs(np.abs(sums - np.round(sums)) - 0.5).min())


@pytest.mark.parametrize("method", METHODS)
def test_no_sum_lies_near_a_tie(folder: Path, tmp_path: Path, method: str) -> None:
    """By every method, four of the five additions keep a quarter of a step from every tie, and no range became narrower."""
    histograms = collect(folder / "model.onnx", pack(tmp_path / "calibration", 16, seed=2), SPEC)
    calibrated = ranges(histograms, method, symmetric=False)
    write_qdq(
        folder / "model.onnx",
        tmp_path / "q.onnx",
        calibrated,
        Form("uint8", symmetric=False, quantize_bias=True, outputs=True, sums=False, only=KERNELS),
    )
    clear = [away_from_ties(*each) for each in scales(tmp_path / "q.onnx")]
    assert len(clear) == 5
    assert sum(distance > 0.25 / STEPS for distance in clear) >= 4, clear
    wide = settle_additions(folder / "model.onnx", calibrated)
    factors = [(h - lo) / (calibrated[n][1] - calibrated[n][0]) for n, (lo, h) in wide.items() if calibrated[n][1] > calibrated[n][0]]
    assert min(factors) == 1
    assert 1 < max(factors) < 1.02

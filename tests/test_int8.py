"""int8 that holds: bias correction, the choice of ranges, float squeeze-and-excite parts and the collapse detector keep their laws."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import SPEC, source
from torch import Tensor, nn

from edgecnn.device.packed import open_packed
from edgecnn.device.preprocess import normalise
from edgecnn.sensitivity import weigh
from edgecnn.stages.base import TorchModel
from edgecnn.targets.bias import channel_means, correct_bias
from edgecnn.targets.calibration import METHODS, collect, ranges
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.onnx import export_onnx
from edgecnn.targets.onnxruntime import KERNELS
from edgecnn.targets.qdq import Form, squeeze_and_excite, stem, write_qdq
from edgecnn.targets.sensitivity import costs, divergence, nodes_of, parts, worst_layers
from edgecnn.targets.tensorrt import FORM

FORMS = {"onnxruntime": Form("uint8", False, quantize_bias=True, outputs=True, sums=False, only=KERNELS), "tensorrt": FORM}


def shifted(folder: Path, path: Path, form: str) -> list[str]:
    """The tiny network's QDQ graph with every bias moved up; returns its layers."""
    made = ranges(source(folder).histograms(), "minmax", symmetric=FORMS[form].symmetric)
    write_qdq(folder / "model.onnx", path, made, FORMS[form])
    graph = onnx.load(str(path))
    makers = {node.output[0]: node for node in graph.graph.node}
    constants = {i.name: i for i in graph.graph.initializer}
    layers = [node for node in graph.graph.node if node.op_type in ("Conv", "Gemm")]
    for node in layers:
        tensor = constants[node.input[2] if node.input[2] in constants else makers[node.input[2]].input[0]]
        value = numpy_helper.to_array(tensor)
        step = 0.05 if value.dtype == np.float32 else 0.05 / numpy_helper.to_array(constants[makers[node.input[2]].input[1]])
        tensor.CopyFrom(numpy_helper.from_array((value + step).astype(value.dtype), tensor.name))
    path.write_bytes(graph.SerializeToString())
    return [node.name for node in layers]


def mean_error(folder: Path, path: Path, layers: list[str]) -> np.ndarray:
    """The absolute median error of each channel's mean, of all layers together."""
    graphs = [onnx.load(str(p)) for p in (folder / "model.onnx", path)]
    x = normalise(open_packed(folder / "calibration").images, SPEC)
    means = []
    for graph in graphs:
        outputs = {node.name: node.output[0] for node in graph.graph.node}
        means.append(channel_means(graph, [outputs[name] for name in layers], x))
    return np.concatenate([np.abs(np.median(a - b, axis=0)) for a, b in zip(*means, strict=True)])


@pytest.mark.parametrize("form", FORMS)
def test_bias_correction_takes_out_the_mean_error(tiny_folder: Path, tmp_path: Path, form: str) -> None:
    """Biases that were moved up by 0.05 come back: no channel's mean is then off by more than a tenth of that."""
    path = tmp_path / "q.onnx"
    layers = shifted(tiny_folder, path, form)
    assert len(layers) == 4
    before = mean_error(tiny_folder, path, layers)
    assert np.median(before) > 0.02
    correct_bias(tiny_folder / "model.onnx", path, open_packed(tiny_folder / "calibration"), SPEC)
    after = mean_error(tiny_folder, path, layers)
    assert len(after) == 24 * 3 + 4
    assert after.max() < 0.05 / 10


@pytest.mark.parametrize("form", FORMS)
def test_the_fit_is_the_best_method_and_the_same_twice(tiny_folder: Path, tmp_path: Path, form: str) -> None:
    """The file kept is the closest of all methods to the float outputs, its note says so, and a second fit gives the same bytes."""
    made, files = source(tiny_folder), [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    notes = [fit_qdq(made, file, FORMS[form], methods=list(METHODS), correct=True)[0] for file in files]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert notes[0] == notes[1]
    assert all(method in notes[0] for method in METHODS)
    alone = tmp_path / "alone.onnx"
    fit_qdq(made, alone, FORMS[form], methods=["minmax"], correct=False)
    wanted = outputs(tiny_folder / "model.onnx", tiny_folder)
    assert divergence(wanted, outputs(files[0], tiny_folder)) <= divergence(wanted, outputs(alone, tiny_folder)) + 1e-12


def outputs(model: Path, folder: Path) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    images = open_packed(folder / "calibration").images
    return np.concatenate([session.run(None, {"input": normalise(images[i : i + 1], SPEC)})[0] for i in range(len(images))])


def test_divergence_is_zero_for_equals_and_grows() -> None:
    """It is 0 for equal logits, whatever is added to all classes, and larger the further they lie apart."""
    logits = np.random.default_rng(0).normal(size=(50, 10))
    noise = np.random.default_rng(1).normal(size=(50, 10))
    assert divergence(logits, logits + 7) == pytest.approx(0, abs=1e-12)
    grown = [divergence(logits, logits + share * noise) for share in (0.01, 0.1, 1.0)]
    assert 0 < grown[0] < grown[1] < grown[2]


class Gated(nn.Module):
    """A convolution behind a squeeze-and-excite gate, and a head that pools too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.wide, self.head = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        pooled = self.wide(x).relu().mean((2, 3), keepdim=True)
        logits: Tensor = self.head(pooled).flatten(1)
        return logits


def test_only_the_gate_is_squeeze_and_excite(tiny_folder: Path, tmp_path: Path) -> None:
    """What follows the pooling up to the gate's sigmoid is found; the head, which works on one position too, is not; some have none."""
    torch.manual_seed(0)
    path = tmp_path / "gated.onnx"
    export_onnx(TorchModel(Gated().eval(), SPEC, tuple("abcd"), {"name": "gated"}), path)
    found = set(squeeze_and_excite(path))
    nodes = onnx.load(str(path)).graph.node
    assert sorted(node.op_type for node in nodes if node.name in found) == ["Conv", "Conv", "Relu", "Sigmoid"]
    assert [node.op_type for node in nodes if "Pool" in node.op_type or "Reduce" in node.op_type] == ["GlobalAveragePool"] * 2
    assert squeeze_and_excite(tiny_folder / "model.onnx") == []


class Headed(nn.Module):
    """Layers as in MobileNets, up to the first block's widening convolution; `kernel` is that of the second one."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.image, self.apart = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
        self.narrow, self.wide, self.head = nn.Conv2d(16, 8, kernel), nn.Conv2d(8, 48, 1), nn.Conv2d(48, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.apart(self.image(x).relu()).relu())
        logits: Tensor = self.head(self.wide(x).relu().mean((2, 3), keepdim=True)).flatten(1)
        return logits


@pytest.mark.parametrize(("module", "convolutions"), [(Headed(), 3), (Headed(kernel=3), 2), (Gated(), 1)])
def test_the_stem_ends_where_channels_become_many(module: nn.Module, convolutions: int, tiny_folder: Path, tmp_path: Path) -> None:
    """It holds the first convolution and separable ones behind it, and nothing from one that widens or is full, gates or not."""
    path = tmp_path / "model.onnx"
    export_onnx(TorchModel(module.eval(), SPEC, tuple("abcd"), {"name": "headed"}), path)
    nodes = [node.name for node in onnx.load(str(path)).graph.node]
    found = stem(path)
    assert found == nodes[: len(found)]
    assert len(stem(tiny_folder / "model.onnx")) == 1, "nothing widens in it"
    assert sum("conv" in name.lower() for name in found) == convolutions
    assert "conv" in found[-1].lower()


def test_a_collapse_is_named_with_its_layer(tiny_folder: Path, tmp_path: Path) -> None:
    """A range of one thousandth of what the input holds is noted as a collapse, the first layer with it; a sound file is not."""
    made, how = source(tiny_folder), {"methods": ["minmax"], "correct": False}
    form = FORMS["onnxruntime"]
    seen = made.histograms()
    h = seen["input"]
    starved = replace(made, histograms=lambda: {**seen, "input": replace(h, low=h.low / 1000, high=h.high / 1000)})
    sound, broken = tmp_path / "sound.onnx", tmp_path / "broken.onnx"
    assert len(fit_qdq(made, sound, form, **how)) == 1  # type: ignore[arg-type]
    note = fit_qdq(starved, broken, form, **how)[1]  # type: ignore[arg-type]
    assert note.startswith("collapse: only ")
    first = next(node.name for node in onnx.load(str(made.onnx)).graph.node if node.op_type == "Conv")
    assert "Most is lost in stem.0, " in note
    assert "which reads " in note
    before, after = ({w.name: w.sqnr_db for w in worst_layers(made.onnx, p, made.calibration, SPEC)} for p in (sound, broken))
    assert len(before) == len(after) == 4
    assert min(before.values()) > 15
    assert after[first] < 3


def test_a_layer_without_error_is_no_overflow(tiny_folder: Path) -> None:
    """A graph beside itself has a large and finite signal-to-noise ratio in every layer, and numpy warns of nothing."""
    made = source(tiny_folder)
    with np.errstate(all="raise"):
        found = worst_layers(made.onnx, made.onnx, made.calibration, SPEC)
    assert len(found) == 4
    assert all(1000 < layer.sqnr_db < 10_000 for layer in found)


def test_correction_leaves_what_is_right(tiny_folder: Path, tmp_path: Path) -> None:
    """Correcting twice changes no int32 bias by more than a few steps: what is right stays."""
    path, twice = tmp_path / "q.onnx", tmp_path / "twice.onnx"
    shifted(tiny_folder, path, "onnxruntime")
    images = open_packed(tiny_folder / "calibration")
    correct_bias(tiny_folder / "model.onnx", path, images, SPEC)
    shutil.copy(path, twice)
    correct_bias(tiny_folder / "model.onnx", twice, images, SPEC)
    biases = [{i.name: numpy_helper.to_array(i) for i in onnx.load(str(p)).graph.initializer if i.data_type == 6} for p in (path, twice)]
    assert len(biases[0]) >= 4
    assert all(np.abs(biases[0][name] - biases[1][name]).max() <= 3 for name in biases[0])


def test_a_network_without_biases_is_left_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    """An untrained network's biases are zero and left out of its graph: there is nothing to correct, and no fault."""
    path, quantized = tmp_path / "bare.onnx", tmp_path / "q.onnx"
    bare = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 14, bias=False), nn.Flatten())
    export_onnx(TorchModel(bare.eval(), SPEC, tuple("abcd"), {"name": "bare"}), path)
    images = open_packed(tiny_folder / "calibration")
    made = ranges(collect(path, images, SPEC), "minmax", symmetric=False)
    write_qdq(path, quantized, made, FORMS["onnxruntime"])
    before = quantized.read_bytes()
    correct_bias(path, quantized, images, SPEC)
    assert quantized.read_bytes() == before


class Uneven(nn.Module):
    """A convolution whose first channel's weights are `times` the others', as folding a batch norm can make them; what is behind it makes
    up for that, or, if not `needed`, hardly reads the other channels."""

    def __init__(self, times: float, needed: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 14)
        with torch.no_grad():
            self.stem.weight[0] *= times
            self.head.weight[:, 0] /= times
            self.head.weight[:, 1:] *= 1 if needed else 1e-6

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stem(x)[:, :, :14, :14].clamp(-1, 1)).flatten(1)
        return logits


@pytest.mark.parametrize(
    ("times", "needed", "collapse", "replaced"), [(1e4, True, True, True), (40, True, False, True), (40, False, False, False)]
)
def test_a_single_scale_for_uneven_weights_is_found_named_and_mended(
    times: float, needed: bool, collapse: bool, replaced: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    """`weights: per-tensor` leaves seven of eight channels no steps: notes name the layer; where that matters the file is per channel."""
    torch.manual_seed(0)
    path, quantized = tmp_path / "uneven.onnx", tmp_path / "q.onnx"
    export_onnx(TorchModel(Uneven(times, needed).eval(), SPEC, tuple("abcd"), {"name": "uneven"}), path)
    images = open_packed(tiny_folder / "calibration")
    made = replace(source(tiny_folder), onnx=path, histograms=lambda: collect(path, images, SPEC))
    form = replace(FORMS["onnxruntime"], weights="per-tensor")
    notes = fit_qdq(made, quantized, form, methods=["minmax"], correct=False)
    print(notes)
    assert notes[1].startswith("collapse: only ") == collapse
    starved, recovered = notes[1 + collapse : 3 + collapse]
    assert starved.startswith("weights: per-tensor leaves many channels less than 8 of 127 steps, in 1 layers: stem, 88% of its channels")
    assert recovered.startswith("recovered: weights: per-tensor was replaced" if replaced else "weights: per-tensor costs nothing")
    scales = [i for i in onnx.load(str(quantized)).graph.initializer if i.name.endswith("weight_scale")]
    assert len(scales) == 2
    assert all((len(i.dims) == 1) == replaced for i in scales)


def test_each_layer_alone_and_what_is_kept_in_float(tiny_folder: Path, tmp_path: Path) -> None:
    """Every layer has its own cost; the one made harmful, or slower in int8, is kept in float and says why; a pin of the recipe too."""
    made, path, form = source(tiny_folder), tmp_path / "q.onnx", FORMS["onnxruntime"]
    fit_qdq(made, path, form, methods=["minmax"], correct=False)
    found = costs(made.onnx, path, form, made.calibration, made.input)
    assert len(found) == 4
    assert all(0 <= c.flips <= 1 and c.divergence > 0 and np.isfinite(c.sqnr_db) for c in found)
    even = [replace(c, divergence=1.0) for c in found]
    assert not any(row.kept_float for row in weigh(even, None, ()))
    harmful = [replace(even[0], divergence=30.0), *even[1:]]
    assert [bool(row.why) for row in weigh(harmful, None, ())] == [True, False, False, False]
    float_s = {c.name: 1e-3 for c in found}
    rows = weigh(even, (float_s, {**float_s, even[2].name: 1.5e-3}), [even[3].node])
    assert [row.why.split(":")[0] for row in rows] == ["", "", "not faster in int8", "left in float by the recipe or the runtime's form"]


def test_every_node_belongs_to_the_layer_before_it(tiny_folder: Path) -> None:
    """A layer's nodes are its own and the weightless ones behind it; all nodes are in exactly one layer."""
    model = source(tiny_folder).onnx
    layers = dict.fromkeys(parts(model).values())
    nodes = [node.name for node in onnx.load(str(model)).graph.node]
    assert sorted(name for layer in layers for name in nodes_of(model, [layer])) == sorted(nodes)
    assert len(layers) == 5  # the four and what lies before them

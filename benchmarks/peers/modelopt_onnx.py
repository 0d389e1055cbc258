"""NVIDIA Model Optimizer's ONNX quantization (Apache-2.0). https://nvidia.github.io/Model-Optimizer/guides/_onnx_quantization.html

It quantizes for TensorRT: symmetric int8, weights per channel.

default: `quantize` with a graph and calibration images: entropy ranges, the float rest in fp16.
best: its advice for CNNs that lose accuracy: `max` ranges; the float rest in fp32, which is what a CPU runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from modelopt.onnx.quantization import quantize
from peer import INPUT, main


def default(graph: Path, images: np.ndarray, out: Path) -> None:
    run(graph, images, out)


def best(graph: Path, images: np.ndarray, out: Path) -> None:
    run(graph, images, out, calibration_method="max", high_precision_dtype="fp32")


def run(graph: Path, images: np.ndarray, out: Path, **how: str) -> None:
    shape = "x".join(map(str, (1, *images.shape[1:])))
    quantize(
        str(graph),
        calibration_data={INPUT: images},
        calibration_shapes=f"{INPUT}:{shape}",
        calibration_eps=["cpu"],
        output_path=str(out / "model.onnx"),
        **how,
    )


main({"default": default, "best": best})

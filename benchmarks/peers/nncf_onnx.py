"""NNCF on the ONNX graph (Apache-2.0). https://docs.openvino.ai: "Quantizing models post-training"

default: `nncf.quantize` with a graph and a data set.
best: what its page on tuning advises for accuracy: mixed preset, full instead of fast bias correction, all images.
"""

from __future__ import annotations

from pathlib import Path

import nncf
import numpy as np
import onnx
from peer import INPUT, feeds, main


def default(graph: Path, images: np.ndarray, out: Path) -> None:
    onnx.save(nncf.quantize(onnx.load(graph), nncf.Dataset(list(feeds(images, INPUT)))), out / "model.onnx")


def best(graph: Path, images: np.ndarray, out: Path) -> None:
    quantized = nncf.quantize(
        onnx.load(graph),
        nncf.Dataset(list(feeds(images, INPUT))),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=False,
        subset_size=len(images),
    )
    onnx.save(quantized, out / "model.onnx")


main({"default": default, "best": best})

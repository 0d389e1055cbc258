"""AIMET for ONNX, Qualcomm (BSD-3-Clause). https://quic.github.io/aimet-pages

default: a simulation with its own configuration (per channel), calibrated by `compute_encodings`, exported as QDQ.
best: its documented chain for CNNs: cross-layer equalization, then a search of each weight's range (sequential MSE).
AdaRound, its last step, takes 10,000 iterations for each layer and was left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from aimet_onnx import QuantizationSimModel, apply_seq_mse
from aimet_onnx.cross_layer_equalization import equalize_model
from peer import INPUT, feeds, main


def default(graph: Path, images: np.ndarray, out: Path) -> None:
    finish(QuantizationSimModel(onnx.load(graph)), images, out)


def best(graph: Path, images: np.ndarray, out: Path) -> None:
    model = onnx.load(graph)
    equalize_model(model)
    simulated = QuantizationSimModel(model, quant_scheme="min_max")
    apply_seq_mse(simulated, list(feeds(images, INPUT)))
    finish(simulated, images, out)


def finish(simulated: QuantizationSimModel, images: np.ndarray, out: Path) -> None:
    simulated.compute_encodings(list(feeds(images, INPUT)))
    onnx.save(simulated.to_onnx_qdq(prequantize_constants=True), out / "model.onnx")


main({"default": default, "best": best})

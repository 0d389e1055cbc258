"""AMD Quark for ONNX (MIT). https://quark.docs.amd.com

default: its configuration for CNNs on a CPU, INT8_CNN_DEFAULT.
best: INT8_CNN_ACCURATE: 99.9999-percentile ranges, then AdaRound on the calibration images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from peer import INPUT, Reader, main
from quark.onnx import ModelQuantizer
from quark.onnx.quantization.config import Config, get_default_config


def default(graph: Path, images: np.ndarray, out: Path) -> None:
    quantize("INT8_CNN_DEFAULT", graph, images, out)


def best(graph: Path, images: np.ndarray, out: Path) -> None:
    quantize("INT8_CNN_ACCURATE", graph, images, out)


def quantize(named: str, graph: Path, images: np.ndarray, out: Path) -> None:
    config = Config(global_quant_config=get_default_config(named))
    ModelQuantizer(config).quantize_model(str(graph), str(out / "model.onnx"), Reader(images, INPUT))


main({"default": default, "best": best})

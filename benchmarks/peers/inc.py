"""Intel Neural Compressor for ONNX (Apache-2.0). https://intel.github.io/neural-compressor

Version 2.6, the last that quantizes ONNX files: 3 is for torch, and its half for ONNX, onnx-neural-compressor, stopped at 1.0 (2024).

default: `fit` with an empty PostTrainingQuantConfig: integer operators (QOperator) instead of QDQ, 100 calibration images.
best: QDQ, percentile ranges, all calibration images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from neural_compressor import PostTrainingQuantConfig, quantization
from peer import main


class Images:
    """A calibration loader as `fit` takes it: batches of (image, label)."""

    batch_size = 1

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __iter__(self) -> Any:
        for i in range(len(self.images)):
            yield self.images[i : i + 1], 0

    def __len__(self) -> int:
        return len(self.images)


def default(graph: Path, images: np.ndarray, out: Path) -> None:
    fit(graph, images, out, PostTrainingQuantConfig())


def best(graph: Path, images: np.ndarray, out: Path) -> None:
    ranges = {".*": {"activation": {"algorithm": ["percentile"]}}}
    fit(graph, images, out, PostTrainingQuantConfig(quant_format="QDQ", calibration_sampling_size=[len(images)], op_type_dict=ranges))


def fit(graph: Path, images: np.ndarray, out: Path, config: PostTrainingQuantConfig) -> None:
    quantization.fit(str(graph), config, calib_dataloader=Images(images)).save(str(out / "model.onnx"))


main({"default": default, "best": best})

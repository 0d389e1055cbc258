"""NNCF on OpenVINO's model (Apache-2.0). https://docs.openvino.ai: "Quantizing models post-training"

default: `nncf.quantize` with a model and a data set.
best: what its page on tuning advises for accuracy: mixed preset, full instead of fast bias correction, all images.
"""

from __future__ import annotations

from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from peer import feeds, main


def default(graph: Path, images: np.ndarray, out: Path) -> None:
    ov.save_model(nncf.quantize(ov.convert_model(str(graph)), data(images)), out / "model.xml")


def best(graph: Path, images: np.ndarray, out: Path) -> None:
    quantized = nncf.quantize(
        ov.convert_model(str(graph)),
        data(images),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=False,
        subset_size=len(images),
    )
    ov.save_model(quantized, out / "model.xml")


def data(images: np.ndarray) -> nncf.Dataset:
    return nncf.Dataset([feed["x"] for feed in feeds(images, "x")])


main({"default": default, "best": best})

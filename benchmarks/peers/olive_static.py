"""Olive's OnnxStaticQuantization pass (MIT). https://microsoft.github.io/Olive

default: the pass with data and nothing else.
best: with what its page offers for accuracy on x86-64: U8S8, weights per channel, symmetric; percentile ranges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from olive.data.config import DataConfig
from olive.data.registry import Registry
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.quantization import OnnxStaticQuantization
from peer import INPUT, main


def default(graph: Path, images: np.ndarray, out: Path) -> None:
    quantize(graph, images, out, {})


def best(graph: Path, images: np.ndarray, out: Path) -> None:
    how = {"precision": "int8", "activation_type": "uint8", "per_channel": True, "weight_symmetric": True, "calibrate_method": "Percentile"}
    quantize(graph, images, out, how)


def quantize(graph: Path, images: np.ndarray, out: Path, how: dict[str, Any]) -> None:
    class Images:
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> tuple[dict[str, np.ndarray], int]:
            return {INPUT: images[i]}, 0

    @Registry.register_dataset("calibration_images")
    def calibration_images(**_: Any) -> Images:
        return Images()

    data = DataConfig(name="calibration", load_dataset_config={"type": "calibration_images"})
    step = create_pass_from_dict(OnnxStaticQuantization, {**how, "data_config": data}, disable_search=True)
    made = step.run(ONNXModelHandler(str(graph)), str(out / "olive"))
    Path(made.model_path).replace(out / "model.onnx")


main({"default": default, "best": best})

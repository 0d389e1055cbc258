"""onnxruntime's own static quantization (MIT). https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

default: `quantize_static` with a graph, a file and a reader: S8S8, per tensor, minmax.
recommended: what that page advises for x86-64 with VNNI: pre-processed, QDQ, U8S8, weights per channel.
percentile: the same with 99.99-percentile ranges, its advice where minmax loses accuracy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from peer import INPUT, Reader, main


def default(graph: Path, images: np.ndarray, out: Path) -> None:
    quantize_static(graph, out / "model.onnx", Reader(images, INPUT))


def recommended(graph: Path, images: np.ndarray, out: Path) -> None:
    u8s8(graph, images, out, CalibrationMethod.MinMax, {})


def percentile(graph: Path, images: np.ndarray, out: Path) -> None:
    u8s8(graph, images, out, CalibrationMethod.Percentile, {"CalibPercentile": 99.99})


def u8s8(graph: Path, images: np.ndarray, out: Path, method: CalibrationMethod, extra: dict[str, object]) -> None:
    quant_pre_process(graph, out / "prepared.onnx")
    quantize_static(
        out / "prepared.onnx",
        out / "model.onnx",
        Reader(images, INPUT),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
        extra_options=extra,
    )


main({"default": default, "recommended": recommended, "percentile": percentile})

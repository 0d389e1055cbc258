"""Writes a QDQ graph: QuantizeLinear and DequantizeLinear around what shall run in int8, by onnxruntime's quantizer from given ranges.

Ranges come from `calibration`, so that every runtime's form, whatever its signedness and symmetry, is made on one path.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np

from edgecnn.device.machine import instruction_sets
from edgecnn.screen import hushed
from edgecnn.targets.additions import settle_additions
from edgecnn.targets.calibration import Range
from edgecnn.targets.onnx import strip


class Form(TypedDict):
    """What a runtime wants of a QDQ graph: arguments of `write_qdq` that its kernels decide."""

    activations: Literal["uint8", "int8"]
    symmetric: bool
    reduce_range: bool
    quantize_bias: bool
    only: Sequence[str]


QUANTIZED = [
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Conv",
    "Gemm",
    "GlobalAveragePool",
    "MatMul",
    "MaxPool",
    "Mul",
    "ReduceMean",
    "Relu",
    "Reshape",
    "Sigmoid",
    "Transpose",
]


def write_qdq(
    model: Path,
    path: Path,
    ranges: Mapping[str, Range],
    *,
    activations: Literal["uint8", "int8"],
    symmetric: bool,
    reduce_range: bool,
    quantize_bias: bool,
    only: Sequence[str],
    exclude: Sequence[str] = (),
) -> None:
    """Write `model` with Q/DQ nodes to `path`; the same arguments give the same bytes.

    Args:
        model: simplified fp32 ONNX.
        path: of the file to write.
        ranges: of every float activation.
        activations: integer type of the activations; weights are always int8, per channel, symmetric.
        symmetric: activations have zero point 0.
        reduce_range: weights use 7 bits.
        quantize_bias: write biases as int32; TensorRT wants them in float.
        only: operator types to quantize.
        exclude: names of nodes to keep in float.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    if not symmetric:
        ranges = settle_additions(model, ranges)
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    with hushed():
        quantizer = QDQQuantizer(
            load_model_with_shape_infer(model),
            True,  # per channel
            reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8 if activations == "uint8" else QuantType.QInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            list(exclude),
            list(only),
            {"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": quantize_bias, "DedicatedQDQPair": False},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    graph = strip(quantizer.model.model)
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def squeeze_and_excite(model: Path) -> list[str]:
    """Names of the nodes that compute a gate for each channel: from the pooling to the last node of one position before a `Mul`."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(str(model))).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.value_info, *graph.input, *graph.output]}
    makers = {name: node for node in graph.node for name in node.output}

    def one_position(name: str) -> bool:
        return len(shapes.get(name, [])) == 4 and shapes[name][2:] == [1, 1] and name in makers

    found: set[str] = set()
    for node in graph.node:
        todo = [i for i in node.input if one_position(i)] if node.op_type == "Mul" and not one_position(node.output[0]) else []
        while todo:
            maker = makers[todo.pop()]
            if maker.name not in found:
                found.add(maker.name)
                todo += [i for i in maker.input if one_position(i)]
    return [node.name for node in graph.node if node.name in found]


def saturates() -> bool:
    """Whether this CPU's int8 kernels add pairs in 16 bits and so need 7-bit weights: x86-64 without VNNI."""
    return platform.machine() in ("x86_64", "AMD64") and not {"avx512_vnni", "avx_vnni"} & set(instruction_sets())

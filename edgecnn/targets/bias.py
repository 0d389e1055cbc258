"""Full bias correction: takes the mean error that quantization leaves in each channel out of the bias, layer after layer.

Rounding a channel's few weights (nine in a depthwise layer) shifts its mean output, and the shifts of many layers add up to a collapse.
Layers are corrected from the input to the output, each behind the corrected ones before it, in the runtime itself.

When: always; it costs no latency. Cost: one pass over `IMAGES` images for each layer, seconds to a minute. Limit: it moves means, not
spreads. Source: Nagel et al. 2019 (arXiv:1906.04721), with measured instead of derived means, as NNCF does. Library: onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise
from edgecnn.device.spec import InputSpec

if TYPE_CHECKING:
    import onnx

IMAGES = 64
LAYERS = ("Conv", "Gemm")


def correct_bias(model: Path, quantized: Path, images: Packed, spec: InputSpec) -> None:
    """Change the biases of the QDQ graph `quantized`, in place, so that each layer's mean output is that of `model`.

    Args:
        model: the float graph that `quantized` was made from; layers are matched by name.
        quantized: biases may be float, or int32 with a scale.
        images: calibration images; the first `IMAGES` are used, as their classes are balanced.
        spec: preprocessing.
    """
    import onnx

    before, after = onnx.load(str(model)), onnx.load(str(quantized))
    x = normalise(images.images[:IMAGES], spec)
    changeable = _biases(after)
    layers = [node for node in after.graph.node if node.name in changeable]
    if not layers:  # biases of zero are left out of the graph, as all are in an untrained network
        return
    names = {node.name: node.output[0] for node in before.graph.node}
    wanted = dict(zip([n.name for n in layers], channel_means(before, [names[n.name] for n in layers], x), strict=True))
    for node in layers:
        (found,) = channel_means(after, [node.output[0]], x)
        changeable[node.name].add(np.median(wanted[node.name] - found, axis=0))
    quantized.write_bytes(after.SerializeToString(deterministic=True))


def channel_means(graph: onnx.ModelProto, tensors: Sequence[str], x: np.ndarray) -> list[np.ndarray]:
    """Mean of each channel of `tensors`, N x C or N x C x H x W, over all positions: images x C each.

    Only the part of the graph that they need is run.
    """
    import onnx
    import onnxruntime as ort

    part = onnx.ModelProto()
    part.CopyFrom(graph)
    del part.graph.output[:], part.graph.node[:]
    needed, kept = set(tensors), []
    for node in reversed(graph.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    part.graph.node.extend(reversed(kept))
    part.graph.output.extend(onnx.helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None) for t in tensors)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # the order of sums, and so every bit, must not depend on the number of cores
    session = ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    means: list[list[np.ndarray]] = [[] for _ in tensors]
    for i in range(len(x)):
        for kept_means, value in zip(means, session.run(list(tensors), {session.get_inputs()[0].name: x[i : i + 1]}), strict=True):
            kept_means.append(value.mean(axis=(0, *range(2, value.ndim)), dtype=np.float64))
    return [np.array(each) for each in means]


class _Bias:
    """A bias in a QDQ graph: the tensor that holds it, and what one step of it is worth."""

    def __init__(self, tensor: onnx.TensorProto, scale: np.ndarray | None) -> None:
        self.tensor, self.scale = tensor, scale

    def add(self, error: np.ndarray) -> None:
        from onnx import numpy_helper

        value = numpy_helper.to_array(self.tensor)
        if self.scale is None:
            value = (value + error).astype(np.float32)
        else:
            limits = np.iinfo(np.int32)
            value = np.clip(value + np.round(error / self.scale), limits.min, limits.max).astype(np.int32)
        self.tensor.CopyFrom(numpy_helper.from_array(value, self.tensor.name))


def _biases(graph: onnx.ModelProto) -> dict[str, _Bias]:
    """The bias of each quantized layer by the layer's name; a layer without one has none to correct."""
    from onnx import numpy_helper

    constants = {i.name: i for i in graph.graph.initializer}
    makers = {node.output[0]: node for node in graph.graph.node}
    found = {}
    for node in graph.graph.node:
        quantized = node.op_type in LAYERS and all(i in makers and makers[i].op_type == "DequantizeLinear" for i in node.input[:2])
        if not quantized or len(node.input) < 3:
            continue
        name = node.input[2]
        if name in constants:
            found[node.name] = _Bias(constants[name], None)
        elif name in makers and makers[name].op_type == "DequantizeLinear":
            tensor, scale = makers[name].input[:2]
            found[node.name] = _Bias(constants[tensor], numpy_helper.to_array(constants[scale]).astype(np.float64))
    return found

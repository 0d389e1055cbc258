"""Full bias correction: takes the mean error that quantization leaves in each channel out of the bias, layer after layer.

Rounding a channel's few weights (nine in a depthwise layer) shifts its mean output, and the shifts of many layers add up to a collapse.
Layers are corrected from the input to the output, each behind the corrected ones before it, in the runtime itself.

When: always; it costs no latency. Cost: some passes over `IMAGES` images, seconds. Memory: `LIVE` numbers of each.
Limit: it moves means, not spreads. Source: Nagel et al. 2019 (arXiv:1906.04721), with measured instead of derived means, as NNCF does.
Library: onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgecnn.cores import each
from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise
from edgecnn.device.spec import InputSpec

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

IMAGES = 128
LIVE = 500_000  # numbers of one image that may be kept between parts
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
    walk = _Walk(after, x)
    for node in layers:
        found = walk.means(node.name)
        changeable[node.name].add(np.median(wanted[node.name] - found, axis=0))
    quantized.write_bytes(after.SerializeToString(deterministic=True))


class _Walk:
    """Runs a graph part by part over all images, so that what lies in front of a corrected layer is not run again from the image on.

    A part begins where what lives is small: wide activations of all images are memory, and to copy them takes longer than to compute them.
    """

    def __init__(self, graph: onnx.ModelProto, x: np.ndarray) -> None:
        self.graph, self.begun = graph, 0
        given = {i.name for i in graph.graph.initializer}
        # Weights and biases are read anew by whoever needs them: biases change on the way.
        self.constant = {n.output[0]: n for n in graph.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in given}
        self.nodes = [n for n in graph.graph.node if n.output[0] not in self.constant]
        self.sizes = _sizes(graph)
        self.values = {graph.graph.input[0].name: [x[i : i + 1] for i in range(len(x))]}

    def means(self, layer: str) -> np.ndarray:
        """The channels' means of the node `layer`, images x C; layers behind it have not been corrected yet."""
        end = next(i for i, node in enumerate(self.nodes) if node.name == layer)
        for cut in range(end, self.begun, -1):
            live = self._live(cut)
            if sum(self.sizes[name] for name in live) <= LIVE:
                made = sorted(live - set(self.values))
                self.values |= dict(zip(made, zip(*self._run(self.nodes[self.begun : cut], made), strict=True), strict=True))
                self.values, self.begun = {name: value for name, value in self.values.items() if name in live}, cut
                break
        node = self.nodes[end]
        pool, pooled = _pool(node.output[0], node.op_type)
        return np.array([_means(y) for (y,) in self._run([*self.nodes[self.begun : end + 1], *pool], [pooled])])

    def _live(self, cut: int) -> set[str]:
        """What the nodes from `cut` on read of what is made before."""
        made = {name for node in self.nodes[:cut] for name in node.output} | {self.graph.graph.input[0].name}
        return made & {name for node in self.nodes[cut:] for name in node.input}

    def _run(self, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[list[np.ndarray]]:
        import onnx

        if not outputs:
            return [[] for _ in next(iter(self.values.values()))]
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in _needed(nodes, outputs)]
        types = {i.name: i.data_type for i in self.graph.graph.initializer}
        integers = {n.output[0]: types[n.input[2]] for n in self.graph.graph.node if n.op_type == "QuantizeLinear"}

        def info(name: str) -> onnx.ValueInfoProto:
            return onnx.helper.make_tensor_value_info(name, integers.get(name, onnx.TensorProto.FLOAT), None)

        read = dict.fromkeys(name for node in nodes for name in node.input)
        inputs = [name for name in read if name in self.values]
        nodes = [*(self.constant[name] for name in read if name in self.constant), *nodes]
        used = {name for node in nodes for name in node.input}
        part = onnx.ModelProto(ir_version=self.graph.ir_version, opset_import=self.graph.opset_import)
        part.graph.name = "part"
        part.graph.node.extend(nodes)
        part.graph.initializer.extend(i for i in self.graph.graph.initializer if i.name in used)
        part.graph.input.extend(info(name) for name in inputs)
        part.graph.output.extend(info(name) for name in outputs)
        session = _session(part)
        values = self.values
        return each(lambda i: session.run(list(outputs), {name: values[name][i] for name in inputs}), len(next(iter(values.values()))))


def channel_means(graph: onnx.ModelProto, tensors: Sequence[str], x: np.ndarray) -> list[np.ndarray]:
    """Mean of each channel of `tensors`, N x C or N x C x H x W, over all positions: images x C each.

    Only the part of the graph that they need is run.
    """
    import onnx

    part = onnx.ModelProto()
    part.CopyFrom(graph)
    del part.graph.output[:], part.graph.node[:]
    makers = {name: node for node in graph.graph.node for name in node.output}
    pools = [_pool(name, makers[name].op_type) for name in tensors]
    part.graph.node.extend(_needed([*graph.graph.node, *(node for pool, _ in pools for node in pool)], [pooled for _, pooled in pools]))
    part.graph.output.extend(onnx.helper.make_tensor_value_info(pooled, onnx.TensorProto.FLOAT, None) for _, pooled in pools)
    session = _session(part)
    given = session.get_inputs()[0].name
    found = each(lambda i: [_means(value) for value in session.run(None, {given: x[i : i + 1]})], len(x))
    return [np.array(of_tensor) for of_tensor in zip(*found, strict=True)]


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Those of `nodes` without which `outputs` cannot be computed."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _pool(tensor: str, operator: str) -> tuple[list[onnx.NodeProto], str]:
    """What makes means of a convolution's output, so that no runtime hands over its positions, and their name; others are as they are."""
    import onnx

    if operator != "Conv":
        return [], tensor
    return [onnx.helper.make_node("GlobalAveragePool", [tensor], [f"{tensor}_means"])], f"{tensor}_means"


def _sizes(graph: onnx.ModelProto) -> dict[str, int]:
    """Numbers in each tensor of one image; of one whose shape is not known, more than may live."""
    import onnx

    known = onnx.shape_inference.infer_shapes(graph).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim[1:]] for v in [*known.value_info, *known.input, *known.output]}
    names = {name for node in graph.graph.node for name in (*node.input, *node.output)}
    return {name: int(np.prod(shapes[name])) if all(shapes.get(name, [0])) else LIVE + 1 for name in names | set(shapes)}


def _means(value: np.ndarray) -> np.ndarray:
    means: np.ndarray = value.mean(axis=(0, *range(2, value.ndim)), dtype=np.float64)
    return means


def _session(graph: onnx.ModelProto) -> ort.InferenceSession:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # the order of sums, and so every bit, must not depend on the number of cores
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


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

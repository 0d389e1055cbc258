"""Writes a QDQ graph: QuantizeLinear and DequantizeLinear around what shall run in int8, where and how the runtime's kernels want them.

Ranges come from `calibration`; so every runtime's form, whatever its signedness and symmetry, is made on one path. Our own writer, because
onnxruntime's quantizer puts a pair on both sides of every operator: in TensorRT's form that rounds a convolution's output a second time
before its ReLU6, and takes the fusion from the one and a third of the range from the other (benchmarks/int8.md).

Sources: Jacob et al. 2018 (arXiv:1712.05877); NVIDIA TensorRT documentation, "Q/DQ placement recommendations"; onnxruntime documentation,
"Quantize ONNX models".
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgecnn.device.machine import instruction_sets
from edgecnn.errors import ModelError
from edgecnn.targets.additions import settle_additions
from edgecnn.targets.calibration import ACTIVATIONS, Range

if TYPE_CHECKING:
    import onnx

WEIGHTED = ("Conv", "Gemm", "MatMul")
COLOURS = 4  # at most, of an image
# Move values and leave them as they are: out comes the scale that went in.
MOVING = ("Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class Form:
    """What a runtime's integer kernels want of a QDQ graph.

    Attributes:
        activations: integer type of the activations; weights are always int8, symmetric.
        symmetric: activations have zero point 0.
        reduce_range: weights use 7 bits.
        quantize_bias: write biases as int32; TensorRT wants them in float.
        outputs: the kernels give integers too: quantize what the operators put out, behind a ReLU. Otherwise only what they take.
        sums: a convolution adds what an `Add` behind it would, before it rounds: there its output is not quantized.
        only: operator types to quantize.
        weights: one scale a channel, or a single one.
        float_stem: the first layers stay in float, see `stem`.
        keep_float: so do these layers, by patterns of names and operator types.
        channels: what only depthwise convolutions read has a scale a channel, where calibration has taken channels apart.
    """

    activations: Literal["uint8", "int8"]
    symmetric: bool
    quantize_bias: bool
    outputs: bool
    sums: bool
    only: tuple[str, ...]
    reduce_range: bool = False
    weights: Literal["per-channel", "per-tensor"] = "per-channel"
    float_stem: bool = False
    keep_float: tuple[str, ...] = ()
    channels: bool = False


def write_qdq(model: Path, path: Path, ranges: Mapping[str, Range], form: Form, exclude: Collection[str] = ()) -> None:
    """Write `model` with Q/DQ nodes to `path`; the same arguments give the same bytes.

    Args:
        model: simplified fp32 ONNX.
        path: of the file to write.
        ranges: of every float activation.
        form: what the runtime wants.
        exclude: names of nodes to keep in float.
    """
    import onnx

    if form.outputs:  # the kernels add integers
        ranges = settle_additions(model, ranges)
    graph = onnx.load(str(model))
    _Writer(graph, ranges, form, exclude).write()
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))


class _Writer:
    """One graph on its way to Q/DQ."""

    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, Range], form: Form, exclude: Collection[str]) -> None:
        from onnx import numpy_helper

        self.graph, self.ranges, self.form = model.graph, ranges, form
        self.constants = {i.name: numpy_helper.to_array(i) for i in self.graph.initializer}
        self.makers = {output: node for node in self.graph.node for output in node.output}
        self.takers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.takers.setdefault(name, []).append(node)
        self.outputs = {output.name for output in self.graph.output}
        self.integer = [node for node in self.graph.node if node.op_type in form.only and node.name not in exclude and self._suits(node)]
        self.summed = set(self._summed()) if form.sums else set()
        self.added: dict[str, onnx.TensorProto] = {}

    def write(self) -> None:
        wanted: dict[str, None] = {}  # tensors to quantize, in the order of the graph
        readers: set[tuple[str, str]] = set()  # (node, tensor) that read integers
        for node in self.integer:
            for name in self._taken(node):
                wanted[name] = None
                readers.add((node.name, name))
            if self.form.outputs:
                wanted.update(dict.fromkeys(self._given(node)))
        scales = {name: self._scale(name) for name in wanted}
        nodes: list[onnx.NodeProto] = []
        for name in [self.graph.input[0].name]:
            nodes += self._pair(name, scales) if name in scales else []
        integer = {node.name for node in self.integer}
        for node in self.graph.node:
            if node.name in integer and node.op_type in WEIGHTED:
                nodes += self._weights(node, scales)
            for i, name in enumerate(node.input):
                # Where the kernel gives integers no float is left for others to read.
                if name in scales and (self.form.outputs or (node.name, name) in readers):
                    node.input[i] = f"{name}_DequantizeLinear_Output"
            nodes += self._hard_swish(node) if node.name in integer and node.op_type == "HardSwish" else [node]
            for name in node.output:
                nodes += self._pair(name, scales) if name in scales else []
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        kept = [i for i in self.graph.initializer if i.name in used and i.name not in self.added]
        del self.graph.initializer[:]
        self.graph.initializer.extend([*kept, *self.added.values()])

    def _suits(self, node: onnx.NodeProto) -> bool:
        """Whether all that it reads and would be quantized is known: a weight that is computed, say, is not."""
        if node.op_type == "Mul" and not self.form.outputs and self._is_swish(node):
            return False
        if node.op_type in WEIGHTED:
            return node.input[0] in self.ranges and node.input[1] in self.constants
        return all(name in self.ranges or name in self.constants for name in node.input)

    def _is_swish(self, node: onnx.NodeProto) -> bool:
        """Whether it multiplies a tensor by its own sigmoid: one operation, in float, to runtimes that compute it behind a convolution."""
        made = [self.makers[name] for name in node.input if name in self.makers]
        return any(maker.op_type == "Sigmoid" and maker.input[0] in node.input for maker in made)

    def _taken(self, node: onnx.NodeProto) -> Iterator[str]:
        """The activations that `node` reads as integers."""
        for name in node.input[: 1 if node.op_type in WEIGHTED else None]:
            if name in self.ranges and name not in self.summed:
                yield name

    def _summed(self) -> Iterator[str]:
        """Of each addition the side, if any, that a convolution ends in."""
        for node in self.integer:
            if node.op_type == "Add":
                made = [name for name in node.input if name in self.ranges and name in self.makers]
                yield from [name for name in made if self.makers[name].op_type in WEIGHTED and len(self.takers[name]) == 1][-1:]

    def _given(self, node: onnx.NodeProto) -> Iterator[str]:
        """The tensor that `node` puts out as integers: behind the ReLU, if one is all that reads it."""
        for name in node.output:
            while name not in self.outputs and [t.op_type in ACTIVATIONS for t in self.takers.get(name, [])] == [True]:
                name = self.takers[name][0].output[0]
            if name in self.ranges and name not in self.outputs | self.summed:
                yield name

    def _scale(self, name: str) -> str:
        """Add the tensor's scale and zero point, those of what it is a mere move of; returns the name of the scale."""
        root = name
        while root in self.makers and self.makers[root].op_type in MOVING:
            root = self.makers[root].input[0]
        name = root if root in self.ranges and self.form.outputs else name
        if f"{name}_scale" not in self.added:
            scale, zero = scale_of(self.ranges[name], self.form)
            self._add(f"{name}_scale", scale.astype(np.float32))
            self._add(f"{name}_zero_point", zero.astype(self.form.activations))
        return f"{name}_scale"

    def _pair(self, name: str, scales: Mapping[str, str]) -> list[onnx.NodeProto]:
        from onnx import helper

        scale = scales[name]
        how = [scale, f"{scale.removesuffix('_scale')}_zero_point"]
        integers, back = f"{name}_QuantizeLinear_Output", f"{name}_DequantizeLinear_Output"
        axis = 1 if self._value(scale).ndim else None
        return [
            helper.make_node("QuantizeLinear", [name, *how], [integers], f"{name}_QuantizeLinear", axis=axis),
            helper.make_node("DequantizeLinear", [integers, *how], [back], f"{name}_DequantizeLinear", axis=axis),
        ]

    def _hard_swish(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """x * clip(x + 3, 0, 6) / 6 as an addition and a product, which have integer kernels: rounding to 0 to 6 clips, and a scale of a
        sixth of that, behind it, divides.
        """
        from onnx import helper

        ends = np.iinfo(self.form.activations)
        steps = int(ends.max) - int(ends.min)
        zero, three = "hard_swish_zero_point", "hard_swish_three"
        self._add(zero, np.array(ends.min, self.form.activations))
        self._add(three, np.array(ends.max, self.form.activations))
        for value in (1, 3, 6):
            self._add(f"hard_swish_{value}_scale", np.float32(value / steps))
        (x,), (y,), name = node.input, node.output, node.name
        return [
            helper.make_node("DequantizeLinear", [three, "hard_swish_3_scale", zero], [f"{name}_three"], f"{name}_three"),
            helper.make_node("Add", [x, f"{name}_three"], [f"{name}_sum"], f"{name}_sum"),
            helper.make_node("QuantizeLinear", [f"{name}_sum", "hard_swish_6_scale", zero], [f"{name}_clipped"], f"{name}_clipped"),
            helper.make_node("DequantizeLinear", [f"{name}_clipped", "hard_swish_1_scale", zero], [f"{name}_gate"], f"{name}_gate"),
            helper.make_node("Mul", [x, f"{name}_gate"], [y], name),
        ]

    def _weights(self, node: onnx.NodeProto, scales: Mapping[str, str]) -> list[onnx.NodeProto]:
        """Make the node's weight, and its bias if so wanted, integers in front of a DequantizeLinear."""
        name, axis = node.input[1], channel_axis(node)
        weight = self.constants[name]
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in self.constants and self.form.quantize_bias else None
        scale = weight_scale(weight, axis, self.form)
        if bias is not None:  # a bias that would not fit into int32 widens its channel's weights
            step = float(self._value(scales[node.input[0]]))
            least = np.abs(self.constants[bias].astype(np.float64)) / (step * (2**31 - 129))
            scale = np.maximum(scale, least if scale.ndim else least.max())
        scale = scale.astype(np.float32)
        wide = np.expand_dims(scale, [i for i in range(weight.ndim) if i != axis]) if scale.ndim else scale
        most = 64 if self.form.reduce_range else 127
        tag = f"{name}_{node.name}" if len(self.takers[name]) > 1 else name
        self._add(f"{tag}_quantized", np.clip(np.round(weight / wide), -most, most).astype(np.int8))
        self._add(f"{tag}_scale", scale)
        self._add(f"{tag}_zero_point", np.zeros(scale.shape, np.int8))
        made = [_dequantize(tag, axis if scale.ndim else None)]
        node.input[1] = made[0].output[0]
        if bias is not None:
            steps = (step * scale.astype(np.float64)).astype(np.float32)
            tag = f"{bias}_{node.name}" if len(self.takers[bias]) > 1 else bias
            self._add(f"{tag}_quantized", np.round(self.constants[bias].astype(np.float64) / steps).astype(np.int32))
            self._add(f"{tag}_scale", steps)
            self._add(f"{tag}_zero_point", np.zeros(steps.shape, np.int32))
            made.append(_dequantize(tag, 0 if steps.ndim else None))
            node.input[2] = made[1].output[0]
        return made

    def _value(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.added[name])

    def _add(self, name: str, value: np.ndarray | np.generic) -> None:
        from onnx import numpy_helper

        self.added[name] = numpy_helper.from_array(np.asarray(value), name)


def _dequantize(tag: str, axis: int | None = None) -> onnx.NodeProto:
    from onnx import helper

    names = [f"{tag}_quantized", f"{tag}_scale", f"{tag}_zero_point"]
    return helper.make_node("DequantizeLinear", names, [f"{tag}_DequantizeLinear_Output"], f"{tag}_DequantizeLinear", axis=axis)


def scale_of(r: Range, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, as float64, of activations from `r[0]` to `r[1]`; a range that is empty gets a scale of 1."""
    ends, (low, high) = np.iinfo(form.activations), np.asarray(r, np.float64)
    if form.symmetric:
        scale = np.maximum(-low, high) / ends.max
        return np.where(scale > 0, scale, 1.0), np.zeros_like(scale)
    scale = np.asarray((high - low) / (int(ends.max) - int(ends.min)), np.float32).astype(np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    return scale, np.clip(np.round(ends.min - low / scale), ends.min, ends.max)


def ranges_of(quantized: Path, form: Form) -> dict[str, Range]:
    """The ranges of the activations that a QDQ graph of `form` rounds; other tensors are not in it."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(quantized)).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer if len(i.dims) < 2}
    ends = np.iinfo(form.activations)
    low, high = -ends.max if form.symmetric else int(ends.min), int(ends.max)
    found: dict[str, Range] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = (constants[name].astype(np.float64) for name in node.input[1:3])
            found[node.input[0]] = ((low - zero) * scale, (high - zero) * scale)
    return found


def weight_scale(weight: np.ndarray, axis: int, form: Form) -> np.ndarray:
    """One scale a channel along `axis`, or a single one; float64."""
    dims = None if form.weights == "per-tensor" else tuple(i for i in range(weight.ndim) if i != axis)
    most = np.abs(weight).max(axis=dims).astype(np.float64)
    return np.where(most > 0, most, 1.0) / (64 if form.reduce_range else 127)


def channel_axis(node: onnx.NodeProto) -> int:
    """The axis of the output channels in the weight of a convolution or matrix product."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def kept_in_float(model: Path, patterns: Collection[str]) -> list[str]:
    """Names of the nodes whose name, weight's name or operator type one of `patterns` matches.

    Raises:
        ModelError: a pattern matches nothing; the message lists what there is.
    """
    import onnx

    graph = onnx.load(str(model)).graph
    constants = {i.name for i in graph.initializer}
    known = {node.name: {node.name, node.op_type, *(i for i in node.input if i in constants)} for node in graph.node}
    for pattern in patterns:
        if not any(fnmatchcase(word, pattern) for words in known.values() for word in words):
            some = ", ".join(
                sorted({node.op_type for node in graph.node} | {node.input[1] for node in graph.node if node.op_type == "Conv"})[:12]
            )
            raise ModelError(f"keep_float: {pattern!r} matches no layer. There are {some}, ...")
    return [name for name, words in known.items() if any(fnmatchcase(word, pattern) for pattern in patterns for word in words)]


def left_in_float(model: Path, form: Form, how: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the nodes that a candidate leaves in float: what the form says and, in its `how`, `keep`, `float_se` and `float_stem`.

    Raises:
        ModelError: `float_se` or `float_stem`, and there are no such parts.
    """
    how = how or {}
    gates = squeeze_and_excite(model) if how.get("float_se") else []
    if how.get("float_se") and not gates:
        raise ModelError("the network has no squeeze-and-excite parts to keep in float")
    first = stem(model) if form.float_stem or how.get("float_stem") else []
    if how.get("float_stem") and not (first or gates):
        raise ModelError("the network has no first layers of few channels to keep in float")
    return [*first, *gates, *kept_in_float(model, form.keep_float), *how.get("keep", ())]


def stem(model: Path) -> list[str]:
    """Names of the nodes from the image to the end of the first layers: the convolution that reads it, and behind it depthwise and
    pointwise ones, up to one that widens or mixes neighbours. Their channels are few and their positions many, which integer kernels like
    least. Where no such one follows, the first convolution alone.
    """
    import onnx

    graph, gates = onnx.load(str(model)).graph, set(squeeze_and_excite(model))
    weights, image = {i.name: i.dims for i in graph.initializer}, {i.name for i in graph.input}
    ends: list[int] = []
    for i, node in enumerate(graph.node):
        if node.op_type not in WEIGHTED or node.name in gates:
            continue
        if node.op_type != "Conv" or node.input[1] not in weights:
            break
        outputs, inputs, *kernel = weights[node.input[1]]
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if not ends:
            if node.input[0] not in image or inputs > COLOURS:
                return []
        elif outputs > inputs * groups or (inputs > 1 and set(kernel) != {1}):
            return [node.name for node in graph.node[: ends[-1]]]
        ends.append(i + 1)
    return [node.name for node in graph.node[: ends[0] if ends else 0]]


def squeeze_and_excite(model: Path) -> list[str]:
    """Names of the nodes that compute a gate for each channel: from behind the pooling to the last node of one position before a `Mul`."""
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
            if maker.name not in found and maker.op_type != "GlobalAveragePool":
                found.add(maker.name)
                todo += [i for i in maker.input if one_position(i)]
    return [node.name for node in graph.node if node.name in found]


def saturates() -> bool:
    """Whether this CPU's int8 kernels add pairs in 16 bits and so need 7-bit weights: x86-64 without VNNI."""
    return platform.machine() in ("x86_64", "AMD64") and not {"avx512_vnni", "avx_vnni"} & set(instruction_sets())

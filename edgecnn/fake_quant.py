"""An int8 ONNX graph as a torch module that can be trained: the graph's own nodes, with every Q/DQ pair as fake quantization.

What is simulated is the file that the targets write, so fake quantization sits exactly where the runtime quantizes: the nodes of the QDQ
graph are run one by one by torch. Weights are rounded per channel to the range of their largest; activations per tensor, with a scale that
is learned (Esser et al. 2020, arXiv:1902.08153) and a zero point that stays; where the file has a scale a channel, all grow by one learned
factor. Rounding passes the gradient straight through.

A network that goes to several runtimes has a graph for each form, all with the same weights; each training step runs one of them.
Batch norm is folded in these graphs, so its statistics are frozen. Limits: the operators in `OPERATORS`; others are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecnn.errors import ModelError
from edgecnn.targets.calibration import Range

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Weight:
    """Trained tensor number `index`, rounded to -`levels` to `levels` steps in each channel along `axis`; with 0 levels, as it is."""

    index: int
    axis: int = 0
    levels: int = 0


@dataclass(frozen=True)
class Bias:
    """Trained tensor number `index`, rounded to multiples of its input's scale, number `scale`, times its weight's, as int32 is."""

    index: int
    scale: int
    weight: Weight


@dataclass(frozen=True)
class Step:
    """A node: what it does to which inputs, each the name of an activation, a constant or a `Weight`, and the names of what it makes."""

    operator: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A QDQ graph, ready to run.

    Attributes:
        given: name of the input, and `made` of the output.
        steps: in the order in which they run; those with the operator `fake` are Q/DQ pairs, `fixed` ones whose scale is not learned.
        pairs: the quantized activations by their names in the float graph, with scales and zero points: one each, or one a channel.
        low: the least integer; `high` the largest.
    """

    given: str
    made: str
    steps: list[Step]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    low: int
    high: int


class FakeQuantized(nn.Module):
    """The network as its QDQ graphs compute it.

    Attributes:
        form: number of the graph that runs. None: in training one drawn for each batch from torch's generator, else each for its share.
        weights: the trained tensors.
        log_scales: for each form, how much each activation's scale has grown, as a logarithm.
    """

    def __init__(self, model: Path, forms: Sequence[Path], trained: Sequence[str]) -> None:
        """Read the graphs.

        Args:
            model: the float graph that they were made from; nodes are matched by name.
            forms: a QDQ graph each.
            trained: names of the initializers of `model` that are trained; the others are constants.

        Raises:
            ModelError: there is an operator that cannot be trained through.
        """
        import onnx
        from onnx import numpy_helper

        super().__init__()
        graph = onnx.load(str(model)).graph
        check_operators(graph)
        values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        self.form: int | None = None
        self.weights = nn.ParameterList(nn.Parameter(torch.from_numpy(values[name].copy())) for name in trained)
        self._programs = [_read(onnx.load(str(path)).graph, graph, trained) for path in forms]
        self.log_scales = nn.ParameterList(nn.Parameter(torch.zeros(len(p.pairs))) for p in self._programs)
        for i, program in enumerate(self._programs):
            scales, zeros = zip(*program.pairs.values(), strict=True)
            self.register_buffer(f"first_scales_{i}", torch.from_numpy(np.concatenate(scales)))
            self.register_buffer(f"zero_points_{i}", torch.from_numpy(np.concatenate(zeros)))
            self.register_buffer(f"owners_{i}", torch.from_numpy(np.repeat(np.arange(len(scales)), [len(each) for each in scales])))

    def forward(self, x: Tensor) -> Tensor:
        forms = len(self._programs)
        if self.form is not None or forms == 1:
            return self._run(self.form or 0, x)
        if self.training:
            return self._run(int(torch.randint(forms, ())), x)
        return torch.cat([self._run(i, part) for i, part in enumerate(x.tensor_split(forms)) if len(part)])

    def _run(self, number: int, x: Tensor) -> Tensor:
        program, scales, zeros = self._programs[number], self._scales(number), getattr(self, f"zero_points_{number}")
        values = {program.given: x}
        for step in program.steps:
            inputs = [self._input(each, values, scales) for each in step.inputs]
            if step.operator == "fake":
                at, factor = step.attributes["at"], 1 / math.sqrt(inputs[0][0].numel() * program.high)  # LSQ's gradient scale
                if at.stop - at.start == 1:
                    made = torch._fake_quantize_learnable_per_tensor_affine(
                        inputs[0], scales[at], zeros[at], program.low, program.high, factor
                    )
                else:
                    made = torch._fake_quantize_learnable_per_channel_affine(
                        inputs[0], scales[at], zeros[at], 1, program.low, program.high, factor
                    )
            elif step.operator == "fixed":
                scale, zero, factor = step.attributes["scale"], step.attributes["zero"], step.attributes["factor"]
                made = factor * torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, program.low, program.high)
            else:
                made = OPERATORS[step.operator](*inputs, **step.attributes)
            values.update(zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=True))
        idle = [log for i, log in enumerate(self.log_scales) if i != number]
        # Training in several processes wants every parameter to have a gradient in every step.
        made = values[program.made]
        for log in idle:
            made = made + log.sum() * 0
        return made

    def ranges(self, number: int) -> dict[str, Range]:
        """Of the quantized activations of form `number`, by name in the float graph; JSON-able, lists where channels have theirs."""
        program, owners = self._programs[number], getattr(self, f"owners_{number}")
        scales, zeros = self._scales(number).detach().double(), getattr(self, f"zero_points_{number}").double()
        low = max(program.low, -127)  # the symmetric form's scale is a 127th of the larger end
        lows, highs = (low - zeros) * scales, (program.high - zeros) * scales
        own = [owners == i for i in range(len(program.pairs))]
        return {name: (_plain_ends(lows[at]), _plain_ends(highs[at])) for name, at in zip(program.pairs, own, strict=True)}

    def _scales(self, number: int) -> Tensor:
        scales: Tensor = getattr(self, f"first_scales_{number}") * self.log_scales[number].exp()[getattr(self, f"owners_{number}")]
        return scales

    def _input(self, given: Any, values: Mapping[str, Tensor], scales: Tensor) -> Any:
        if isinstance(given, str):
            return values[given]
        if isinstance(given, Tensor):
            return given.to(self.weights[0].device)
        # Divided as the writer of the graph divides: a weight halfway between two steps would else go to the other one here, and shift a
        # whole channel.
        if isinstance(given, Bias):
            bias, step = self.weights[given.index], (scales[given.scale].double() * self._weight_scale(given.weight).double()).float()
            return _valued(bias, (bias.double() / step.double()).round().float() * step)
        if not isinstance(given, Weight):
            return given
        weight = self.weights[given.index]
        if not given.levels:
            return weight
        scale = self._weight_scale(given).view([-1 if axis == given.axis else 1 for axis in range(weight.ndim)])
        return _valued(weight, (weight / scale).round().clamp(-given.levels, given.levels) * scale)

    def _weight_scale(self, given: Weight) -> Tensor:
        """For each channel, of its largest weight."""
        weight = self.weights[given.index].detach()
        others = [axis for axis in range(weight.ndim) if axis != given.axis]
        scale: Tensor = weight.abs().amax(others).clamp(min=torch.finfo(weight.dtype).tiny) / given.levels
        return scale


def _valued(trained: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `trained`."""
    return value.detach() + (trained - trained.detach())


def _plain_ends(ends: Tensor) -> Any:
    return ends.item() if len(ends) == 1 else ends.tolist()


def check_operators(graph: onnx.GraphProto) -> None:
    """Raise a ModelError that names the operators of a float graph that cannot be trained through."""
    unknown = sorted({node.op_type for node in graph.node} - set(OPERATORS))
    if unknown:
        raise ModelError(
            f"stages: qat: the network has operators that it cannot train through: {', '.join(unknown)}. "
            "Leave the stage out: the targets quantize without training too."
        )


# ---- from a graph to steps


def _read(graph: onnx.GraphProto, model: onnx.GraphProto, trained: Sequence[str]) -> Program:
    """The steps of the QDQ graph `graph` made from the float graph `model`."""
    from onnx import helper, numpy_helper

    numbers = {name: i for i, name in enumerate(trained)}
    floats = {node.name: node for node in model.node}
    known = {name for node in model.node for name in node.output} | {i.name for i in model.input}
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    attributes = {node.name: {a.name: _plain(helper.get_attribute_value(a)) for a in node.attribute} for node in graph.node}
    rounded = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in arrays}
    quantized: dict[str, onnx.NodeProto] = {}
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    places: dict[str, slice] = {}
    fakes: dict[str, str] = {}
    steps = []
    ends = (0, 255)

    def given(node: onnx.NodeProto, position: int) -> Any:
        name = node.input[position]
        if not name or name not in (*arrays, *rounded):
            return name or None
        own = floats[node.name].input[position] if node.name in floats else ""
        if name in arrays:
            return Weight(numbers[own]) if own in numbers else _constant(arrays[name])
        q, scale = rounded[name].input[:2]
        axis = attributes[rounded[name].name].get("axis", 1)
        if own not in numbers:
            shape = [-1 if i == axis else 1 for i in range(arrays[q].ndim)] if arrays[scale].ndim else []
            return _constant(arrays[q] * arrays[scale].reshape(shape))
        if arrays[q].dtype == "int32":
            return Bias(numbers[own], places[fakes[node.input[0]]].start, given(node, 1))
        return Weight(numbers[own], axis, int(abs(arrays[q].astype(int)).max()))

    for node in graph.node:
        if node.output[0] in rounded:
            continue
        if node.op_type == "QuantizeLinear":
            quantized[node.output[0]] = node
        elif node.op_type == "DequantizeLinear":
            before, scale, zero = quantized[node.input[0]].input
            name = before if before in known else before.removesuffix("_QuantizeLinear_Input")
            if name not in known:  # inside what the writer made of one node; its rounding is not learned
                step, back = float(arrays[scale]), float(arrays[node.input[1]])
                fixed = {"scale": step, "zero": int(arrays[zero]), "factor": back / step}
                steps.append(Step("fixed", (before,), fixed, (node.output[0],)))
                continue
            if name not in pairs:
                pairs[name] = np.atleast_1d(arrays[scale]), np.atleast_1d(arrays[zero]).astype(np.float32)
                begin = sum(len(each) for each, _ in pairs.values()) - len(pairs[name][0])
                places[name] = slice(begin, begin + len(pairs[name][0]))
                ends = (-128, 127) if arrays[zero].dtype == "int8" else (0, 255)
            fakes[node.output[0]] = name
            steps.append(Step("fake", (before,), {"at": places[name]}, (node.output[0],)))
        else:
            inputs = tuple(given(node, i) for i in range(len(node.input)))
            steps.append(Step(node.op_type, inputs, attributes[node.name], tuple(node.output)))
    return Program(graph.input[0].name, graph.output[0].name, steps, pairs, *ends)


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else list(value) if isinstance(value, list | tuple) else value


def _constant(array: Any) -> Any:
    """Integers, which are shapes and axes, as Python's; everything else as a tensor."""
    return array.tolist() if array.dtype.kind == "i" else torch.tensor(array)


# ---- what ONNX's operators do, in torch


def _conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, strides: Any = 1, pads: Any = None, dilations: Any = 1, group: int = 1, **_: Any
) -> Tensor:
    x, padding = _padded(x, pads, 0.0)
    return F.conv2d(x, w, b, strides, padding, dilations, group)


def _padded(x: Tensor, pads: Sequence[int] | None, value: float) -> tuple[Tensor, Any]:
    """`x`, and the padding that torch can do by itself; where that is not the same at both ends, `x` padded, and none."""
    if not pads:
        return x, 0
    top, left, bottom, right = pads
    return (x, (top, left)) if (top, left) == (bottom, right) else (F.pad(x, (left, right, top, bottom), value=value), 0)


def _gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    made = alpha * ((a.t() if transA else a) @ (b.t() if transB else b))
    return made if c is None else made + beta * c


def _max_pool(
    x: Tensor, *, kernel_shape: Any, strides: Any = 1, pads: Any = None, dilations: Any = 1, ceil_mode: int = 0, **_: Any
) -> Tensor:
    x, padding = _padded(x, pads, -math.inf)
    return F.max_pool2d(x, kernel_shape, strides, padding, dilations, bool(ceil_mode))


def _average_pool(
    x: Tensor, *, kernel_shape: Any, strides: Any = 1, pads: Any = None, ceil_mode: int = 0, count_include_pad: int = 0, **_: Any
) -> Tensor:
    x, padding = _padded(x, pads, 0.0)
    return F.avg_pool2d(x, kernel_shape, strides, padding, bool(ceil_mode), bool(count_include_pad))


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x.clamp(low, high) if low is not None or high is not None else x


def _reduce_mean(x: Tensor, axes: Sequence[int] | None = None, *, keepdims: int = 1, **_: Any) -> Tensor:
    return x.mean(tuple(axes) if axes is not None else None, bool(keepdims))


def _reshape(x: Tensor, shape: Sequence[int], *, allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[i] if not size and not allowzero else size for i, size in enumerate(shape)])


def _squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[i] if axes is not None else i
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end, steps[i] if steps is not None else 1),)]
    return x


def _split(x: Tensor, sizes: Sequence[int], *, axis: int = 0, **_: Any) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes), axis)


def _batch_norm(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, epsilon: float = 1e-5, **_: Any) -> Tensor:
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


def _layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Tensor:
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _pad(x: Tensor, pads: Sequence[int], value: Tensor | None = None, axes: Any = None, *, mode: str = "constant") -> Tensor:
    half = len(pads) // 2
    ends: list[int] = []
    for axis in reversed(range(half)):
        ends += [pads[axis], pads[axis + half]]
    return F.pad(x, ends, mode, 0.0 if value is None else float(value))


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _conv,
    "Div": torch.div,
    "Erf": torch.erf,
    "Flatten": lambda x, axis=1: x.flatten(axis) if axis == 1 else x.reshape(math.prod(x.shape[:axis]), -1),
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "Mul": torch.mul,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: x.softmax(axis),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
}

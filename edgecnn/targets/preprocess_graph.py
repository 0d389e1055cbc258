"""Puts preprocessing into the model's file: it then takes pixels, uint8 N x H x W x C, as a camera gives them.

The head goes in front of the finished graph, after any quantization, so that what was quantized is what was calibrated. It ends with
`(pixel / 255 - mean) / std` in the order and the roundings of `device.preprocess.normalise`: in onnxruntime the tensor behind it is the
same bit for bit. Only decoding always stays outside.

Prepared pixels need no more than that. The cast comes first, because TensorRT takes no uint8 anywhere else. Mean and std are repeated along
the width, W x C, because onnxruntime moves the transpose behind the arithmetic, where constants of 3 numbers make it broadcast 3 numbers
at a time: on MobileNetV2 int8 that costs 1.1 ms of 2.7, and this form 0.06.

Images of any size, and frames, are resized and cropped as Pillow does it: across and then down, rounded to whole pixels each time, as
products with matrices of the filter's weights, of the rows and columns that the crop keeps. Pillow's weights are whole numbers of 22
bits, and float32 has 24 for a sum: so they are taken in two parts of 11 bits, and every step is exact. Bilinear pixels are Pillow's, all
of them and in every runtime; bicubic weights are not computed to their last bit, and 1 pixel of 10,000 is one off. (With float32 weights
2 of 375 photos got another class.) No operator for resizing serves all three: TensorRT has none that smooths, OpenVINO's takes 150 ms a
photo, and of onnxruntime's 70 of 10,000 pixels are others. Cost: 400 million multiplications for a photo of 375 x 500.

With `squash`, Pillow 13 goes down before across for some sizes; there a quarter of a noise image's pixels are one off.
Source of the weights: Pillow, Resample.c, `precompute_coeffs`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecnn.device.spec import InputSpec
from edgecnn.errors import ModelError
from edgecnn.targets.onnx import OPSET, simplify

if TYPE_CHECKING:
    import onnx

IMAGE = "image"
_PART = 1 << 11  # half of the bits of Pillow's weights
_CUBIC = -0.5  # Pillow's coefficient of the bicubic filter


def take_pixels(source: Path, path: Path, spec: InputSpec) -> Path:
    """Write the ONNX graph of `source` with the head in front to `path`; returns `path`.

    Args:
        source: its one input is float32 N x C x H x W, with N free or fixed.
        path: of the file to write.
        spec: of the input, with its mean and std.

    Raises:
        ModelError: the resizing that `spec` asks for cannot be in the graph.
    """
    import onnx

    graph = onnx.load(str(source))
    add_head(graph, spec)
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))
    return path


def add_head(graph: onnx.ModelProto, spec: InputSpec) -> None:
    """Put the head in front of `graph`, in place."""
    (given,) = graph.graph.input
    batch = given.type.tensor_type.shape.dim[0]
    head = _head(spec, batch.dim_param or batch.dim_value, given.name)
    if spec.image_size != "prepared" and spec.pixel_size:
        head = simplify(head)  # the weights for frames of one size become constants, which is the form that TensorRT takes
    graph.graph.input[0].CopyFrom(head.graph.input[0])
    nodes = [*head.graph.node, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(head.graph.initializer)


def openvino_take_pixels(model: Any, spec: InputSpec) -> Any:
    """The `openvino.Model` with the head in front; where nothing is resized OpenVINO's own, equal to a rounding or two of float32."""
    import openvino as ov

    if spec.image_size != "prepared":
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "head.onnx"
            path.write_bytes(_head(spec, "batch", "input").SerializeToString())
            ours = ov.convert_model(path)
        made = ours.output(0).get_node().input_value(0)
        for taker in model.input(0).get_target_inputs():
            taker.replace_source_output(made)
        return ov.Model(model.outputs, ours.get_parameters())

    head = ov.preprocess.PrePostProcessor(model)
    head.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    head.input().model().set_layout(ov.Layout("NCHW"))
    steps = head.input().preprocess().convert_element_type(ov.Type.f32).scale(255.0)
    steps.mean(list(spec.mean)).scale(list(spec.std))
    built = head.build()
    built.input(0).set_names({IMAGE})
    return built


class _Nodes:
    """Collects the nodes and constants of a graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, kind: type = np.int64) -> str:
        from onnx import numpy_helper

        name = f"{IMAGE}_constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def floats(self, value: Any) -> str:
        return self.constant(value, np.float32)

    def add(self, operator: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output, `into` where it is given."""
        from onnx import helper

        name = f"{IMAGE}_{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [into or name], name, **attributes))
        return into or name


def _head(spec: InputSpec, batch: str | int, output: str) -> onnx.ModelProto:
    """A graph from pixels to the model's input."""
    from onnx import TensorProto, helper

    n = _Nodes()
    if spec.image_size == "prepared":
        unit = n.add("Div", n.add("Cast", IMAGE, to=TensorProto.FLOAT), n.floats(255))
        mean, std = (np.tile(np.asarray(values, np.float32), (spec.width, 1)) for values in (spec.mean, spec.std))
        normal = n.add("Div", n.add("Sub", unit, n.floats(mean)), n.floats(std))
        n.add("Transpose", normal, into=output, perm=[0, 3, 1, 2])
    else:
        unit = n.add("Div", _resized(n, spec), n.floats(255))
        mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
        n.add("Div", n.add("Sub", unit, n.floats(mean)), n.floats(std), into=output)
    given = helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [batch, *(spec.pixel_size or ("height", "width")), spec.channels])
    made = helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, *spec.shape])
    graph = helper.make_graph(n.nodes, "head", [given], [made], n.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _resized(n: _Nodes, spec: InputSpec) -> str:
    """The image resized and cropped: whole numbers from 0 to 255 in float32, N x C x H x W."""
    from onnx import TensorProto

    if spec.interpolation not in ("bilinear", "bicubic"):
        raise ModelError(f"image_size: {spec.image_size}: the file cannot resize with {spec.interpolation}. Use image_size: prepared.")
    if spec.fit == "crop" and spec.resize < max(spec.height, spec.width):
        raise ModelError(f"image_size: {spec.image_size}: the file cannot add the margin that resize {spec.resize} needs. Use prepared.")
    shape = n.add("Shape", IMAGE)
    height, width = (n.add("Gather", shape, n.constant(axis), axis=0) for axis in (1, 2))
    short = n.add("Min", height, width)

    def weights(given: str, kept: int) -> tuple[str, str]:
        whole = n.constant(kept) if spec.fit == "squash" else n.add("Div", n.add("Mul", given, n.constant(spec.resize)), short)
        return _weights(n, spec, given, whole, kept)

    down, across = weights(height, spec.height), weights(width, spec.width)
    pixels = n.add("Transpose", n.add("Cast", IMAGE, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    pixels = _rounded(n, *(n.add("MatMul", pixels, n.add("Transpose", part, perm=[1, 0])) for part in across))
    return _rounded(n, *(n.add("MatMul", part, pixels) for part in down))


def _weights(n: _Nodes, spec: InputSpec, given: str, resized: str, kept: int) -> tuple[str, str]:
    """kept x given, twice: the weights of the filter along one axis of `given` pixels, for the middle `kept` of `resized`.

    Pixel x counts for pixel i by the distance of x + 1/2 from (i + 1/2) given / resized, in units of the larger of given / resized and 1.
    Both are multiplied by 2 resized here, and so are whole numbers. A weight is, as Pillow's, a whole number of 1 / 2^22; it is returned
    as the upper part of it, in 1 / 2^11, and the rest.
    """
    from onnx import TensorProto

    margin = n.add("Cast", n.add("Sub", resized, n.constant(kept)), to=TensorProto.FLOAT)
    first = n.add("Cast", n.add("Round", n.add("Mul", margin, n.floats(0.5))), to=TensorProto.INT64)  # half to even, as torchvision
    i = n.add("Add", n.constant(2 * np.arange(kept)[:, None] + 1), n.add("Mul", first, n.constant(2)))
    x = n.add("Add", n.add("Mul", n.add("Range", n.constant(0), given, n.constant(1)), n.constant(2)), n.constant(1))
    distance = n.add("Abs", n.add("Sub", n.add("Mul", x, resized), n.add("Mul", i, given)))
    reach = n.add("Mul", n.add("Max", given, resized), n.constant(2))
    if spec.interpolation == "bilinear":
        weights = n.add("Max", n.add("Sub", reach, distance), n.constant(0))
        whole = n.add("ReduceSum", weights, n.constant([1]), keepdims=1)
        weights = n.add("Mul", weights, n.constant(_PART))  # in two steps, because OpenVINO's whole numbers have 32 bits
        upper = n.add("Div", weights, whole)
        rest = n.add("Mul", n.add("Sub", weights, n.add("Mul", upper, whole)), n.constant(2 * _PART))
        lower = n.add("Div", n.add("Add", rest, whole), n.add("Mul", whole, n.constant(2)))
        return n.add("Cast", upper, to=TensorProto.FLOAT), n.add("Cast", lower, to=TensorProto.FLOAT)
    cubic = _cubic(n, n.add("Div", n.add("Cast", distance, to=TensorProto.FLOAT), n.add("Cast", reach, to=TensorProto.FLOAT)))
    share = n.add("Div", cubic, n.add("ReduceSum", cubic, n.constant([1]), keepdims=1))
    weight = n.add("Floor", n.add("Add", n.add("Mul", share, n.floats(_PART**2)), n.floats(0.5)))
    upper = n.add("Floor", n.add("Div", weight, n.floats(_PART)))
    return upper, n.add("Sub", weight, n.add("Mul", upper, n.floats(_PART)))


def _cubic(n: _Nodes, t: str) -> str:
    """Keys' cubic of the distances t >= 0: (a+2)t^3 - (a+3)t^2 + 1 up to 1, a(t^3 - 5t^2 + 8t - 4) from there to 2, then 0."""

    def polynomial(*coefficients: float) -> str:
        value = n.floats(coefficients[0])
        for coefficient in coefficients[1:]:
            value = n.add("Add", n.add("Mul", value, t), n.floats(coefficient))
        return value

    near = polynomial(_CUBIC + 2, -(_CUBIC + 3), 0, 1)
    far = polynomial(_CUBIC, -5 * _CUBIC, 8 * _CUBIC, -4 * _CUBIC)
    beyond = n.add("Where", n.add("Less", t, n.floats(2)), far, n.floats(0))
    return n.add("Where", n.add("Less", t, n.floats(1)), near, beyond)


def _rounded(n: _Nodes, upper: str, lower: str) -> str:
    """The sum of both parts as a whole number, halves up, and within a byte: the bicubic filter overshoots.

    What is left of the lower part once its own whole numbers are carried over cannot change the result, so every step here is exact.
    """
    carried = n.add("Floor", n.add("Div", lower, n.floats(_PART)))
    value = n.add("Add", n.add("Add", upper, carried), n.floats(_PART // 2))
    return n.add("Clip", n.add("Floor", n.add("Div", value, n.floats(_PART))), n.floats(0), n.floats(255))

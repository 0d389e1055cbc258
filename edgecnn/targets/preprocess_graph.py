"""Puts the arithmetic of preprocessing into the model's file: it then takes pixels, uint8 N x H x W x C, as a camera gives them.

The head goes in front of the finished graph, after any quantization, so that what was quantized is what was calibrated. It is
`(pixel / 255 - mean) / std` and the transpose, in the order and the roundings of `device.preprocess.normalise`: in onnxruntime the
tensor behind it is the same bit for bit. Decoding, resizing and cropping stay in `device.preprocess`.

Its form is what measurement left over. The cast comes first, because TensorRT takes no uint8 anywhere else. Mean and std are repeated along
the width, W x C, because onnxruntime moves the transpose behind the arithmetic, where constants of 3 numbers make it broadcast 3 numbers
at a time: on MobileNetV2 int8 that costs 1.1 ms of 2.7, and this form 0.06.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecnn.device.spec import InputSpec

if TYPE_CHECKING:
    import onnx

IMAGE = "image"


def take_pixels(source: Path, path: Path, spec: InputSpec) -> Path:
    """Write the ONNX graph of `source` with the head in front to `path`; returns `path`.

    Args:
        source: its one input is float32 N x C x H x W, with N free or fixed.
        path: of the file to write.
        spec: of the input, with its mean and std.
    """
    import onnx

    graph = onnx.load(str(source))
    add_head(graph, spec)
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))
    return path


def add_head(graph: onnx.ModelProto, spec: InputSpec) -> None:
    """Put the head in front of `graph`, in place."""
    from onnx import TensorProto, helper, numpy_helper

    (given,) = graph.graph.input
    batch = given.type.tensor_type.shape.dim[0]

    def constant(name: str, value: Any) -> str:
        graph.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    head = [
        helper.make_node("Cast", [IMAGE], ["image_float"], "image_cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["image_float", constant("image_255", 255)], ["image_unit"], "image_scale"),
        helper.make_node("Sub", ["image_unit", constant("image_mean", _along_width(spec.mean, spec))], ["image_centred"], "image_centre"),
        helper.make_node(
            "Div", ["image_centred", constant("image_std", _along_width(spec.std, spec))], ["image_normal"], "image_normalise"
        ),
        helper.make_node("Transpose", ["image_normal"], [given.name], "image_transpose", perm=[0, 3, 1, 2]),
    ]
    shape = [batch.dim_param or batch.dim_value, spec.height, spec.width, spec.channels]
    graph.graph.input[0].CopyFrom(helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, shape))
    nodes = [*head, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def openvino_take_pixels(model: Any, spec: InputSpec) -> Any:
    """The `openvino.Model` with the head in front, which OpenVINO writes itself: equal to a rounding or two of float32."""
    from openvino import Layout, Type
    from openvino.preprocess import PrePostProcessor

    head = PrePostProcessor(model)
    head.input().tensor().set_element_type(Type.u8).set_layout(Layout("NHWC"))
    head.input().model().set_layout(Layout("NCHW"))
    steps = head.input().preprocess().convert_element_type(Type.f32).scale(255.0)
    steps.mean(list(spec.mean)).scale(list(spec.std))
    made = head.build()
    made.input(0).set_names({IMAGE})
    return made


def _along_width(values: tuple[float, ...], spec: InputSpec) -> np.ndarray:
    repeated: np.ndarray = np.tile(np.asarray(values, np.float32), (spec.width, 1))
    return repeated

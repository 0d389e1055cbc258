"""An exported file cut in two at its last feature map, so that one can look at the map and ask what each channel is worth.

The cut goes through one tensor that everything passes on its way from the image to the logits, the last with at least `least` rows and
columns. Both halves are the file's own graph and weights, run by its own runtime (TensorRT's graph by onnxruntime, as for accuracy);
what a runtime fuses across the cut it cannot fuse any more, so `Halves` are for looking, never for timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.device.quiet import signal_stack_kept, silence_openvino
from edgecnn.device.runtimes.ort import AS_WRITTEN
from edgecnn.device.spec import Manifest
from edgecnn.errors import ModelError

AT_ONCE = 64


@dataclass(frozen=True)
class Halves:
    """`front` takes what the file takes, one image, and gives the map 1 x C x H x W; `tail` takes B x C x H x W and gives logits."""

    front: Callable[[np.ndarray], np.ndarray]
    tail: Callable[[np.ndarray], np.ndarray]


def halves(folder: Path, manifest: Manifest, least: int) -> Halves:
    """Cut the model file of a bundle or artifact.

    Raises:
        ModelError: it has no such tensor.
    """
    path = folder / manifest.model_file
    return _openvino(path, manifest.options, least) if manifest.runtime == "openvino" else _onnx(path, least)


def _onnx(path: Path, least: int) -> Halves:
    import onnx
    import onnxruntime as ort
    from onnx.utils import Extractor

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = model.graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in graph.value_info
        if value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    }
    made_by = {name: node for node in graph.node for name in node.output}
    given = graph.input[0].name

    def is_cut(name: str) -> bool:
        """Whether no way leads from the logits back to the image but through `name`."""
        seen, todo = {name}, [output.name for output in graph.output]
        while todo:
            at = todo.pop()
            if at == given:
                return False
            if at not in seen:
                seen.add(at)
                todo += made_by[at].input if at in made_by else []
        return True

    spread = [name for node in reversed(graph.node) for name in node.output if _is_map(shapes.get(name, ()), least)]
    cut = next((name for name in spread if is_cut(name)), None)
    if cut is None:
        raise ModelError(f"{path.name}: no feature map of at least {least} x {least} that everything passes through.")
    extract = Extractor(model).extract_model
    ends = extract([given], [cut]), extract([cut], [output.name for output in graph.output])
    ends[1].graph.input[0].type.tensor_type.shape.dim[0].dim_param = "some"
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    front, tail = (
        ort.InferenceSession(end.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=AS_WRITTEN)
        for end in ends
    )
    kind = np.float16 if "float16" in tail.get_inputs()[0].type else np.float32
    return Halves(
        lambda x: np.asarray(front.run(None, {given: x})[0], np.float32),
        lambda a: _each(lambda part: np.asarray(tail.run(None, {cut: part.astype(kind)})[0], np.float32), a),
    )


@signal_stack_kept()
def _openvino(path: Path, options: dict[str, str], least: int) -> Halves:
    silence_openvino()
    import openvino as ov
    from openvino import opset13 as ops

    core = ov.Core()

    def cut_of(model: Any) -> Any:
        """The output port of the tensor to cut at."""
        order = list(model.get_ordered_ops())
        for node in reversed(order):
            if node.get_output_size() != 1:
                continue
            shape = node.output(0).get_partial_shape()
            dims = [d.get_length() if d.is_static else 0 for d in shape] if shape.rank.is_static else []
            if node.get_type_name() not in ("Constant", "Parameter") and _is_map(dims, least) and is_cut(model, node):
                return node.output(0)
        raise ModelError(f"{path.name}: no feature map of at least {least} x {least} that everything passes through.")

    def is_cut(model: Any, at: Any) -> bool:
        seen, todo = {at.get_friendly_name()}, [result.get_node() for result in model.outputs]
        while todo:
            node = todo.pop()
            if node.get_type_name() == "Parameter":
                return False
            if node.get_friendly_name() not in seen:
                seen.add(node.get_friendly_name())
                todo += [node.input_value(i).get_node() for i in range(node.get_input_size())]
        return True

    whole = core.read_model(path)
    front = core.compile_model(ov.Model([ops.result(cut_of(whole))], whole.get_parameters()), "CPU", options).create_infer_request()
    other = core.read_model(path)
    port = cut_of(other)
    shape = port.get_partial_shape()
    shape[0] = AT_ONCE  # OpenVINO 2026.4 crashes on some quantized halves whose batch is left open
    given = ops.parameter(shape, port.get_element_type())
    for taker in list(port.get_target_inputs()):
        taker.replace_source_output(given.output(0))
    rest = ov.Model(other.get_results(), [given])
    rest.validate_nodes_and_infer_types()
    tail = core.compile_model(rest, "CPU", options).create_infer_request()
    kind = given.get_element_type().to_dtype()

    def logits(maps: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(maps), AT_ONCE):
            part = maps[start : start + AT_ONCE]
            full = np.concatenate([part, np.zeros((AT_ONCE - len(part), *part.shape[1:]), part.dtype)])
            parts.append(np.array(tail.infer([full.astype(kind)])[0], np.float32)[: len(part)])
        return np.concatenate(parts)

    return Halves(lambda x: np.array(front.infer([x])[0], np.float32), logits)


def _is_map(shape: Any, least: int) -> bool:
    return len(shape) == 4 and min(shape[2], shape[3]) >= least


def _each(run: Callable[[np.ndarray], np.ndarray], maps: np.ndarray) -> np.ndarray:
    """All at once, or one by one where the graph was made for a single image."""
    try:
        got = run(maps)
        if len(got) == len(maps):
            return got
    except Exception:  # each runtime has exceptions of its own for a batch that it cannot take
        if len(maps) == 1:
            raise
    return np.concatenate([run(maps[i : i + 1]) for i in range(len(maps))])

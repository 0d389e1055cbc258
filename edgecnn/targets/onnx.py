"""The one float ONNX graph that every target starts from: torch's dynamo exporter, simplified, checked, stripped.

Limits: what torch.export cannot trace cannot be exported; the preflight finds that before any training. The batch dimension is left
free where the model allows it, and fixed at one where it does not.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from edgecnn.errors import ModelError
from edgecnn.screen import hushed

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from edgecnn.stages.base import TorchModel

# The newest opset that every runtime we ship to can read, among them TensorRT 10.
OPSET = 20
INPUT = "input"
OUTPUT = "logits"


def export_onnx(model: TorchModel, path: Path, *, half: bool = False) -> None:
    """Write the model as fp32 ONNX, or with `half` in fp16 between fp32 input and output.

    Raises:
        ModelError: torch cannot export it, or the graph is not valid; the message names the reason.
    """
    import onnx

    module = _HalfInside(model.module) if half else model.module
    try:
        with hushed():
            graph = _pool(simplify(_export(module.eval(), model.input.shape)))
    except Exception as fault:  # the exporter raises whatever its many layers raise
        raise ModelError(
            f"{model.origin.get('name', 'the model')}: torch cannot export it to ONNX opset {OPSET}: {_reason(fault)}. "
            "Choose another model, or rewrite the operation it names."
        ) from fault
    path.write_bytes(graph.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)


def simplify(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and merge nodes by onnxslim, then drop everything that is not computation.

    The exporter's metadata holds stack traces with the absolute paths of the machine it ran on.
    """
    import onnxslim

    slim: onnx.ModelProto = onnxslim.slim(copy.deepcopy(graph))
    return strip(slim)


def _pool(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Write means over height and width as GlobalAveragePool, in place: onnxruntime has that in its blocked layout and in int8, and for
    ReduceMean goes back to float and to N x C x H x W. EfficientNet-B0's int8 file spends a sixth of its time there (benchmarks/int8.md).
    """
    import onnx

    shapes = {v.name: v.type.tensor_type.shape.dim for v in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "ReduceMean" and len(node.input) == 2 and len(shapes.get(node.input[0], ())) == 4:
            kept = all(a.i for a in node.attribute if a.name == "keepdims")
            if kept and sorted(int(axis) % 4 for axis in constants.get(node.input[1], ())) == [2, 3]:
                node.op_type = "GlobalAveragePool"
                del node.input[1:], node.attribute[:]
    used = {name for node in graph.graph.node for name in node.input}
    left = [i for i in graph.graph.initializer if i.name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(left)
    return graph


def strip(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Remove documentation strings and metadata in place: they leak paths and change the digest, not the result."""
    del graph.metadata_props[:]
    graph.doc_string = ""
    graph.graph.doc_string = ""
    parts = [graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.value_info, *graph.graph.initializer]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    return graph


def _export(module: nn.Module, shape: tuple[int, int, int]) -> onnx.ModelProto:
    import torch

    def export(batch: int, dynamic: bool) -> onnx.ModelProto:
        program = torch.onnx.export(
            module,
            (torch.zeros(batch, *shape),),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) if dynamic else None,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
        assert program is not None
        proto: onnx.ModelProto = program.model_proto
        return proto

    try:
        # Two, because torch.export takes a batch of one for a constant.
        return export(2, dynamic=True)
    except Exception:
        return export(1, dynamic=False)


def _reason(fault: BaseException) -> str:
    while fault.__cause__ is not None:
        fault = fault.__cause__
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)[:300]


def _HalfInside(module: nn.Module) -> nn.Module:
    import torch

    class HalfInside(torch.nn.Module):
        """fp32 in, fp16 arithmetic, fp32 out."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(module).half()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(x.half())
            return logits.float()

    return HalfInside()

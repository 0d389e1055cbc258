"""What a model file says of itself, read with the standard library: its input, and which weights each of its nodes uses.

A bare file comes without a manifest, and a board has no `onnx`. An ONNX file is one protobuf message, of which only a few fields count
here; an OpenVINO IR is XML. Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import mmap
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgecnn.device.files import sha256_file
from edgecnn.device.spec import InputSpec, Manifest, Takes
from edgecnn.errors import ModelError

_FLOAT, _UINT8 = 1, 2  # TensorProto.DataType
_XML_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Node:
    """A node of an ONNX graph: its name, operator, and the names of what it reads and writes."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxGraph:
    """Nodes, shapes of the weights by name, and name, element type and shape (None is a free dimension) of the other inputs."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, tuple[int, ...]]
    inputs: tuple[tuple[str, int, tuple[int | None, ...]], ...]


def bare_manifest(path: Path, runtime: str | None = None) -> Manifest:
    """The manifest of a model file without a bundle, as far as measuring needs one: there are no labels and no preprocessing.

    Args:
        path: `.onnx`, or `.xml` with its `.bin` beside it.
        runtime: that is to run it; None is onnxruntime for ONNX and openvino for IR.

    Raises:
        ModelError: it is another kind of file, or does not take one batch of images.
    """
    if path.suffix == ".onnx":
        files = {"model": path.name}
        inputs = [(kind, shape) for _, kind, shape in read_onnx(path).inputs]
    elif path.suffix == ".xml":
        files = {"model": path.name, "weights": path.with_suffix(".bin").name}
        if not path.with_suffix(".bin").is_file():
            raise ModelError(f"{path}: {files['weights']} is not beside it. An OpenVINO IR is two files: copy both.")
        inputs = _ir_inputs(path)
        runtime = runtime or "openvino"
        if runtime != "openvino":
            raise ModelError(f"{path}: an OpenVINO IR does not run in {runtime}. Leave out --runtime.")
    else:
        raise ModelError(f"{path}: not a model that can be measured. Give a bundle's folder, an .onnx file or an OpenVINO .xml file.")
    takes, spec = _image_input(path, inputs)
    return Manifest(
        name=path.name,
        runtime=runtime or "onnxruntime",
        precision="as it is",
        candidate="bare file",
        files=files,
        digests={name: sha256_file(path.with_name(name)) for name in files.values()},
        input=spec,
        labels=(),
        takes=takes,
        # A file of floats is run in them: OpenVINO's own choice on CPUs that have it is bf16.
        options={"INFERENCE_PRECISION_HINT": "f32"} if runtime == "openvino" else {},
    )


def _image_input(path: Path, inputs: list[tuple[int, tuple[int | None, ...]]]) -> tuple[Takes, InputSpec]:
    if len(inputs) != 1:
        raise ModelError(f"{path}: takes {len(inputs)} inputs; only models of one image input can be measured.")
    kind, shape = inputs[0]
    takes: Takes = "uint8" if kind == _UINT8 else "float32"
    sizes = shape[1:]
    if kind not in (_FLOAT, _UINT8) or len(shape) != 4 or any(size is None or size < 1 for size in sizes):
        text = " x ".join("?" if size is None else str(size) for size in shape)
        raise ModelError(
            f"{path}: its input is {text} of ONNX type {kind}; only a batch of float32 or uint8 images of a fixed size can be measured. "
            "Export it with height and width fixed."
        )
    first, second, third = (int(size or 0) for size in sizes)
    channels, height, width = (third, first, second) if takes == "uint8" else (first, second, third)
    return takes, InputSpec(channels, height, width, height, "squash", "bilinear", (0.0,) * channels, (1.0,) * channels)


def read_onnx(path: Path) -> OnnxGraph:
    """Read the graph's skeleton; weights are skipped, not loaded.

    Raises:
        ModelError: it is no ONNX file.
    """
    try:
        with path.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            nodes: list[Node] = []
            weights: dict[str, tuple[int, ...]] = {}
            inputs: list[tuple[str, int, tuple[int | None, ...]]] = []
            for number, graph in _fields(view, 0, len(view)):
                if number == 7 and isinstance(graph, tuple):
                    for inner, value in _fields(view, *graph):
                        if isinstance(value, int):
                            continue
                        if inner == 1:
                            nodes.append(_node(view, *value))
                        elif inner == 5:
                            weights |= _weight(view, *value)
                        elif inner == 11:
                            inputs.append(_value_info(view, *value))
            if not nodes:
                raise ValueError("no graph in it")
            return OnnxGraph(tuple(nodes), weights, tuple(i for i in inputs if i[0] not in weights))
    except (ValueError, IndexError) as fault:
        raise ModelError(f"{path}: not a readable ONNX file ({fault}). Export it again.") from None


def _node(view: memoryview, start: int, end: int) -> Node:
    found: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    for number, value in _fields(view, start, end):
        if number in found and isinstance(value, tuple):
            found[number].append(_text(view, value))
    return Node("".join(found[3]), "".join(found[4]), tuple(found[1]), tuple(found[2]))


def _weight(view: memoryview, start: int, end: int) -> dict[str, tuple[int, ...]]:
    name, shape = "", []
    for number, value in _fields(view, start, end):
        if number == 1 and isinstance(value, int):
            shape.append(value)
        elif number == 1 and isinstance(value, tuple):  # the packed form of the same
            at, stop = value
            while at < stop:
                size, at = _varint(view, at, stop)
                shape.append(size)
        elif number == 8 and isinstance(value, tuple):
            name = _text(view, value)
    return {name: tuple(shape)}


def _value_info(view: memoryview, start: int, end: int) -> tuple[str, int, tuple[int | None, ...]]:
    name, kind, shape = "", 0, []
    for number, value in _fields(view, start, end):
        if number == 1 and isinstance(value, tuple):
            name = _text(view, value)
        for number_2, tensor in _fields(view, *value) if number == 2 and isinstance(value, tuple) else ():
            for number_3, part in _fields(view, *tensor) if number_2 == 1 and isinstance(tensor, tuple) else ():
                if number_3 == 1 and isinstance(part, int):
                    kind = part
                for _, dim in _fields(view, *part) if number_3 == 2 and isinstance(part, tuple) else ():
                    sizes = [v for n, v in _fields(view, *dim) if n == 1 and isinstance(v, int)] if isinstance(dim, tuple) else []
                    shape.append(sizes[0] if sizes else None)
    return name, kind, tuple(shape)


def _text(view: memoryview, span: tuple[int, int]) -> str:
    return bytes(view[span[0] : span[1]]).decode("utf-8", "replace")


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Number and value of each field of a message: a number, or where the bytes begin and end."""
    at = start
    while at < end:
        key, at = _varint(view, at, end)
        kind = key & 7
        if kind == 0:
            value, at = _varint(view, at, end)
            yield key >> 3, value
        elif kind in (1, 2, 5):
            length, at = _varint(view, at, end) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + length > end:
                raise ValueError("it ends early")
            if kind == 2:
                yield key >> 3, (at, at + length)
            at += length
        else:
            raise ValueError("no protobuf message")


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("no protobuf message")


def read_ir(path: Path) -> ET.Element:
    """The XML of an OpenVINO IR.

    Raises:
        ModelError: it is none, is not UTF-8, or declares entities, which no IR does and which can grow without end.
    """
    if path.stat().st_size > _XML_MOST_BYTES:
        raise ModelError(f"{path}: larger than any IR that edgecnn reads. Is it the right file?")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # whatever encoding it names: in another one, the search would see nothing
        if "\0" in text:
            raise ValueError("not UTF-8")
        if re.search("<!(DOCTYPE|ENTITY)", text):
            raise ModelError(f"{path}: declares entities, which no OpenVINO IR does. Convert the model again.")
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as fault:
        raise ModelError(f"{path}: not a readable OpenVINO IR ({fault}). Convert the model again.") from None
    if root.tag != "net" or root.find("layers") is None:
        raise ModelError(f"{path}: not an OpenVINO IR. Give an .xml that OpenVINO wrote.")
    return root


def _ir_inputs(path: Path) -> list[tuple[int, tuple[int | None, ...]]]:
    found = []
    for layer in read_ir(path).findall("layers/layer[@type='Parameter']"):
        data = layer.find("data")
        told = {} if data is None else data.attrib
        shape = tuple(int(size) if size.strip().isdigit() else None for size in told.get("shape", "").split(",") if size.strip())
        found.append(({"f32": _FLOAT, "u8": _UINT8}.get(told.get("element_type", ""), 0), shape))
    return found

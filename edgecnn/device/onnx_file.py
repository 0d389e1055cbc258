"""Small ONNX files, written with the standard library alone: a board has no `onnx`. Field numbers are those of onnx.proto3."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_OPSET = 17
_KINDS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _message(*fields: tuple[int, int | str | bytes]) -> bytes:
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return bytes(out)


def tensor(name: str, array: np.ndarray) -> bytes:
    """A weight."""
    return _message(*((1, size) for size in array.shape), (2, _KINDS[array.dtype.name]), (8, name), (9, array.tobytes()))


def node(operator: str, inputs: Iterable[str], output: str, **ints: int | tuple[int, ...]) -> bytes:
    """A node of one output, with attributes that are whole numbers or lists of them."""
    attributes = []
    for name, value in ints.items():
        if isinstance(value, int):
            attributes.append(_message((1, name), (3, value), (20, 2)))
        else:
            attributes.append(_message((1, name), *((8, each) for each in value), (20, 7)))
    return _message(*((1, name) for name in inputs), (2, output), (4, operator), *((5, each) for each in attributes))


def value(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    """An input or output of the graph."""
    dims = _message(*((1, _message((1, size))) for size in shape))
    return _message((1, name), (2, _message((1, _message((1, _KINDS[kind]), (2, dims))))))


def model(nodes: Iterable[bytes], weights: Iterable[bytes], given: bytes, made: bytes) -> bytes:
    """The file, of one input and one output."""
    graph = _message(*((1, each) for each in nodes), (2, "graph"), *((5, each) for each in weights), (11, given), (12, made))
    return _message((1, 8), (7, graph), (8, _message((1, ""), (2, _OPSET))))

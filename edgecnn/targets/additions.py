"""Ranges with which a quantized addition gives the same bytes on every CPU.

onnxruntime adds two 8-bit tensors in float32 on some CPUs and in 22-bit fixed point on others, and so rounds a sum that lies almost
halfway between two integers differently: one of 100,000. Fifty layers of a network make a few per cent of the logits' deviation of it,
enough to change the class of 3 photos of 100 between x86-64 and arm64 (MobileNetV2). Every other integer operation of such a network
is exact.

A sum is (a - za) * sa / sc + (b - zb) * sb / sc. Where both quotients are whole multiples of 1 / STEPS with STEPS odd, it is at least
1 / (2 * STEPS) away from any halfway point, far more than either arithmetic errs, so both round it alike. To get there, ranges are
widened, mostly by less than half a per cent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgecnn.targets.calibration import ACTIVATIONS, Range

STEPS = 1023
# Their output has the scale of their input in onnxruntime's QDQ graphs.
_SAME_SCALE = {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"}


def settle_additions(model: Path, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """`ranges` with those of every addition's inputs and output widened so that it cannot tie.

    An addition of two tensors that earlier additions have settled is left as it is: both its ranges are taken.

    Args:
        model: simplified fp32 ONNX, its nodes in topological order.
        ranges: asymmetric ones, of every float activation.
    """
    import onnx

    graph = onnx.load(str(model)).graph
    takers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    scaled_as: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _SAME_SCALE:
            scaled_as[node.output[0]] = scaled_as.get(node.input[0], node.input[0])
    wide = dict(ranges)
    settled: set[str] = set()
    for node in graph.node:
        if node.op_type != "Add":
            continue
        a, b = (scaled_as.get(name, name) for name in node.input)
        after = takers.get(node.output[0], [])
        c = after[0].output[0] if len(after) == 1 and after[0].op_type in ACTIVATIONS else node.output[0]
        if b in settled:
            a, b = b, a
        if a == b or b in settled or not all(_width(wide.get(name)) for name in (a, b, c)):
            continue
        # Wider, never narrower: nothing is clipped that was not.
        a_steps = math.floor(STEPS * _width(wide[a]) / _width(wide[c]))
        if not a_steps:
            continue
        wide[c] = _widened(wide[c], _width(wide[a]) * STEPS / a_steps)
        b_steps = math.ceil(STEPS * _width(wide[b]) / _width(wide[c]))
        wide[b] = _widened(wide[b], _width(wide[c]) * b_steps / STEPS)
        settled |= {a, b, c}
    return wide


def _width(r: Range | None) -> float:
    """What the scale is proportional to; ranges include zero."""
    return float(np.maximum(r[1], 0.0) - np.minimum(r[0], 0.0)) if r else 0.0


def _widened(r: Range, width: float) -> Range:
    factor = width / _width(r)
    return float(r[0] * factor), float(r[1] * factor)

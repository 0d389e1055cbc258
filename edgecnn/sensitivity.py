"""What int8 costs and buys in each layer, and which layers stay in float in the mixed-precision candidate: those that lose more of the
accuracy than their share, and those that do not get faster.

A layer's time is that of the whole file's profile: with what follows it and has no weights of its own, and with its conversions. What a
mixed file really takes is measured on it, as on every candidate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from edgecnn.device.profile import Profile
from edgecnn.targets.sensitivity import Cost

# Chosen by hand; seen to work on the demo, not tuned on larger networks.
# A layer loses too much where it does this many times the mean harm of a layer; at most this share of the layers is kept for that.
HARM, MOST_HARMFUL = 3.0, 0.15
# It does not get faster where int8 takes longer by at least this share of the whole float file's time: less is noise of the profile.
NOT_FASTER = 0.005
_CONVERSION = re.compile(r"_(Quantize|Dequantize)Linear.*$")


@dataclass(frozen=True)
class Weighed:
    """A layer as `result.json` lists it: `targets[].layers`.

    Attributes:
        name: by its weights, as in the torch model.
        operator: ONNX operator type.
        sqnr_db: signal-to-noise ratio of its output with the whole network in int8.
        flips: share of calibration images that change their class with this layer alone in int8.
        divergence: mean Kullback-Leibler divergence then, in nats.
        float_s: its time in the fp32 file; None where it was not, or could not be, measured.
        int8_s: in the int8 file.
        kept_float: whether the mixed-precision candidate leaves it in float, or the recipe does.
        why: the reason, or "".
    """

    name: str
    operator: str
    sqnr_db: float
    flips: float
    divergence: float
    float_s: float | None
    int8_s: float | None
    kept_float: bool
    why: str


def weigh(costs: Sequence[Cost], times: tuple[Mapping[str, float], Mapping[str, float]] | None, pinned: Collection[str]) -> list[Weighed]:
    """Every layer with what it costs and buys.

    Args:
        costs: of each layer.
        times: seconds of each layer in the fp32 and in the int8 file, or None.
        pinned: nodes that every int8 file has in float.
    """
    mean = math.fsum(c.divergence for c in costs) / len(costs) if costs else 0.0
    ranked = sorted(costs, key=lambda c: -c.divergence)[: math.ceil(MOST_HARMFUL * len(costs))]
    harmful = {c.node for c in ranked if c.divergence > HARM * mean}
    whole = math.fsum(times[0].values()) if times else 0.0
    rows = []
    for c in costs:
        float_s, int8_s = (each.get(c.name) for each in times) if times else (None, None)
        why = ""
        if c.node in pinned:
            why = "left in float by the recipe or the runtime's form"
        elif c.node in harmful:
            why = f"does {c.divergence / mean:.1f} times the mean harm of a layer"
        elif float_s is not None and int8_s is not None and int8_s - float_s > NOT_FASTER * whole:
            why = f"not faster in int8: {int8_s * 1e3:.3f} ms against {float_s * 1e3:.3f}"
        rows.append(Weighed(c.name, c.operator, c.sqnr_db, c.flips, c.divergence, float_s, int8_s, bool(why), why))
    return rows


def seconds_of(profile: Profile, parts: Mapping[str, str]) -> dict[str, float]:
    """Seconds of each layer by its name; "" holds what belongs to none.

    Args:
        profile: of one file.
        parts: the layer of each node and tensor of the float graph.
    """
    layers = set(parts.values())
    sums: dict[str, float] = {}
    for entry in profile.layers:
        name = entry.name if entry.name in layers else parts.get(_CONVERSION.sub("", entry.node), "")
        sums[name] = sums.get(name, 0.0) + entry.seconds
    return sums

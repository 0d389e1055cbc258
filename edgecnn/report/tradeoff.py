"""What the page shows of accuracy against latency and size: the files, the promises and the samples of a result, drawn by `charts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from edgecnn.report import charts
from edgecnn.report.charts import Line, Point, Strip, milliseconds

WIDTHS = (880, 360)  # for a desktop and for a phone
PERCENTILES = ("p50", "p90", "p99")


def section(result: Mapping[str, Any]) -> dict[str, Any]:
    """The charts, each for both widths or none where nothing was measured, and the targets that have no place by latency."""
    targets = result.get("targets", [])
    floors, too_slow, too_large = _floors(result), _ceilings(targets, "p90_latency_ms"), _ceilings(targets, "size_mb")
    timed, sized = _points(result, _latency), _points(result, _size)
    strips = [strip for i, t in enumerate(targets) if (strip := _strip(t, i))]
    by_latency = "Accuracy against latency: every measured file. The same figures are in the tables."
    by_size = "Accuracy against size: every measured file. The same figures are in the tables."
    sizes = [p.megabytes * 1e6 for p in timed if p.megabytes]
    latency, size = "p90 latency of one image, ms", "size of the file, MB"
    return {
        "latency": [charts.accuracy(timed, floors, too_slow, latency, w, by_latency) for w in WIDTHS] if timed else [],
        "size": [charts.accuracy(sized, floors, too_large, size, w, by_size) for w in WIDTHS] if sized else [],
        "steadiness": [charts.steadiness(strips, too_slow, w) for w in WIDTHS] if strips else [],
        "sizes": (min(sizes), max(sizes)) if sizes else None,
        "unplaced": [t.get("name", "unnamed") for t in targets if not _latency(t)],
    }


def _points(result: Mapping[str, Any], across: Any) -> list[Point]:
    """The shipped file of each target, and the candidates that lost to it, where its top-1 and what `across` asks for were measured."""
    points = []
    for series, target in enumerate(result.get("targets", [])):
        name = str(target.get("name", "unnamed"))
        if is_number(top1 := target.get("top1")) and (x := across(target)):
            drop, ends = target.get("top1_drop"), target.get("drop_interval", [])
            # The interval is the paired one of the drop, hung on the float model's own top-1.
            interval = (top1 + drop - ends[1], top1 + drop - ends[0]) if is_number(drop) and len(ends) == 2 else None
            said = f"{name}, ships {target.get('candidate', '')}: {_figures(top1, _latency(target), _size(target))}"
            points.append(Point(x, top1, interval, _megabytes(across, target), name, said, series, True))
        void = across is _latency and target.get("latency_s", {}).get("void")  # then its candidates' times are no better
        shift = _shift(result, target)
        for candidate in target.get("candidates", []) if not void else []:
            if not candidate.get("chosen") and is_number(top1 := candidate.get("choice_top1")) and (x := across(candidate)):
                label = str(candidate.get("name", "unnamed"))
                figures = _figures(top1, _latency(candidate), _size(candidate))
                said = f"{name}, {label}: {figures} on the choice images. {candidate.get('why', '')}"
                points.append(Point(x, top1 + shift, None, _megabytes(across, candidate), label, said, series, False))
    return points


def _shift(result: Mapping[str, Any], target: Mapping[str, Any]) -> float:
    """What is added to a top-1 on the choice images to stand beside one on the evaluation images: so that fp32 has the float model's."""
    of = (c.get("choice_top1") for c in target.get("candidates", []) if c.get("name") == "fp32")
    there, here = next(of, None), result.get("baseline", {}).get("top1")
    return here - there if is_number(there) and is_number(here) else 0.0


def _latency(part: Mapping[str, Any]) -> float | None:
    """The p90 in ms of a target or a candidate, where it was measured and may be used."""
    found = part.get("latency_s", {})
    p90 = found.get("p90", found.get("p50")) if not found.get("void") else None
    p90 = part.get("p90_s", p90) if not part.get("void") else None
    return p90 * 1e3 if is_number(p90) and p90 > 0 else None


def _size(part: Mapping[str, Any]) -> float | None:
    """Of the file, in MB."""
    size = part.get("size_bytes")
    return size / 1e6 if is_number(size) and size > 0 else None


def _megabytes(across: Any, part: Mapping[str, Any]) -> float | None:
    """What a mark's area shows: nothing where the size is what the chart has to the right."""
    return None if across is _size else _size(part)


def _figures(top1: float, ms: float | None, megabytes: float | None) -> str:
    said = [f"{top1 * 100:.1f} %"]
    said += [f"p90 {milliseconds(ms / 1e3)} ms"] if ms else ["no latency that may be used"]
    return ", ".join(said + ([f"{megabytes:.3g} MB"] if megabytes else []))


def _floors(result: Mapping[str, Any]) -> list[Line]:
    """The lowest top-1 each target may have; one line a value."""
    names: dict[float, list[str]] = {}
    base = result.get("baseline", {}).get("top1")
    for target in result.get("targets", []):
        promise = target.get("promise", {})
        floors = [promise["min_accuracy"]] if is_number(promise.get("min_accuracy")) else []
        if is_number(promise.get("accuracy_drop")) and is_number(base):
            floors.append(base - promise["accuracy_drop"])
        if floors and max(floors) > 0:  # a drop larger than the top-1 promises nothing
            names.setdefault(max(floors), []).append(str(target.get("name", "unnamed")))
    return [Line(at, f"promised: at least {at * 100:.4g} %" + _whose(who, names)) for at, who in names.items()]


def _ceilings(targets: Sequence[Mapping[str, Any]], key: str) -> list[Line]:
    """The most that each target may have of p90 in ms or of size in MB; one line a value."""
    say = {"p90_latency_ms": "promised: p90 ≤ {:g} ms", "size_mb": "promised: ≤ {:g} MB"}[key]
    names: dict[float, list[str]] = {}
    for target in targets:
        if is_number(most := target.get("promise", {}).get(key)):
            names.setdefault(most, []).append(str(target.get("name", "unnamed")))
    return [Line(at, say.format(at) + _whose(who, names)) for at, who in names.items()]


def _whose(who: list[str], names: Mapping[float, list[str]]) -> str:
    return f" ({', '.join(who)})"[:40] if len(names) > 1 else ""


def _strip(target: Mapping[str, Any], series: int) -> Strip | None:
    """The target's samples in ms, where they were taken and may be used."""
    latency = target.get("latency_s", {})
    samples = [s * 1e3 for s in latency.get("samples", []) if is_number(s) and s > 0]
    found = []
    for name in PERCENTILES:
        if is_number(at := latency.get(name)):
            ends = latency.get("intervals", {}).get(name)
            found.append((name, at * 1e3, (ends[0] * 1e3, ends[1] * 1e3) if ends and all(map(is_number, ends)) else None))
    if not samples or not found or latency.get("void"):
        return None
    return Strip(str(target.get("name", "unnamed")), samples, found, series)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

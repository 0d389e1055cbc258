"""result.json to one HTML file: no script, no network, the same bytes for the same result.

Every name in a result is hostile until shown otherwise: class names come from folders, paths and notes from anywhere. The
template escapes everything, the page forbids scripts and loads by its own policy, and characters that would
reorder or hide text are written out.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecnn.device.files import write_atomically
from edgecnn.errors import IntegrityError, UsageError
from edgecnn.report import charts, layers, trust

SCHEMA = 1
WIDE, NARROW = 1040, 360
PICTURE_BYTES = 64 << 10
# Controls, marks that reorder text, and halves of surrogate pairs (file names that are not UTF-8).
_TRICKS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def write_report(result_json: Path, html: Path) -> None:
    """Write the page of one run. `html` appears whole or not at all.

    Raises:
        UsageError: there is no result, or it is of a newer format.
        IntegrityError: the file is not a result.
    """
    write_atomically(html, render(read_result(result_json), pictures_in(result_json.parent / "pictures")).encode())


def pictures_in(folder: Path) -> Callable[[Any], str]:
    """A function from a picture's name in the result to what an <img> shows: the file itself, or "" where it is not what we wrote.

    A result may come from anyone: only a plain name of a JPEG in this very folder, no link and of our size, is put into the page.
    """

    def source(name: Any) -> str:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}\.jpg", name):
            return ""
        path = folder / name
        if path.is_symlink() or folder.is_symlink() or not path.is_file() or path.stat().st_size > PICTURE_BYTES:
            return ""
        data = path.read_bytes()
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data.startswith(b"\xff\xd8\xff") else ""

    return source


def read_result(path: Path) -> dict[str, Any]:
    """The result with nulls left out and its text made safe to show."""
    if not path.is_file():  # nor a link that leads to itself
        raise UsageError(f"{path}: not there. Give the folder of a finished run, or run `edgecnn compress` first.")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:
        raise IntegrityError(f"{path}: not readable as JSON ({fault}). Run `edgecnn compress` again to write it anew.") from None
    schema = result.get("schema") if isinstance(result, dict) else None
    if not isinstance(schema, int):
        raise IntegrityError(f"{path}: not a result of edgecnn, it has no schema number. Give the result.json of a run folder.")
    if schema > SCHEMA:
        raise UsageError(f"{path}: format {schema} is newer than this edgecnn reads ({SCHEMA}). Install a newer edgecnn.")
    cleaned: dict[str, Any] = _clean(result)
    return cleaned


def render(result: dict[str, Any], picture: Callable[[Any], str] = lambda name: "") -> str:
    """The page of a cleaned result; `picture` gives what to show for a picture's name, or ""."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,  # a failed target lacks whole branches, and the page must still say what is there
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {
        "percent": _shown(lambda v: f"{v * 100:.1f} %"),
        "percent2": _shown(lambda v: f"{v * 100:.2f} %"),
        "points": _shown(_points),
        "drop": _shown(lambda v: _points(v).replace("+", "")),
        "ms": _shown(charts.milliseconds),
        "seconds": _shown(_seconds),
        "megabytes": _shown(_megabytes),
        "million": _shown(lambda v: f"{v / 1e6:.3g} M"),
        "times": _shown(lambda v: f"{v:.2f}×"),
        "plain": _shown(lambda v: f"{v:.3g}"),
        "db": _shown(lambda v: f"{v:.1f} dB"),
        "cosine": _shown(lambda v: f"{v:.6f}"),
    }
    page.globals |= {"key": charts.key, "promised": promised}
    targets = result.get("targets", [])
    points, unplaced = _points_of(result), [t for t in targets if not _latency(t)]
    floors, ceilings = _floors(result), _ceilings(targets)
    strips = [strip for i, t in enumerate(targets) if (strip := _strip(t, i))]
    return page.get_template("page.html.j2").render(
        run=result,
        scatter=[charts.accuracy_against_latency(points, floors, ceilings, w) for w in (WIDE, NARROW)] if points else [],
        unplaced=unplaced,
        strips=[charts.latency_strips(strips, ceilings, w) for w in (WIDE, NARROW)] if strips else [],
        classes=worst_classes(result),
        trust=[shown for i, t in enumerate(targets) if (shown := trust.section(t, i, picture))],
        layers=[shown for i, t in enumerate(targets) if (shown := layers.section(t, i))],
        doubts=doubts(result),
        circumstances=list(_flat(result.get("environment", {}).get("machine", {}))),
    )


def render_tables(title: str, tables: Sequence[tuple[str, tuple[str, ...], list[tuple[str, ...]]]], remarks: Sequence[str]) -> str:
    """A page of plain tables (title, head, rows of text), such as `edgecnn compare` shows, in the style of the report."""
    from jinja2 import Environment, FileSystemLoader

    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("tables.html.j2").render(title=title, tables=tables, remarks=remarks)


def worst_classes(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a class: what it had, what each target left of it; the largest loss first, then the lowest top-1."""
    targets = [t.get("per_class", []) for t in result.get("targets", [])]
    rows = []
    for i, base in enumerate(result.get("baseline", {}).get("per_class", [])):
        # By place, since two outputs may share a name (ImageNet has two cranes).
        found = [t[i].get("top1") if i < len(t) and t[i].get("label") == base.get("label") else None for t in targets]
        had = base.get("top1")
        losses = [had - top1 if _is_number(top1) and _is_number(had) else None for top1 in found]
        rows.append(
            {
                "label": base.get("label", "unnamed"),
                "n": base.get("n", "?"),
                "top1": had,
                "cells": [{"top1": top1, "loss": loss} for top1, loss in zip(found, losses, strict=True)],
                "worst": max((loss for loss in losses if loss is not None), default=-1.0),
                "lowest": min((top1 for top1 in [had, *found] if _is_number(top1)), default=2.0),
            }
        )
    return sorted(rows, key=lambda row: (-row["worst"], row["lowest"]))


def doubts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every reason to trust a figure less: where it belongs, and the doubt."""
    found = [("run", d) for d in result.get("doubts", [])] + [("data", d) for d in result.get("data", {}).get("doubts", [])]
    for target in result.get("targets", []):
        latency = target.get("latency_s", {})
        if latency.get("void"):
            found.append((target.get("name", "unnamed"), f"the latency must not be used: {latency['void']}"))
        found += [(target.get("name", "unnamed"), d) for d in latency.get("doubts", [])]
    return found


def promised(promise: Mapping[str, Any] | None) -> list[str]:
    """A promise as short phrases."""
    say = {
        "accuracy_drop": lambda v: f"top-1 drop at most {v * 100:.3g} point{'' if v == 0.01 else 's'}",
        "min_accuracy": lambda v: f"top-1 at least {v * 100:.4g} %",
        "p90_latency_ms": lambda v: f"p90 latency at most {v:g} ms",
        "size_mb": lambda v: f"size at most {v:g} MB",
    }
    return [say[k](v) if k in say and _is_number(v) else f"{k}: {v}" for k, v in (promise or {}).items()]


def _points_of(result: Mapping[str, Any]) -> list[charts.Point]:
    """The shipped file of each target, and the candidates that lost to it, where both figures were measured."""
    points = []
    for series, target in enumerate(result.get("targets", [])):
        name = str(target.get("name", "unnamed"))
        if _is_number(target.get("top1")) and (p90 := _latency(target)):
            top1 = target["top1"]
            drop, ends = target.get("top1_drop"), target.get("drop_interval", [])
            # The interval is the paired one of the drop, hung on the float model's own top-1.
            interval = (top1 + drop - ends[1], top1 + drop - ends[0]) if _is_number(drop) and len(ends) == 2 else None
            title = f"{name}, ships {target.get('candidate', '')}: {top1 * 100:.1f} %, p90 {charts.milliseconds(p90)} ms"
            points.append(charts.Point(p90, top1, interval, name, title, series, True))
        for candidate in target.get("candidates", []):
            top1, p90 = candidate.get("choice_top1"), candidate.get("p90_s")
            if not candidate.get("chosen") and _is_number(top1) and _is_number(p90) and p90 > 0:
                label = str(candidate.get("name", "unnamed"))
                title = f"{name}, {label}: {top1 * 100:.1f} %, p90 {charts.milliseconds(p90)} ms. {candidate.get('why', '')}"
                points.append(charts.Point(p90, top1, None, label, title, series, False))
    return points


def _floors(result: Mapping[str, Any]) -> list[charts.Line]:
    """The lowest top-1 each target may have; one line a value."""
    names: dict[float, list[str]] = {}
    base = result.get("baseline", {}).get("top1")
    for target in result.get("targets", []):
        promise = target.get("promise", {})
        floors = [promise["min_accuracy"]] if _is_number(promise.get("min_accuracy")) else []
        if _is_number(promise.get("accuracy_drop")) and _is_number(base):
            floors.append(base - promise["accuracy_drop"])
        if floors:
            names.setdefault(max(floors), []).append(str(target.get("name", "unnamed")))
    return [charts.Line(at, f"promised: at least {at * 100:.4g} %" + _whose(who, names)) for at, who in names.items()]


def _ceilings(targets: list[dict[str, Any]]) -> list[charts.Line]:
    """The highest p90 each target may have, in seconds; one line a value."""
    names: dict[float, list[str]] = {}
    for target in targets:
        if _is_number(most := target.get("promise", {}).get("p90_latency_ms")):
            names.setdefault(most / 1e3, []).append(str(target.get("name", "unnamed")))
    return [charts.Line(at, f"promised: p90 ≤ {at * 1e3:g} ms" + _whose(who, names)) for at, who in names.items()]


def _whose(who: list[str], names: Mapping[float, list[str]]) -> str:
    return f" ({', '.join(who)})"[:40] if len(names) > 1 else ""


def _latency(target: Mapping[str, Any]) -> float | None:
    """The target's p90 in seconds, where it was measured and may be used."""
    latency = target.get("latency_s", {})
    p90 = latency.get("p90", latency.get("p50"))
    return p90 if _is_number(p90) and p90 > 0 and not latency.get("void") else None


def _strip(target: Mapping[str, Any], series: int) -> charts.Strip | None:
    """The target's samples, where they were taken and may be used."""
    latency = target.get("latency_s", {})
    samples = [s for s in latency.get("samples", []) if _is_number(s) and s > 0]
    p50, p90 = latency.get("p50"), latency.get("p90")
    if not samples or latency.get("void") or not (_is_number(p50) and _is_number(p90)):
        return None
    return charts.Strip(str(target.get("name", "unnamed")), samples, p50, p90, series)


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested circumstances as rows of name and text."""
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in _flat(v, f"{name} · {k}" if name else str(k))]
    if isinstance(value, list):
        return [(name, ", ".join(text for v in value for _, text in _flat(v)))]
    return [(name, {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))]


def _clean(value: Any) -> Any:
    """Leave out the nulls of objects, and write out characters that hide or reorder text."""
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_clean(v) for v in value]
    if isinstance(value, str):
        return _TRICKS.sub(lambda found: f"\\u{ord(found.group()):04x}", value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(say: Callable[[float], str]) -> Callable[[Any], str]:
    """A filter that says "not measured" instead of inventing a figure."""
    return lambda value: say(value) if _is_number(value) else "not measured"


def _points(fraction: float) -> str:
    """A signed change in percentage points."""
    return f"{fraction * 100:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"

"""result.json to one HTML file: no script, no network, the same bytes for the same result.

Every name in a result is hostile until shown otherwise: class names come from folders, paths and notes from anywhere. The
template escapes everything, the page forbids scripts and loads by its own policy, and characters that would
reorder or hide text are written out.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecnn.device.files import write_atomically
from edgecnn.errors import IntegrityError, UsageError, printable
from edgecnn.report import charts, layers, tradeoff, trust
from edgecnn.report.tradeoff import is_number

if TYPE_CHECKING:
    from jinja2 import Template

SCHEMA = 1
UNITS: dict[str, Callable[[float], str]] = {
    "_bytes": lambda v: f"{v / 1e9:.1f} GB" if v >= 1e9 else _megabytes(v),
    "_hz": lambda v: f"{v / 1e6:.0f} MHz",
    "_s": lambda v: f"{v:.4g} s",
    "_c": lambda v: f"{v:.0f} °C",
}
PICTURE_BYTES = 64 << 10


def write_report(result_json: Path, html: Path) -> None:
    """Write the page of one run. `html` appears whole or not at all.

    Raises:
        UsageError: there is no result, or it is of a newer format.
        IntegrityError: the file is not a result.
    """
    result = read_result(result_json)
    try:
        page = render(result, pictures_in(result_json.parent / "pictures"))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
        raise IntegrityError(
            f"{result_json}: not as edgecnn writes it ({type(fault).__name__}: {printable(str(fault))}). "
            "Run `edgecnn compress` again to write it anew."
        ) from fault
    write_html(html, page)


def write_html(html: Path, text: str) -> None:
    """`html` appears whole or not at all.

    Raises:
        UsageError: there can be no such file.
    """
    try:
        write_atomically(html, text.encode())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as fault:
        raise UsageError(f"{html}: cannot be written ({fault.strerror}). Name a file in a folder that is there.") from None


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
    targets = result.get("targets", [])
    looked = [shown for i, t in enumerate(targets) if (shown := trust.section(t, i, picture))]
    return _template("page.html.j2").render(
        run=result,
        tradeoff=tradeoff.section(result),
        classes=worst_classes(result),
        trust=looked,
        alarms=[f"{t['name']}: {trust.alarm(row, t['classes'])}" for t in looked for row in t["flagged"]],
        layers=[shown for i, t in enumerate(targets) if (shown := layers.section(t, i))],
        doubts=doubts(result),
        open=reservations(targets),
        circumstances=list(_flat(result.get("environment", {}).get("machine", {}))),
    )


def render_tables(title: str, tables: Sequence[Any], remarks: Sequence[str]) -> str:
    """A page of plain tables (`title`, `head`, `rows` of text, `notes`), such as `edgecnn compare` shows, in the style of the report."""
    return _template("tables.html.j2").render(title=title, tables=tables, remarks=remarks)


@functools.cache
def _template(name: str) -> Template:
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
    return page.get_template(name)


def worst_classes(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a class: what it had, what each target left of it; the largest loss first, then the lowest top-1."""
    targets = [t.get("per_class", []) for t in result.get("targets", [])]
    rows = []
    for i, base in enumerate(result.get("baseline", {}).get("per_class", [])):
        # By place, since two outputs may share a name (ImageNet has two cranes).
        found = [t[i].get("top1") if i < len(t) and t[i].get("label") == base.get("label") else None for t in targets]
        had = base.get("top1")
        losses = [had - top1 if is_number(top1) and is_number(had) else None for top1 in found]
        rows.append(
            {
                "label": base.get("label", "unnamed"),
                "n": base.get("n", "?"),
                "top1": had,
                "cells": [{"top1": top1, "loss": loss} for top1, loss in zip(found, losses, strict=True)],
                "worst": max((loss for loss in losses if loss is not None), default=-1.0),
                "lowest": min((top1 for top1 in [had, *found] if is_number(top1)), default=2.0),
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
        kinds: dict[str, list[str]] = {}
        for doubt in map(str, latency.get("doubts", [])):
            kinds.setdefault(re.sub(r"[\d.]+", "0", doubt), []).append(doubt)
        for alike in kinds.values():
            found.append((target.get("name", "unnamed"), alike[0] + (f" ({len(alike)} times, with other figures)" if alike[1:] else "")))
    return found


def reservations(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a verdict leaves open: a void latency, and a pass where the interval of the drop reaches beyond the promise."""
    found = []
    for t in targets:
        if void := t.get("latency_s", {}).get("void"):
            found.append(f"{t.get('name', 'unnamed')}: no latency, the measurement is void: {str(void).partition(';')[0]}")
        most, ends = t.get("promise", {}).get("accuracy_drop"), t.get("drop_interval", [])
        if t.get("verdict") == "pass" and is_number(most) and len(ends) == 2 and is_number(ends[1]) and ends[1] > most:
            found.append(
                f"{t.get('name', 'unnamed')}: judged by the drop as measured; with {t.get('n', '?')} images it may be as much as "
                f"{100 * ends[1]:.1f} points (promised: at most {100 * most:g})"
            )
    return found


def promised(promise: Mapping[str, Any] | None) -> list[str]:
    """A promise as short phrases."""
    say = {
        "accuracy_drop": lambda v: f"top-1 drop at most {v * 100:.3g} point{'' if v == 0.01 else 's'}",
        "min_accuracy": lambda v: f"top-1 at least {v * 100:.4g} %",
        "p90_latency_ms": lambda v: f"p90 latency at most {v:g} ms",
        "size_mb": lambda v: f"size at most {v:g} MB",
    }
    return [say[k](v) if k in say and is_number(v) else f"{k}: {v}" for k, v in (promise or {}).items()]


def _flat(value: Any, name: str = "", unit: str = "") -> list[tuple[str, str]]:
    """Nested circumstances as rows of name and text; the unit, which a name ends in, stands with the figures."""
    if isinstance(value, dict):
        rows = []
        for k, v in value.items():
            part, of = next(
                ((str(k).removesuffix(end), end) for end in UNITS if str(k).endswith(end)), (str(k), unit if isinstance(v, float) else "")
            )
            part = part if name == "versions" else part.replace("_", " ")
            rows += _flat(v, f"{name} · {part}" if name else part, of)
        return rows
    if isinstance(value, list):
        return [(name, ", ".join(text for v in value for _, text in _flat(v, unit=unit)))]
    if unit and is_number(value):
        return [(name, UNITS[unit](value))]
    return [(name, {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))]


def _clean(value: Any) -> Any:
    """Leave out the nulls of objects, and write out characters that hide or reorder text."""
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_clean(v) for v in value]
    if isinstance(value, str):
        return value if value.isprintable() else "".join(_written_out(c) if _hides(c) else c for c in value)
    return value


def _written_out(c: str) -> str:
    return f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else f"\\U{ord(c):08x}"


def _hides(c: str) -> bool:
    """Controls, marks that reorder text or cannot be seen, private characters, line separators, and halves of surrogate pairs."""
    return c not in "\t\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _shown(say: Callable[[float], str]) -> Callable[[Any], str]:
    """A filter that says "not measured" instead of inventing a figure."""
    return lambda value: say(value) if is_number(value) else "not measured"


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

"""results.json and results.md from the folders that run.py filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.device.stats import compare

RUNTIMES = ("onnxruntime", "openvino")


def rows(folder: Path) -> dict[str, Any]:
    """Every file of one model: accuracy and latency in each runtime, and where edgecnn's is beaten."""
    found: dict[str, Any] = {"files": {}, "bar": {}}
    times = {runtime: medians(folder / f"race-{runtime}.json") for runtime in RUNTIMES}
    for runtime in RUNTIMES:
        found.setdefault("float", {})[runtime] = shown(times[runtime].get("float"))
    seen: dict[tuple[str, str], str] = {}
    for out in tried(folder):
        about = json.loads((out / "result.json").read_text())
        row = {key: about[key] for key in ("peer", "way", "versions", "fault", "bytes", "seconds") if key in about}
        for runtime in RUNTIMES:
            if runtime not in about:
                continue
            measured = {**about[runtime], "fault": about[runtime]["fault"].replace(f"{folder}/", "")}
            # Two peers' files may be the same bytes: then one of them was raced.
            name = seen.setdefault((runtime, measured["sha256"]), out.name)
            row[runtime] = {**measured, **shown(times[runtime].get(name))}
            if name != out.name:
                row[runtime]["same_file_as"] = name
        found["files"][out.name] = row
    for runtime in RUNTIMES:
        own = [
            name for name, row in found["files"].items() if row["peer"] == "edgecnn" and not row.get(runtime, {"fault": "none"})["fault"]
        ]
        found["bar"][runtime] = {name: bar(name, found["files"], times[runtime], runtime) for name in own}
    return found


def tried(folder: Path) -> list[Path]:
    """Every way that came to an end; one that was stopped half-way has no result and is made anew by the next `quantize`."""
    return sorted(record.parent for record in (folder / "peers").glob("*/result.json"))


def medians(record: Path) -> dict[str, list[float]]:
    """Seconds: the median of each process, for each contender of a race."""
    if not record.exists():
        return {}
    race = json.loads(record.read_text())
    return {c["name"]: [float(np.median(r["samples_s"])) for r in c["results"]] for c in race["contenders"]}


def shown(times: list[float] | None) -> dict[str, Any]:
    if not times:
        return {}
    return {"p50_ms": round(1e3 * float(np.median(times)), 4), "processes_p50_ms": [round(1e3 * t, 4) for t in times]}


def bar(own: str, files: dict[str, Any], times: dict[str, list[float]], runtime: str) -> dict[str, Any]:
    """Peers' files that are more accurate than edgecnn's `own` (top-1, same images) and faster (99 % interval, processes as units)."""
    mine, beaten, close, unraced = files[own][runtime], [], [], []
    for name, row in files.items():
        theirs = row.get(runtime)
        if row["peer"] == "edgecnn" or not theirs or theirs["fault"] or theirs["top1"] <= mine["top1"]:
            continue
        raced = theirs.get("same_file_as", name)
        if own not in times or raced not in times:
            unraced.append(name)
            continue
        verdict = compare([[t] for t in times[own]], [[t] for t in times[raced]])
        if verdict.verdict == "faster":
            beaten.append(name)
        elif verdict.ratio is None:  # too few processes that nothing disturbed
            unraced.append(name)
        elif verdict.ratio < 1:
            close.append(name)
    return {
        "held": not beaten and not unraced,
        "beaten_by": beaten,
        "more_accurate_and_not_told_apart_in_time": close,
        "more_accurate_and_not_raced": unraced,
    }


def markdown(found: dict[str, Any]) -> str:
    lines = ["<!-- written by `python benchmarks/peers/run.py table OUT` -->", ""]
    for name, model in found.items():
        lines += [f"## {name}", "", "| file | top-1 onnxruntime | agreement | ms | top-1 OpenVINO | agreement | ms | MB | |"]
        lines.append("|---|--:|--:|--:|--:|--:|--:|--:|---|")
        floats = [model["float"][runtime].get("p50_ms", "") for runtime in RUNTIMES]
        lines.append(f"| float | | | {floats[0]} | | | {floats[1]} | | |")
        lines += [line(file, row) for file, row in sorted(model["files"].items(), key=lambda item: item[1]["peer"] != "edgecnn")]
        lines.append("")
        for runtime in RUNTIMES:
            lines += [f"- {runtime}, {own}: {told(held)}" for own, held in model["bar"][runtime].items()]
        lines.append("")
    return "\n".join(lines)


def line(file: str, row: dict[str, Any]) -> str:
    cells: list[str] = []
    notes = [row["fault"]] if row["fault"] else [] if any(runtime in row for runtime in RUNTIMES) else ["made, not evaluated yet"]
    for runtime in RUNTIMES:
        got = row.get(runtime)
        if not got or got["fault"]:
            cells += ["refused" if got else "", "", ""]
            notes += [f"{runtime}: {got['fault']}"] if got else []
            continue
        time = f"{got['p50_ms']:.3f}" if "p50_ms" in got else ""
        cells += [f"{got['top1']:.2%} ({-100 * got['drop']:+.2f})", f"{got['agreement']:.2%}", time]
        if got["drop"] > 0.1:
            notes.append(f"collapsed in {runtime}, not timed")
        if "same_file_as" in got:
            notes.append(f"same bytes as {got['same_file_as']}")
    size = f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else ""
    text = "; ".join(dict.fromkeys(notes)).replace("|", "/").replace("\n", " ")
    return f"| {file} | {' | '.join(cells)} | {size} | {text} |"


def told(held: dict[str, Any]) -> str:
    if held["held"]:
        return "no peer's file is both more accurate and faster"
    ways = {"beaten by": held["beaten_by"], "not known, more accurate and not raced enough:": held["more_accurate_and_not_raced"]}
    return "; ".join(f"{what} {', '.join(names)}" for what, names in ways.items() if names)

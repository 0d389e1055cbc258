"""Runs side by side: what changed in the recipe, and what that did to accuracy, latency and size, each with how sure it is.

Every run is held against the first. Where two runs predicted the very same images, accuracy is compared image by image; latency is ranked
from the processes' raw samples, and only between measurements of one machine. What cannot be compared is said to be so, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.device.files import write_atomically
from edgecnn.device.stats import compare as rank
from edgecnn.device.stats import percentile, wilson
from edgecnn.errors import IntegrityError, UsageError, printable
from edgecnn.parity import paired_interval
from edgecnn.report.page import read_result, render_tables
from edgecnn.trust.change import ALPHA, classes, flips
from edgecnn.trust.predicted import Predicted, read_predictions

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What tells two machines apart that report the same CPU.
MACHINE = ("board", "cpu", "architecture", "instruction_sets", "cores_online", "affinity", "cpu_limit", "memory_bytes", "gpus")
OWN_TIME = (
    "Each run measured latency in its own time, not taking turns with the others: what the machine did in between is in the ratio. "
    "`edgecnn bench` on the bundles lets them take turns."
)

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True, eq=False)
class Shipped:
    """What one run ships for one target.

    Attributes:
        latency: `latency_s` of the result; empty where it was not measured.
        machine: what must be equal for two latencies to be of one machine.
        classes: those that have evaluation images.
        predictions: where each image's answers lie, if the run kept them.
    """

    name: str
    runtime: str
    candidate: str
    verdict: str
    top1: float
    n: int
    size_bytes: int
    latency: dict[str, Any]
    machine: tuple[Any, ...]
    classes: frozenset[str]
    predictions: Path

    def processes(self) -> list[list[float]] | None:
        """The samples in seconds, a list for each process; None where the run did not keep which is of which."""
        samples: list[float] = self.latency["samples"]
        counts: list[int] = self.latency.get("samples_by_process") or ([len(samples)] if self.latency["processes"] == 1 else [])
        if sum(counts) != len(samples):
            return None
        ends = np.cumsum(counts).tolist()
        return [samples[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def p50(self) -> float | None:
        return percentile(self.latency["samples"], 0.5) if self.latency.get("samples") else None


@dataclass(frozen=True, eq=False)
class RunFolder:
    """One run; `settings` are its recipe's by the names that `--set` gives them, with the data's digest and the libraries' versions."""

    letter: str
    folder: Path
    name: str
    verdict: str
    settings: dict[str, Any]
    targets: list[Shipped]


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Hold every run against the first.

    Args:
        paths: run folders, or their result.json.

    Returns:
        `runs`; `changed` (`key`, and `values`, one a run); `targets` (`ships`, one of each run that has it, and `against`, one of each
        run but the first: `accuracy`, `latency`, `size_ratio`); `unmatched` targets; `remarks`.

    Raises:
        UsageError: fewer than two runs, a folder that is no run, or one that has no target in common with the first.
        IntegrityError: a result or predictions that cannot be read.
    """
    if not 2 <= len(paths) <= len(LETTERS):
        raise UsageError(f"compare: found {len(paths)} of at least two runs. Give two run folders or more, {len(LETTERS)} at most.")
    first, *others = runs = [_read(letter, path) for letter, path in zip(LETTERS, paths, strict=False)]
    pairs = {run.letter: _matched(first, run) for run in others}
    targets: list[dict[str, Any]] = []
    for ours in first.targets:
        theirs = {letter: pair[ours.name] for letter, pair in pairs.items() if ours.name in pair}
        if theirs:
            against = [{"run": letter, **_against(ours, shipped)} for letter, shipped in theirs.items()]
            ships = [_ships(letter, shipped) for letter, shipped in {first.letter: ours, **theirs}.items()]
            targets.append({"target": ours.name, "ships": ships, "against": against})
    timed = any(a["latency"]["ratio"] is not None for t in targets for a in t["against"])
    return {
        "runs": [{"run": r.letter, "folder": str(r.folder), "name": r.name, "verdict": r.verdict} for r in runs],
        "changed": _changed(runs),
        "targets": targets,
        "unmatched": [
            *({"run": first.letter, "target": t.name} for t in first.targets if not any(t.name in pair for pair in pairs.values())),
            *({"run": r.letter, "target": t.name} for r in others for t in r.targets if t not in pairs[r.letter].values()),
        ],
        "remarks": [OWN_TIME] if timed else [],
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """What `compare` found, as title, head and rows of text: what the terminal and the page show."""
    letters = tuple(run["run"] for run in found["runs"])
    shown: list[Table] = [
        ("runs", ("run", "folder", "recipe", "verdict"), [(r["run"], r["folder"], r["name"], r["verdict"]) for r in found["runs"]]),
        ("what changed", ("key", *letters), [(c["key"], *map(_text, c["values"])) for c in found["changed"]] or [("nothing",)]),
        (
            "what ships",
            ("target", "run", "runtime", "file", "top-1", "images", "p50 ms", "MB", "verdict"),
            [
                (
                    s["name"],
                    s["run"],
                    s["runtime"],
                    s["file"],
                    f"{s['top1']:.2%}",
                    str(s["n"]),
                    "-" if s["p50_s"] is None else f"{s['p50_s'] * 1e3:.3g}",
                    f"{s['size_bytes'] / 1e6:.2f}",
                    s["verdict"],
                )
                for t in found["targets"]
                for s in t["ships"]
            ],
        ),
        (
            f"against {letters[0]}",
            ("target", "run", "of", "change", "interval", "what it says"),
            [row for t in found["targets"] for a in t["against"] for row in _lines(t["target"], a)],
        ),
    ]
    if found["unmatched"]:
        shown.append(("not compared", ("target", "run"), [(u["target"], u["run"]) for u in found["unmatched"]]))
    return [(title, head, [tuple(map(printable, row)) for row in rows]) for title, head, rows in shown]


def write_page(found: dict[str, Any], html: Path) -> None:
    """The same as one HTML file without scripts; `html` appears whole or not at all."""
    write_atomically(html, render_tables("edgecnn: runs compared", tables(found), found["remarks"]).encode())


def _read(letter: str, path: Path) -> RunFolder:
    file = path / "result.json" if path.is_dir() else path
    result = read_result(file)
    try:
        machine, devices = result["environment"]["machine"], {t["name"]: t.get("device") for t in result["recipe"]["targets"]}
        facts = tuple(str(machine.get(key)) for key in MACHINE)
        targets = []
        for t in result["targets"]:
            name = str(t["name"])
            if Path(name).name != name:
                raise ValueError(f"a target named {name!r}")
            # Of a board, its address and CPU; of this machine, what it told about itself.
            place = (t["where"].rpartition(f", {t['runtime']}")[0], *(() if devices.get(name) else facts))
            latency = t.get("latency_s", {})
            if latency:
                latency = {**latency, "samples": [float(s) for s in latency["samples"]], "processes": int(latency["processes"])}
            targets.append(
                Shipped(
                    name,
                    str(t["runtime"]),
                    str(t["candidate"]),
                    str(t["verdict"]),
                    float(t["top1"]),
                    int(t["n"]),
                    int(t["size_bytes"]),
                    latency,
                    place,
                    frozenset(str(c["label"]) for c in t["per_class"]),
                    file.parent / "predictions" / f"{name}.npz",
                )
            )
        settings = dict(_flat({**result["recipe"], "versions": result["environment"]["versions"]}))
        settings["data.digest"] = str(result["data"]["digest"])[:16]
        return RunFolder(letter, path, str(result["name"]), str(result["verdict"]), settings, targets)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise IntegrityError(
            f"{file}: not a whole result of a run ({type(fault).__name__}: {fault}). Run `edgecnn compress` again to write it anew."
        ) from None


def _matched(first: RunFolder, run: RunFolder) -> dict[str, Shipped]:
    """The run's target for each of the first's, by name, else the first that is left of the same runtime."""
    by_name = {t.name: t for t in run.targets}
    found = {t.name: by_name.pop(t.name) for t in first.targets if t.name in by_name}
    for ours in first.targets:
        left = [t for t in by_name.values() if t.runtime == ours.runtime]
        if ours.name not in found and left:
            found[ours.name] = by_name.pop(left[0].name)
    if not found:
        have = [", ".join(f"{t.name} ({t.runtime})" for t in r.targets) or "none" for r in (first, run)]
        raise UsageError(
            f"{run.folder}: no target in common with {first.folder}: {have[1]}, and {have[0]}. "
            "Compare runs that share a target's name or its runtime."
        )
    return found


def _ships(letter: str, t: Shipped) -> dict[str, Any]:
    return {
        "run": letter,
        "name": t.name,
        "runtime": t.runtime,
        "file": t.candidate,
        "top1": t.top1,
        "n": t.n,
        "p50_s": t.p50(),
        "size_bytes": t.size_bytes,
        "verdict": t.verdict,
    }


def _against(ours: Shipped, theirs: Shipped) -> dict[str, Any]:
    return {
        "accuracy": _accuracy(ours, theirs),
        "latency": _latency(ours, theirs),
        "size_ratio": theirs.size_bytes / max(1, ours.size_bytes),
    }


def _accuracy(ours: Shipped, theirs: Shipped) -> dict[str, Any]:
    """`change` of top-1 (positive is better) with its 95 % `interval`, and `verdict`.

    Paired: exact McNemar, and Bonett and Price's interval. Otherwise Newcombe's hybrid score interval (Statistics in Medicine 17, 1998,
    method 10) of two independent shares.
    """
    pair, why = _paired(ours, theirs)
    if pair:
        before, after = pair
        found = flips(before.labels, before.after, after.after)
        low, high = paired_interval(found["lost"], found["won"], found["n"])
        paid = classes(before.labels, before.after, after.after, before.names)["flagged"]
        change, interval, sure = (found["won"] - found["lost"]) / found["n"], (-high, -low), found["p"] < ALPHA
        told: dict[str, Any] = {"paired": True, "flips": found, "flagged": paid}
    else:
        (l1, u1), (l2, u2) = (wilson(round(t.top1 * t.n), t.n) for t in (ours, theirs))
        change = theirs.top1 - ours.top1
        interval = change - math.hypot(theirs.top1 - l2, u1 - ours.top1), change + math.hypot(u2 - theirs.top1, ours.top1 - l1)
        sure = not interval[0] <= 0 <= interval[1]
        told = {"paired": False, "why": why}
        if not (ours.classes <= theirs.classes or theirs.classes <= ours.classes):
            sure, told["why"] = False, "the classes differ: another task"
    verdict = ("better" if change > 0 else "worse") if sure else "cannot tell"
    return {"verdict": verdict, "change": change, "interval": list(interval), **told}


def _paired(ours: Shipped, theirs: Shipped) -> tuple[tuple[Predicted, Predicted] | None, str]:
    """Both files' answers to the same images in the same order, or why there are none."""
    both = []
    for t in (ours, theirs):
        told = read_predictions(t.predictions)
        if told is None:
            return None, f"{t.predictions} is not there"
        if len(told.labels) != t.n or not math.isclose(float((told.after.top1 == told.labels).mean()), t.top1, abs_tol=1e-6):
            return None, f"{t.predictions} is not of this result"
        if told.labels.min() < 0 or told.labels.max() >= len(told.names):
            return None, f"{t.predictions} has labels without a name"
        both.append(_sorted(told))
    before, after = both
    if before.names != after.names:
        return None, "the classes or their order differ"
    if before.contents != after.contents:
        shared = len(set(before.contents) & set(after.contents))
        return None, f"the evaluation images differ: {shared} of {len(before.contents)} and {len(after.contents)} are in both"
    if not np.array_equal(before.labels, after.labels):
        return None, "the labels of the images differ"
    return (before, after), ""


def _sorted(told: Predicted) -> Predicted:
    """In the order of the images' digests, which does not depend on the run."""
    order = sorted(range(len(told.labels)), key=lambda i: (told.contents[i], told.labels[i]))
    before, after = (type(p)(p.top1[order], p.confidence[order]) for p in (told.before, told.after))
    return Predicted(tuple(told.contents[i] for i in order), told.labels[order], before, after, told.names)


def _latency(ours: Shipped, theirs: Shipped) -> dict[str, Any]:
    """`verdict` about `theirs`, `ratio` of its p50 with the interval at 99 %, and `reason` where it cannot be told."""

    def cannot(reason: str) -> dict[str, Any]:
        return {"verdict": "cannot tell", "ratio": None, "low": None, "high": None, "reason": reason}

    both = (ours, theirs)
    if any(not t.latency for t in both):
        return cannot("not measured in " + (" and ".join(w for w, t in zip(("the first", "this one"), both, strict=True) if not t.latency)))
    if ours.machine != theirs.machine:
        return cannot("measured on different machines")
    threads = [t.latency.get("threads") for t in both]
    if threads[0] != threads[1]:
        return cannot(f"measured with {threads[0]} and {threads[1]} threads")
    for t in both:
        unsteady = [d for d in t.latency.get("doubts", []) if str(d).startswith("unsteady")]
        if t.latency.get("void") or unsteady:
            return cannot(f"the measurement is void: {t.latency['void']}" if t.latency.get("void") else str(unsteady[0]))
    samples = [t.processes() for t in both]
    if samples[0] is None or samples[1] is None:
        return cannot("an older edgecnn did not keep which samples are of which process: run its `edgecnn compress` again")
    found = asdict(rank(samples[0], samples[1]))
    if found["ratio"] is None:
        found["reason"] += ": set bench.processes in the recipe"
    return found


def _changed(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [{"key": key, "values": [run.settings.get(key) for run in runs]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"][1:])]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by the names that `--set` gives them; a target by its name, so that order changes nothing."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _flat(v, f"{key}.{k}" if key else str(k))
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        for i, v in enumerate(value):
            yield from _flat(v, f"{key}.{v['name']}" if key == "targets" else f"{key}[{i}]")
    else:
        yield key, value


def _lines(target: str, a: dict[str, Any]) -> list[tuple[str, ...]]:
    """Accuracy, latency and size of one run's target against the first's."""
    accuracy, latency = a["accuracy"], a["latency"]
    if accuracy["paired"]:
        f = accuracy["flips"]
        how = (
            f"McNemar p {f['p']:.2g} on the same {f['n']} images; {f['changed']} answers changed: "
            f"{f['lost']} lost, {f['won']} won, {f['wrong_differently']} wrong differently"
        )
        how += f"; lost more than their share: {', '.join(accuracy['flagged'])}" if accuracy["flagged"] else ""
    else:
        how = f"unpaired, {accuracy['why']}"
    low, high = (100 * end for end in accuracy["interval"])
    spread = "" if latency["low"] is None else f"{latency['low']:.3g} to {latency['high']:.3g}"
    ratio, size = latency["ratio"], a["size_ratio"]
    says = latency["verdict"] + (f": {latency['reason']}" if latency["reason"] else "")
    change = f"{100 * accuracy['change']:+.2f} points"
    what = "same" if size == 1 else "smaller" if size < 1 else "larger"
    return [
        (
            target,
            a["run"],
            "top-1",
            change,
            f"{low:+.2f} to {high:+.2f}",
            f"{accuracy['verdict']}: {how}",
        ),
        (target, a["run"], "latency", "-" if ratio is None else f"{ratio:.3g}x", spread, says),
        (target, a["run"], "size", f"{size:.3g}x", "", what),
    ]


def _text(value: Any) -> str:
    return "-" if value is None else str(value)

"""Runs and bundles side by side: what changed in the recipe, and what that did to accuracy, latency and size, each with how sure it is.

Each is held against the first. Where two predicted the very same images, accuracy is compared image by image; latency is ranked from the
processes' raw samples, and only between measurements of one machine. What cannot be compared is said to be so, with the reason.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.device.bundle import MANIFEST
from edgecnn.device.evaluate import accuracy
from edgecnn.device.machine import NOT_AVAILABLE
from edgecnn.device.packed import Packed, open_packed
from edgecnn.device.spec import read_manifest
from edgecnn.device.stats import compare as rank
from edgecnn.device.stats import wilson
from edgecnn.errors import UsageError, printable
from edgecnn.measure import evaluate
from edgecnn.parity import paired_interval
from edgecnn.report.page import render_tables, write_html
from edgecnn.screen import Screen
from edgecnn.shipped import Shipped, Side, read_side
from edgecnn.targets.tensorrt import gpu_here
from edgecnn.trust.change import ALPHA, Predictions, classes, flips
from edgecnn.trust.predicted import Predicted, read_predictions

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OWN_TIME = (
    "Each run measured latency in its own time, not taking turns with the others: what the machine did in between is in the ratio. "
    "`edgecnn bench` on the bundles lets them take turns."
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, and below them what does not fit into a cell; without rows, only that."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def compare(paths: Sequence[Path], data: Path | None = None, screen: Screen | None = None) -> dict[str, Any]:
    """Hold each of `paths` against the first.

    Args:
        paths: run folders or their result.json, and bundles, in any mix.
        data: prepared images on which every bundle is run, so that accuracy is of the same images; None takes what was kept.
        screen: where it is told that bundles are run.

    Returns:
        `runs`; `changed` (`key`, and `values`, one a run); `targets` (`ships`, one of each run that has it, and `against`, one of each
        run but the first: `accuracy`, `latency`, `size_ratio`); `unmatched` targets; `remarks`. A bundle is a run of one target, whose
        `verdict` is None.

    Raises:
        UsageError: fewer than two, one that is neither run nor bundle, or that has no target in common with the first.
        IntegrityError: a result, predictions or a bundle that cannot be read or is not as it was made.
        DeviceError: a bundle cannot be run on `data`.
    """
    if not 2 <= len(paths) <= len(LETTERS):
        raise UsageError(f"compare: found {len(paths)} of at least two. Give two run folders or bundles or more, {len(LETTERS)} at most.")
    first, *others = sides = [read_side(letter, path) for letter, path in zip(LETTERS, paths, strict=False)]
    pairs = {side.letter: _matched(first, side) for side in others}
    images = None if data is None else open_packed(data, check=True)
    targets: list[dict[str, Any]] = []
    for ours in first.targets:
        shipped = [ours, *(pair[ours.name] for pair in pairs.values() if ours.name in pair)]
        if len(shipped) > 1:
            shipped = shipped if images is None else [_answered(t, images, screen or Screen(quiet=True)) for t in shipped]
            against = [{"run": t.side, "name": t.name, **_against(shipped[0], t)} for t in shipped[1:]]
            targets.append({"target": ours.name, "ships": list(map(_ships, shipped)), "against": against})
    timed = any(a["latency"]["ratio"] is not None for t in targets for a in t["against"])
    judged = [] if images is None else [f"Accuracy: each bundle was run here on the {len(images)} images of {data}."]
    return {
        "runs": [{"run": s.letter, "folder": str(s.path), "name": s.name, "verdict": s.verdict} for s in sides],
        "changed": _changed(sides),
        "targets": targets,
        "unmatched": [
            *({"run": first.letter, "target": t.name} for t in first.targets if not any(t.name in pair for pair in pairs.values())),
            *({"run": s.letter, "target": t.name} for s in others for t in s.targets if t not in pairs[s.letter].values()),
        ],
        "remarks": [*judged, *([OWN_TIME] if timed else [])],
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """What `compare` found: what the terminal and the page show."""
    letters = tuple(run["run"] for run in found["runs"])
    ships = [s for t in found["targets"] for s in t["ships"]]
    against = [(t["target"] + (f", {a['name']}" if a["name"] != t["target"] else ""), a) for t in found["targets"] for a in t["against"]]
    runs: list[tuple[str, ...]] = [(r["run"], r["folder"], r["name"], _known(r["verdict"])) for r in found["runs"]]
    whole = all(run["verdict"] is not None for run in found["runs"])
    nothing = "Nothing: the same recipe, the same data and the same versions of the libraries."
    nothing = nothing if whole else "Nothing, as far as the bundles tell: they do not hold the recipe, but its digest."
    changed = [(c["key"], *map(_text, c["values"])) for c in found["changed"]]
    shown = [
        Table("what is compared", ("which", "folder", "recipe", "verdict"), runs, []),
        Table("what changed in the recipe", ("key", *letters), changed, [] if changed else [nothing]),
        Table(
            "what ships",
            ("target", "which", "runtime", "file", "top-1", "images", "p50 ms", "MB", "verdict"),
            list(map(_shipped_row, ships)),
            [f"latency of {s['run']}, {s['name']}: void, so not shown: {s['void'].partition(';')[0]}" for s in ships if s["void"]],
        ),
        Table(
            f"against {letters[0]}",
            ("target", "which", "of", "change", "interval", "verdict"),
            [row for target, a in against for row in _rows(target, a)],
            [note for target, a in against for note in _notes(target, a)],
        ),
    ]
    if found["unmatched"]:
        shown.append(Table("not compared", ("target", "which"), [(u["target"], u["run"]) for u in found["unmatched"]], []))
    return [replace(t, rows=[tuple(map(printable, row)) for row in t.rows], notes=list(map(printable, t.notes))) for t in shown]


def write_page(found: dict[str, Any], html: Path) -> None:
    """The same as one HTML file without scripts; `html` appears whole or not at all."""
    write_html(html, render_tables("edgecnn: side by side", tables(found), found["remarks"]))


def _matched(first: Side, side: Side) -> dict[str, Shipped]:
    """The side's target for each of the first's, by name, else the first that is left of the same runtime; two bundles always meet."""
    if first.recipe is None and side.recipe is None:
        return {first.targets[0].name: side.targets[0]}
    by_name = {t.name: t for t in side.targets}
    found = {t.name: by_name.pop(t.name) for t in first.targets if t.name in by_name}
    for ours in first.targets:
        left = [t for t in by_name.values() if t.runtime == ours.runtime]
        if ours.name not in found and left:
            found[ours.name] = by_name.pop(left[0].name)
    if not found:
        have = [", ".join(f"{t.name} ({t.runtime})" for t in s.targets) or "none" for s in (first, side)]
        raise UsageError(
            f"{side.path}: no target in common with {first.path}: {have[1]}, and {have[0]}. "
            "Compare runs that share a target's name or its runtime, or two bundles."
        )
    return found


def _answered(t: Shipped, images: Packed, screen: Screen) -> Shipped:
    """What is shipped, with its accuracy and its answers on `images`, which its bundle is run on here."""
    manifest = read_manifest(t.bundle / MANIFEST)
    screen.say(f"{t.side}: {t.bundle} on {len(images)} images")
    stand_in = "onnxruntime" if t.runtime == "tensorrt" and not gpu_here() else None  # the same graph, for accuracy only
    with tempfile.TemporaryDirectory() as work:
        evaluate(t.bundle, images.folder, Path(work) / "logits.npy", threads=1, runtime=stand_in)
        logits = np.load(Path(work) / "logits.npy", allow_pickle=False)
    contents = tuple(hashlib.sha256(images.one(i).tobytes()).hexdigest() for i in range(len(images)))
    told, got = Predictions.of(logits), accuracy(logits, images.labels)
    return replace(t, top1=got.top1, n=got.n, answers=Predicted(contents, images.labels, told, told, manifest.labels))


def _ships(t: Shipped) -> dict[str, Any]:
    return {
        "run": t.side,
        "name": t.name,
        "runtime": t.runtime,
        "file": t.candidate,
        "top1": t.top1,
        "n": t.n,
        "p50_s": t.p50(),
        "void": str(t.latency.get("void", "")),
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
    """`change` of top-1 (positive is better) with its 95 % `interval`, None between two tasks, and `verdict`.

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
        if not found["changed"]:
            return {"verdict": "same", "change": change, "interval": list(interval), **told}
    elif not (ours.classes <= theirs.classes or theirs.classes <= ours.classes):
        return {"verdict": "cannot tell", "change": None, "interval": None, "paired": False, "why": "the classes differ: another task"}
    else:
        (l1, u1), (l2, u2) = (wilson(round(t.top1 * t.n), t.n) for t in (ours, theirs))
        change = theirs.top1 - ours.top1
        interval = change - math.hypot(theirs.top1 - l2, u1 - ours.top1), change + math.hypot(u2 - theirs.top1, ours.top1 - l1)
        sure = not interval[0] <= 0 <= interval[1]
        told = {"paired": False, "why": why}
    verdict = ("better" if change > 0 else "worse") if sure else "cannot tell"
    return {"verdict": verdict, "change": change, "interval": list(interval), **told}


def _paired(ours: Shipped, theirs: Shipped) -> tuple[tuple[Predicted, Predicted] | None, str]:
    """Both files' answers to the same images in the same order, or why there are none."""
    both = []
    for t in (ours, theirs):
        told = t.answers or read_predictions(t.predictions)
        if told is None:
            return None, f"{t.predictions} is not there; with --data, both are run on the same images"
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
    """`verdict` about `theirs`, `ratio` of its p50 with its interval, and `reason` where it cannot be told."""

    def cannot(reason: str) -> dict[str, Any]:
        return {"verdict": "cannot tell", "ratio": None, "low": None, "high": None, "reason": reason}

    both = (ours, theirs)
    if missing := [t.side for t in both if not t.latency]:
        return cannot(f"not measured in {' and '.join(missing)}")
    if void := [t.side for t in both if t.latency.get("void")]:
        return cannot(f"the measurement of {' and '.join(void)} is void")
    if kept := [t.side for t in both if not t.latency.get("samples")]:
        return cannot(f"the bundle {' and '.join(kept)} keeps no raw samples: `edgecnn bench {ours.bundle} {theirs.bundle}` measures both")
    if ours.machine != theirs.machine:
        return cannot("measured on different machines")
    threads = [t.latency.get("threads") for t in both]
    if threads[0] != threads[1]:
        return cannot(f"measured with {threads[0]} and {threads[1]} threads")
    for t in both:
        if unsteady := [str(d) for d in t.latency.get("doubts", []) if str(d).startswith("unsteady")]:
            return cannot(f"{t.side} is {unsteady[0]}")
    samples = [t.processes() for t in both]
    if samples[0] is None or samples[1] is None:
        return cannot("an older edgecnn did not keep which samples are of which process: run its `edgecnn compress` again")
    found = asdict(rank(samples[0], samples[1]))
    if found["ratio"] is None:
        found["reason"] += ": set bench.processes in the recipe"
    return found


def _changed(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The keys whose values differ among those who know them: None where a recipe has no such key."""
    bundles = any(side.recipe is None for side in sides)
    known = [{**(s.recipe or {}), **(s.made_from if bundles else {}), **s.common} for s in sides]
    rows = []
    for key in dict.fromkeys(key for settings in known for key in settings):
        values = [k.get(key, None if s.recipe is not None else NOT_AVAILABLE) for s, k in zip(sides, known, strict=True)]
        told = [value for value in values if value != NOT_AVAILABLE]
        if any(value != told[0] for value in told[1:]):
            rows.append({"key": key, "values": values})
    return rows


def _shipped_row(s: dict[str, Any]) -> tuple[str, ...]:
    p50 = "void" if s["void"] else "-" if s["p50_s"] is None else f"{s['p50_s'] * 1e3:.3g}"
    size = f"{s['size_bytes'] / 1e6:.2f}"
    return (s["name"], s["run"], s["runtime"], s["file"], f"{s['top1']:.2%}", str(s["n"]), p50, size, _known(s["verdict"]))


def _rows(target: str, a: dict[str, Any]) -> list[tuple[str, ...]]:
    """Accuracy, latency and size of one run's target against the first's."""
    accuracy, latency, size = a["accuracy"], a["latency"], a["size_ratio"]
    points = "-" if accuracy["change"] is None else f"{100 * accuracy['change']:+.2f} points"
    ends = "" if accuracy["interval"] is None else "{:+.2f} to {:+.2f}".format(*(100 * end for end in accuracy["interval"]))
    spread = "" if latency["low"] is None else f"{latency['low']:.3g} to {latency['high']:.3g}"
    ratio = "-" if latency["ratio"] is None else f"{latency['ratio']:.3g}x"
    what = "same" if size == 1 else "smaller" if size < 1 else "larger"
    return [
        (target, a["run"], "top-1", points, ends, accuracy["verdict"]),
        (target, a["run"], "latency", ratio, spread, latency["verdict"]),
        (target, a["run"], "size", f"{size:.3g}x", "", what),
    ]


def _notes(target: str, a: dict[str, Any]) -> list[str]:
    """How its accuracy was compared, and why its latency was not."""
    accuracy, reason = a["accuracy"], a["latency"]["reason"]
    if accuracy["paired"]:
        f = accuracy["flips"]
        counts = f": {f['lost']} lost, {f['won']} won, {f['wrong_differently']} wrong differently" if f["changed"] else ""
        answers = "1 answer" if f["changed"] == 1 else f"{f['changed'] or 'no'} answers"
        how = f"McNemar p {f['p']:.2g} on the same {f['n']} images; {answers} changed{counts}"
        how += f"; lost more than their share: {', '.join(accuracy['flagged'])}" if accuracy["flagged"] else ""
    else:
        how = f"unpaired, {accuracy['why']}"
    return [f"top-1 of {a['run']}, {target}: {how}", *([f"latency of {a['run']}, {target}: {reason}"] if reason else [])]


def _known(value: Any) -> str:
    return NOT_AVAILABLE if value is None else str(value)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)

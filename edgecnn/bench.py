"""Several contenders against each other: fresh processes in random order, and a verdict that never ranks noise.

A process that was disturbed (`Result.void`) is measured again, at most as often as it was to be measured at all; void ones are kept in
the record and count for nothing. What makes a result void is what the machine did, never the time that came out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgecnn import measure
from edgecnn.device.bench import energy_lines
from edgecnn.device.bundle import verify_bundle
from edgecnn.device.graph import bare_manifest
from edgecnn.device.limit import Distance, checked, text
from edgecnn.device.profile import Profile, table
from edgecnn.device.spec import SCHEMA, Result
from edgecnn.device.stats import compare, estimate, processes_needed, spread, summarise
from edgecnn.errors import DeviceError, UsageError, printable
from edgecnn.remote import Board
from edgecnn.screen import Screen

Ranking = Literal["faster", "slower", "cannot tell", "unsteady", "void"]


@dataclass(frozen=True)
class Contender:
    """A bundle or bare model file, and the threads it gets."""

    name: str
    path: Path
    threads: int


@dataclass(frozen=True)
class Verdict:
    """A contender against the baseline: `ratio` is its time over the baseline's, with an interval of 99 %; None where there is none."""

    baseline: str
    contender: str
    verdict: Ranking
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.ratio is None or self.low is None or self.high is None:
            return f"{self.contender} against {self.baseline}: {self.verdict} ({self.reason})"
        interval = f"{self.low:.3f} to {self.high:.3f}"
        if self.verdict in ("faster", "slower"):
            return f"{self.contender} is {self.verdict} than {self.baseline}: {self.ratio:.3f} of its time (99 % interval {interval})"
        told = f"{self.ratio:.3f} of its time, 99 % interval {interval}"
        return f"{self.contender} against {self.baseline}: {self.verdict}; {told} ({self.reason})"


@dataclass(frozen=True)
class Comparison:
    """All that was measured, in the order of `contenders`; `void` are the results that count for nothing."""

    contenders: tuple[Contender, ...]
    results: dict[str, list[Result]]
    void: dict[str, list[Result]]
    verdicts: tuple[Verdict, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "contenders": [
                {
                    "name": c.name,
                    "path": str(c.path),
                    "threads": c.threads,
                    "latency_s": summarise(*(r.samples_s for r in self.results[c.name])) if self.results[c.name] else None,
                    "results": [asdict(r) for r in self.results[c.name]],
                    "void": [asdict(r) for r in self.void[c.name]],
                }
                for c in self.contenders
            ],
            "verdicts": [asdict(v) for v in self.verdicts],
        }


def contenders_of(paths: Sequence[Path], threads: Sequence[int]) -> list[Contender]:
    """One for each file and number of threads, under names that tell them apart; every bundle is verified.

    Raises:
        EdgecnnError: a path is neither a whole bundle nor a model file.
    """
    for path in paths:
        if path.is_file():
            bare_manifest(path)
        else:
            verify_bundle(path)
    bases = [path.resolve().name if path.is_dir() else path.name for path in paths]
    if len(set(bases)) < len(bases):  # as far up as it takes
        bases = [str(path) for path in paths]
    if len(set(bases)) < len(bases):  # the same file twice: an A/A test
        bases = [f"{base} #{i}" for i, base in enumerate(bases, 1)]
    bases = [printable(base) for base in bases]
    many = len(set(threads)) > 1
    return [
        Contender(f"{base}, {n} thread{'s' * (n > 1)}" if many else base, path, n)
        for n in dict.fromkeys(threads)
        for base, path in zip(bases, paths, strict=True)
    ]


def race(
    contenders: Sequence[Contender],
    once: Callable[[Contender], Result],
    *,
    processes: int,
    seed: int,
    screen: Screen,
) -> Comparison:
    """Measure every contender `processes` times, taking turns, and judge each against the first.

    Args:
        contenders: with different names; the first is the baseline, and with several numbers of threads the first of each number.
        once: measures one of them in a fresh process.
        processes: that are to count, for each.
        seed: of the order.
        screen: where progress is shown.
    """
    by_name = {c.name: c for c in contenders}
    order = random.Random(seed)
    good: dict[str, list[Result]] = {name: [] for name in by_name}
    void: dict[str, list[Result]] = {name: [] for name in by_name}
    total = processes * len(by_name)
    with screen.bar("bench", total) as bar:
        for _ in range(2 * processes):
            left = [name for name in by_name if len(good[name]) < processes]
            if not left:
                break

            def told(name: str) -> None:
                disturbed = sum(map(len, void.values()))
                bar(sum(map(len, good.values())), name + (f", {disturbed} disturbed" if disturbed else ""))

            for name, (result,) in measure.interleaved(left, lambda name: once(by_name[name]), 1, order, told).items():
                (void if result.void else good)[name].append(result)
        bar(sum(map(len, good.values())), "")
    verdicts = []
    for c in contenders:
        first = next((b for b in contenders if b.threads == c.threads), c)
        baseline = contenders[0] if first is c else first
        if baseline is not c:
            verdicts.append(judge(baseline.name, c.name, good, void, processes))
    return Comparison(tuple(contenders), good, void, tuple(verdicts))


def judge(baseline: str, contender: str, good: dict[str, list[Result]], void: dict[str, list[Result]], processes: int) -> Verdict:
    """The verdict on `contender` from the results that count, and why there is none from those that do not."""
    both = (baseline, contender)
    if any(void[name] and len(good[name]) < processes for name in both):
        reasons = dict.fromkeys(r.void for name in both for r in void[name])
        return Verdict(baseline, contender, "void", reason=next(iter(reasons)))
    for name in both:
        unsteady = [doubt for r in good[name] for doubt in r.doubts if doubt.startswith("unsteady")]
        if 2 * len(unsteady) > len(good[name]):
            return Verdict(baseline, contender, "unsteady", reason=f"{name}: {unsteady[0].removeprefix('unsteady: ')}")
    found = compare([r.samples_s for r in good[baseline]], [r.samples_s for r in good[contender]])
    reason = found.reason
    if found.ratio is None:
        reason = f"it takes {processes_needed(found.confidence)} processes of each: --processes {processes_needed(found.confidence)}"
    return Verdict(baseline, contender, found.verdict, found.ratio, found.low, found.high, reason)


def bench(
    paths: Sequence[Path],
    *,
    threads: Sequence[int],
    batch: int,
    seconds: float,
    processes: int,
    options: Sequence[str],
    screen: Screen,
    board: Board | None = None,
    seed: int | None = None,
) -> Comparison:
    """Measure bundles and bare model files against each other, here or on a board."""

    def once(contender: Contender) -> Result:
        words = ("--threads", contender.threads, "--batch", batch, "--seconds", seconds, *options)
        return measure.bench(contender.path, *words, board=board)

    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    return race(contenders_of(paths, threads), once, processes=processes, seed=seed, screen=screen)


def numbers(text: str) -> list[int]:
    """[1, 2, 4] for "1,2,4".

    Raises:
        UsageError: it is something else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise UsageError(f"--threads {text}: give whole numbers from 1 to 1024, as in --threads 1,2,4.")
    return [int(part) for part in parts]


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A table of all contenders: what `HEAD` names."""
    return [_row(c, comparison.results[c.name]) for c in comparison.contenders]


HEAD = ("", "p50 ms (99 % interval)", "p90 ms", "p99 ms", "images/s", "load ms", "first ms", "memory MB", "between", "within")


def _row(contender: Contender, results: Sequence[Result]) -> tuple[str, ...]:
    if not results:
        return (contender.name, "void", *[""] * (len(HEAD) - 2))
    samples = [r.samples_s for r in results]
    cells = []
    for q in (0.5, 0.9, 0.99):
        e = estimate(samples, q)
        if e.value is None or e.low is None or e.high is None:
            cells.append(f"takes {e.needed} calls")
        else:
            cells.append(_ms(e.value) + (f" ({_ms(e.low)} to {_ms(e.high)})" if q == 0.5 else ""))
    rate = results[0].batch * sum(map(len, samples)) / math.fsum(map(math.fsum, samples))
    apart = spread(samples)
    return (
        contender.name,
        *cells,
        f"{rate:.4g}",
        _ms(float(np.median([r.load_s for r in results]))),
        _ms(float(np.median([r.first_s for r in results]))),
        _memory(results),
        "" if apart.between is None else f"{apart.between:.1%}",
        f"{apart.within:.1%}",
    )


def _memory(results: Sequence[Result]) -> str:
    """Peak, and how much of it came after the runtime was imported and before anything was loaded."""
    peak = max(r.peak_rss_bytes for r in results)
    above = [
        r.peak_rss_bytes - r.circumstances["rss_before_load_bytes"]
        for r in results
        if _is_size(r.circumstances.get("rss_before_load_bytes"))
    ]
    return f"{peak / 1e6:.0f}" + (f" (+{max(above) / 1e6:.0f})" if above else "")


def _is_size(value: Any) -> bool:
    return isinstance(value, int)


def remarks(comparison: Comparison) -> list[str]:
    """Verdicts, doubts and what was measured again, each as a line."""
    lines = [str(v) for v in comparison.verdicts]
    for c in comparison.contenders:
        doubts = dict.fromkeys(doubt for r in comparison.results[c.name] for doubt in r.doubts)
        lines += [f"doubt: {c.name}: {printable(doubt)}" for doubt in list(doubts)[:3]]
        void = comparison.void[c.name]
        lines += [f"{c.name}: {printable(line)}" for line in _energy(comparison.results[c.name])]
        if void:
            lines.append(f"void: {c.name}: {len(void)} processes do not count: {printable(void[0].void)}")
    return lines


def _energy(results: Sequence[Result]) -> list[str]:
    """Energy by each meter, the median of the processes."""
    told = [r for r in results if r.energy != "not measured"]
    seen: dict[str, list[dict[str, Any]]] = {}
    for result in told:
        for each in result.energy if isinstance(result.energy, tuple) else ():
            seen.setdefault(each["source"], []).append(each)
    if not seen:
        return energy_lines(told[0]) if told else []
    medians = []
    for source, entries in seen.items():
        known = {name: [e[name] for e in entries if e[name] is not None] for name in ("idle_w", "working_w", "per_inference_j")}
        medians.append({"source": source, **{name: float(np.median(each)) if each else None for name, each in known.items()}})
    return energy_lines(replace(told[0], energy=tuple(medians)))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def profiles(
    paths: Sequence[Path], *, threads: int, batch: int, seconds: float, options: Sequence[str], board: Board | None = None
) -> list[Profile]:
    """Where the time goes in each file, each in a process of its own."""
    found = []
    for contender in contenders_of(paths, [threads]):
        words = ("--profile", "--threads", threads, "--batch", batch, "--seconds", seconds, *options)
        answer = measure.device("bench", contender.path, *words, board=board)
        try:
            found.append(replace(Profile.from_json(answer), file=contender.name))
        except (TypeError, KeyError):
            raise DeviceError(f"{contender.path}: the answer is no profile. Is the board's Python sound?") from None
    return found


def distances(
    paths: Sequence[Path], *, threads: int, batch: int, seconds: float, options: Sequence[str], board: Board | None = None
) -> list[Distance]:
    """How far each file is from what the machine could do, each in a process of its own, which measures the machine as well.

    Raises:
        DeviceBug: one was faster than is possible.
    """
    found = []
    for contender in contenders_of(paths, [threads]):
        words = ("--distance", "--threads", threads, "--batch", batch, "--seconds", seconds, *options)
        answer = measure.device("bench", contender.path, *words, board=board)
        try:
            far = replace(Distance.from_json(answer), file=contender.name)
            checked(far.ratio, far.void)
        except (TypeError, KeyError):
            raise DeviceError(f"{contender.path}: the answer is no distance. Is the board's Python sound?") from None
        found.append(far)
    return found


def distances_text(found: Sequence[Distance]) -> str:
    """The distances for a terminal."""
    return printable("\n".join(map(text, found)), breaks="\n")


def layers_text(found: Sequence[Profile]) -> str:
    """The profiles for a terminal."""
    return printable(table(found), breaks="\n")

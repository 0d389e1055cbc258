"""Several contenders against each other: fresh processes in random order, and a verdict that never ranks noise.

A process that was disturbed (`Result.void`) is measured again, at most as often as it was to be measured at all; void ones are kept in
the record and count for nothing. What makes a result void is what the machine did, never the time that came out. One process may be
too short to see that, so all of a contender are judged together as well, from the beginning of their warm-up on.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgecnn import __version__, measure
from edgecnn.device import machine
from edgecnn.device.bench import WINDOW_S, energy_lines
from edgecnn.device.bundle import MANIFEST, SUMS, verify_bundle
from edgecnn.device.graph import bare_manifest
from edgecnn.device.limit import Distance, checked, text
from edgecnn.device.profile import Profile, table
from edgecnn.device.spec import SCHEMA, Result
from edgecnn.device.stats import compare, estimate, needed, processes_needed, spread, summarise, sureness
from edgecnn.errors import BoardError, DeviceError, ModelError, ResourceError, UsageError, printable
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
    """All that was measured, in the order of `contenders`.

    Attributes:
        void: results that count for nothing, by contender.
        failed: contenders that cannot run at all, and why.
        seed: of the order of the processes.
        where: the board's address, or "this machine".
        asked: for how many processes, what batch, seconds and runtime options.
    """

    contenders: tuple[Contender, ...]
    results: dict[str, list[Result]]
    void: dict[str, list[Result]]
    verdicts: tuple[Verdict, ...] = field(default=())
    failed: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    where: str = "this machine"
    asked: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "edgecnn": __version__,
            "where": self.where,
            "seed": self.seed,
            "asked": self.asked,
            "contenders": [
                {
                    "name": c.name,
                    "path": str(c.path),
                    "threads": c.threads,
                    "latency_s": summarise(*(r.samples_s for r in self.results[c.name])) if self.results[c.name] else None,
                    "results": [asdict(r) for r in self.results[c.name]],
                    "void": [asdict(r) for r in self.void[c.name]],
                    "failed": self.failed.get(c.name, ""),
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
        elif path.is_dir() and any((path / name).exists() for name in (MANIFEST, SUMS)):
            verify_bundle(path)
        else:
            found = "a folder, and no bundle" if path.is_dir() else "not there" if not path.exists() else "no file"
            raise ModelError(f"{path}: {found}. Give a bundle's folder, an .onnx file or an OpenVINO .xml file.")
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

    One that fails in its first process is left out, and the others go on.

    Args:
        contenders: with different names; the first is the baseline, and with several numbers of threads the first of each number.
        once: measures one of them in a fresh process.
        processes: that are to count, for each.
        seed: of the order.
        screen: where progress is shown.

    Raises:
        DeviceError: none can run, or one that could cannot any more, or the board is lost.
    """
    by_name = {c.name: c for c in contenders}
    order = random.Random(seed)
    good: dict[str, list[Result]] = {name: [] for name in by_name}
    void: dict[str, list[Result]] = {name: [] for name in by_name}
    failed: dict[str, DeviceError | ResourceError] = {}
    total = processes * len(by_name)
    with screen.bar("bench", total) as bar:
        for turn in range(2 * processes):
            left = [name for name in by_name if len(good[name]) < processes and name not in failed]
            for name in order.sample(left, len(left)):
                disturbed = sum(map(len, void.values()))
                bar(sum(map(len, good.values())), name + (f", {disturbed} disturbed" if disturbed else ""))
                try:
                    result = once(by_name[name])
                except (DeviceError, ResourceError) as fault:
                    if turn or isinstance(fault, BoardError):  # it could, or was not asked: something broke
                        raise
                    failed[name] = fault
                else:
                    (void if result.void else good)[name].append(result)
            if len(failed) == len(by_name):
                raise next(iter(failed.values()))
        bar(sum(map(len, good.values())), "")
    for c in contenders:
        if reasons := _disturbed_together(good[c.name], c.threads):
            void[c.name] += [replace(result, void=reasons) for result in good[c.name]]
            good[c.name] = []
    told = {name: str(fault) for name, fault in failed.items()}
    verdicts = []
    for c in contenders:
        first = next((b for b in contenders if b.threads == c.threads), c)
        baseline = contenders[0] if first is c else first
        if baseline is not c and (out := [name for name in (baseline.name, c.name) if name in told]):
            verdicts.append(Verdict(baseline.name, c.name, "void", reason=f"{out[0]} cannot run"))
        elif baseline is not c:
            verdicts.append(judge(baseline.name, c.name, good, void, processes))
    return Comparison(tuple(contenders), good, void, tuple(verdicts), told, seed)


def _disturbed_together(results: Sequence[Result], threads: int) -> str:
    """What others took of the machine during all of `results`, where that makes them void."""
    loads = [load for r in results if isinstance(load := r.circumstances.get("load"), dict)]
    finite = [load for load in loads if all(isinstance(v, float | int) and math.isfinite(v) for v in load.values())]  # a board may lie
    return "; ".join(machine.judge_load(finite, threads)[1])


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

    contenders = contenders_of(paths, threads)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    count = processes * len(contenders)
    screen.say(f"bench: {count} processes, each at least {seconds + WINDOW_S:g} s and {needed(0.9)} calls of batch {batch}")
    found = race(contenders, once, processes=processes, seed=seed, screen=screen)
    asked = {"processes": processes, "batch": batch, "min_time_s": seconds, "options": list(options)}
    return replace(found, where=str(board.address) if board else found.where, asked=asked)


def numbers(text: str) -> list[int]:
    """[1, 2, 4] for "1,2,4".

    Raises:
        UsageError: it is something else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise UsageError(f"--threads {text}: give whole numbers from 1 to 1024, as in --threads 1,2,4.")
    return [int(part) for part in parts]


def check_options(seconds: float, kinds: dict[str, bool], others: dict[str, object]) -> None:
    """Refuse what could only be ignored.

    Args:
        seconds: of `--min-time`.
        kinds: options that ask for something else than a race; one at most.
        others: options that only a race has, None or False where they are not given.

    Raises:
        UsageError: naming the options.
    """
    if not 0 < seconds <= 3600:
        raise UsageError(f"--min-time {seconds}: give seconds above 0, at most 3600.")
    asked = [name for name, given in kinds.items() if given]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} are two measurements. Run the command once with each.")
    ignored = [name for name, given in others.items() if given is not None and given is not False]
    if asked and ignored:
        raise UsageError(f"{asked[0]} has no {' or '.join(ignored)}. Leave out the one or the other.")


def check_all_ran(comparison: Comparison) -> None:
    """Tell, when all else is told, who could not run.

    Raises:
        DeviceError: naming them with the reason.
    """
    if comparison.failed:
        told = "; ".join(f"{name}: {why}" for name, why in comparison.failed.items())
        raise DeviceError(f"{len(comparison.failed)} of {len(comparison.contenders)} could not run. {told}")


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A table of all contenders: what `head` names."""
    return [_row(c.name, comparison) for c in comparison.contenders]


_ELSE = ("load ms", "first ms", "memory MB", "between", "within")


def head(comparison: Comparison) -> tuple[str, ...]:
    """The titles of the table; the interval is as sure as the fewest processes make it."""
    fewest = min((len(each) for each in comparison.results.values() if each), default=1)
    sure = f"{math.floor(100 * sureness(fewest))} % interval" if fewest > 1 else "interval of one process"
    return ("", f"p50 ms ({sure})", "p90 ms", "p99 ms", "images/s", *_ELSE)


def tables(comparison: Comparison) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """The same as two tables, each with its head: one would not fit a terminal of 80 columns."""
    whole, titles, cut = rows(comparison), head(comparison), -len(_ELSE)
    return [(titles[:cut], [row[:cut] for row in whole]), ((titles[0], *_ELSE), [(row[0], *row[cut:]) for row in whole])]


def _row(name: str, comparison: Comparison) -> tuple[str, ...]:
    results = comparison.results[name]
    if not results:
        return (name, "cannot run" if name in comparison.failed else "void", *[""] * (len(head(comparison)) - 2))
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
        name,
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
    """Where it was measured, doubts, what was measured again, energy, and last the verdicts, each as a line."""
    lines = _circumstances(comparison)
    for c in comparison.contenders:
        results, void = comparison.results[c.name], comparison.void[c.name]
        lines += [f"doubt: {c.name}: {printable(doubt)}" for doubt in _kinds(results)]
        if void:
            lines.append(f"void: {c.name}: {len(void)} of its processes did not count: {printable(void[0].void)}")
        lines += [f"{c.name}: {printable(line)}" for line in _energy(results)]
    return lines + [str(v) for v in comparison.verdicts]


def _circumstances(comparison: Comparison) -> list[str]:
    """Where and with what it was measured; mostly one line."""
    lines = []
    for result in (r for kind in (comparison.results, comparison.void) for each in kind.values() for r in each):
        cpu, system, runtime = (result.circumstances.get(key, machine.NOT_AVAILABLE) for key in ("cpu", "system", "runtime"))
        threads = f"{result.threads} thread{'s' * (result.threads > 1)}"
        lines.append(printable(f"{comparison.where}: {cpu}, {system}; {runtime}, {threads}, batch {result.batch}"))
    return list(dict.fromkeys(lines))


def _kinds(results: Sequence[Result]) -> list[str]:
    """Each kind of doubt once, with the figures of the first process that had it, and in how many it came up."""
    seen: dict[str, list[str]] = {}
    for result in results:
        for doubt in dict.fromkeys(result.doubts):
            seen.setdefault(re.sub(r"[\d.]+", "0", doubt), []).append(doubt)
    of = len(results)
    return [doubts[0] + (f" (so in {len(doubts)} of {of} processes)" if of > 1 else "") for doubts in seen.values()]


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


def profiles(paths: Sequence[Path], **options: Any) -> list[Profile]:
    """Where the time goes in each file with each number of threads; `options` are those of `_each`."""
    found = []
    for contender, answer in _each(paths, "--profile", **options):
        try:
            profile = replace(Profile.from_json(answer), file=contender.name)
            real = _is_real(profile)
        except (TypeError, KeyError):
            real = False
        if not real:
            raise DeviceError(f"{contender.path}: the answer is no profile. Is the board's Python sound?")
        found.append(profile)
    return found


def _is_real(profile: Profile) -> bool:
    """Whether it can be one: a board may answer anything."""
    times = (profile.steady_s, profile.profiler_s, *(layer.seconds for layer in profile.layers))
    texts = (profile.runtime, profile.void, *(text for each in profile.layers for text in (each.name, each.node, each.operator)))
    real = all(isinstance(t, float) and 0 <= t < measure.LONGEST_S for t in times) and all(isinstance(text, str) for text in texts)
    return real and profile.steady_s > 0


def distances(paths: Sequence[Path], **options: Any) -> list[Distance]:
    """How far each file is from what the machine could do, which is measured with each; `options` are those of `_each`.

    Raises:
        DeviceBug: one was faster than is possible.
    """
    found = []
    for contender, answer in _each(paths, "--distance", **options):
        try:
            far = replace(Distance.from_json(answer), file=contender.name)
            checked(far.ratio, far.void)
        except (TypeError, KeyError):
            raise DeviceError(f"{contender.path}: the answer is no distance. Is the board's Python sound?") from None
        found.append(far)
    return found


def _each(
    paths: Sequence[Path],
    what: str,
    *,
    threads: Sequence[int],
    batch: int,
    seconds: float,
    options: Sequence[str],
    screen: Screen | None = None,
    board: Board | None = None,
) -> Iterator[tuple[Contender, dict[str, Any]]]:
    """What `bench WHAT` answers of each contender, in a process of its own."""
    contenders = contenders_of(paths, threads)
    with (screen or Screen(quiet=True)).bar(what.removeprefix("--"), len(contenders)) as bar:
        for i, c in enumerate(contenders):
            bar(i, c.name)
            words = (what, "--threads", c.threads, "--batch", batch, "--seconds", seconds, *options)
            yield c, measure.device("bench", c.path, *words, board=board)


def distances_text(found: Sequence[Distance]) -> str:
    """The distances for a terminal."""
    return printable("\n".join(map(text, found)), breaks="\n")


def layers_text(found: Sequence[Profile]) -> str:
    """The profiles for a terminal."""
    return printable(table(found), breaks="\n")

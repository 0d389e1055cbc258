"""The timing loops of edgecnn.

`measure`: one contender, one process: load it, infer once, warm up until a trend test says steady, then keep every sample.
The garbage collector is off while calls are timed, as in `timeit`: a collection belongs to the program around the
model. What the machine was doing meanwhile is recorded, and doubts are drawn from it; nothing is clipped or repaired.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np

from edgecnn.device import machine
from edgecnn.device.meters import Energy, Meter, measure_energy, why_none
from edgecnn.device.runtimes import Runner
from edgecnn.device.spec import Result
from edgecnn.device.stats import estimate, needed, percentile, trend

TIMED = (
    "one call of the runtime's inference: the tensor that the file takes in (float32, or uint8 pixels), logits on the host out, "
    "the same input each time; "
    "not decoding, resizing or normalising; garbage collector off"
)

# A warm-up window is at least this many calls and this long: a governor takes tens of milliseconds to raise the clock.
WINDOW_CALLS = 10
WINDOW_S = 0.25
# After that long, and three windows at least, an unsteady machine is measured as it is, and doubted.
WARM_UP_MOST_S = 10.0

Clock = Callable[[], float]


def measure(
    open_runner: Callable[[], Runner],
    example: np.ndarray,
    *,
    file: str,
    file_sha256: str,
    runtime: str,
    threads: int,
    batch: int,
    min_seconds: float = 2.0,
    min_samples: int = needed(0.9),
    meters: Sequence[Meter] | None = None,
    clock: Clock = time.perf_counter,
    state: Callable[[], dict[str, Any]] = machine.state,
) -> Result:
    """Measure one contender in this process, which should be a fresh one that holds nothing else.

    Args:
        open_runner: loads the model. The first in a process also imports the runtime, unless that is done before.
        example: `batch` images as the file takes them.
        file: the model file's name; `file_sha256` is its digest.
        runtime: its name.
        threads: of the runtime, which `open_runner` was told as well.
        batch: images in `example`.
        min_seconds: of steady state, at least.
        min_samples: of steady state, at least; the default carries a p90.
        meters: of energy, to be read while it infers some more when the samples are taken; None measures no energy.
        clock: seconds, monotonic.
        state: what the machine is doing, as `machine.state`.
    """
    rss_before = machine.rss()
    start = clock()
    opened = open_runner()
    load_s = clock() - start
    with opened as runner, _no_garbage_collection():
        start = clock()
        runner.infer(example)
        first_s = clock() - start
        started = state()
        warmup, steady = _warm_up(runner, example, clock)
        before = state()
        samples = _run(runner, example, min_seconds, min_samples, clock)
        after = state()
        energy: list[Energy] = [] if meters is None else measure_energy(lambda: runner.infer(example), min_seconds, meters)
        provider, version = runner.provider, runner.version
    doubts, void = machine.disturbances(before, after, threads)
    load = machine.load(started, after)
    if machine.load(before, after).get("elapsed_s", 0.0) <= machine.SHORTEST_S:  # too short to be void by: what the warm-up saw is a doubt
        doubts += chain.from_iterable(machine.judge_load([load], threads))
    return Result(
        file=file,
        file_sha256=file_sha256,
        runtime=runtime,
        threads=threads,
        batch=batch,
        samples_s=tuple(samples),
        warmup_s=tuple(warmup),
        load_s=load_s,
        first_s=first_s,
        timed=TIMED,
        circumstances={
            **machine.facts(),
            "runtime": version,
            "provider": provider,
            "rss_before_load_bytes": rss_before,
            "before": before,
            "after": after,
            "load": load,
        },
        peak_rss_bytes=machine.peak_rss(),
        doubts=(*_unsteady(samples, steady), *doubts),
        void="; ".join(void),
        energy="not measured" if meters is None else tuple(map(asdict, energy)) or f"{machine.NOT_AVAILABLE}: {why_none(meters)}",
    )


def _run(runner: Runner, x: np.ndarray, seconds: float, calls: int, clock: Clock) -> list[float]:
    """Seconds of each call, until both `seconds` and `calls` are reached."""
    infer, samples = runner.infer, []
    end = clock() + seconds
    while True:
        start = clock()
        infer(x)
        stop = clock()
        samples.append(stop - start)
        if stop >= end and len(samples) >= calls:
            return samples


def _warm_up(runner: Runner, x: np.ndarray, clock: Clock) -> tuple[list[float], bool]:
    """Call until the last window shows no trend, or one below 1 %; the calls, and whether that came to pass."""
    calls: list[float] = []
    start, windows = clock(), 0
    while True:
        window = _run(runner, x, WINDOW_S, WINDOW_CALLS, clock)
        calls += window
        windows += 1
        found = trend(window)
        if found.p >= 0.05 or abs(found.drift) < 0.01:
            return calls, True
        if windows >= 3 and clock() - start >= WARM_UP_MOST_S:
            return calls, False


def take_turns(contenders: Sequence[tuple[Runner, np.ndarray]], seconds: float, clock: Clock = time.perf_counter) -> list[list[float]]:
    """Seconds of each call of loaded models, each with its input, that take turns: a machine that slows down slows all of them.

    That tells a small difference in a fraction of the time that processes of their own take, and no more than the difference.
    """
    samples: list[list[float]] = [[] for _ in contenders]
    end = clock() + seconds
    while clock() < end or len(samples[0]) < 30:
        for (runner, x), into in zip(contenders, samples, strict=True):
            runner.infer(x)  # brings its weights back into the cache
            for _ in range(3):
                start = clock()
                runner.infer(x)
                into.append(clock() - start)
    return samples


def share(samples: Sequence[float], whole: Sequence[float]) -> float:
    """What one takes of the other's time, of samples that took turns; by their 10th percentiles, which disturbances do not reach."""
    return percentile(samples, 0.1) / percentile(whole, 0.1)


def _unsteady(samples: list[float], steady: bool) -> list[str]:
    """Doubts that the samples themselves raise."""
    doubts = []
    found = trend(samples)
    if found.p < 0.01 and abs(found.drift) > 0.05:
        way = "slower" if found.drift > 0 else "faster"
        doubts.append(f"unsteady: calls got {abs(found.drift):.0%} {way} while measured. Let the machine settle, measure longer")
    elif not steady:
        doubts.append(f"unsteady: still changing after {WARM_UP_MOST_S:.0f} s of warm-up. Let the machine settle")
    late = float(np.mean(np.asarray(samples) > 2 * percentile(samples, 0.5)))
    if late > 0.01:
        doubts.append(f"{late:.1%} of the calls took over twice the median: something else ran, or its own threads are in each other's way")
    return doubts


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def summary(result: Result) -> str:
    """A few lines for a terminal."""
    lines = []
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        e = estimate([result.samples_s], q)
        if e.value is None or e.low is None or e.high is None:
            lines.append(f"{name}  withheld: it takes {e.needed} samples, {e.n} were taken")
        else:
            lines.append(f"{name}  {_ms(e.value)} ms   99 % interval of this process {_ms(e.low)} to {_ms(e.high)}")
    lines.append(
        f"load {_ms(result.load_s)} ms, first inference {_ms(result.first_s)} ms, peak memory {result.peak_rss_bytes / 1e6:.0f} MB; "
        f"{len(result.samples_s)} calls of batch {result.batch} with {result.threads} thread{'s' * (result.threads > 1)} "
        f"after {len(result.warmup_s)} to warm up"
    )
    if result.energy != "not measured":
        lines += energy_lines(result)
    lines += [f"doubt: {doubt}" for doubt in result.doubts]
    if result.void:
        lines.append(f"VOID, do not use these figures: {result.void}")
    return "\n".join(lines)


def energy_lines(result: Result) -> list[str]:
    """Energy per inference by each meter."""
    if isinstance(result.energy, str):
        return [f"energy: {result.energy}"]
    lines = []
    for each in (Energy(**told) for told in result.energy):
        above = f"{each.idle_w:.3g} W idle, {each.working_w:.3g} W working"
        joules = each.per_inference_j
        told = "does not stand out from the idle level" if joules is None else f"{1e3 * joules:.3g} mJ an inference, idle subtracted"
        lines.append(f"energy: {told} ({each.source}: {above})")
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"

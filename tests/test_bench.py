"""The timing loop, with a clock that only the runner moves: no real duration is asserted."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain, repeat
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from edgecnn.device import machine
from edgecnn.device.bench import WARM_UP_MOST_S, measure, summary
from edgecnn.device.spec import Result
from edgecnn.device.stats import compare
from edgecnn.errors import DeviceError

X = np.zeros((1, 3, 8, 8), np.float32)


class Clock:
    """Time stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Delay:
    """A runner that takes exactly the next of `durations`; entering and leaving are seen."""

    provider, version = "Fake", "fake 1.0"

    def __init__(self, clock: Clock, durations: Any, fail_at: int = -1) -> None:
        self.clock, self.durations, self.fail_at = clock, iter(durations), fail_at
        self.calls, self.closed, self.collecting = 0, False, False

    def infer(self, x: np.ndarray) -> np.ndarray:
        assert x is X
        self.collecting |= gc.isenabled() and self.calls > 0
        if self.calls == self.fail_at:
            raise DeviceError("the runtime gave up")
        self.calls += 1
        self.clock.now += next(self.durations)
        return np.zeros((1, 10), np.float32)

    def __enter__(self) -> Delay:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.closed = True


def quiet() -> dict[str, Any]:
    """A machine at rest, so that what this test machine does meanwhile has no say."""
    unknown = dict.fromkeys(("cpu_s", "waited_s", "pressure_s"), machine.NOT_AVAILABLE)
    return {**machine.state(), "throttle_events": {}, "throttled_now": [], "frequencies_hz": {"cpu0": 1e9}, **unknown}


def bench(
    durations: Any, *, state: Callable[[], dict[str, Any]] = quiet, load_s: float = 0.5, fail_at: int = -1, **options: Any
) -> tuple[Result, Delay]:
    clock = Clock()
    runner = Delay(clock, durations, fail_at)

    def open_runner() -> Delay:
        clock.now += load_s
        return runner

    told: dict[str, Any] = {"file": "m.onnx", "file_sha256": "ab", "runtime": "fake", "threads": 1, "batch": 1, "min_seconds": 1.0}
    return measure(open_runner, X, clock=clock, state=state, **{**told, **options}), runner


def test_three_numbers_are_kept_apart() -> None:
    """Load, first inference and steady state come out as they were; the slow first calls are in the warm-up alone, in order."""
    slow = [0.2, *np.linspace(0.1, 0.02, 15)]
    result, runner = bench(chain(slow, repeat(0.01)))
    assert result.load_s == pytest.approx(0.5)
    assert result.first_s == pytest.approx(0.2)
    assert result.warmup_s[:15] == pytest.approx(slow[1:])
    assert len(result.samples_s) >= 100
    assert result.samples_s == pytest.approx([0.01] * len(result.samples_s))
    assert runner.calls == 1 + len(result.warmup_s) + len(result.samples_s)
    assert (result.doubts, result.void) == ((), "")


@pytest.mark.parametrize(("duration", "at_least"), [(0.001, 1000), (0.5, 64)])
def test_both_minimums_hold(duration: float, at_least: int) -> None:
    """A quick model is measured for the time asked, a slow one for the 64 calls that a p90 takes."""
    result, _ = bench(repeat(duration))
    assert at_least <= len(result.samples_s) <= at_least + 1
    assert sum(result.samples_s) >= 1.0 - 1e-9


def test_nothing_is_clipped() -> None:
    """Outliers stay among the samples, in their place, and more than 1 % of them is a doubt."""
    rng = np.random.default_rng(0)
    noise = [*rng.normal(0.01, 1e-5, 400)]
    for i in range(100, 400, 20):
        noise[i] = 0.05
    result, _ = bench(chain(noise, repeat(0.01)), min_seconds=5.0)
    assert sum(s > 0.04 for s in (*result.warmup_s, *result.samples_s)) == 15
    assert [doubt for doubt in result.doubts if "twice the median" in doubt]


def test_drift_is_doubted() -> None:
    """A model that gets 20 % slower while it is measured is called unsteady, with how much."""
    rng = np.random.default_rng(1)
    result, _ = bench(chain(repeat(0.01, 30), np.linspace(0.01, 0.0125, 300) * rng.normal(1, 0.01, 300), repeat(0.0125)), min_seconds=3.0)
    assert len(result.doubts) == 1
    assert "slower while measured" in result.doubts[0]


def test_warm_up_ends() -> None:
    """A model that never settles is measured after the longest warm-up, and doubted."""
    durations = (0.01 * 1.002**i for i in range(10_000))
    result, _ = bench(durations)
    assert WARM_UP_MOST_S <= sum(result.warmup_s) < WARM_UP_MOST_S + 2
    assert [doubt for doubt in result.doubts if doubt.startswith("unsteady")]


def test_throttling_makes_void() -> None:
    """A throttle counter that grew between the two states makes the result void, and the summary says so."""
    counts = iter([3, 3, 4])
    result, _ = bench(repeat(0.01), state=lambda: {**quiet(), "throttle_events": {"core too hot": next(counts)}})
    assert "core too hot" in result.void
    assert "VOID" in summary(result)


def test_busy_cores_make_void() -> None:
    """With every core kept busy by others, on the kernel's own counters, the result is void and never a figure to rank by."""
    busy = {"time_s": 10.0, "own_cpu_s": 11.7, "cpu_s": {"busy": 20.0, "steal": 0.0, "total": 20.0, "cores": 2}}
    idle = {"time_s": 0.0, "own_cpu_s": 5.0, "cpu_s": {"busy": 0.0, "steal": 0.0, "total": 0.0, "cores": 2}}
    states = iter([idle, idle, busy])
    result, _ = bench(repeat(0.01), state=lambda: {**quiet(), **next(states)})
    assert "other processes" in result.void


def test_too_short_to_be_void_is_doubted() -> None:
    """Where the measured part is too short to judge, the load that the warm-up saw is a doubt, and the record holds it for the race."""
    idle = {"time_s": 0.0, "own_cpu_s": 5.0, "cpu_s": {"busy": 0.0, "steal": 0.0, "total": 0.0, "cores": 2}}
    busy = {"time_s": 0.35, "own_cpu_s": 5.2, "cpu_s": {"busy": 0.7, "steal": 0.0, "total": 0.7, "cores": 2}}
    states = iter([idle, {**busy, "time_s": 0.3}, busy])
    result, _ = bench(repeat(0.01), state=lambda: {**quiet(), **next(states)})
    assert result.void == ""
    assert [doubt for doubt in result.doubts if "other processes kept 1.4 of 2 cores" in doubt]
    assert machine.judge_load([result.circumstances["load"]], 1)[1]


def test_collector_is_off_and_comes_back() -> None:
    """No garbage collection runs among timed calls; afterwards it is as it was, also after a failure, and the runner is closed."""
    assert gc.isenabled()
    _, runner = bench(repeat(0.01))
    assert (runner.collecting, runner.closed, gc.isenabled()) == (False, True, True)
    with pytest.raises(DeviceError, match="gave up"):
        bench(repeat(0.01), fail_at=5)
    assert gc.isenabled()
    gc.disable()
    try:
        bench(repeat(0.01))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_result_carries_its_circumstances() -> None:
    """A result survives JSON unchanged and names what it ran on, before and after, and what was timed."""
    result, _ = bench(repeat(0.01))
    assert Result.from_json(json.loads(json.dumps(asdict(result)))) == result
    told = result.circumstances
    assert (told["provider"], told["runtime"]) == ("Fake", "fake 1.0")
    for name in ("cpu", "instruction_sets", "governor", "affinity", "cpu_limit", "versions", "before", "after", "rss_before_load_bytes"):
        assert name in told
    assert result.peak_rss_bytes > 0
    assert "garbage collector off" in result.timed


def test_summary_withholds() -> None:
    """The text gives p50 and p90 with intervals and withholds a p99 that 100 calls do not carry, saying what it takes."""
    text = summary(bench(repeat(0.01))[0])
    assert "p50  10 ms" in text
    assert "p90  10 ms" in text
    assert "p99  withheld: it takes 662 samples" in text


def test_equal_runners_are_not_ranked_and_a_slower_one_is(request: pytest.FixtureRequest) -> None:
    """20 comparisons of 5 noisy processes through the whole loop: A/A ranked at most once; +10 % slower in 19, its interval right in 18."""
    rng = np.random.default_rng(2)
    gc.freeze()  # the loop collects garbage before each run; what other tests left is not its business
    request.addfinalizer(gc.unfreeze)

    def contender(mean: float) -> list[tuple[float, ...]]:
        return [bench(mean * rng.lognormal(0, 0.015) * rng.lognormal(0, 0.05, 1000), min_seconds=0.5)[0].samples_s for _ in range(5)]

    rounds = [(contender(0.01), contender(0.01), contender(0.011)) for _ in range(20)]
    same = [compare(a, other) for a, other, _ in rounds]
    slower = [compare(a, b) for a, _, b in rounds]
    assert sum(c.verdict == "cannot tell" for c in same) >= 19
    assert sum(c.verdict == "slower" for c in slower) >= 19
    assert sum(c.low <= 1.1 <= c.high for c in slower if c.low is not None and c.high is not None) >= 18


def test_energy_is_named_or_not_available() -> None:
    """Without being asked nothing is said of energy; without a meter "not available"; with one, joules and source."""
    assert "energy" not in summary(bench(repeat(0.01))[0])
    result, _ = bench(repeat(0.01), meters=[])
    assert str(result.energy).startswith("not available: this machine has none of the meters")
    assert "energy: not available" in summary(result)
    told = replace(result, energy=({"source": "RAPL package-0", "idle_w": 2.0, "working_w": 5.0, "per_inference_j": 0.03},))
    assert "energy: 30 mJ an inference, idle subtracted (RAPL package-0: 2 W idle, 5 W working)" in summary(told)
    assert Result.from_json(json.loads(json.dumps(asdict(told)))) == told

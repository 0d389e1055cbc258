"""The rules of choice and verdict, on constructed candidates whose figures are given."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tiny

from edgecnn.choose import Tried, choose, judge, overall, slower_than_float, summaries
from edgecnn.device.spec import Artifact, Manifest, Result
from edgecnn.targets.base import Candidate, Promise


def promise(**keys: float) -> Promise:
    return Promise.model_validate(keys)


def tried(
    folder: Path,
    name: str,
    ms: float | None,
    *,
    top1: float = 0.9,
    agreement: float = 0.95,
    precision: str = "int8",
    eligible: bool = True,
    size: int = 1000,
    void: str = "",
) -> Tried:
    """A candidate whose every sample is within 0.1 % of `ms`, in five processes."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "m").write_bytes(bytes(size))
    manifest = Manifest(name, "onnxruntime", precision, name, {"model": "m"}, {"m": "0"}, tiny.SPEC, tiny.CLASSES)
    results = tuple(
        Result("m", "0", "onnxruntime", 1, 1, tuple((ms + ms * (i % 5) / 5000) / 1e3 for i in range(200)), (), 0, 0, "", {}, 0, (), void)
        for _ in range(5 if ms else 0)
    )
    return Tried(Candidate(name, precision, {}), eligible, Artifact(folder / name, manifest), "", top1, agreement, 100, results)


def test_fastest_that_keeps_the_promise(tmp_path: Path) -> None:
    """A faster file that breaks the promise and a slower one that keeps it both lose, each for its own reason."""
    candidates = [
        tried(tmp_path, "slow", 3.0, agreement=1.0),
        tried(tmp_path, "right", 2.0),
        tried(tmp_path, "worse", 1.0, top1=0.8),
    ]
    best, why = choose(candidates, promise(accuracy_drop=0.01), 0.9)
    assert best is candidates[1]
    assert why == {
        "slow": "slower than right: 3 ms against 2",
        "right": "the fastest that keeps the promise",
        "worse": "breaks the promise on the choice images: top-1 drops by 10.00 points, 1 promised",
    }


def test_order_of_candidates_does_not_matter(tmp_path: Path) -> None:
    """Every order of the same candidates ships the same one."""
    candidates = [tried(tmp_path, name, ms, agreement=a) for name, ms, a in (("a", 2.0, 0.9), ("b", 2.04, 0.95), ("c", 3.0, 1.0))]
    orders = list(itertools.permutations(candidates))
    assert len(orders) == 6
    for order in orders:
        best, _ = choose(order, promise(accuracy_drop=0.5), 0.9)
        assert best is candidates[1]  # within 3 % of the fastest, and closer to the float model


def test_comparison_candidates_never_ship(tmp_path: Path) -> None:
    """A float file that is better and faster does not ship where int8 is asked for, and a note says that it is faster."""
    candidates = [tried(tmp_path, "fp32", 1.0, agreement=1.0, precision="fp32", eligible=False), tried(tmp_path, "int8", 2.0)]
    best, why = choose(candidates, promise(accuracy_drop=0.5), 0.9)
    assert best is candidates[1]
    assert why["fp32"].startswith("for comparison")
    assert "2.00x slower than fp32" in slower_than_float(candidates, candidates[1])[0]
    assert slower_than_float([candidates[1]], candidates[1]) == []


def test_void_latency_makes_no_speedup(tmp_path: Path) -> None:
    """A candidate's reason for being void is kept beside its figures, and no speed-up is of or over a void one."""
    candidates = [
        tried(tmp_path, "fp32", 1.0, precision="fp32", void="noise"),
        tried(tmp_path, "fp16", 3.0, precision="fp16"),
        tried(tmp_path, "int8", 2.0),
        tried(tmp_path, "other", 2.0, void="noise"),
    ]
    rows = summaries(candidates, None, dict.fromkeys(("fp32", "fp16", "int8", "other"), ""))
    assert [row["void"] for row in rows] == ["noise", "", "", "noise"]
    assert [row["speedup"] for row in rows] == [None, pytest.approx(1, rel=0.01), pytest.approx(1.5, rel=0.01), None]


def test_without_a_clock_the_closest_ships(tmp_path: Path) -> None:
    """Where latency was not measured, agreement with the float model decides."""
    candidates = [tried(tmp_path, "a", None, agreement=0.9), tried(tmp_path, "b", None, agreement=0.99)]
    best, why = choose(candidates, promise(accuracy_drop=0.5), 0.9)
    assert best is candidates[1]
    assert "latency cannot be measured here" in why["b"]


def test_what_disturbed_every_turn_does_not_hide_a_file_that_is_far_faster(tmp_path: Path) -> None:
    """Void figures are not told in ms, but files that took turns are told apart where the difference is larger than the disturbance."""
    busy = "the machine was busy"
    far = [tried(tmp_path, "a", 1.0, agreement=0.9, void=busy), tried(tmp_path, "b", 3.0, agreement=0.99)]
    best, why = choose(far, promise(accuracy_drop=0.5), 0.9)
    assert best is far[0]
    assert busy in why["a"]
    assert " ms" not in why["b"]
    assert "slower than a: 3.00 of its time" in why["b"]
    near = [tried(tmp_path, "a", 1.0, agreement=0.9, void=busy), tried(tmp_path, "b", 1.02, agreement=0.99, void=busy)]
    assert choose(near, promise(accuracy_drop=0.5), 0.9)[0] is near[1]


def test_none_keeps_the_promise(tmp_path: Path) -> None:
    """If every file breaks the promise, the closest is shown and its reason says that it breaks it."""
    candidates = [tried(tmp_path, "a", 1.0, top1=0.5, agreement=0.5), tried(tmp_path, "b", 2.0, top1=0.8, agreement=0.9)]
    best, why = choose(candidates, promise(accuracy_drop=0.01), 0.9)
    assert best is candidates[1]
    assert "none keeps the promise" in why["b"]
    assert "breaks the promise" in why["a"]


def test_failures_are_told(tmp_path: Path) -> None:
    """What could not be built is listed with its failure; if nothing could, nothing ships."""
    failed = Tried(Candidate("x", "int8", {}), True, None, failure="no such operator")
    good = tried(tmp_path, "a", 1.0)
    best, why = choose([failed, good], promise(accuracy_drop=0.5), 0.9)
    assert best is good
    assert why["x"] == "not built: no such operator"
    assert choose([failed], promise(accuracy_drop=0.5), 0.9) == (None, {"x": "not built: no such operator"})
    rows = summaries([failed, good], good, why)
    assert [(row["chosen"], row["choice_top1"]) for row in rows] == [(False, None), (True, 0.9)]


def test_every_promise_is_held(tmp_path: Path) -> None:
    """Each promise alone rules out the one candidate that breaks it, exactly at its bound none."""
    good, bad = tried(tmp_path, "good", 2.0), tried(tmp_path, "bad", 1.0, top1=0.5, size=2000)
    slow = tried(tmp_path, "slow", 9.0, agreement=1.0)
    collapsed = tried(tmp_path, "collapsed", 1.0, top1=0.1, agreement=0.12)
    cases = [
        (promise(size_mb=1), 0.9, [collapsed, good], good),  # though no accuracy is promised
        (promise(accuracy_drop=0.1), 1.0, [bad, good], good),
        (promise(min_accuracy=0.9), 0.9, [bad, good], good),
        (promise(size_mb=0.001), 0.9, [bad, good], good),
        (promise(p90_latency_ms=5), 0.9, [slow, good], good),
    ]
    for kept, float_top1, candidates, right in cases:
        assert choose(candidates, kept, float_top1)[0] is right


def test_judge() -> None:
    """Broken is fail, also where something could not be measured; not measurable or doubtful is unproven; else pass."""
    latency = promise(p90_latency_ms=10, accuracy_drop=0.01)
    good = {"top1": 0.9, "drop": 0.01, "agreement": 0.95, "size_bytes": 1000, "doubts": []}
    assert judge(latency, **good, p90_s=0.010) == ("pass", [])  # type: ignore[arg-type]
    verdict, (reason,) = judge(promise(size_mb=1), **{**good, "agreement": 0.12}, p90_s=0.010)  # type: ignore[arg-type]
    assert verdict == "fail"
    assert "collapsed: 12% of the images" in reason
    assert judge(latency, **good, p90_s=0.0101)[0] == "fail"  # type: ignore[arg-type]
    assert judge(latency, **good, p90_s=None)[0] == "unproven"  # type: ignore[arg-type]
    assert judge(latency, **{**good, "drop": 0.02}, p90_s=None)[0] == "fail"  # type: ignore[arg-type]
    assert judge(latency, **{**good, "doubts": ["it was hot"]}, p90_s=0.009) == (  # type: ignore[arg-type]
        "unproven",
        ["p90 latency was measured, but it was hot"],
    )
    assert judge(promise(accuracy_drop=0.01), **{**good, "doubts": ["it was hot"]}, p90_s=0.009)[0] == "pass"  # type: ignore[arg-type]
    assert judge(promise(accuracy_drop=0.01), **{**good, "drop": 0.03 - 0.02}, p90_s=None)[0] == "pass"  # type: ignore[arg-type]


@pytest.mark.parametrize("verdicts", list(itertools.product(("pass", "fail", "unproven"), repeat=3)))
def test_overall(verdicts: tuple[str, ...]) -> None:
    """The run is as bad as its worst target: fail before unproven before pass."""
    assert overall(verdicts) == min(verdicts, key=("fail", "unproven", "pass").index)

"""Contenders against each other: turns, names, verdicts, and the command; made-up durations wherever a figure is asserted."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper

from edgecnn import bench, measure
from edgecnn.bench import Contender
from edgecnn.device import machine
from edgecnn.device.graph import bare_manifest, read_onnx
from edgecnn.device.spec import Result
from edgecnn.errors import DeviceError, ModelError, UsageError
from edgecnn.screen import Screen
from edgecnn.targets.onnxruntime import Onnxruntime
from edgecnn.targets.openvino import Openvino

QUIET = Screen(quiet=True)


def result(mean: float, rng: np.random.Generator, *, void: str = "", doubts: tuple[str, ...] = ()) -> Result:
    """A process whose own luck is 1.5 % and whose calls scatter by 5 %."""
    samples = tuple(map(float, mean * rng.lognormal(0, 0.015) * rng.lognormal(0, 0.05, 300)))
    return Result("m.onnx", "ab", "fake", 1, 1, samples, (), 0.1, 0.1, "", {"rss_before_load_bytes": 10}, 1_000_010, doubts, void)


def race(means: dict[str, float], seed: int, **options: Any) -> bench.Comparison:
    rng = np.random.default_rng(seed)
    contenders = [Contender(name, Path(name), 1) for name in means]
    return bench.race(contenders, lambda c: result(means[c.name], rng, **options), processes=5, seed=seed, screen=QUIET)


def test_equal_is_not_ranked_and_slower_is() -> None:
    """20 races of five processes: the same file twice is ranked at most once; 10 % slower in 19, with an interval that holds 1.1 in 18."""
    races = [race({"a": 0.01, "same": 0.01, "slow": 0.011}, seed) for seed in range(20)]
    same, slow = ([r.verdicts[i] for r in races] for i in (0, 1))
    assert sum(v.verdict == "cannot tell" for v in same) >= 19
    assert sum(v.verdict == "slower" for v in slow) >= 19
    assert sum(v.low <= 1.1 <= v.high for v in slow if v.low is not None and v.high is not None) >= 18


def test_turns_are_random_and_fair() -> None:
    """In every round each contender is measured once, in an order that differs between rounds and is the seed's."""
    seen: list[str] = []
    rng = np.random.default_rng(0)

    def once(name: str) -> Result:
        seen.append(name)
        return result(0.01, rng)

    measure.interleaved("abc", once, 8, random.Random(1))
    rounds = [tuple(seen[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 2
    again, seen = seen, []
    measure.interleaved("abc", once, 8, random.Random(1))
    assert seen == again


def test_disturbed_processes_are_measured_again_and_count_for_nothing() -> None:
    """Of two disturbed processes neither's samples are used, two more are measured, and the record keeps them."""
    rng = np.random.default_rng(0)
    calls = 0

    def once(c: Contender) -> Result:
        nonlocal calls
        calls += 1
        return result(0.5, rng, void="throttled") if calls in (2, 5) else result(0.01, rng)

    found = bench.race([Contender("a", Path("a"), 1), Contender("b", Path("b"), 1)], once, processes=5, seed=0, screen=QUIET)
    assert calls == 12
    assert sum(map(len, found.void.values())) == 2
    assert [len(each) for each in found.results.values()] == [5, 5]
    assert found.verdicts[0].verdict == "cannot tell"
    assert any(line.startswith("void: ") and "throttled" in line for line in bench.remarks(found))


def test_all_disturbed_is_void() -> None:
    """Where nothing undisturbed can be had, the verdict is void with the reason and no ratio, after twice the processes and no more."""
    found = race({"a": 0.01, "b": 0.02}, 0, void="other processes kept 2.0 of 2 cores busy: stop them")
    assert [len(each) for each in found.void.values()] == [10, 10]
    (verdict,) = found.verdicts
    assert (verdict.verdict, verdict.ratio) == ("void", None)
    assert "other processes" in str(verdict)
    assert bench.rows(found)[0][1] == "void"


def test_unsteady_is_not_ranked() -> None:
    """Contenders that most processes call unsteady are not ranked, however far apart their figures are."""
    (verdict,) = race({"a": 0.01, "b": 0.02}, 0, doubts=("unsteady: calls got 20% slower while measured. Let the machine settle",)).verdicts
    assert verdict.verdict == "unsteady"
    assert "20% slower" in str(verdict)


def test_too_few_processes_rank_nothing() -> None:
    """Four processes of each cannot tell, and say that it takes five."""
    rng = np.random.default_rng(0)
    contenders = [Contender(name, Path(name), 1) for name in "ab"]
    found = bench.race(contenders, lambda c: result(0.01 if c.name == "a" else 0.05, rng), processes=4, seed=0, screen=QUIET)
    assert found.verdicts[0].verdict == "cannot tell"
    assert "--processes 5" in found.verdicts[0].reason


def test_waiting_for_a_core_is_seen() -> None:
    """Threads that were ready and had no core for over a tenth of the time make a result void, for over a fiftieth doubted."""
    quiet = {**machine.state(), "throttle_events": {}, "throttled_now": [], "frequencies_hz": "not available", "cpu_s": "not available"}
    seen = 0
    for share, doubts, void in ((0.01, 0, 0), (0.05, 1, 0), (0.3, 0, 1)):
        before, after = {**quiet, "time_s": 0.0, "waited_s": 1.0}, {**quiet, "time_s": 10.0, "waited_s": 1.0 + 10 * share}
        found = machine.disturbances(before, after, 1)
        assert tuple(map(len, found)) == (doubts, void)
        seen += 1
    assert seen == 3


@pytest.fixture(scope="module")
def bundles(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    targets = [Onnxruntime(name="pi", runtime="onnxruntime", precision="fp32"), Openvino(name="nuc", runtime="openvino", precision="fp32")]
    return {t.name: t.build(t.candidates()[0], tiny.source(tiny_folder), folder / t.name).folder for t in targets}


def test_bundles_and_bare_files(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle, an ONNX file and an OpenVINO file are measured in fresh processes, with their digests, as JSON that can be read again."""
    paths = [bundles["pi"], bundles["pi"] / "model.onnx", bundles["nuc"] / "model.xml"]
    found = bench.bench(paths, threads=[1], batch=2, seconds=0.01, processes=1, options=[], screen=QUIET, seed=0)
    told = json.loads(json.dumps(found.to_json()))
    assert [c["name"] for c in told["contenders"]] == ["pi", "model.onnx", "model.xml"]
    results = [Result.from_json(r) for c in told["contenders"] for r in (c["results"] or c["void"])[:1]]
    assert [r.runtime for r in results] == ["onnxruntime", "onnxruntime", "openvino"]
    assert results[0].file_sha256 == results[1].file_sha256
    assert {r.batch for r in results} == {2}
    assert len({r.circumstances["before"]["time_s"] for r in results}) == 3
    assert [v["verdict"] in ("cannot tell", "void", "unsteady") for v in told["verdicts"]] == [True, True]
    assert capsys.readouterr().out == ""


def test_busy_cores_are_not_ranked(bundles: dict[str, Path]) -> None:
    """With every core really kept busy by others, the verdict on real files is void, with the reason; never a ranking."""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        found = bench.bench(
            [bundles["pi"], bundles["pi"]], threads=[1], batch=1, seconds=0.5, processes=1, options=[], screen=QUIET, seed=0
        )
    finally:
        for process in load:
            process.kill()
            process.wait()
    (verdict,) = found.verdicts
    assert verdict.verdict == "void", verdict
    assert "waited" in verdict.reason or "kept" in verdict.reason
    assert found.results == {name: [] for name in found.results}


def test_names(bundles: dict[str, Path]) -> None:
    """Contenders are told apart, also where a file is given twice or gets several numbers of threads."""
    pi, nuc = bundles["pi"], bundles["nuc"]
    assert [c.name for c in bench.contenders_of([pi, nuc], [1])] == ["pi", "nuc"]
    assert [c.name for c in bench.contenders_of([pi, pi], [1])] == [f"{pi} #1", f"{pi} #2"]
    assert [c.name for c in bench.contenders_of([pi], [1, 2])] == ["pi, 1 thread", "pi, 2 threads"]
    assert bench.numbers("1,2,4") == [1, 2, 4]
    for text in ("", "0", "1,,2", "a", "-1", "9999"):
        with pytest.raises(UsageError):
            bench.numbers(text)


def test_liar(monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers with something that is no measurement is refused, and nothing of it reaches the terminal raw."""
    rng = np.random.default_rng(0)
    good = {**vars(result(0.01, rng))}
    seen = 0
    for lie in (
        {},
        {**good, "samples_s": []},
        {**good, "samples_s": [float("nan")]},
        {**good, "samples_s": ["\x1b[2J"]},
        {**good, "void": 5},
    ):
        monkeypatch.setattr(measure, "device", lambda *words, lie=lie, board=None: lie)
        with pytest.raises(DeviceError) as caught:
            measure.bench(Path("x"))
        assert str(caught.value).isprintable()
        seen += 1
    assert seen == 5


def model(path: Path, shape: list[int | str | None], kind: int = TensorProto.FLOAT) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def test_bare_files_tell_their_input(tmp_path: Path) -> None:
    """Shape, layout and type of the input are read from the file itself; what is no batch of images is refused with what was found."""
    spec = bare_manifest(model(tmp_path / "a.onnx", ["batch", 3, 20, 30]))
    assert (spec.input.shape, spec.takes) == ((3, 20, 30), "float32")
    spec = bare_manifest(model(tmp_path / "b.onnx", ["n", 20, 30, 3], TensorProto.UINT8))
    assert (spec.input.shape, spec.takes) == ((3, 20, 30), "uint8")
    seen = 0
    for shape, kind in ((["n", 3, "h", "w"], TensorProto.FLOAT), ([1, 10], TensorProto.FLOAT), ([1, 3, 8, 8], TensorProto.INT64)):
        with pytest.raises(ModelError, match="its input is"):
            bare_manifest(model(tmp_path / "c.onnx", shape, kind))
        seen += 1
    assert seen == 3


def test_mutated_onnx_files(tmp_path: Path) -> None:
    """500 cut or changed ONNX files are read as they are or refused in one line; nothing else is raised."""
    whole = bytearray(model(tmp_path / "a.onnx", ["batch", 3, 20, 30]).read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        (tmp_path / "b.onnx").write_bytes(data[: rng.integers(0, len(data) + 1)])
        try:
            read_onnx(tmp_path / "b.onnx")
        except ModelError as fault:
            assert str(fault).isprintable()  # noqa: PT017
            refused += 1
    assert 50 < refused < 500


def test_ir_with_entities(tmp_path: Path) -> None:
    """An IR that declares entities, which could grow without end, is refused before it is parsed."""
    (tmp_path / "m.bin").write_bytes(b"")
    (tmp_path / "m.xml").write_text('<!DOCTYPE net [<!ENTITY a "aaaa">]><net><layers/></net>')
    with pytest.raises(ModelError, match="declares entities"):
        bare_manifest(tmp_path / "m.xml")

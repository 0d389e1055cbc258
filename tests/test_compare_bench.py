"""Contenders against each other: turns, names, verdicts, and the command; made-up durations wherever a figure is asserted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper

from edgecnn import bench, cli, measure
from edgecnn.bench import Contender
from edgecnn.device import machine
from edgecnn.device.files import sha256_file
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
    quiet["pressure_s"] = "not available"
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
    found = bench.bench(paths, threads=[1], batch=2, seconds=0.01, processes=1, options=[], screen=QUIET, seed=3)
    told = json.loads(json.dumps(found.to_json()))
    assert (told["where"], told["seed"]) == ("this machine", 3)
    assert bench.head(found)[1] == "p50 ms (interval of one process)"
    where = [line for line in bench.remarks(found) if line.startswith("this machine: ")]
    assert ["; onnxruntime " in line for line in where] == [True, False]
    assert all(line.endswith(", 1 thread, batch 2") for line in where)
    assert [c["name"] for c in told["contenders"]] == ["pi", "model.onnx", "model.xml"]
    results = [Result.from_json(r) for c in told["contenders"] for r in (c["results"] or c["void"])[:1]]
    assert [r.runtime for r in results] == ["onnxruntime", "onnxruntime", "openvino"]
    assert results[0].file_sha256 == results[1].file_sha256
    assert {r.batch for r in results} == {2}
    assert len({r.circumstances["before"]["time_s"] for r in results}) == 3
    assert [v["verdict"] in ("cannot tell", "void", "unsteady") for v in told["verdicts"]] == [True, True]
    assert capsys.readouterr().out == ""


@contextmanager
def every_core_busy(*before: str) -> Iterator[None]:
    """A loop without end on every core that this process may use."""
    load = [subprocess.Popen([*before, sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


def test_busy_cores_are_not_ranked(bundles: dict[str, Path]) -> None:
    """With every core really kept busy by others, the verdict on real files is void, with the reason; also where one process is short."""
    seen = 0
    for seconds in (0.001, 0.5):
        with every_core_busy():
            found = bench.bench(
                [bundles["pi"], bundles["pi"]], threads=[1], batch=1, seconds=seconds, processes=1, options=[], screen=QUIET, seed=0
            )
        (verdict,) = found.verdicts
        assert verdict.verdict == "void", verdict
        assert "waited" in verdict.reason or "kept" in verdict.reason
        assert found.results == {name: [] for name in found.results}
        seen += 1
    assert seen == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "before"), [(1e-6, ""), (0.02, ""), (0.05, ""), (0.2, ""), (1.0, ""), (0.05, "setsid"), (0.05, "nice -n 19")]
)
def test_busy_cores_are_never_ranked(bundles: dict[str, Path], seconds: float, before: str) -> None:
    """As many processes as a ranking takes, of two files that differ: whatever time is asked for, and whatever priority the others have."""
    paths = [bundles["pi"], bundles["nuc"]]
    with every_core_busy(*before.split()):
        found = bench.bench(paths, threads=[1], batch=1, seconds=seconds, processes=5, options=[], screen=QUIET)
    assert [v.verdict for v in found.verdicts] == ["void"], found.verdicts


def test_a_board_may_lie_about_its_load() -> None:
    """What a board calls its load judges, or is left out where it is none; it never stops the comparison."""
    rng = np.random.default_rng(0)
    busy = {"elapsed_s": 0.5, "cores": 2, "total_s": 1.0, "stolen_s": 0.0, "others_s": 1.0}
    seen = 0
    lies: tuple[Any, ...] = ({"elapsed_s": "x"}, {"elapsed_s": float("inf")}, {"elapsed_s": 1.0, "total_s": 1.0}, [], None, {})
    for load, verdict in ((busy, "void"), *((lie, "cannot tell") for lie in lies)):

        def once(_: Contender, load: Any = load) -> Result:
            return replace(result(0.01, rng), circumstances={"load": load})

        found = bench.race([Contender(name, Path(name), 1) for name in "ab"], once, processes=5, seed=0, screen=QUIET)
        assert found.verdicts[0].verdict == verdict, load
        seen += 1
    assert seen == 7


def test_what_cannot_run_costs_the_others_nothing() -> None:
    """A contender that fails in its first process is told and left out; one that fails later, or all of them, end the race."""
    rng = np.random.default_rng(0)
    contenders = [Contender(name, Path(name), 1) for name in "abc"]

    def once(c: Contender) -> Result:
        if c.name == "b":
            raise DeviceError("it takes a GPU")
        return result(0.01, rng)

    found = bench.race(contenders, once, processes=5, seed=0, screen=QUIET)
    assert {name: len(each) for name, each in found.results.items()} == {"a": 5, "b": 0, "c": 5}
    assert [(v.contender, v.verdict) for v in found.verdicts] == [("b", "void"), ("c", "cannot tell")]
    assert bench.rows(found)[1][1] == "cannot run"
    assert found.to_json()["contenders"][1]["failed"] == "it takes a GPU"
    with pytest.raises(DeviceError, match=r"1 of 3 could not run. b: it takes a GPU"):
        bench.check_all_ran(found)
    with pytest.raises(DeviceError, match="it takes a GPU"):
        bench.race(contenders[1:2], once, processes=5, seed=0, screen=QUIET)
    calls = 0

    def breaks(c: Contender) -> Result:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise DeviceError("the connection broke")
        return result(0.01, rng)

    with pytest.raises(DeviceError, match="connection broke"):
        bench.race(contenders, breaks, processes=5, seed=0, screen=QUIET)


def edgecnn(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    handler = signal.getsignal(signal.SIGTERM)
    with patch.object(sys, "argv", ["edgecnn", "bench", *map(str, words)]):
        code = cli.run()
    signal.signal(signal.SIGTERM, handler)
    out, err = capsys.readouterr()
    return code, out, err


REFUSED: dict[str, tuple[list[object], int, str]] = {
    "two measurements": (["--profile", "--distance"], 2, "--profile and --distance are two measurements"),
    "energy of a profile": (["--profile", "--energy"], 2, "--profile has no --energy"),
    "processes and seed of a distance": (["--distance", "--processes", 5, "--seed", 0], 2, "--distance has no --processes or --seed"),
    "no time": (["--min-time", 0], 2, "give seconds above 0"),
    "a time that is none": (["--min-time", "nan"], 2, "--min-time nan: give seconds above 0"),
    "a time without end": (["--min-time", "inf"], 2, "at most 3600"),
    "an unknown runtime": (["--runtime", "foo"], 2, "'foo' is not one of 'onnxruntime', 'openvino'. See `edgecnn bench --help`"),
    "an unknown provider": (["--provider", "foo"], 8, "onnxruntime offers "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], case: str) -> None:
    """What would be ignored, or cannot be, is refused in one line that ends as a sentence; no list of Python's is shown."""
    words, code, part = REFUSED[case]
    got, out, err = edgecnn(capsys, bundles["pi"], "-q", *words)
    assert (got, out, err.count("\n")) == (code, "", 1), err
    assert part in err
    assert "[" not in err
    assert err.rstrip()[-1] in ".?`"


def test_batch_that_does_not_fit(bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images that do not fit into memory are refused with their size, before memory is filled with them."""
    code, _, err = edgecnn(capsys, model(tmp_path / "wide.onnx", ["n", 3, 4000, 4000]), "--batch", 100_000, "-q")
    assert code == 5
    assert "its images alone take 2.4e+04 GB" in err


def test_what_is_no_model_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is no bundle, nothing at all, and another file: each one line with all three kinds of what can be measured."""
    (tmp_path / "x.txt").write_text("x")
    seen = 0
    for path, part in ((tmp_path, "a folder, and no bundle"), (tmp_path / "nope", "not there"), (tmp_path / "x.txt", "not a model")):
        code, _, err = edgecnn(capsys, path)
        assert code == 3
        assert part in err
        assert "Give a bundle's folder, an .onnx file or an OpenVINO .xml file." in err
        seen += 1
    assert seen == 3


def test_several_numbers_of_threads(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """--profile measures each number of threads, and prints one JSON object."""
    code, out, err = edgecnn(capsys, bundles["pi"], "--profile", "--threads", "1,2", "--min-time", 0.05, "--json")
    assert (code, err) == (0, "")
    assert [(each["file"], each["threads"]) for each in json.loads(out)["profiles"]] == [("pi, 1 thread", 1), ("pi, 2 threads", 2)]


def test_the_table_fits_80_columns(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The tables of a whole race, with an interval and a withheld percentile, are at most 80 wide; what comes is told first."""
    code, out, err = edgecnn(capsys, bundles["pi"], bundles["nuc"], "--processes", 1, "--min-time", 0.001)
    assert code == 0
    assert err.startswith("bench: 2 processes, each at least 0.251 s and 64 calls of batch 1\n")
    lines = out.split("\n")
    tables = lines[: lines.index("", lines.index("") + 1)]
    assert len(tables) == 7
    assert max(map(len, tables)) <= 80, out
    assert "takes 662 calls" in out or "void" in out


def test_doubts_are_told_once() -> None:
    """The same doubt with another figure in each process is one line that says in how many, and the verdicts come last."""
    doubts = iter([(f"{i}.5% of the calls took over twice the median",) for i in range(10)])
    rng = np.random.default_rng(0)
    contenders = [Contender(name, Path(name), 1) for name in "ab"]
    found = bench.race(contenders, lambda c: result(0.01, rng, doubts=next(doubts)), processes=5, seed=0, screen=QUIET)
    _, *lines = bench.remarks(found)
    assert len(lines) == 3
    assert all(line.endswith("(so in 5 of 5 processes)") for line in lines[:2])
    assert lines[2].startswith("b against a: cannot tell")


def test_interrupted_says_no_more_than_is_true(bundles: dict[str, Path]) -> None:
    """A bench that is interrupted keeps nothing, and promises nothing."""
    words = [sys.executable, "-m", "edgecnn", "bench", bundles["pi"], "--min-time", "60"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("bench: 5 processes")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "edgecnn: interrupted.\n")


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


def test_liar(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers with no measurement, or with one of something else, is refused, and nothing of it reaches the terminal raw."""
    good = asdict(result(0.01, np.random.default_rng(0)))
    good |= {"file_sha256": sha256_file(bundles["pi"] / "model.onnx"), "samples_s": list(good["samples_s"]), "doubts": []}
    lies: tuple[dict[str, Any], ...] = (
        {"samples_s": []}, {"samples_s": [float("nan")]}, {"samples_s": ["\x1b[2J"]}, {"samples_s": [0.0] * 200},
        {"samples_s": [1e308] * 9}, {"void": 5}, {"batch": "x"}, {"batch": 999}, {"threads": 64}, {"file_sha256": "0" * 64},
        {"peak_rss_bytes": 10**400},
        {"circumstances": {"rss_before_load_bytes": 10**400}}, {"energy": 5}, {"energy": ["x"]},
    )  # fmt: skip
    seen = 0
    for answer in ({}, *({**good, **lie} for lie in lies)):
        monkeypatch.setattr(measure, "device", lambda *words, answer=answer, board=None: answer)
        with pytest.raises(DeviceError) as caught:
            measure.bench(bundles["pi"])
        assert str(caught.value).isprintable()
        seen += 1
    assert seen == 15
    monkeypatch.setattr(measure, "device", lambda *words, board=None: good)
    assert measure.bench(bundles["pi"]).batch == 1
    turns = {
        "samples_s": [0.01],
        "against_s": [0.02],
        "file_sha256": good["file_sha256"],
        "against_sha256": good["file_sha256"],
        "threads": 1,
    }
    lies = (
        {"samples_s": []}, {"samples_s": [float("nan")]}, {"against_s": [-0.1]}, {"against_s": [0.01, "\x1b[2J"]}, {"against_s": [True]},
        {"against_s": [0.0]}, {"samples_s": 0.5}, {"threads": 2}, {"against_sha256": "0" * 64}, {"file_sha256": None},
    )  # fmt: skip
    for answer in ({}, *({**turns, **lie} for lie in lies)):
        monkeypatch.setattr(measure, "device", lambda *words, answer=answer, board=None: answer)
        with pytest.raises(DeviceError) as caught:
            measure.in_turns(bundles["pi"], bundles["pi"], threads=1, seconds=1.0)
        assert str(caught.value).isprintable()
        seen += 1
    assert seen == 26
    monkeypatch.setattr(measure, "device", lambda *words, board=None: turns)
    assert measure.in_turns(bundles["pi"], bundles["pi"], threads=1, seconds=1.0) == 0.5
    layer = {"name": "a", "node": "b", "operator": "c", "seconds": 0.1}
    for steady_s, layers in ((0.0, [layer]), ("a", [layer]), (1.0, [{**layer, "seconds": "z"}]), (1.0, [{**layer, "name": 1}])):
        answer = {
            "file": "x",
            "file_sha256": "y",
            "runtime": "r",
            "threads": 1,
            "batch": 1,
            "steady_s": steady_s,
            "calls": 3,
            "layers": layers,
        }
        monkeypatch.setattr(measure, "device", lambda *words, answer=answer, board=None: answer)
        with pytest.raises(DeviceError, match="no profile"):
            bench.profiles([bundles["pi"]], threads=[1], batch=1, seconds=1.0, options=[])


def test_the_longest_measurement_is_waited_for(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a command grows with the time that it is to measure for, which may be an hour."""
    seen: list[float] = []
    monkeypatch.setattr(measure, "_here", lambda _, timeout_s: (seen.append(timeout_s), (0, "{}", ""))[1])
    for seconds in (0.1, 3600.0):
        with pytest.raises(DeviceError):
            measure.bench(bundles["pi"], "--seconds", seconds)
    assert seen == [3600.4, 18000.0]


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp037"])
def test_ir_with_entities(tmp_path: Path, encoding: str) -> None:
    """An IR that declares entities, which could grow without end, is refused before it is parsed, in whatever encoding."""
    text = '<!DOCTYPE net [<!ENTITY a "aaaa">]><net><layers/></net>'
    named = f'<?xml version="1.0" encoding="{encoding}"?>'.encode() if encoding == "cp037" else b""
    (tmp_path / "m.bin").write_bytes(b"")
    (tmp_path / "m.xml").write_bytes(named + text.encode(encoding))
    with pytest.raises(ModelError, match="declares entities" if "utf-8" in encoding else "not a readable OpenVINO IR"):
        bare_manifest(tmp_path / "m.xml")

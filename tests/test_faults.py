"""A run that is killed, interrupted or refused its disk at any instant loses nothing, and the same command ends with the same files."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import LEVEL, count
from traced import calls, can_trace

from edgecnn.device.bundle import verify_bundle
from edgecnn.store import SWEPT, _read_done

ROOT = Path(__file__).parent.parent
# Steps whose content is the machine's speed, or a log of it; all others must end with the same digests.
OF_THIS_RUN = ("latency", "preflight")


class Runs:
    """The warm process of attempts.py, and what a run that nothing disturbed ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "tmp").mkdir(parents=True)
        recipe = tiny.write_recipe(folder)
        self.images = {p: p.read_bytes() for p in sorted((folder / "images").rglob("*.png"))}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
        self.process = subprocess.Popen(
            [sys.executable, tiny.HERE / "attempts.py", recipe, self.out],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        whole = self("")
        assert whole["code"] == 0, whole["stderr"]
        self.labels: list[str] = whole["labels"]
        self.good = self.results()
        self.fresh()

    def __call__(self, fault: str, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"fault": fault or None, **job}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def fresh(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def results(self) -> dict[str, Any]:
        """What must be equal after every finished run: digests of the steps, of the shipped files, and the figures."""
        result = json.loads((self.out / "result.json").read_text())
        found: dict[str, Any] = {"verdict": result["verdict"], "baseline": result["baseline"]["top1"]}
        for target in result["targets"]:
            assert verify_bundle(self.out / target["bundle"]).model_sha256 == target["file_sha256"]
            found[target["name"]] = [target["file_sha256"], target["top1"], target["agreement"]]
        for record in sorted((self.out / "store").glob("*/done.json")):
            if record.parent.name.partition("-")[0] not in OF_THIS_RUN:
                facts = _read_done(record.parent)
                assert facts is not None, record
                found[record.parent.name] = json.loads(record.read_text())["digests"]
        return found

    def check(self) -> None:
        """Whatever happened: a final name is absent, old or new, never half; and the user's images are what they were."""
        for name in ("result.json", "recipe.json"):
            if (self.out / name).exists():
                json.loads((self.out / name).read_text())
        for folder in (self.out / "store").glob("*"):
            assert _read_done(folder) is not None, folder
        for folder in (self.out / "bundles").glob("[!.]*"):
            verify_bundle(folder)
        html = self.out / "report.html"
        assert not html.exists() or html.read_text().rstrip().endswith("</html>")
        assert {p: p.read_bytes() for p in self.images} == self.images

    def ends_well(self) -> None:
        """The same command, undisturbed, ends with the files of a run that never was; nothing is left behind."""
        last = self("")
        assert last["code"] == 0, last["stderr"]
        assert self.results() == self.good
        left = [p for p in self.out.rglob("*") if p.name.endswith((".tmp", ".old")) or p.name == "work"]
        assert left == []
        # What torch makes there when it is imported, before any attempt, is not ours.
        assert [p for p in (self.folder / "tmp").iterdir() if not p.name.startswith((".ses", "torchinductor"))] == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("faults"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait()


def chain(runs: Runs, fault: str, most: int | None = None) -> list[dict[str, Any]]:
    """Attempts, each ended at the first point that no earlier one was ended at, until one reaches the end."""
    runs.fresh()
    covered: set[str] = set()
    answers = []
    skipped = random.Random(0).sample(runs.labels, max(0, len(runs.labels) - most)) if most else []
    while True:
        answer = runs(fault, covered=[*covered, *skipped])
        if answer.get("struck") is None:
            assert answer["code"] == 0, answer["stderr"]
            break
        answers.append(answer)
        covered.add(answer["struck"])
        runs.check()
    assert runs.results() == runs.good
    return answers


def told_in_one_line(answer: dict[str, Any], code: int) -> None:
    assert answer["code"] == code, (answer["struck"], answer["code"], answer["stderr"])
    lines = answer["stderr"].strip().splitlines()
    assert len(lines) == 1, (answer["struck"], answer["stderr"])
    assert lines[0].startswith("edgecnn: ")


@pytest.mark.faults
def test_killed_at_every_point(runs: Runs) -> None:
    """Killed at every write, rename, fsync, removal and new folder of a whole run, one after the other: never half, and ends the same.

    Of the store alone, test_store_points.py takes all system calls.
    """
    answers = chain(runs, "kill")
    assert len(answers) > len(runs.labels) // 2  # what is there already is not made again
    assert {answer["code"] for answer in answers} == {-9}
    assert sum(answer["orphans"] for answer in answers) == 0
    runs.ends_well()
    print(f"\nkilled at {len(answers)} points of {len(runs.labels)}")


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EMFILE"])
def test_an_io_error_at_every_point(runs: Runs, fault: str) -> None:
    """A full disk, an I/O error or too many open files at every point ends in one line with code 5; nothing is lost, and it goes on."""
    answers = chain(runs, fault, None if LEVEL == "hours" else 15)
    for answer in answers:
        told_in_one_line(answer, 5)
    assert len(answers) >= 10
    runs.ends_well()
    print(f"\n{fault} at {len(answers)} points of {len(runs.labels)}")


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["SIGINT", "SIGTERM"])
def test_interrupted_at_any_point(runs: Runs, fault: str) -> None:
    """Ctrl-C or a polite kill at any point ends with 130 in one line, its children too, and it goes on."""
    answers = chain(runs, fault, 150 if LEVEL == "hours" else 12)
    for answer in answers:
        told_in_one_line(answer, 130)
        assert answer["orphans"] == 0
    assert len(answers) >= 10
    runs.ends_well()


@pytest.mark.faults
@pytest.mark.parametrize("quarter", range(4))  # so that both cores have work
def test_killed_at_random(runs: Runs, quarter: int) -> None:
    """Killed at random instants, again and again until a run gets through: never half, no process left, and ends the same."""
    draw, kills, lineages = random.Random(), 0, 0
    wanted = count(5, 200, 1000) // 4
    while kills < wanted:
        runs.fresh()
        lineages += 1
        slowness = 1.0
        while True:
            answer = runs("kill", after_s=draw.uniform(0.05, 1.5) * slowness)
            if answer["code"] == 0:
                break
            assert answer["code"] == -9, answer["stderr"]
            assert answer["orphans"] == 0
            kills += 1
            slowness *= 1.15  # so that each lineage ends
            runs.check()
        runs.ends_well()
    print(f"\n{kills} random kills in {lineages} runs")


@pytest.mark.faults
@pytest.mark.parametrize("how", ["signal=SIGKILL", "error=ENOSPC", "error=EIO", "error=EMFILE"])
def test_any_system_call(runs: Runs, how: str) -> None:
    """As above, but below Python: any call that changes a file, of libraries and of the board's half too, in whatever process.

    EMFILE is what opening ends with, also to read.
    """
    if not can_trace():
        pytest.skip("strace is not here, or may not attach to a process")
    runs.fresh()
    assert runs("", inject="")["code"] == 0
    found = calls(runs.folder / "strace")
    ours = [call for call in found if call.below(runs.out, runs.folder / "tmp")]
    points = sorted({(c.name, c.number) for c in ours if (c.name == "openat" if how == "error=EMFILE" else c.changes)})
    assert len(points) >= 100
    codes = []
    for name, number in random.Random().sample(points, count(2, 6, 300)):
        runs.fresh()
        answer = runs("", inject=f"{name}:{how}:when={number}")
        codes.append(answer["code"])
        if answer["code"] not in (0, -9):  # of a child of its own, that is killed, it tells
            lines = answer["stderr"].strip().splitlines()
            assert len(lines) == 1, (name, number, answer["stderr"])
            assert answer["code"] in (3, 5, 8), (name, number, answer["stderr"])
        assert answer["orphans"] == 0
        runs.check()
        runs.ends_well()
    print(f"\n{how} at {len(codes)} of {len(points)} calls: {sorted(codes)}")


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["SIGINT", "SIGTERM"])
def test_interrupted_at_random(runs: Runs, fault: str) -> None:
    """Ctrl-C or a polite kill at a random instant of a run for OpenVINO, whose plugin leaves a freed signal stack behind: 130, one line."""
    settings = ["targets=[{name: nuc, runtime: openvino, precision: fp32}]"]
    draw, times = random.Random(), 0
    while times < count(2, 30, 200):
        runs.fresh()
        slowness = 1.0
        while True:  # goes on from where it was interrupted, so that every part of a run has its turn
            answer = runs(fault, after_s=draw.uniform(0.05, 1.5) * slowness, settings=settings)
            if answer["code"] == 0:
                break
            told_in_one_line({"struck": fault, **answer}, 130)
            assert answer["orphans"] == 0
            runs.check()
            times, slowness = times + 1, slowness * 1.15  # so that each lineage ends
        assert runs("", settings=settings)["code"] == 0
    print(f"\n{times} times {fault}")


def test_killed_at_a_few_points(runs: Runs) -> None:
    """The short form: six points of a run, among them renames, and one error of each kind."""
    runs.fresh()
    renames = [label for label in runs.labels if label.startswith("rename store")]
    points = [*renames[:1], *random.Random(1).sample(runs.labels, 2)]
    for fault, code in (("kill", -9), ("ENOSPC", 5), ("SIGTERM", 130)):
        answer = runs(fault, covered=[label for label in runs.labels if label != points[0]])
        assert answer["code"] == code, answer["stderr"]
        runs.check()
        points.append(points.pop(0))
    runs.ends_well()


def test_the_points_are_all_kinds(runs: Runs) -> None:
    """The points that are enumerated include every kind, and every file that a run ends with."""
    kinds = {label.split()[0] for label in runs.labels}
    assert {"write", "rename", "fsync", "mkdir"} <= kinds
    for name in ("result.json", "report.html", "recipe.json", "bundles/pi"):
        assert any(label.startswith("rename") and name.split("/")[0] in label for label in runs.labels), name
    assert len(runs.labels) >= 100


def test_every_folder_with_half_files_is_swept(runs: Runs) -> None:
    """Wherever a run renames a file into place, `open_store` looks for what a killed one left there."""
    made = [Path(label.split()[1]) for label in runs.labels if label.startswith(("write", "mkdir"))]
    half = {str(path.parent) for path in made if path.suffix == ".tmp" and ".tmp" not in str(path.parent)}
    half = {folder for folder in half if not folder.startswith(("store/", "work/"))}
    assert half <= set(SWEPT)
    assert len(half) >= 3

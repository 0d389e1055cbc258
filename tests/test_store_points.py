"""The store, ended or hindered at every system call that it makes: killed, ENOSPC, EIO, EMFILE; nothing is lost, nothing is left.

The job is a second run in a folder that an earlier one finished: steps are found, made, gone on with and replaced; so are a bundle and
the result files. strace does it, so every call counts, whoever makes it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from faults import LEVEL
from traced import Call, calls, can_trace, traced, unsynced

from edgecnn import store
from edgecnn.device.bundle import verify_bundle, write_bundle
from edgecnn.device.files import write_atomically
from edgecnn.device.spec import Manifest
from edgecnn.errors import guarded
from edgecnn.store import _read_done, open_store

MANIFEST = Manifest("pi", "onnxruntime", "fp32", "fp32", {"model": "model.onnx"}, {}, tiny.SPEC, tiny.CLASSES)


def job(out: Path, version: int) -> int:
    """A run of three steps, a bundle and two result files, of which one step is the same in every version."""

    def first(work: Path) -> dict[str, int]:
        (work / "deep").mkdir(exist_ok=True)
        (work / "deep" / "weights").write_bytes(bytes(9000))
        return {"n": 1}

    def second(work: Path) -> dict[str, int]:
        for epoch in range(2):
            write_atomically(work / "checkpoint", f"{epoch}".encode())
        (work / "checkpoint").unlink()
        (work / "model.onnx").write_bytes(b"model %d" % version)
        return {"version": version}

    with open_store(out, "job") as run:
        one = run.once("first", {}, first)
        two = run.once("second", {"of": one.key, "version": version}, second)
        run.once("third", {"of": two.key}, lambda work: shutil.copy(two.folder / "model.onnx", work) and None)
        write_bundle(out / "bundles" / "pi", MANIFEST, {"model.onnx": two.folder / "model.onnx"}, "# Read\n", {"a/b.txt": b"b"})
        run.write("report.html", f"<html>{version}</html>")
        run.write("result.json", json.dumps({"version": version}))
        run.finish()
    return 0


class Job:
    """The job in a folder of its own, from the same beginning each time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.temporary = folder, folder / "out", folder / "tmp"
        job(folder / "before", 1)
        self.fresh()
        assert self.run() == (0, "")
        self.good = self.digests()
        self.log = (folder / "strace").rename(folder / "whole")
        self.calls = [call for call in calls(self.log) if call.below(self.out, self.temporary)]

    def fresh(self) -> None:
        for folder in (self.out, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "before", self.out)
        self.temporary.mkdir()

    def run(self, *options: str) -> tuple[int, str]:
        return traced(lambda: guarded(lambda: job(self.out, 2)), self.folder, *options)

    def struck(self, call: Call, how: str) -> tuple[int, str]:
        """Run from the beginning, and let strace strike at that call."""
        self.fresh()
        return self.run("-e", f"inject={call.name}:{how}:when={call.number}")

    def digests(self) -> dict[str, str]:
        """Every file of the run folder but what tells who holds it, by its content."""
        found = {str(p.relative_to(self.out)): p.read_bytes().hex() for p in sorted(self.out.rglob("*")) if p.is_file()}
        return {name: content for name, content in found.items() if name != "run.lock"}

    def faults(self) -> list[str]:
        """What is neither absent, nor old, nor new."""
        found = []
        for name in ("result.json", "report.html"):
            if not any(str(version) in (self.out / name).read_text() for version in (1, 2)):
                found.append(name)
        json.loads((self.out / "result.json").read_text())
        json.loads((self.out / "recipe.json").read_text())
        found += [str(folder) for folder in (self.out / "store").iterdir() if _read_done(folder) is None]
        verify_bundle(self.out / "bundles" / "pi")
        return found

    def ends_well(self) -> list[str]:
        """What is wrong after the same command was run again, undisturbed."""
        before = tempfile.tempdir
        try:
            job(self.out, 2)
        finally:
            tempfile.tempdir = before
        now = self.digests()
        left = [f"{path} is left" for path in self.temporary.iterdir()]
        return left + [f"{name} differs" for name in sorted({*now, *self.good}) if now.get(name) != self.good.get(name)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    if not can_trace():
        pytest.skip("strace is not here, or may not attach to a process")
    folder = tmp_path_factory.mktemp("points")
    with pytest.MonkeyPatch.context() as patch:
        (folder / "tmp").mkdir()
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        patch.setattr(store, "MIN_FREE_BYTES", 0)
        yield Job(folder)


def some(points: list[Call], most: int) -> list[Call]:
    """All of them, or in the short form as many, evenly taken."""
    return points if LEVEL else points[:: max(1, len(points) // most)]


def told(wrong: list[tuple[object, ...]]) -> str:
    return "\n".join(f"{number} {fault}" for number, fault in enumerate(wrong))


def test_killed_at_every_call(jobs: Job) -> None:
    """Killed at any call: no final name is ever half, and the same command ends with the files of a run that nothing disturbed."""
    points = [call for call in jobs.calls if call.changes]
    wrong = []
    for call in some(points, 12):
        code, _ = jobs.struck(call, "signal=SIGKILL")
        wrong += [(call.text, code)] if code != -9 else []
        wrong += [(call.text, fault) for fault in (*jobs.faults(), *jobs.ends_well())]
        if len(wrong) > 5:
            break
    assert wrong == [], told(wrong)
    assert len(points) >= 100
    print(f"\nkilled at {len(some(points, 12))} of {len(points)} calls")


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EMFILE"])
def test_an_error_at_every_call(jobs: Job, error: str) -> None:
    """Any call fails: the run ends in one line with 5, or does without what failed; nothing is half, and the next run ends well.

    EMFILE is what opening ends with, also to read.
    """
    points = [call for call in jobs.calls if (call.name == "openat" if error == "EMFILE" else call.changes)]
    wrong, codes = [], []
    for call in some(points, 4):
        code, said = jobs.struck(call, f"error={error}")
        codes.append(code)
        fine = (code == 5 and len(said.splitlines()) == 1 and said.startswith("edgecnn: ")) or (code == 0 and not said)
        wrong += [] if fine else [(call.text, code, said)]
        wrong += [(call.text, fault) for fault in (*jobs.faults(), *jobs.ends_well())]
        if len(wrong) > 5:
            break
    assert wrong == [], told(wrong)
    assert codes.count(5) > len(codes) // 2
    print(f"\n{error} at {len(codes)} of {len(points)} calls: {codes.count(5)} ended with 5, {codes.count(0)} did without")


def test_synced_before_renamed(jobs: Job) -> None:
    """A power cut loses nothing finished: what is renamed was synced, and then the folder it is in."""
    assert unsynced(jobs.log, jobs.out) == []
    renames = [call for call in jobs.calls if call.name.startswith("rename")]
    assert len(renames) >= 6

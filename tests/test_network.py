"""Nothing is sent: a whole run without any network ends the same, and opens no socket beyond this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.faults


def run(folder: Path, *before: str, threads: int = 1, settings: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    recipe = tiny.write_recipe(folder)
    command = [*before, sys.executable, "-m", "edgecnn", "compress", "-q", "-r", str(recipe), "-o", str(folder / "out")]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tiny.HERE}", "HOME": str(folder / "home")}
    environment["OMP_NUM_THREADS"] = str(threads)
    (folder / "home").mkdir()
    return subprocess.run(command, cwd=tiny.HERE, env=environment, capture_output=True, text=True, check=False)


def steps(folder: Path) -> dict[str, dict[str, str]]:
    """Every step of a finished run and the digests of its files, but those that hold times."""
    found = {path.parent.name: json.loads(path.read_text())["digests"] for path in (folder / "out" / "store").glob("*/done.json")}
    return {name: digests for name, digests in found.items() if not name.startswith("latency-")}


def test_without_network(tmp_path: Path) -> None:
    """With networking cut off by `unshare -n`, a run ends with the same files, byte for byte, as with it; HOME stays empty.

    Not so with another number of threads: torch sums gradients in parts, one a thread, so training is the first step that differs.
    """
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to cut off the network here (unshare -n)")
    made = {}
    for threads, settings in ((1, []), (2, ["targets=[{name: pi, runtime: onnxruntime, precision: fp32}]"])):
        for before in ((), ("unshare", "-n")):
            folder = tmp_path / f"{threads}{len(before)}"
            done = run(folder, *before, threads=threads, settings=settings)
            assert done.returncode == 0, done.stderr
            assert [p for p in (folder / "home").rglob("*") if p.is_file()] == []
            made[threads, bool(before)] = steps(folder)
        there, cut = made[threads, False], made[threads, True]
        both = there.keys() & cut.keys()  # which candidate is faster, and so is looked at further, may differ between two runs
        assert {kind.partition("-")[0] for kind in both} >= {"model", "images", "stage", "onnx", "candidate", "float", "accuracy"}
        assert {name: cut[name] for name in both} == {name: there[name] for name in both}
    one, two = made[1, False], made[2, False]
    differ = {name.partition("-")[0] for name in one.keys() & two.keys() if one[name] != two[name]}
    assert not differ & {"model", "images"}
    assert "stage" in differ


def test_no_socket_beyond_this_machine(tmp_path: Path) -> None:
    """Under strace, no process of a run connects, binds or sends to an address that is not this machine's."""
    if not shutil.which("strace"):
        pytest.skip("no strace")
    done = run(tmp_path, "strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=%network", "-o", str(tmp_path / "log"))
    assert done.returncode in (0, 4), done.stderr  # traced, it is too slow for any promise of speed
    lines = (tmp_path / "log").read_text().splitlines()
    foreign = [line for line in lines if re.search(r"AF_INET6?", line) and not re.search(r'"127\.|"::1"|inet_addr\("0\.0\.0\.0"\)', line)]
    assert foreign == []


def test_onnxruntime_reports_nothing(tmp_path: Path) -> None:
    """With edgecnn imported first, onnxruntime opens no socket to the network and leaves no file in the home folder."""
    if not shutil.which("strace"):
        pytest.skip("no strace")
    code = "import edgecnn, onnxruntime as ort, time; ort.SessionOptions(); ort.get_available_providers(); time.sleep(1)"
    command = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=%network", "-o", tmp_path / "log", sys.executable, "-c", code]
    (tmp_path / "home").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}, check=True)
    assert "AF_INET" not in (tmp_path / "log").read_text()
    assert not list((tmp_path / "home").rglob("*"))

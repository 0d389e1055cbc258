"""Nothing is sent: a whole run without any network ends the same, and opens no socket beyond this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.faults


def run(folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    recipe = tiny.write_recipe(folder)
    command = [*before, sys.executable, "-m", "edgecnn", "compress", "-q", "-r", str(recipe), "-o", str(folder / "out")]
    # One thread, as the tests themselves: the last bits of trained weights depend on the number of threads.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tiny.HERE}", "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    (folder / "home").mkdir()
    return subprocess.run(command, cwd=tiny.HERE, env=environment, capture_output=True, text=True, check=False)


def test_without_network(tmp_path: Path, finished: Path) -> None:
    """With networking cut off by `unshare -n`, the run ends with the same accuracy and the same candidates' files; HOME stays empty."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to cut off the network here (unshare -n)")
    done = run(tmp_path, "unshare", "-n")
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((out / "result.json").read_text()) for out in (tmp_path / "out", finished))
    assert ours["baseline"]["top1"] == theirs["baseline"]["top1"]
    assert [s["top1"] for s in ours["stages"]] == [s["top1"] for s in theirs["stages"]]
    same = 0
    for a, b in zip(ours["targets"], theirs["targets"], strict=True):
        if a["candidate"] == b["candidate"]:  # which is faster may differ between two runs
            assert (a["file_sha256"], a["top1"], a["agreement"]) == (b["file_sha256"], b["top1"], b["agreement"])
            same += 1
    assert same >= 1
    assert [p for p in (tmp_path / "home").rglob("*") if p.is_file()] == []


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

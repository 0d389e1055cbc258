"""Atheris on our own parsers, each from a corpus of good files: nothing but an `EdgecnnError`, nothing that takes ten seconds or 2 GB."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from faults import count, keep, kept

from edgecnn.device.archive import pack
from edgecnn.device.bundle import write_bundle
from edgecnn.device.spec import Manifest

ROOT = Path(__file__).parent.parent
KINDS = ("recipe", "sums", "manifest", "archive", "onnx", "ir")


@pytest.fixture(scope="module")
def goods(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a kind, with a good file in it."""
    folder = tmp_path_factory.mktemp("fuzz")
    manifest = Manifest("pi", "onnxruntime", "fp32", "fp32", {"model": "model.onnx"}, {}, tiny.SPEC, tiny.CLASSES)
    write_bundle(folder / "bundle", manifest, {"model.onnx": tiny_folder / "model.onnx"}, "# Read me\n")
    pack(folder / "bundle", folder / "b.edgecnn")
    contents = {
        "recipe": tiny.RECIPE.format(images="images").encode(),
        "sums": (folder / "bundle" / "SHA256SUMS").read_bytes(),
        "manifest": (folder / "bundle" / "manifest.json").read_bytes(),
        "archive": (folder / "b.edgecnn").read_bytes(),
        "onnx": (tiny_folder / "model.onnx").read_bytes(),
        "ir": b'<?xml version="1.0"?><net name="m" version="11"><layers><layer id="0" name="x" type="Parameter" version="opset1">'
        b'<data shape="1,3,16,16" element_type="f32"/><output><port id="0" precision="FP32"><dim>1</dim><dim>3</dim><dim>16</dim>'
        b"<dim>16</dim></port></output></layer></layers><edges/></net>",
    }
    for kind, content in contents.items():
        (folder / kind).mkdir()
        (folder / kind / "good").write_bytes(content)
        for path in kept(kind):
            (folder / kind / path.name).write_bytes(path.read_bytes())
    assert set(contents) == set(KINDS)
    return folder


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(goods: Path, tmp_path: Path, kind: str) -> None:
    """An input that breaks a parser is kept among the regressions."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris: pip install atheris")
    most = count(2_000, 20_000, 2_000_000)
    command = [sys.executable, tiny.HERE / "fuzz.py", kind, goods / kind, f"-atheris_runs={most}", "-max_total_time=1800", "-max_len=8192"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace", check=False)
    for crash in [path for word in ("crash", "timeout", "oom") for path in tmp_path.glob(f"{word}-*")]:
        keep(kind, crash.read_bytes(), f".{kind}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    covered = re.findall(r"#(\d+)\s.*?cov: (\d+)", done.stderr)
    assert covered, done.stderr[-2000:]
    print(f"\n{kind}: {covered[-1][0]} inputs, {covered[-1][1]} branches")

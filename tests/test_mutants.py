"""Mutated files of every kind: each is refused in one line or is still good; no traceback, no hang, no write elsewhere.

An input that made something fail is kept in `regressions/KIND/` and tried again with every run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from faults import REGRESSIONS, count, keep
from mutants import numbered, parsers
from PIL import Image
from safetensors.torch import save_file

from edgecnn.device.archive import pack
from edgecnn.device.bundle import write_bundle
from edgecnn.device.spec import Manifest, Result
from edgecnn.errors import EdgecnnError

ROOT = Path(__file__).parent.parent
# Kind, and how many of it are tried in `make test`, `make faults` and `make faults-long`.
COUNTS = {
    "recipe": (150, 10_000, 50_000),
    "bundle": (150, 10_000, 50_000),
    "archive": (100, 2_000, 20_000),
    "safetensors": (150, 10_000, 50_000),
    "pt": (100, 2_000, 20_000),
    "npz": (50, 2_000, 10_000),
    "onnx": (50, 10_000, 50_000),
    "ir": (10, 2_000, 10_000),
    "png": (100, 1_000, 10_000),
    "jpeg": (100, 1_000, 10_000),
    "reply": (150, 2_000, 20_000),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files of every kind."""
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "tiny").mkdir()
    tiny.prepare(folder / "tiny")
    model = folder / "tiny" / "model.onnx"
    import openvino as ov

    def put(kind: str, name: str, content: bytes) -> Path:
        path = folder / f"good-{kind}" / f"{kind}.{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    put("recipe", "yaml", tiny.RECIPE.format(images="images").encode())
    put("onnx", "onnx", model.read_bytes())
    ov.save_model(ov.convert_model(model), folder / "tiny" / "ir.xml", compress_to_fp16=False)
    xml = (folder / "tiny" / "ir.xml").read_text()
    put("ir", "xml", xml.encode())
    put("ir-weights", "bin", (folder / "tiny" / "ir.bin").read_bytes())
    state = tiny.network().state_dict()
    save_file(state, folder / "tiny" / "w.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "tiny" / "w.pt")
    np.savez_compressed(folder / "tiny" / "a.npz", images=tiny.images(16)[0], labels=tiny.images(16)[1])
    for kind, name in (("safetensors", "w.safetensors"), ("pt", "w.pt"), ("npz", "a.npz")):
        put(kind, name.partition(".")[2], (folder / "tiny" / name).read_bytes())
    for kind in ("png", "jpeg"):
        Image.fromarray(tiny.images(1)[0][0]).save(folder / "tiny" / f"i.{kind}")
        put(kind, kind, (folder / "tiny" / f"i.{kind}").read_bytes())
    manifest = Manifest("pi", "onnxruntime", "fp32", "fp32", {"model": "model.onnx"}, {}, tiny.SPEC, tiny.CLASSES)
    write_bundle(folder / "bundle", manifest, {"model.onnx": model}, "# Read me\n")
    put("bundle", "txt", b"")
    pack(folder / "bundle", folder / "b.edgecnn")
    put("archive", "edgecnn", (folder / "b.edgecnn").read_bytes())
    result = Result("m", "0" * 64, "onnxruntime", 1, 1, (0.1, 0.2), (0.3,), 0.1, 0.1, "infer", {"cpu": "x"}, 1 << 20, ("a doubt",))
    put("reply", "json", json.dumps(asdict(result)).encode())
    return folder


@pytest.mark.parametrize("kind", COUNTS)
def test_mutants(folder: Path, kind: str) -> None:
    """Every mutant ends in one line, or is accepted because it still is a good file; a crash of a runtime is a failure too."""
    number, seed = count(*COUNTS[kind]), random.SystemRandom().randrange(1 << 30) if os.environ.get("FAULTS") else 0
    first, refused, accepted, crashed = 0, 0, 0, 0
    failures = []
    while first < number:
        command = [sys.executable, tiny.HERE / "mutants.py", kind, str(seed), str(first), str(number - first), folder]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        if done.returncode == 0:
            told = json.loads(lines[-1])
            refused, accepted = refused + told["refused"], accepted + told["accepted"]
            failures += told["failures"]
            break
        at = int(lines[-1]) if lines else first  # crashed, or hung, here
        crashed += 1
        if kind not in ("onnx", "ir") or done.returncode == -14:  # a hang; a runtime that crashes takes its own process along, and no other
            failures.append((at, f"ended with {done.returncode}: {done.stderr[-500:]}"))
        refused += at - first
        first = at + 1
        assert len(failures) < 20
    good = parsers(folder)[kind][0]
    for i, _ in failures:
        keep(kind, numbered(kind, folder, good, seed, i), f".{kind}")
    print(f"\n{kind}: {refused} refused, {accepted} accepted, {crashed} crashed a runtime's own process, seed {seed}")
    assert not failures, failures[0][1]
    assert refused > number // 4 or number < 100


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_kept_inputs(folder: Path, path: Path) -> None:
    """What once failed is refused in one line, or read."""
    read = parsers(folder)[path.parent.name][1]
    try:
        read(path.read_bytes())
    except EdgecnnError as fault:
        assert all(c.isprintable() or c == "\n" for c in str(fault))  # noqa: PT017


def test_the_witness_works(folder: Path, tmp_path: Path) -> None:
    """The process that tries mutants cannot write elsewhere: a parser that did would be found."""
    code = (
        "import sys; from pathlib import Path; from edgecnn.device.confine import confine\n"
        "if not confine(writable=[Path(sys.argv[1])]): sys.exit(3)\n"
        "(Path(sys.argv[1]) / 'x').write_text('x'); (Path(sys.argv[2]) / 'x').write_text('x')"
    )
    done = subprocess.run([sys.executable, "-c", code, folder, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this kernel has no Landlock")
    assert "PermissionError" in done.stderr
    assert not (tmp_path / "x").exists()
    shutil.rmtree(folder / "work", ignore_errors=True)

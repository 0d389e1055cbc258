"""Every command with every kind of bad input: the right exit code, one line, nothing written, the user's files as they were."""

from __future__ import annotations

import io
import pickle
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from faults import tree
from PIL import Image

from edgecnn import cli


def bad_inputs(folder: Path) -> dict[str, Path]:
    """Name and path of 26 things that are none of ours."""
    folder.mkdir()
    zipped, image = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("../../escape", "x")
    Image.new("RGB", (4, 4)).save(image, "PNG")
    contents = {
        "empty": b"",
        "text.txt": b"hello\n",
        "random.bin": bytes(range(256)) * 8,
        "zeros.onnx": bytes(100),
        "text.onnx": b"not a model",
        "empty.xml": b"",
        "entities.xml": b'<!DOCTYPE net [<!ENTITY a "aaaa">]><net>&a;</net>',
        "other.xml": b"<html/>",
        "list.yaml": b"- 1\n- 2\n",
        "alias.yaml": b"a: &a [1]\nb: *a\n",
        "open.yaml": b"model: [",
        "deep.json": b"[" * 5000,
        "null.json": b"null",
        "latin.yaml": b"name: \xe9\n",
        "archive.zip": zipped.getvalue(),
        "archive.edgecnn": b"SHA256SUMS" + bytes(2000),
        "pickle.pt": pickle.dumps(print),
        "image.png": image.getvalue(),
        "page.html": b"<!DOCTYPE html><html>",
        "engine.engine": b"ptrt" + bytes(64),
        "elf.safetensors": b"\x7fELF" + bytes(60),
        "two\nlines": b"x",
        "escape\x1b[2J": b"x",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "folder" / "manifest.json").write_text("{}")
    (folder / "loop").symlink_to("loop")
    found = {name: folder / name for name in [*contents, "folder", "loop", "missing"]}
    return found


def commands(recipe: Path, good: Path) -> dict[str, Callable[[Path], list[object]]]:
    """Twenty-one commands that take a path."""
    quick = ["compress", "-r", recipe, "-o", "out", "-q"]
    return {
        "compress": lambda x: ["compress", "-r", x, "-o", "out"],
        "compress --dry-run": lambda x: ["compress", "-r", x, "--dry-run"],
        "compress checkpoint": lambda x: [*quick, "--set", f"model.checkpoint={str(x)!r}"],
        "compress data": lambda x: [*quick, "--set", f"data.path={str(x)!r}"],
        "compress arrays": lambda x: [*quick, "--set", "data={source: arrays, path: " + repr(str(x)) + "}"],
        "recipe check": lambda x: ["recipe", "check", x],
        "report": lambda x: ["report", x],
        "compare": lambda x: ["compare", x, x],
        "clean": lambda x: ["clean", x],
        "verify": lambda x: ["verify", x],
        "verify --signer": lambda x: ["verify", x, "--signer", x],
        "verify --json": lambda x: ["verify", x, "--json"],
        "eval": lambda x: ["eval", x],
        "eval --data": lambda x: ["eval", good, "--data", x],
        "run": lambda x: ["run", x, x],
        "run image": lambda x: ["run", good, x],
        "bench": lambda x: ["bench", x, "--min-time", "0.01", "--processes", "1"],
        "build": lambda x: ["build", x],
        "pack": lambda x: ["pack", x],
        "unpack": lambda x: ["unpack", x, "--out", "unpacked"],
        "sign": lambda x: ["sign", x, "--key", x],
    }


COMMANDS = tuple(commands(Path(), Path()))


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_with_bad_inputs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    """With any bad input it ends with 2, 3, 7 or 8 in one line, or, for a good image, with 0; nothing is written but into `out`."""
    recipe = tiny.write_recipe(tmp_path)
    inputs = bad_inputs(tmp_path / "inputs")
    assert len(inputs) * len(COMMANDS) >= 500
    words = commands(recipe, finished / "bundles" / "pi")[command]
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.syspath_prepend(tiny.HERE)
    handler = signal.getsignal(signal.SIGTERM)
    before = tree(tmp_path), tree(finished)
    wrong = []
    for name, path in inputs.items():
        monkeypatch.setattr(sys, "argv", ["edgecnn", *map(str, words(path))])
        capsys.readouterr()
        signal.alarm(60)
        try:
            code = cli.run()
        except SystemExit as leave:
            code = int(leave.code or 0)
        signal.alarm(0)
        out, err = capsys.readouterr()
        allowed = {2, 3, 7, 8} | ({0} if command == "run image" and name in ("image.png", "folder") else set())
        lines = [line for line in err.strip().splitlines() if not line.startswith("  ")]
        if code not in allowed or "Traceback" in err + out or (code and not lines):
            wrong.append((name, code, err[-300:]))
        if "\x1b" in err + out:
            wrong.append((name, "an escape code is printed", err[-200:]))
    signal.signal(signal.SIGTERM, handler)
    assert wrong == [], f"{len(wrong)}: {wrong[:8]}"
    after = {name: about for name, about in tree(tmp_path).items() if not name.startswith("cwd/out/")}
    assert after == before[0]
    assert tree(finished) == before[1]

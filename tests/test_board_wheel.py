"""The wheel on a board: an environment with numpy, Pillow and onnxruntime, and no torch, uses a bundle as the host does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import source, write_images

from edgecnn import __version__
from edgecnn.targets.onnxruntime import Onnxruntime

ROOT = Path(__file__).parent.parent
# Nothing of the host's may help the board: no PYTHONPATH, and commands run outside the checkout.
ENV = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key != "VIRTUAL_ENV"}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the built wheel with its extra `onnxruntime`; the folder of its programs."""
    folder = tmp_path_factory.mktemp("board")
    _do(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"edgecnn-{__version__}-py3-none-any.whl"
    _do(sys.executable, "-m", "venv", folder / "venv")
    programs = folder / "venv" / "bin"
    _do(programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[onnxruntime]")
    return programs


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 bundle for onnxruntime, eight images beside it."""
    folder = tmp_path_factory.mktemp("shipped")
    target = Onnxruntime.model_validate({"name": "pi", "runtime": "onnxruntime"})
    target.build(next(c for c in target.candidates() if c.precision == "int8"), source(tiny_folder), folder / "pi")
    write_images(folder / "images", 8)
    return folder / "pi"


def _do(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=ENV, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def test_the_board_holds_no_torch(board: Path, bundle: Path) -> None:
    """Of the packages of the host none is there, and edgecnn comes from the wheel and not from the checkout."""
    code = "import importlib.util as u, edgecnn; print([n for n in ('torch', 'pydantic', 'yaml', 'typer', 'onnx') if u.find_spec(n)]);"
    lines = _do(board / "python", "-c", f"{code} print(edgecnn.__file__)", cwd=bundle.parent).splitlines()
    assert lines[0] == "[]"
    assert Path(lines[1]).is_relative_to(board.parent)


@pytest.mark.parametrize("program", [("python", "-m", "edgecnn.device"), ("edgecnn",)], ids=["module", "script"])
def test_a_bundle_answers_as_on_the_host(board: Path, bundle: Path, tiny_folder: Path, program: tuple[str, ...]) -> None:
    """verify, eval and run on the board print what they print on the host; bench measures the same file."""
    images = sorted((bundle.parent / "images").rglob("*.png"))
    host = (sys.executable, "-m", "edgecnn.device")
    here = (board / program[0], *program[1:])
    rows: list[tuple[object, ...]] = [("verify", bundle), ("eval", bundle, "--data", tiny_folder / "evaluation"), ("run", bundle, *images)]
    for words in rows:
        there = json.loads(_do(*here, *words, "--json", cwd=bundle.parent))
        assert there == json.loads(_do(*host, *words, "--json", cwd=ROOT)), words
    bench = json.loads(_do(*here, "bench", bundle, "--seconds", "0.05", "--json", cwd=bundle.parent))
    assert len(bench["samples_s"]) >= 50
    assert bench["file_sha256"] == json.loads((bundle / "manifest.json").read_text())["digests"]["model.onnx"]


@pytest.mark.parametrize("command", ["compress", "doctor", "models", "recipe", "report"])
def test_the_hosts_commands_say_how_to_install_them(board: Path, command: str) -> None:
    """On the board, what needs torch ends with exit code 2 and one line that says what to install."""
    done = subprocess.run([board / "edgecnn", command], env=ENV, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr == f"edgecnn: {command} needs the host's packages. Install them: pip install 'edgecnn[all]'\n"


def test_another_runtimes_bundle_says_what_to_install(board: Path, bundle: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """A bundle for OpenVINO is verified on this board, and running it says that openvino is missing, with exit code 8."""
    from edgecnn.targets.openvino import Openvino

    target = Openvino.model_validate({"name": "nuc", "runtime": "openvino"})
    target.build(target.candidates()[0], source(tiny_folder), tmp_path / "nuc")
    _do(board / "edgecnn", "verify", tmp_path / "nuc")
    image = next((bundle.parent / "images").rglob("*.png"))
    done = subprocess.run([board / "edgecnn", "run", tmp_path / "nuc", image], env=ENV, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (8, ""), done
    assert done.stderr == "edgecnn: openvino is not installed. Install it: pip install openvino\n"

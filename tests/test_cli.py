"""Every bad input ends in one line that says what to do, with the right exit code, and loses nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from edgecnn import cli

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edgecnn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """Runs a command line in this process; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgecnn", *map(str, words)])
        capsys.readouterr()
        try:
            code = cli.run()
        except SystemExit as leave:  # argparse, of the board's commands
            code = int(leave.code or 0)
        return (code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny.write_recipe(tmp_path)


def told(answer: tuple[int, str, str], code: int, *parts: str) -> str:
    """The last line of stderr, after the checks that every failure must pass."""
    found, out, err = answer
    lines = [line for line in err.splitlines() if not line.startswith("  checking images")]
    assert found == code, err
    assert "Traceback" not in err + out
    assert len(lines) == 1, f"not one line: {lines}"
    assert out == ""
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"
    assert lines[0].startswith("edgecnn: ")
    return lines[0]


def test_missing_recipe(edgecnn: Command) -> None:
    """A recipe that is not there ends with 2 and says how to get one."""
    told(edgecnn("compress", "--recipe", "no.yaml"), 2, "no.yaml: no such recipe", "edgecnn recipe init")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("seed: 0", "seed: [0", ("tiny.yaml:", "expected")),
        ("seed: 0", "sead: 0", ("tiny.yaml:2: sead", "did you mean 'seed'")),
        ("epochs: 12", 'epochs: "ten"', ("tiny.yaml:12: stages[0].epochs", "'ten'")),
        ("epochs: 12", "epochs: on", ("tiny.yaml:12: stages[0].epochs",)),
        ("seed: 0", "seed: 0\nseed: 1", ("tiny.yaml:3: seed", "twice")),
        ("runtime: openvino", "runtime: openvno", ("tiny.yaml:15: targets[1].runtime", "Did you mean 'openvino'")),
    ],
    ids=["syntax", "misspelled key", "word for a number", "switch for a number", "key twice", "misspelled runtime"],
)
def test_faulty_recipe(edgecnn: Command, recipe: Path, old: str, new: str, parts: tuple[str, ...]) -> None:
    """A fault in the recipe ends with 2 and is named by file, line and key; nothing is written."""
    assert recipe.read_text().count(old) == 1
    recipe.write_text(recipe.read_text().replace(old, new))
    told(edgecnn("compress", "--recipe", recipe, "--out", "out"), 2, *parts)
    assert not Path("out").exists()


def test_all_faults_at_once(edgecnn: Command, recipe: Path) -> None:
    """Two faults in a recipe are both told."""
    recipe.write_text(recipe.read_text().replace("seed: 0", "sead: 0").replace("epochs: 12", "epochs: on"))
    code, _, err = edgecnn("recipe", "check", recipe)
    assert code == 2
    assert "sead" in err
    assert "epochs" in err


def test_unknown_model(edgecnn: Command, recipe: Path) -> None:
    """A model that no zoo has ends with 3 or 2 and offers the nearest names."""
    text = recipe.read_text().replace("source: python", "source: timm").replace("entry: tiny:network", "name: mobilnetv2_035")
    recipe.write_text(text)
    told(edgecnn("compress", "-r", recipe, "-o", "out", "-q"), 3, "mobilnetv2_035", "mobilenetv2_035")


def test_bad_folders(edgecnn: Command, recipe: Path, tmp_path: Path) -> None:
    """A data folder that is missing, empty or of one class ends with 3 and is named."""
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "images" / "level", tmp_path / "one" / "level")
    found = 0
    for name, part in (("missing", "missing"), ("empty", "empty"), ("one", "one class")):
        told(edgecnn("compress", "-r", recipe, "-o", "out", "-q", "--set", f"data.path={tmp_path / name}"), 3, str(tmp_path / name), part)
        found += 1
    assert found == 3


def test_corrupt_image(edgecnn: Command, recipe: Path, tmp_path: Path) -> None:
    """A corrupt image is refused by its name; with --skip-bad the run goes on, and the user's file stays as it was."""
    bad = tmp_path / "images" / "level" / "000.png"
    bad.write_bytes(bad.read_bytes()[:100])
    told(edgecnn("compress", "-r", recipe, "-o", "out", "-q"), 3, "000.png", "--skip-bad")
    code, _, err = edgecnn("compress", "-r", recipe, "--dry-run", "--skip-bad", "--set", "targets=[{name: pi, runtime: onnxruntime}]")
    assert code == 0, err
    assert bad.stat().st_size == 100


def test_other_architectures_checkpoint(edgecnn: Command, recipe: Path, tmp_path: Path) -> None:
    """A checkpoint of another network ends with 3 and names keys that differ."""
    torch.save({"features.weight": torch.zeros(3)}, tmp_path / "other.pt")
    answer = edgecnn("compress", "-r", recipe, "-o", "out", "-q", "--set", f"model.checkpoint={tmp_path / 'other.pt'}")
    told(answer, 3, "model.checkpoint", "features.weight", "stem.0.weight")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("canary",))


def test_pickles_are_not_executed(edgecnn: Command, recipe: Path, tmp_path: Path) -> None:
    """A pickled module and a pickle that runs code are refused with 3, and nothing of them is run."""
    torch.save(tiny.network(), tmp_path / "module.pt")
    torch.save({"weights": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    refused = 0
    for name in ("module.pt", "bomb.pt", "raw.pt"):
        answer = edgecnn("compress", "-r", recipe, "-o", "out", "-q", "--set", f"model.checkpoint={tmp_path / name}")
        told(answer, 3, name)
        refused += 1
    assert refused == 3
    assert not Path("canary").exists()


def test_nan_weights(edgecnn: Command, recipe: Path, tmp_path: Path) -> None:
    """A checkpoint with a weight that is not a number ends with 3 and names the tensor."""
    weights = tiny.network().state_dict()
    weights["head.weight"][1, 2] = torch.nan
    torch.save(weights, tmp_path / "nan.pt")
    told(edgecnn("compress", "-r", recipe, "-o", "out", "-q", "--set", f"model.checkpoint={tmp_path / 'nan.pt'}"), 3, "head.weight")


def test_labels_out_of_range(edgecnn: Command, recipe: Path, tmp_path: Path) -> None:
    """A label beyond the named classes ends with 3 and names the image."""
    pixels, labels = tiny.images(24)
    labels[7] = 9
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    data = f"data={{source: arrays, path: {tmp_path / 'a.npz'}, class_names: [a, b, c, d]}}"
    told(edgecnn("compress", "-r", recipe, "-o", "out", "-q", "--set", data), 3, "out of range", "image 7")


def test_runtime_that_is_not_installed(edgecnn: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose package is not there ends with 8 before any work, and says how to install it."""
    monkeypatch.setattr("edgecnn.targets.openvino.find_spec", lambda name: None)
    told(edgecnn("compress", "-r", recipe, "-o", "out", "-q"), 8, "targets[1] (nuc)", "pip install 'edgecnn[openvino]'")


def test_wrong_command_lines(edgecnn: Command, recipe: Path) -> None:
    """An unknown option, a missing one and an unknown command each end with 2 and point to the help."""
    for words in (["compress", "--recipes", recipe], ["compress"], ["compres"], ["models"]):
        told(edgecnn(*words), 2, "--help")


def test_tampered_bundle(edgecnn: Command, finished: Path, tmp_path: Path) -> None:
    """One flipped bit, a missing and an extra file each end `verify`, `run` and `eval` with 7, and name the file."""
    seen = 0

    def flip(folder: Path) -> str:
        content = bytearray((folder / "model.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "model.onnx").write_bytes(content)
        return "model.onnx"

    def miss(folder: Path) -> str:
        (folder / "labels.txt").unlink()
        return "labels.txt"

    def add(folder: Path) -> str:
        (folder / "more").write_text("more")
        return "more"

    for spoil in (flip, miss, add):
        folder = tmp_path / spoil.__name__
        shutil.copytree(finished / "bundles" / "pi", folder)
        name = spoil(folder)
        for words in (["verify", folder], ["run", folder, "x.png"], ["eval", folder, "--data", finished / "evaluation"]):
            told(edgecnn(*words), 7, name)
            seen += 1
    assert seen == 9


def test_image_that_is_not_one(edgecnn: Command, finished: Path, tmp_path: Path) -> None:
    """`run` on a text file or on nothing ends with 3 and names it."""
    (tmp_path / "text.png").write_text("not an image")
    told(edgecnn("run", finished / "bundles" / "pi", tmp_path / "text.png"), 3, "text.png")
    told(edgecnn("run", finished / "bundles" / "pi", tmp_path / "none.png"), 3, "none.png")


def test_json(edgecnn: Command, finished: Path, tmp_path: Path) -> None:
    """With --json, each command prints one JSON object (doctor and models: one list) and nothing else on stdout."""
    bundle = finished / "bundles" / "pi"
    Image.fromarray(tiny.images(4)[0][1]).save(tmp_path / "a.png")
    seen = 0
    for words in (
        ["verify", bundle],
        ["run", bundle, tmp_path / "a.png"],
        ["eval", bundle],
        ["bench", bundle, "--seconds", "0.01"],
        ["models", "mobilenetv2_035"],
        ["doctor"],
    ):
        code, out, err = edgecnn(*words, "--json")
        assert code == 0, err
        assert isinstance(json.loads(out), dict | list)
        seen += 1
    assert seen == 6


def test_run_names_the_classes(edgecnn: Command, finished: Path, tmp_path: Path) -> None:
    """`run` gives the right class of a clear image, its probabilities falling and at most 1 in sum."""
    pixels, labels = tiny.images(4, seed=5)
    Image.fromarray(pixels[2]).save(tmp_path / "a.png")
    code, out, _ = edgecnn("run", finished / "bundles" / "pi", tmp_path / "a.png", "--json")
    top = json.loads(out)["images"][0]["top"]
    assert code == 0
    assert top[0]["label"] == tiny.CLASSES[labels[2]]
    chances = [entry["probability"] for entry in top]
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) <= 1 + 1e-6


@pytest.mark.parametrize(
    "words",
    [[], *([name] for name in ("compress", "verify", "eval", "run", "bench", "build", "report", "doctor", "models", "recipe"))],
    ids=lambda words: " ".join(words) or "edgecnn",
)
def test_help(edgecnn: Command, words: list[str]) -> None:
    """Every command has a help that names it and explains every option, and ends with 0."""
    code, out, err = edgecnn(*words, "--help")
    assert code == 0
    assert err == ""
    assert " ".join(["edgecnn", *words]) in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_report_without_a_run(edgecnn: Command, tmp_path: Path) -> None:
    """`report` on a folder that is no run ends with 2 and says what makes one."""
    told(edgecnn("report", tmp_path), 2, "result.json", "edgecnn compress")


def test_compress_tells_its_verdict_as_json(edgecnn: Command, finished: Path, tmp_path: Path) -> None:
    """`compress --json` prints result.json and nothing else, and ends with 4 where a promise is broken."""
    shutil.copytree(finished, tmp_path / "out", symlinks=True)
    recipe = finished.parent / "tiny.yaml"
    for words, code, verdict in (((), 0, "pass"), (("--set", "promise.size_mb=0.0001"), 4, "fail")):
        found, out, err = edgecnn("compress", "-r", recipe, "-o", "out", "--json", *words)
        assert (found, err) == (code, "")
        assert json.loads(out) == json.loads(Path("out/result.json").read_text())
        assert json.loads(out)["verdict"] == verdict


def test_folders_of_others(edgecnn: Command, finished: Path, recipe: Path, tmp_path: Path) -> None:
    """A folder of another recipe, or with files of others, ends with 2 and is left as it was."""
    told(edgecnn("compress", "-r", recipe, "-o", finished, "--set", "name=other", "-q"), 2, "belongs to the recipe 'tiny'")
    told(edgecnn("compress", "-r", recipe, "-o", tmp_path, "-q"), 2, "holds files that are not of an edgecnn run")
    assert not (tmp_path / "recipe.json").exists()

"""The board's commands: what they answer, what they refuse, and that `edgecnn` and `python -m edgecnn.device` are one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import CLASSES, SPEC, source, write_images

from edgecnn.device import __main__ as device
from edgecnn.device.files import sha256_file
from edgecnn.device.packed import open_packed, write_packed
from edgecnn.device.stats import wilson
from edgecnn.targets.onnxruntime import Onnxruntime
from edgecnn.targets.openvino import Openvino
from edgecnn.targets.tensorrt import Tensorrt

BOARD = (sys.executable, "-m", "edgecnn.device")
HOST = (sys.executable, "-m", "edgecnn")
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run leaves it: bundles/pi (onnxruntime int8), nuc (OpenVINO fp32), orin (TensorRT int8), and evaluation; images beside."""
    folder = tmp_path_factory.mktemp("run")
    made = source(tiny_folder)
    for target, name in (
        (Onnxruntime.model_validate({"name": "pi", "runtime": "onnxruntime"}), "int8"),
        (Openvino.model_validate({"name": "nuc", "runtime": "openvino"}), "fp32"),
        (Tensorrt.model_validate({"name": "orin", "runtime": "tensorrt"}), "int8"),
    ):
        candidate = next(c for c in target.candidates() if c.name == name)
        target.build(candidate, made, folder / "bundles" / target.name)
    shutil.copytree(tiny_folder / "evaluation", folder / "evaluation")
    write_images(folder / "images", 8)
    return folder


def call(folder: Path, *words: object, by: tuple[str, ...] = BOARD) -> Done:
    """Run a command in `folder`."""
    package = str(Path(__file__).parent.parent)
    env = {"PYTHONPATH": package, "PATH": "", "HOME": str(folder)}
    return subprocess.run([*by, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)


def answer(folder: Path, *words: object, by: tuple[str, ...] = BOARD) -> dict[str, object]:
    """What the command prints with --json: one object, and nothing on stderr."""
    done = call(folder, *words, "--json", by=by)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert len(done.stdout.splitlines()) == 1
    data: dict[str, object] = json.loads(done.stdout)
    return data


@pytest.mark.parametrize("target", ["pi", "nuc"])
def test_run_names_the_class(run_folder: Path, target: str) -> None:
    """Each of eight images gets its own class first, probabilities fall and add up to 1, and the text says the same as --json."""
    images = sorted((run_folder / "images").rglob("*.png"))
    data = answer(run_folder, "run", f"bundles/{target}", *images)
    assert [a["image"] for a in data["images"]] == [str(p) for p in images]  # type: ignore[attr-defined]
    for path, each in zip(images, data["images"], strict=True):  # type: ignore[call-overload]
        top = each["top"]
        assert top[0]["label"] == path.parent.name == CLASSES[top[0]["index"]]
        probabilities = [entry["probability"] for entry in top]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert len(top) == len(CLASSES), "five were asked for, and there are four"
    assert len(images) == 8
    text = call(run_folder, "run", f"bundles/{target}", images[0], "--top", 1).stdout.splitlines()
    assert text[0] == str(images[0])
    assert len(text) == 2
    assert text[1].endswith(f"%  {images[0].parent.name}")


def test_eval_counts_right_answers(run_folder: Path) -> None:
    """top1 is that of the logits it writes, the interval is Wilson's, and the images are named by their digest."""
    for target, more in (("pi", ()), ("nuc", ()), ("orin", ("--runtime", "onnxruntime"))):
        data = answer(run_folder, "eval", f"bundles/{target}", "--logits", run_folder / "logits.npy", *more)
        images, logits = open_packed(run_folder / "evaluation"), np.load(run_folder / "logits.npy")
        right = int((logits.argmax(1) == images.labels).sum())
        assert (data["top1"], data["n"]) == (right / 64, 64)
        assert data["interval"] == list(wilson(right, 64))
        assert data["data_sha256"] == images.sha256
        assert right >= 60
        text = call(run_folder, "eval", f"bundles/{target}", *more).stdout
        assert f"top-1 {right / 64:.2%} of 64 images" in text
    assert f"{run_folder}/bare: logits 64 x 4, float32." in call(run_folder, "eval", "bundles/pi", "--logits", run_folder / "bare").stdout
    assert np.load(run_folder / "bare").shape == (64, 4)


def test_bench_keeps_every_sample(run_folder: Path) -> None:
    """Samples are positive, enough for a p90, fill the seconds asked for; load, first call, memory and circumstances are there."""
    data = answer(run_folder, "bench", "bundles/pi", "--seconds", 0.1, "--batch", 2)
    samples = np.array(data["samples_s"])
    assert (samples > 0).all()
    assert samples.sum() <= 60
    assert len(samples) >= 50
    assert (data["runtime"], data["batch"], data["threads"]) == ("onnxruntime", 2, 1)
    assert all(data[key] > 0 for key in ("load_s", "first_s", "peak_rss_bytes"))  # type: ignore[operator]
    assert "cpu" in data["circumstances"]  # type: ignore[operator]
    text = call(run_folder, "bench", "bundles/pi", "--seconds", 0.1).stdout
    assert all(word in text for word in ("p50", "p90", "p99", "first inference"))


def test_bench_in_turns(run_folder: Path) -> None:
    """`--against` times two files in one process, as many calls of each: a file takes about all of its own time; runtimes are not mixed."""
    data = answer(run_folder, "bench", "bundles/pi", "--against", "bundles/pi", "--seconds", 0.1)
    first, second = np.array(data["samples_s"]), np.array(data["against_s"])
    assert len(first) == len(second) >= 30
    assert (first > 0).all()
    assert (second > 0).all()
    assert data["file_sha256"] == data["against_sha256"] == sha256_file(run_folder / "bundles" / "pi" / "model.onnx")
    text = call(run_folder, "bench", "bundles/pi/model.onnx", "--against", "bundles/pi", "--seconds", 0.01).stdout
    assert "of the time of pi, sha256" in text


def test_both_names_are_one_program(run_folder: Path) -> None:
    """`edgecnn` and `python -m edgecnn.device` print the same and end the same, right or wrong."""
    image = next((run_folder / "images").rglob("*.png"))
    rows: list[tuple[object, ...]] = [
        ("verify", "bundles/pi"),
        ("verify", "bundles/pi", "--json"),
        ("run", "bundles/pi", image, "--json"),
        ("eval", "bundles/pi", "--json"),
        ("run", "bundles/pi", "gone.png"),
        ("verify", "gone"),
        ("run", "bundles/pi", image, "--top", "none"),
        ("run", "bundles/pi", "--top", "1", image),
        ("run", "--", "bundles/pi", "-gone.png"),
    ]
    for words in rows:
        one, other = call(run_folder, *words), call(run_folder, *words, by=HOST)
        assert (one.returncode, one.stdout) == (other.returncode, other.stdout), words
        assert one.stderr.replace("python -m edgecnn.device", "edgecnn") == other.stderr, words
        assert "unrecognized" not in one.stderr


REFUSED = {
    "no such image": (("run", "bundles/pi", "gone.png"), 3, "gone.png: no such file"),
    "not an image": (("run", "bundles/pi", "bundles/pi/manifest.json"), 3, "not an image of a known format"),
    "a folder for an image": (("run", "bundles/pi", "images"), 3, "images: no image file in it"),
    "half an image": (("run", "bundles/pi", "half.png"), 3, "half.png"),
    "no bundle": (("run", "gone", "good.png"), 7, "gone: not a folder"),
    "a name longer than any": (("run", "bundles/pi", "a" * 300 + ".png"), 3, "too long"),
    "a provider that leaves it to the CPU": (("eval", "bundles/pi", "--provider", "AzureExecutionProvider"), 8, "CPU do all of the work"),
    "a provider that is not there": (("run", "bundles/pi", "good.png", "--provider", "NoSuchProvider"), 8, "CPUExecutionProvider"),
    "an empty provider": (("run", "bundles/pi", "good.png", "--provider", ""), 8, "asked for ''"),
    "a device that is not there": (("bench", "bundles/nuc", "--provider", "NPU9"), 8, "OpenVINO offers"),
    "an empty device": (("eval", "bundles/nuc", "--provider", ""), 8, "asked for ''"),
    "another runtime for an IR": (("run", "bundles/nuc", "good.png", "--runtime", "onnxruntime"), 2, "is no ONNX graph"),
    "build of what needs none": (("build", "bundles/pi"), 2, "needs no build"),
    "no prepared images": (("eval", "bundles/pi", "--data", "gone"), 3, "no prepared images"),
    "a folder that is no set": (("eval", "bundles/pi", "--data", "images"), 7, "not a readable image set"),
    "images of another geometry": (("eval", "bundles/pi", "--data", "other"), 3, "prepared for another input"),
    "tampered images": (("eval", "bundles/pi", "--data", "tampered"), 7, "not those of the digest"),
    "logits into the bundle": (("eval", "bundles/pi", "--logits", "bundles/pi/lo.npy"), 2, "lies in the bundle"),
    "logits over the images": (("eval", "bundles/pi", "--logits", "evaluation/labels.npy"), 2, "among the prepared images"),
    "an archive into a bundle": (("pack", "bundles/pi", "--out", "bundles/nuc/pi.edgecnn"), 2, "lies in the bundle"),
    "logits on a full disk": (("eval", "bundles/pi", "--logits", "/dev/full"), 5, "No space left"),
    "logits nowhere": (("eval", "bundles/pi", "--logits", "gone/x.npy"), 2, "there is no folder gone"),
    "no threads": (("bench", "bundles/pi", "--threads", "0"), 2, "from 1 to 1024"),
    "threads that would hang the machine": (("bench", "bundles/pi", "--threads", "100000"), 2, "from 1 to 1024"),
    "seconds that are none": (("bench", "bundles/pi", "--seconds", "nan"), 2, "seconds above 0"),
    "negative seconds": (("bench", "bundles/pi", "--seconds", "-1"), 2, "seconds above 0"),
    "half a batch": (("bench", "bundles/pi", "--batch", "1.5"), 2, "whole number"),
    "turns with another runtime": (("bench", "bundles/pi", "--against", "bundles/nuc"), 2, "for openvino, not onnxruntime"),
    "no image": (("run", "bundles/pi"), 2, "images"),
    "an unknown word": (("verify", "bundles/pi", "--bogus"), 2, "--bogus"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_ends_in_one_line(run_folder: Path, case: str) -> None:
    """Each wrong input ends with its exit code, one line on stderr that names it and what to do, and nothing on stdout."""
    _spoil(run_folder)
    words, code, told = REFUSED[case]
    done = call(run_folder, *words)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("edgecnn: ")
    assert told in done.stderr


def test_threads_that_only_wait_are_refused(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen for each core still end, more would take minutes for a call."""
    monkeypatch.setattr(device, "usable_cores", lambda: 1)
    assert device.main(["bench", str(run_folder / "bundles" / "pi"), "--seconds", "0.01", "--threads", "16"]) == 0
    assert device.main(["bench", str(run_folder / "bundles" / "pi"), "--threads", "17"]) == 8
    assert "Give 1 at most" in capsys.readouterr().err


def _spoil(folder: Path) -> None:
    """The files that the wrong inputs name, once."""
    if (folder / "good.png").exists():
        return
    good = next((folder / "images").rglob("*.png"))
    (folder / "half.png").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    write_packed(folder / "other", ["a", "b"], np.array([0, 1]), pixels, {**SPEC.geometry, "height": 8, "width": 8})
    shutil.copytree(folder / "evaluation", folder / "tampered")
    tampered = folder / "tampered" / "images.npy"
    tampered.write_bytes(tampered.read_bytes()[:-1] + bytes([tampered.read_bytes()[-1] ^ 1]))
    shutil.copyfile(good, folder / "good.png")


def test_a_tampered_bundle_runs_nothing(run_folder: Path, tmp_path: Path) -> None:
    """Every command checks the digests first: with one byte flipped, none of them gives a figure."""
    shutil.copytree(run_folder / "bundles" / "pi", tmp_path / "pi")
    image = next((run_folder / "images").rglob("*.png"))
    model = tmp_path / "pi" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + bytes([model.read_bytes()[-1] ^ 1]))
    for words in (("verify",), ("run", image), ("eval", "--data", run_folder / "evaluation"), ("bench",), ("build",)):
        done = call(tmp_path, words[0], "pi", *words[1:])
        assert (done.returncode, done.stdout) == (7, ""), done
        assert "model.onnx has changed" in done.stderr


def test_images_of_any_kind_are_brought_to_the_input(run_folder: Path, tmp_path: Path) -> None:
    """Grey, palette, transparent and 16-bit files, and one 40 times as large, get the same class as the plain one."""
    path = next((run_folder / "images" / "upright").glob("*.png"))
    image = Image.open(path)
    for kind in ("L", "P", "RGBA", "LA"):
        image.convert(kind).save(tmp_path / f"{kind}.png")
    image.resize((640, 640)).save(tmp_path / "large.jpg")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    files = sorted(tmp_path.iterdir())
    data = answer(run_folder, "run", "bundles/pi", *files)
    tops = [each["top"][0]["label"] for each in data["images"]]  # type: ignore[attr-defined]
    assert tops == ["upright"] * 6

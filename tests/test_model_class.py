"""`Model` in a program of one's own, and where `run` takes its images from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import CLASSES, HERE, SPEC, images, source

from edgecnn.device import feed
from edgecnn.device.model import Model
from edgecnn.device.spec import InputSpec
from edgecnn.errors import DataError, DeviceError, IntegrityError, UsageError
from edgecnn.targets.onnxruntime import Onnxruntime


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Onnxruntime.model_validate({"name": "pi", "runtime": "onnxruntime"})
    folder = tmp_path_factory.mktemp("model") / "pi"
    target.build(target.candidates()[0], source(tiny_folder), folder)
    return folder


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgecnn.device", "run", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False, timeout=60)


def test_it_knows_the_stripes_however_they_are_given(bundle: Path, tmp_path: Path) -> None:
    """A file, a Pillow image and an array give the same list of (label, probability), best first, and the label is right."""
    pixels, labels = images(16, seed=5)
    right = 0
    with Model.open(bundle) as model:
        for image, label in zip(pixels, labels, strict=True):
            Image.fromarray(image).save(tmp_path / "x.png")
            answers = [model.predict(given) for given in (str(tmp_path / "x.png"), tmp_path / "x.png", Image.fromarray(image), image)]
            assert all(answer == answers[0] for answer in answers)
            right += answers[0][0][0] == CLASSES[label]
            probabilities = [p for _, p in answers[0]]
            assert probabilities == sorted(probabilities, reverse=True)
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
            assert {name for name, _ in answers[0]} == set(CLASSES)
            assert model.predict(image, top=1) == answers[0][:1]
    assert right >= 15


def test_an_answer_is_kept_when_the_next_one_comes(bundle: Path) -> None:
    """The logits of one image are not overwritten by the next."""
    pixels, _ = images(2, seed=6)
    with Model.open(bundle) as model:
        first = model.logits(pixels[0])
        kept = first.copy()
        second = model.logits(pixels[1])
    assert (first == kept).all()
    assert not (first == second).all()


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(bundle: Path, wrong: np.ndarray) -> None:
    """Floats, four channels, one dimension and no pixels are refused in one line that names what was found."""
    with Model.open(bundle) as model, pytest.raises(DataError, match="is not an image"):
        model.predict(wrong)


@pytest.mark.parametrize("wrong", [None, 7, ["a.png"], b"a.png"])
def test_what_is_of_no_kind_is_refused(bundle: Path, wrong: object) -> None:
    """Anything else than a name, an image or an array is refused, and its type is named."""
    with Model.open(bundle) as model, pytest.raises(DataError, match=f"a {type(wrong).__name__} is not an image"):
        model.predict(wrong)  # type: ignore[arg-type]


def test_a_closed_model_says_so(bundle: Path) -> None:
    """After `close` or a `with`, `predict` says that it is closed; closing twice is fine."""
    with Model.open(bundle) as model:
        pass
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.predict(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None])
def test_numbers_are_above_0(bundle: Path, wrong: object) -> None:
    """Threads and top that are no whole number above 0 are refused by their name and value."""
    with pytest.raises(UsageError, match=f"threads={wrong}"):
        Model.open(bundle, threads=wrong)  # type: ignore[arg-type]
    with Model.open(bundle) as model, pytest.raises(UsageError, match=f"top={wrong}"):
        model.predict(np.zeros((8, 8, 3), np.uint8), top=wrong)  # type: ignore[arg-type]


def test_it_opens_only_what_is_intact_and_there(bundle: Path, tmp_path: Path) -> None:
    """A folder that is no bundle, and a provider that is not there or leaves all the work to the CPU, are refused."""
    with pytest.raises(IntegrityError):
        Model.open(tmp_path)
    for provider in ("NoSuchProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"):
        with pytest.raises(DeviceError, match=f"asked for '{provider}'"):
            Model.open(bundle, provider=provider)
    with pytest.raises(DeviceError, match="lets the CPU do all of the work"):
        Model.open(bundle, provider="AzureExecutionProvider")  # every onnxruntime from PyPI offers it


def test_a_folder_is_all_its_images_in_order(bundle: Path, tmp_path: Path) -> None:
    """`run BUNDLE FOLDER` classifies the image files in it by name and leaves the rest; `--count` ends it early."""
    pixels, labels = images(6, seed=7)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    done = run(bundle, tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["images"]
    assert [Path(a["image"]).name for a in answers] == [f"{i}.png" for i in range(6)]
    assert [a["top"][0]["label"] for a in answers] == [CLASSES[label] for label in labels]
    assert len(json.loads(run(bundle, tmp_path, "--json", "--count", 2).stdout)["images"]) == 2


def test_a_bad_image_costs_its_own_answer_only(bundle: Path, tmp_path: Path) -> None:
    """The others are answered, in their order; each bad one is named, on stderr and in --json; the exit code is 3."""
    pixels, labels = images(4, seed=7)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    Image.new("RGB", (400_000, 1)).save(tmp_path / "2.png")
    for words in ((tmp_path,), sorted(tmp_path.iterdir())):
        done = run(bundle, *words, "--json")
        told = json.loads(done.stdout)
        assert done.returncode == 3
        assert [(a["image"], a["top"][0]["label"]) for a in told["images"]] == [
            (str(tmp_path / f"{i}.png"), CLASSES[labels[i]]) for i in (0, 3)
        ]
        assert [r["image"] for r in told["refused"]] == [str(tmp_path / f"{i}.png") for i in (1, 2)]
        assert done.stderr.splitlines() == [f"edgecnn: {r['fault']}" for r in told["refused"]]
        assert all(r["fault"].startswith(r["image"]) for r in told["refused"])
    text = run(bundle, tmp_path, "--top", 1)
    assert (text.returncode, len(text.stdout.splitlines()), len(text.stderr.splitlines())) == (3, 4, 2)


def test_odd_names_are_shown_and_obeyed_by_no_terminal(bundle: Path, tmp_path: Path) -> None:
    """Control characters and bytes that are no text, in names of good and of bad files, are escaped in text and whole in --json."""
    names = [b"\x1b[2J.png", b"a\nb.png", b"\xff\xfe.png", "caf\u00e9 \u202e.png".encode()]
    paths = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) for name in names]
    for path in paths:
        Image.fromarray(images(1, seed=1)[0][0]).save(path, "PNG")
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\x1b]0;title\x07\xff.png"))
    bad.write_bytes(b"x")
    done = run(bundle, *paths, bad, "--top", 1)
    assert done.returncode == 3, done.stderr
    assert len(done.stdout.splitlines()) == 8
    assert all(c.isprintable() or c == "\n" for c in done.stdout + done.stderr)
    assert "caf\u00e9" in done.stdout
    assert r"\x1b[2J.png" in done.stdout
    told = json.loads(run(bundle, *paths, "--json").stdout)
    assert [os.fsencode(a["image"]) for a in told["images"]] == [os.fsencode(p) for p in paths]


def test_one_source_at_a_time(bundle: Path, tmp_path: Path) -> None:
    """No source, two sources, and a folder without images are refused in one line."""
    for words, code in (((), 2), (("a.png", "--watch", tmp_path), 2), ((tmp_path,), 3), (("--watch", tmp_path / "gone"), 3)):
        done = run(bundle, *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr


def test_watching_takes_each_new_file_once_and_when_it_is_whole(tmp_path: Path) -> None:
    """Files that were there are left, one that still grows is waited for, and one that vanishes or leads to itself is passed over."""
    pixels, _ = images(2, seed=8)
    Image.fromarray(pixels[0]).save(tmp_path / "old.png")
    Image.fromarray(pixels[1]).save(tmp_path / "whole.tmp", "PNG")
    whole = (tmp_path / "whole.tmp").read_bytes()
    (tmp_path / "loop.png").symlink_to("loop.png")
    looks = 0

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            (tmp_path / "new.png").write_bytes(whole[:20])
            (tmp_path / "short.png").write_bytes(whole)
        if looks == 2:
            (tmp_path / "new.png").write_bytes(whole)
            (tmp_path / "short.png").unlink()
        if looks == 6:
            (tmp_path / "again.png").write_bytes(whole)
        assert looks < 20

    came = feed.watch(tmp_path, sleep=sleep)
    name, image = next(came)
    assert (Path(name).name, looks) == ("new.png", 3)
    assert isinstance(image, Path)
    assert (np.asarray(Image.open(image)) == pixels[1]).all()
    assert Path(next(came)[0]).name == "again.png"
    assert looks >= 7


def test_the_command_watches(bundle: Path, tmp_path: Path) -> None:
    """`run --watch --json` prints one object a line as images come, tells what is no image and goes on, and ends after `--count`."""
    pixels, labels = images(2, seed=9)
    command = [sys.executable, "-m", "edgecnn.device", "run", str(bundle), "--watch", str(tmp_path), "--count", "8", "--json"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent)
    try:
        stop = threading.Event()

        def drop() -> None:
            # Again and again under new names: when the watcher has begun is not ours to know.
            for turn in range(200):
                if stop.wait(0.3):
                    return
                part, name = tmp_path / "part.tmp", f"{labels[turn % 2]}-{turn}.png"
                if turn % 2 == 0:
                    Image.fromarray(pixels[0]).save(part, "PNG")
                elif turn % 4 == 1:
                    part.write_bytes(b"no image")
                else:  # it opens, and is too thin to be resized
                    Image.new("RGB", (400_000, 1)).save(part, "PNG")
                os.replace(part, tmp_path / name)  # noqa: PTH105

        dropper = threading.Thread(target=drop)
        dropper.start()
        out, err = watcher.communicate(timeout=60)
        stop.set()
        dropper.join()
    finally:
        watcher.kill()
    assert watcher.returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    for line in lines:
        (answer,) = line["images"]
        assert answer["top"][0]["label"] == CLASSES[int(Path(answer["image"]).name[0])]
    told = err.splitlines()
    assert (len(lines) + len(told), len(lines) >= 2) == (8, True)
    assert any("not an image" in line for line in told)
    assert any("too thin" in line for line in told)
    assert all(f"edgecnn: {tmp_path}/" in line for line in told), "each names its file"


def test_a_camera_needs_opencv(bundle: Path, tmp_path: Path) -> None:
    """Without OpenCV, --camera says what to install; with it, a video that is not there is refused. Exit code 8 both times."""
    done = run(bundle, "--camera", tmp_path / "gone.avi")
    assert done.returncode == 8, done.stderr
    assert "OpenCV cannot open it" in done.stderr.splitlines()[-1]
    code = "import sys; sys.modules['cv2'] = None; from edgecnn.device.__main__ import main; "
    code += f"sys.exit(main(['run', {str(bundle)!r}, '--camera', '0']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1].partition("Install it: ")[2]) == (8, "pip install opencv-python-headless")


def test_frames_of_a_video_are_right_way_round(tmp_path: Path) -> None:
    """Red frames come out red: OpenCV's order of colours is turned."""
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (32, 16))
    for _ in range(3):
        writer.write(np.full((16, 32, 3), (0, 0, 255), np.uint8))
    writer.release()
    frames = list(feed.camera(str(tmp_path / "red.avi")))
    assert len(frames) == 3
    red, green, blue = np.asarray(frames[0][1]).reshape(-1, 3).mean(0)
    assert red > 200
    assert max(green, blue) < 50
    assert frames[0][1].size == (32, 16)


def test_a_grey_model_takes_grey_arrays() -> None:
    """Height x width and height x width x 1 are the same grey image."""
    from edgecnn.device.model import _opened
    from edgecnn.device.preprocess import to_pixels

    spec = InputSpec(1, 8, 8, 8, "squash", "bilinear", (0.5,), (0.5,))
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for given in (grey, grey[:, :, None]):
        assert (to_pixels(_opened(given), spec)[:, :, 0] == grey).all()
    assert SPEC.channels == 3

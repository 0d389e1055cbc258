"""Golden vectors say whether a board computes what was measured."""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CLASSES, HERE, SPEC, source

from edgecnn.board_runtime import board_runtime
from edgecnn.device.bundle import verify_bundle, write_bundle
from edgecnn.device.golden import ABOUT, BOUND, VECTORS, compare_golden, synthesise, write_golden
from edgecnn.device.preprocess import to_input
from edgecnn.device.runtimes import open_runner
from edgecnn.device.spec import Manifest, Takes
from edgecnn.errors import IntegrityError
from edgecnn.targets.onnxruntime import Onnxruntime


def write(folder: Path, tiny_folder: Path, tmp_path: Path, changed: Any = lambda logits: logits) -> Manifest:
    """A bundle with golden vectors and the board's half; `changed` falsifies the expected logits."""
    target = Onnxruntime.model_validate({"name": "pi", "runtime": "onnxruntime"})
    candidate = next(c for c in target.candidates() if c.precision == "int8")
    artifact = target.build(candidate, source(tiny_folder), tmp_path / "artifact")
    images = synthesise(SPEC)
    with open_runner(artifact.folder, artifact.manifest, threads=1) as runner:
        logits = np.concatenate([runner.infer(to_input(images[i : i + 1], SPEC, runner.takes)) for i in range(len(images))])
    golden = tmp_path / "golden"
    golden.mkdir()
    paths = write_golden(golden, artifact.manifest, images, changed(logits), "here")
    files = {name: artifact.folder / name for name in artifact.manifest.digests}
    return write_bundle(folder, artifact.manifest, files, "", {**paths, **board_runtime()})


def device(*words: object, cwd: Path = HERE.parent) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgecnn.device", *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False)


def test_the_images_are_the_same_for_everyone_and_not_alike() -> None:
    """The same seed gives the same bytes; the images differ from each other and use most of the range."""
    images = synthesise(SPEC)
    assert images.tobytes() == synthesise(SPEC).tobytes()
    assert images.shape == (4, SPEC.height, SPEC.width, SPEC.channels)
    assert images.dtype == np.uint8
    for i in range(4):
        assert images[i].std() > 15
        for j in range(i):
            assert np.abs(images[i].astype(int) - images[j]).mean() > 10
    assert synthesise(replace(SPEC, channels=1, mean=(0.5,), std=(0.5,))).shape[3] == 1


def test_where_it_was_made_the_answer_is_no_difference(tiny_folder: Path, tmp_path: Path) -> None:
    """`verify --run` ends with 0, and says that logits differ by 0 and every best class is the same; golden.json can be read by people."""
    write(tmp_path / "pi", tiny_folder, tmp_path)
    done = device("verify", tmp_path / "pi", "--run", "--json")
    assert done.returncode == 0, done.stderr
    golden = json.loads(done.stdout)["golden"]
    assert (golden["error"], golden["agreement"], golden["n"], golden["same"]) == (0.0, 1.0, 4, True)
    assert "differ by 0 of their standard deviation" in device("verify", tmp_path / "pi", "--run").stdout
    about = json.loads((tmp_path / "pi" / ABOUT).read_text())
    assert len(about["images"]) == 4
    assert all({entry["label"] for entry in image} == set(CLASSES) for image in about["images"])
    assert about["bound"] == BOUND["int8"]


@pytest.mark.parametrize(
    "wrong",
    [lambda x: np.roll(x, 1, axis=1), lambda x: x * 1.5, lambda x: np.where(x == x.max(), np.nan, x)],
    ids=["other classes", "half as much again", "not a number"],
)
def test_something_else_is_refused(tiny_folder: Path, tmp_path: Path, wrong: Any) -> None:
    """Where the computed logits are not the expected ones: exit code 8, how far they are apart, and nothing on stdout."""
    write(tmp_path / "pi", tiny_folder, tmp_path, wrong)
    done = device("verify", tmp_path / "pi", "--run")
    assert done.returncode == 8, done.stderr
    assert done.stdout == ""
    assert "computes something else here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert device("verify", tmp_path / "pi").returncode == 0, "the files themselves are as they were made"


def test_a_changed_vector_is_an_integrity_fault(tiny_folder: Path, tmp_path: Path) -> None:
    """The vectors are in SHA256SUMS: one flipped byte ends with 7 before anything runs."""
    write(tmp_path / "pi", tiny_folder, tmp_path)
    path = tmp_path / "pi" / VECTORS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = device("verify", tmp_path / "pi", "--run")
    assert (done.returncode, done.stdout) == (7, "")


class Still:
    """A board that answers with the same row whatever it is shown."""

    provider, version = "CPU", "0"
    takes: Takes = "float32"

    def __init__(self, row: np.ndarray) -> None:
        self.row = row

    def infer(self, x: np.ndarray) -> np.ndarray:
        return np.tile(self.row, (len(x), 1)).astype(np.float32)

    def __enter__(self) -> Still:
        return self

    def __exit__(self, *fault: object) -> None: ...


def test_the_error_is_the_root_mean_square_as_a_share_of_the_deviation(tmp_path: Path) -> None:
    """For known differences the figures come out as computed by hand; a bundle without vectors is refused."""
    manifest = Manifest("pi", "onnxruntime", "fp32", "fp32", {"model": "m"}, {}, SPEC, CLASSES)
    expected = np.tile(np.array([0.0, 2.0, 0.0, 2.0], np.float32), (4, 1))  # standard deviation 1
    with pytest.raises(IntegrityError, match="no golden vectors"):
        compare_golden(tmp_path, manifest, Still(expected[0]))
    write_golden(tmp_path, manifest, synthesise(SPEC), expected, "by hand")
    found, about = compare_golden(tmp_path, manifest, Still(np.array([0.0, 2.0, 0.0, 2.002])))
    assert found.error == pytest.approx(0.001, rel=1e-3)
    assert found.largest == pytest.approx(0.002, rel=1e-3)
    assert (found.agreement, found.n, found.bound, about["where"]) == (0.0, 4, BOUND["fp32"], "by hand")
    nearly, _ = compare_golden(tmp_path, manifest, Still(np.array([0.0, 2.0, 0.0, 2.003])))
    assert not nearly.same
    assert not compare_golden(tmp_path, manifest, Still(np.array([0.0, 2.0, 0.0, np.nan])))[0].same


def test_the_bundle_brings_its_own_program(tiny_folder: Path, tmp_path: Path) -> None:
    """`python -m edgecnn.device` inside the bundle runs the bundle's own files, leaves nothing behind, and they are less than 300 KB."""
    bundle = tmp_path / "pi"
    write(bundle, tiny_folder, tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    alone = "import edgecnn.device.__main__ as m, sys; print(m.__file__); sys.exit(m.main(sys.argv[1:]))"
    for words in (("verify", "."), ("verify", ".", "--run"), ("bench", ".", "--seconds", "0.05")):
        done = subprocess.run([sys.executable, "-c", alone, *words], capture_output=True, text=True, cwd=bundle, env=env, check=False)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.splitlines()[0]).resolve().is_relative_to(bundle.resolve())
    assert device("verify", bundle, cwd=HERE.parent).returncode == 0
    assert device("verify", ".", cwd=bundle).returncode == 0
    verify_bundle(bundle)
    size = sum(path.stat().st_size for path in (bundle / "edgecnn").rglob("*") if path.is_file())
    assert 20_000 < size < 300_000
    assert all(path.is_file() for path in bundle.rglob("__pycache__"))


def test_nothing_hides_in_a_byte_code_cache(tiny_folder: Path, tmp_path: Path) -> None:
    """A compiled file that Python would run instead of the bundle's own is found, and so is a module that would come before Python's."""
    write(tmp_path / "pi", tiny_folder, tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    for where, name in (
        ("edgecnn/device/__pycache__", f"bundle.{sys.implementation.cache_tag}.pyc"),
        ("edgecnn/device", "golden.pyc"),
        (".", "json.py"),
    ):
        bundle = shutil.copytree(tmp_path / "pi", tmp_path / f"pi-{Path(name).stem}")
        cache = bundle / where
        if cache.is_file():
            cache.unlink()
            cache.mkdir()
        if name.endswith(".pyc"):
            py_compile.compile(
                str(tmp_path / "evil.py"), str(cache / name), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )
        else:
            shutil.copyfile(tmp_path / "evil.py", cache / name)
        done = device("verify", bundle, cwd=HERE.parent)
        assert (done.returncode, done.stdout) == (7, ""), done
        assert "__pycache__ is not a regular file" in done.stderr or f"{name} does not belong" in done.stderr
    assert not canary.exists(), "verify ran nothing of the bundle"

"""Mistakes in labels and input are named; healthy data is passed in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from edgecnn import room
from edgecnn.device.preprocess import normalise
from edgecnn.device.spec import InputSpec
from edgecnn.errors import ResourceError
from edgecnn.sanity import LEAST_GAIN, mistakes, no_better_than_guessing
from edgecnn.stages.base import TorchModel


@pytest.fixture(scope="module")
def model() -> TorchModel:
    return tiny.trained()


def predictor(model: TorchModel):  # type: ignore[no-untyped-def]
    def predict(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model.module(torch.from_numpy(normalise(pixels, spec))))

    return predict


NAMES = dict(enumerate(tiny.CLASSES))


def found(model: TorchModel, pixels: np.ndarray, labels: np.ndarray, spec: InputSpec = tiny.SPEC) -> str:
    return "; ".join(mistakes(predictor(model), pixels, labels, spec, NAMES))


def test_sabotaged_labels_are_named(model: TorchModel) -> None:
    """Labels shifted either way, permuted, with two classes swapped, sorted as text, or random: each is named for what it is."""
    pixels, labels = tiny.images(200, seed=5)
    assert "shifted by one (one too low)" in found(model, pixels, (labels - 1) % 4)
    assert "shifted by one (one too high)" in found(model, pixels, (labels + 1) % 4)
    assert "two classes swapped ('rising' and 'falling')" in found(model, pixels, np.array([0, 3, 2, 1])[labels])
    assert "labels permuted" in found(model, pixels, np.array([1, 3, 0, 2])[labels])

    # Twelve numbered classes and a model that is right 85 times of a hundred.
    random = np.random.default_rng(0)
    truth = np.arange(360) % 12
    said = np.where(random.random(360) < 0.85, truth, random.integers(0, 12, 360))
    folders = sorted(map(str, range(12)))
    labels = np.array([folders.index(str(i)) for i in truth])
    names = dict(enumerate(folders))
    empty = np.zeros((360, 2, 2, 3), np.uint8)
    told = mistakes(lambda pixels, spec: np.eye(12, dtype=np.float32)[said], empty, labels, tiny.SPEC, names)
    assert "numbered classes sorted as text" in told[0]

    guess = predictor(model)(pixels, tiny.SPEC).argmax(1)
    assert "nothing to do with the images" in str(no_better_than_guessing(guess, random.integers(0, 4, 200)))
    assert no_better_than_guessing(guess, tiny.images(200, seed=5)[1]) is None


def test_sabotaged_input_is_named(model: TorchModel) -> None:
    """A missing or another normalisation, and swapped channels where they matter, are named."""
    pixels, labels = tiny.images(200, seed=6)
    raw = InputSpec(3, 16, 16, 16, "crop", "bilinear", (0.0,) * 3, (1 / 255,) * 3)
    assert "wrong normalisation" in found(model, pixels, labels, raw)
    # Stripes in red, noise in blue, and a model that looks at red alone.
    noisy = pixels.copy()
    noisy[..., 2] = np.random.default_rng(0).integers(0, 256, noisy.shape[:3])

    def red(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
        return np.asarray(predictor(model)(np.ascontiguousarray(pixels[..., [0, 0, 0]]), spec))

    assert mistakes(red, noisy, labels, tiny.SPEC, NAMES) == []
    assert "channels swapped" in mistakes(red, np.ascontiguousarray(noisy[..., ::-1]), labels, tiny.SPEC, NAMES)[0]


def test_healthy_draws_are_silent(model: TorchModel) -> None:
    """Twenty draws of images with their own labels: not a word, of labels or input."""
    for seed in range(20):
        pixels, labels = tiny.images(160, seed=100 + seed)
        assert found(model, pixels, labels) == ""


def test_chance_is_not_taken_for_a_mistake() -> None:
    """Fifty draws of a model that guesses: another labelling often fits by five points more, by chance, and not a word is said."""
    pixels, helps = np.zeros((80, 2, 2, 3), np.uint8), 0
    for seed in range(50):
        draw = np.random.default_rng(seed)
        labels, said = draw.integers(0, 4, 80), draw.integers(0, 4, 80)
        assert mistakes(lambda pixels, spec, said=said: np.eye(4, dtype=np.float32)[said], pixels, labels, tiny.SPEC, NAMES) == []  # type: ignore[misc]
        helps += (said == (labels + 1) % 4).mean() - (said == labels).mean() >= LEAST_GAIN
    assert helps >= 10


def test_the_run_names_a_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole run, preflight looks at a trained checkpoint's answers: shifted labels are a doubt in result.json, right ones are not."""
    from edgecnn.data import load_data
    from edgecnn.floats import Run
    from edgecnn.pipeline import preflight
    from edgecnn.recipe import load_recipe
    from edgecnn.screen import Screen
    from edgecnn.store import open_store

    monkeypatch.chdir(tiny.HERE)
    save_file(tiny.trained().module.state_dict(), tmp_path / "w.safetensors")
    recipe = tiny.write_recipe(tmp_path)
    pixels, labels = tiny.images(240, seed=9)
    said = []
    for shift in (0, 1):
        np.savez(tmp_path / "a.npz", images=pixels, labels=(labels + shift) % 4)
        settings = [
            f"data={json.dumps({'source': 'arrays', 'path': str(tmp_path / 'a.npz'), 'split': {'evaluation': 0.25, 'choice': 0.5}})}",
            f"model.checkpoint={tmp_path / 'w.safetensors'}",
            "targets=[{name: pi, runtime: onnxruntime, precision: fp32}]",
            "stages=[]",
        ]
        loaded = load_recipe(recipe, settings)
        with open_store(tmp_path / f"out{shift}", loaded.name) as store:
            said.append(preflight(Run(loaded, load_data(loaded.data, loaded.seed), store, Screen(quiet=True))))
    assert said[0] == []
    assert "shifted by one" in said[1][0]


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are counted layer by layer; a disk without room is refused before any work, short memory is a doubt."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 64, 4)
    ).eval()
    assert room.activations(module, (3, 8, 8)) == 4 * (512 + 512 + 512 + 4)
    need = room.estimate(module, (3, 8, 8), images=100, candidates=2, stages=1, batch=10)
    assert need.disk_bytes > 2 * 100 * 192
    assert room.check(need, tmp_path) == []
    with pytest.raises(ResourceError, match="free on its disk, the run needs about"):
        room.check(room.Room(1 << 60, 1), tmp_path)
    assert "memory is needed" in room.check(room.Room(1, 1 << 60), tmp_path)[0]
    assert "of disk" in str(need)

"""Poisoned calibration sets are named, and honest draws are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faults import count
from sklearn.datasets import load_digits

from edgecnn.calibration_doubts import calibration_doubts
from edgecnn.device.packed import Packed, open_packed, write_packed

GEOMETRY = {"height": 8, "width": 8, "channels": 1}


def digits(folder: Path, seed: int, n: int = 200, poison: str = "") -> Packed:
    """A draw of scanned digits, poisoned in one way."""
    data = load_digits()
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(data.target))[:n]
    if poison == "one class":
        chosen = np.flatnonzero(data.target == 3)[:n]
    images = (data.images[chosen] * 15.9).astype(np.uint8)[..., None]
    labels = data.target[chosen].astype(np.int64)
    if poison == "few":
        images, labels = images[:8], labels[:8]
    elif poison == "duplicated":
        images[50:] = np.resize(images[:50], images[50:].shape)
    elif poison == "black":
        images[:] = 0
    elif poison == "constant":
        images[:60] = random.integers(0, 255, (60, 1, 1, 1))
    elif poison == "noise":
        images = random.integers(0, 256, images.shape).astype(np.uint8)
    elif poison == "unnormalised":
        images = (images > 127).astype(np.uint8)
    elif poison == "inverted":
        images = 255 - images
    write_packed(folder, [str(i) for i in range(len(images))], labels, iter(images), GEOMETRY)
    return open_packed(folder)


@pytest.mark.parametrize("seed", range(count(5, 20, 200)))
def test_honest_draws_are_silent(tmp_path: Path, seed: int) -> None:
    """Two hundred digits drawn at random raise no doubt."""
    assert calibration_doubts(digits(tmp_path / "a", seed), digits(tmp_path / "b", seed + 100, 400)) == []


@pytest.mark.parametrize(
    ("poison", "word"),
    [
        ("few", "only 8"),
        ("one class", "unbalanced"),
        ("duplicated", "duplicated"),
        ("black", "unnormalised"),
        ("constant", "constant"),
        ("noise", "noise"),
        ("unnormalised", "unnormalised"),
        ("inverted", "unlike"),
    ],
)
def test_every_poison_is_named(tmp_path: Path, poison: str, word: str) -> None:
    """Each of eight poisoned sets is told from honest images by the doubt that names what is wrong."""
    doubts = calibration_doubts(digits(tmp_path / "a", 0, poison=poison), digits(tmp_path / "b", 100, 400))
    assert any(word in doubt for doubt in doubts), doubts

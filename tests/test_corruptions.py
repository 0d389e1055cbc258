"""Corruptions: seeded, of the right shape, harsher with severity, and each what its name says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgecnn.trust.corruptions import KINDS, corrupt


def photo(height: int = 48, width: int = 64, channels: int = 3) -> np.ndarray:
    """Shapes of every size, as photos have: noise whose power falls with frequency."""
    random = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    falling = 1 / np.maximum(np.hypot(fy, fx), 0.5 / width)
    planes = [np.fft.ifft2(np.fft.fft2(random.normal(size=(height, width))) * falling).real for _ in range(channels)]
    return np.clip(np.stack([120 + 45 * p / p.std() for p in planes], 2), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_seeded_and_harsher_with_severity(kind: str, channels: int) -> None:
    """uint8 of the same shape, the same bytes for the same seed, and the error grows from severity 1 to 5; the image given stays."""
    image = photo(channels=channels)
    kept = image.copy()
    errors = []
    for severity in range(1, 6):
        once, twice = (corrupt(image, kind, severity, (7, severity)) for _ in range(2))
        assert once.dtype == np.uint8
        assert once.shape == image.shape
        assert (once == twice).all()
        errors.append(float(np.abs(once.astype(int) - image).mean()))
    assert (image == kept).all()
    assert errors[0] > 0.2
    assert errors[-1] > 1.05 * errors[0]
    assert all(b >= a * 0.9 for a, b in itertools.pairwise(errors)), errors


def test_each_does_what_it_says() -> None:
    """Noise goes by the seed, blur lowers edges, brightness keeps hue, contrast shrinks the spread, pixelate makes blocks."""
    image = photo()
    assert (corrupt(image, "noise", 3, (1,)) != corrupt(image, "noise", 3, (2,))).any()
    blurred = corrupt(image, "blur", 5, (0,)).astype(float)
    assert np.abs(np.diff(blurred, axis=1)).mean() < 0.8 * np.abs(np.diff(image.astype(float), axis=1)).mean()
    assert blurred.mean() == pytest.approx(image.mean(), abs=2)
    bright = corrupt(image, "brightness", 2, (0,)).astype(float)
    there = image.min(2) > 30
    np.testing.assert_allclose(bright[there][:, 0] / bright[there][:, 2], image[there][:, 0] / image[there][:, 2], rtol=0.03)
    assert corrupt(np.zeros((4, 4, 3), np.uint8), "brightness", 5, (0,)).mean() == pytest.approx(127.5, abs=1)
    np.testing.assert_allclose(corrupt(image, "contrast", 3, (0,)).std((0, 1)), 0.2 * image.std((0, 1)), rtol=0.1)
    rows = corrupt(image, "pixelate", 5, (0,))
    assert (np.diff(rows.astype(int), axis=1) == 0).all(2).mean() > 0.6


def test_tiny_images_are_taken() -> None:
    """One pixel wide, for every kind."""
    for kind in KINDS:
        assert corrupt(np.full((1, 1, 3), 90, np.uint8), kind, 5, (0,)).shape == (1, 1, 3)

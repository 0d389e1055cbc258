"""Corrupted images, made here and seeded: what a cheap camera, bad light and a thin network line do to a photo.

After ImageNet-C (Hendrycks and Dietterich, ICLR 2019), with its severities 1 to 5, on the pixels that the model would get. Figures are
comparable between two models of one run, not with published ImageNet-C tables: the generators and the images are ours.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


def corrupt(image: Pixels, kind: str, severity: int, seed: tuple[int, ...]) -> Pixels:
    """One image, uint8 H x W x C, after corruption `kind` of `KINDS` at `severity` 1 to 5; the same for the same seed."""
    return np.clip(np.rint(KINDS[kind](image.astype(np.float64), severity - 1, seed)), 0, 255).astype(np.uint8)


def _noise(x: Floats, level: int, seed: tuple[int, ...]) -> Floats:
    return x + np.random.default_rng(seed).normal(0, 255 * (0.08, 0.12, 0.18, 0.26, 0.38)[level], x.shape)


def _blur(x: Floats, level: int, seed: tuple[int, ...]) -> Floats:
    """Gaussian: ImageNet-C's radii, which are for 224 pixels, and on small images at least CIFAR-10-C's."""
    sigma = max((1, 2, 3, 4, 6)[level] * min(x.shape[:2]) / 224, (0.4, 0.6, 0.7, 0.8, 1.0)[level])
    reach = max(1, math.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        edges = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(x, edges, mode="symmetric" if reach <= x.shape[axis] else "edge")
        length = x.shape[axis]
        x = np.sum([w * np.take(padded, np.arange(i, i + length), axis) for i, w in enumerate(weights)], axis=0)
    return x


def _brightness(x: Floats, level: int, seed: tuple[int, ...]) -> Floats:
    """Adds to the value of HSV: hue and saturation stay."""
    value = x.max(2, keepdims=True)
    lifted = np.minimum(value + 255 * (level + 1) / 10, 255)
    bright: Floats = np.where(value > 0, x * lifted / np.maximum(value, 1), lifted)
    return bright


def _contrast(x: Floats, level: int, seed: tuple[int, ...]) -> Floats:
    mean = x.mean((0, 1))
    flat: Floats = (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean
    return flat


def _jpeg(x: Floats, level: int, seed: tuple[int, ...]) -> Floats:
    from PIL import Image

    def again(plane: Floats) -> Floats:
        buffer = io.BytesIO()
        Image.fromarray(plane.astype(np.uint8)).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[level])
        return np.asarray(Image.open(buffer, formats=["JPEG"]), np.float64)

    return again(x) if x.shape[2] == 3 else np.stack([again(x[:, :, c]) for c in range(x.shape[2])], 2)


def _pixelate(x: Floats, level: int, seed: tuple[int, ...]) -> Floats:
    from PIL import Image

    height, width = x.shape[:2]
    scale = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    small = max(1, round(width * scale)), max(1, round(height * scale))

    def coarse(plane: Floats) -> Floats:
        image = Image.fromarray(plane.astype(np.uint8)).resize(small, Image.Resampling.BOX)
        return np.asarray(image.resize((width, height), Image.Resampling.NEAREST), np.float64)

    return np.stack([coarse(x[:, :, c]) for c in range(x.shape[2])], 2)


KINDS: dict[str, Callable[[Floats, int, tuple[int, ...]], Floats]] = {
    "noise": _noise,
    "blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
}

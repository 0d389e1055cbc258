"""Why ranges from these calibration images may not suit the images to come: too few, of one class, the same again, or no pictures at all.

Every check looks at the prepared pixels, as quantization will see them, and is silent on an honest draw of a sound data set.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np

from edgecnn.device.packed import Packed

FEW = 32
ALIKE = 0.1  # of the images may be duplicates, or empty
FLAT = 2.0  # grey levels: a smaller standard deviation is no picture
NOISE = 0.8  # of independent pixels' differences between neighbours; of photos 0.02 to 0.4
APART = 5.0  # standard errors


def calibration_doubts(calibration: Packed, judged: Packed) -> list[str]:
    """A sentence for each thing that is wrong with `calibration`.

    Args:
        calibration: the prepared calibration images.
        judged: other images of the same data, which the quantized file will be judged on.
    """
    n = len(calibration)
    pixels = np.asarray(calibration.images, np.float32)
    spread = pixels.std(axis=(1, 2)).max(axis=1)  # a colour is not a difference between its red and its blue
    doubts = []
    if n < FEW:
        doubts.append(f"only {n} calibration images: ranges from fewer than {FEW} depend on which they are")
    label, most = Counter(calibration.labels.tolist()).most_common(1)[0]
    classes = len(set(judged.labels.tolist()))
    if most >= 8 and classes > 1 and most > 3 * n / min(n, classes):
        doubts.append(f"unbalanced calibration images: {most} of {n} are of class {label}, and there are {classes} classes")
    different = len({hashlib.sha256(image.tobytes()).digest() for image in calibration.images})
    if different < (1 - ALIKE) * n:
        doubts.append(f"duplicated calibration images: only {different} of {n} are different")
    if pixels.max() <= 2:
        doubts.append(f"unnormalised calibration images: no pixel is above {pixels.max():.0f} of 255; were they saved as 0 to 1?")
    elif (spread < FLAT).mean() > ALIKE:
        doubts.append(f"constant calibration images: {(spread < FLAT).sum()} of {n} are of one colour")
    if np.median([0.0, *_roughness(pixels, spread)]) > NOISE:
        doubts.append("calibration images that are noise: neighbouring pixels have nothing to do with each other")
    apart = _apart(calibration.images, judged.images)
    if apart:
        doubts.append(f"calibration images unlike those it is judged on: {apart}")
    return doubts


def _roughness(pixels: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Mean square difference of neighbours over that of independent pixels, of each image that is not flat."""
    pictures = spread >= FLAT
    steps = np.square(np.diff(pixels[pictures], axis=2)).mean(axis=(1, 2, 3))
    rough: np.ndarray = steps / (2 * np.square(spread[pictures]))
    return rough


def _apart(some: np.ndarray, others: np.ndarray) -> str:
    """In what channel the mean brightness differs by far more than chance, or ""."""
    a, b = (np.asarray(images, np.float32).mean(axis=(1, 2)) for images in (some, others[:1000]))
    error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
    distance = np.abs(a.mean(axis=0) - b.mean(axis=0))
    channel = int(np.argmax(distance - APART * error))
    if distance[channel] <= max(APART * error[channel], 12.0):
        return ""
    return f"mean of channel {channel} is {a[:, channel].mean():.0f} of 255, there {b[:, channel].mean():.0f}"

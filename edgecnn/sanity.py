"""Does what the model says fit the labels? Names the mistakes that look like a bad model: labels shifted or permuted, channels swapped,
another normalisation.

A trained model is its own witness: with the mistake undone it must be right significantly more often. Each candidate mistake is undone and
compared with the images as they are, by McNemar's exact test (one-sided, with Bonferroni's correction); a permutation is fitted to one
half of the images and tried on the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgecnn.device.spec import InputSpec

Bools = npt.NDArray[np.bool_]
LEAST_IMAGES = 40
LEAST_GAIN = 0.05  # of top-1; less would not be worth a word
RISK = 1e-3  # of a word too many, over all mistakes together
_NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "pixels as they are, 0 to 255": ((0.0,), (1 / 255,)),
    "pixels from 0 to 1": ((0.0,), (1.0,)),
    "pixels from -1 to 1": ((0.5,), (0.5,)),
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def mistakes(
    predict: Callable[[npt.NDArray[np.uint8], InputSpec], npt.NDArray[np.float32]],
    pixels: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    spec: InputSpec,
    names: Mapping[int, str],
) -> list[str]:
    """What looks wrong, in words; empty where nothing does.

    Args:
        predict: logits N x classes of the trained model, for pixels uint8 N x H x W x C prepared by a spec.
        pixels: prepared images, in an order that mixes the classes.
        labels: the data's.
        spec: the model's input.
        names: of the classes the data has.
    """
    if len(labels) < LEAST_IMAGES:
        return []
    logits = predict(pixels, spec)
    predicted, right = logits.argmax(1), logits.argmax(1) == labels
    tried = [*_labels(predicted, labels, logits.shape[1], names), *_inputs(predict, pixels, labels, spec, right)]
    helps = [(what, float(undone.mean()), len(undone)) for what, undone, as_it_is in tried if _better(undone, as_it_is)]
    # A shift is a permutation too, and undoing a part of what is wrong helps too: the first of those that explain the most.
    most = max((top1 for _, top1, _ in helps), default=0.0)
    return [
        f"{what}: top-1 is {right.mean():.1%} as it is and {top1:.1%} with that undone, on {n} images"
        for what, top1, n in helps
        if top1 >= most - 0.03
    ][:1]


def _labels(
    predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], classes: int, names: Mapping[int, str]
) -> Iterator[tuple[str, Bools, Bools]]:
    right = predicted == labels
    for step in (1, -1):
        words = "one too low" if step > 0 else "one too high"
        yield f"looks like labels shifted by one ({words})", predicted == (labels + step) % classes, right
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    half = np.random.default_rng(0).permutation(len(labels)) % 2 == 0
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels[half], predicted[half]), 1)
    # Of equal assignments, the one that changes least: a class without images keeps its place.
    rows, columns = linear_sum_assignment(-(counts + 0.5 * np.eye(classes)))
    moved = {int(a): int(b) for a, b in zip(rows, columns, strict=True) if a != b and counts[a, b]}
    if moved:
        to = np.arange(classes)
        to[list(moved)] = list(moved.values())
        yield _permutation(moved, names), predicted[~half] == to[labels[~half]], right[~half]


def _permutation(moved: dict[int, int], names: Mapping[int, str]) -> str:
    def name(i: int) -> str:
        return repr(names.get(i, str(i)))

    digits = [names.get(i, "") for i in sorted(names)]
    if all(text.isdecimal() for text in digits) and digits == sorted(digits) and digits != sorted(digits, key=int):
        ranks = {i: rank for rank, i in enumerate(sorted(names, key=lambda i: int(names[i])))}
        if all(ranks.get(a) == b for a, b in moved.items()):
            return "looks like numbered classes sorted as text (0, 1, 10, 2 ...)"
    if len(moved) == 2 and all(moved.get(b) == a for a, b in moved.items()):
        a, b = sorted(moved)
        return f"looks like the labels of two classes swapped ({name(a)} and {name(b)})"
    some = ", ".join(f"{name(a)} is the model's {name(b)}" for a, b in sorted(moved.items())[:4])
    return f"looks like labels permuted ({some}{', ...' if len(moved) > 4 else ''})"


def _inputs(
    predict: Callable[[npt.NDArray[np.uint8], InputSpec], npt.NDArray[np.float32]],
    pixels: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    spec: InputSpec,
    right: Bools,
) -> Iterator[tuple[str, Bools, Bools]]:
    if spec.channels == 3:
        swapped = np.ascontiguousarray(pixels[..., ::-1])
        yield "looks like channels swapped (BGR for RGB)", predict(swapped, spec).argmax(1) == labels, right
    yield "looks like inverted images (black for white)", predict(255 - pixels, spec).argmax(1) == labels, right
    for words, (mean, std) in _NORMALISATIONS.items():
        if len(mean) not in (1, spec.channels):
            continue
        each = spec.channels // len(mean)
        other = replace(spec, mean=mean * each, std=std * each)
        if not np.allclose(other.mean, spec.mean) or not np.allclose(other.std, spec.std):
            told = f"looks like a wrong normalisation in model.input (the weights seem to want {words})"
            yield told, predict(pixels, other).argmax(1) == labels, right


def _better(undone: Bools, as_it_is: Bools) -> bool:
    """Whether undoing a mistake helps, more than chance explains: McNemar's exact test."""
    gained, lost = int((undone & ~as_it_is).sum()), int((as_it_is & ~undone).sum())
    if gained - lost < LEAST_GAIN * len(undone):
        return False
    n = gained + lost
    tail = math.fsum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n if n < 1000 else math.exp(-((gained - lost) ** 2) / (2 * n))
    return tail < RISK / 9  # mistakes that are tried


def no_better_than_guessing(predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> str | None:
    """A doubt where a model's top-1 is what naming always the most frequent class would give: its labels may be random."""
    n, most = len(labels), int(np.bincount(labels).max())
    right = int((predicted == labels).sum())
    if n < LEAST_IMAGES or right > most + 2 * math.sqrt(most * (n - most) / n):
        return None
    return (
        f"top-1 is {right / n:.1%} of {n} images, no better than always naming the most frequent class ({most / n:.1%}): "
        "labels that have nothing to do with the images look like this, and so does a model that has not learnt"
    )

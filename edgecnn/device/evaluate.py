"""Accuracy of a bundle: the exported file, in its own runtime, one image at a time as on the board."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import to_input
from edgecnn.device.runtimes import Runner
from edgecnn.device.spec import InputSpec
from edgecnn.device.stats import wilson


@dataclass(frozen=True)
class Accuracy:
    """Top-1 over `n` images; `interval` is Wilson's 95 %."""

    top1: float
    n: int
    interval: tuple[float, float]


def infer_all(runner: Runner, images: Packed, spec: InputSpec) -> np.ndarray:
    """Logits N x classes, float32, of every image of the set, in its order."""
    return np.concatenate([runner.infer(to_input(images.one(i), spec, runner.takes)) for i in range(len(images))])


def accuracy(logits: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Top-1 of `logits` N x classes against `labels` N."""
    correct = int((logits.argmax(1) == labels).sum())
    return Accuracy(correct / len(labels), len(labels), wilson(correct, len(labels)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    e: np.ndarray = np.exp(logits - logits.max(-1, keepdims=True))
    p: np.ndarray = e / e.sum(-1, keepdims=True)
    return p

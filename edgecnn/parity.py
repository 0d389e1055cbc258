"""The numeric ledger: how far each step of an export moved the outputs, image by image."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Parity:
    """Two models' outputs on the same images.

    Attributes:
        step: what lies between them, such as "torch -> onnx".
        max_error: largest absolute difference of a logit.
        cosine: mean over images of the cosine between their logits.
        agreement: fraction of images with the same top-1.
        n: images.
    """

    step: str
    max_error: float
    cosine: float
    agreement: float
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(step: str, before: np.ndarray, after: np.ndarray) -> Parity:
    """Compare logits N x classes of the same images."""
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosine = (before * after).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)
    agreement = (before.argmax(1) == after.argmax(1)).mean()
    return Parity(step, float(np.abs(before - after).max()), float(cosine.mean()), float(agreement), len(before))


def drop_interval(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95 % interval of the top-1 drop from `before` to `after` on the same images; positive is worse.

    Bonett and Price's adjusted Wald interval for paired proportions (J. Educ. Behav. Stat. 37(4), 2012).
    """
    right_before, right_after = before.argmax(1) == labels, after.argmax(1) == labels
    return paired_interval(int((right_before & ~right_after).sum()), int((~right_before & right_after).sum()), len(labels))


def paired_interval(lost: int, won: int, n: int) -> tuple[float, float]:
    """The same from counts: of `n` images, `lost` are right before only and `won` after only."""
    only_before, only_after = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    drop = only_before - only_after
    half = 1.959964 * math.sqrt(max(only_before + only_after - drop**2, 0.0) / (n + 2))
    return max(-1.0, drop - half), min(1.0, drop + half)


def per_class(logits: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Top-1 within each class that has images."""
    right = logits.argmax(1) == labels
    return [{"label": names[c], "n": int((labels == c).sum()), "top1": float(right[labels == c].mean())} for c in np.unique(labels)]

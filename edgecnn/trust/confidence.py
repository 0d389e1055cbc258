"""Whether a model is as often right as it says: expected calibration error and the reliability curve.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017: equal-width bins of the top-1 probability. ECE depends on the bins and
is above zero by chance alone on few images, so both models are always binned alike and compared with each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15


def reliability(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], bins: int = BINS) -> dict[str, Any]:
    """ECE and the curve.

    Args:
        confidence: of each prediction, in (0, 1].
        right: whether it was.
        bins: of equal width, each open below and closed above.

    Returns:
        `ece`, mean `confidence`, `accuracy`, and `bins` that hold images: `low`, `high`, `n`, mean `confidence`, `accuracy`.
    """
    place = np.clip(np.ceil(confidence * bins - 1e-12).astype(int) - 1, 0, bins - 1)
    n = np.bincount(place, minlength=bins)
    said = np.bincount(place, confidence, minlength=bins)
    held = np.bincount(place, right, minlength=bins)
    rows = [
        {"low": i / bins, "high": (i + 1) / bins, "n": int(n[i]), "confidence": float(said[i] / n[i]), "accuracy": float(held[i] / n[i])}
        for i in range(bins)
        if n[i]
    ]
    return {
        "ece": float(np.abs(said - held).sum() / len(confidence)),
        "confidence": float(confidence.mean()),
        "accuracy": float(right.mean()),
        "bins": rows,
    }

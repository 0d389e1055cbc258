"""Parity figures against their definitions, and the interval of the drop against exact sums and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgecnn.parity import compare, drop_interval, per_class


def test_equal_outputs() -> None:
    """A model agrees with itself: no error, cosine 1, agreement 1; also where an image's logits are all zero but for the cosine."""
    logits = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    same = compare("x", logits, logits)
    assert (same.max_error, same.agreement, same.n) == (0, 1, 50)
    assert same.cosine == pytest.approx(1, abs=1e-6)
    assert math.isfinite(compare("x", 0 * logits, logits).cosine)


def test_known_difference() -> None:
    """One flip of four images, orthogonal logits on it, error 1."""
    before = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    after = before.copy()
    after[0] = [0, 1]
    told = compare("x", before, after)
    assert (told.max_error, told.agreement, told.cosine) == (1, 0.75, 0.75)


def logits_of(right: np.ndarray) -> np.ndarray:
    """Two-class logits that are right (class 0) or wrong."""
    return np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])


def interval(lost: int, won: int, n: int) -> tuple[float, float]:
    """drop_interval of n images of which `lost` become wrong and `won` right."""
    before, after = np.ones(n, bool), np.ones(n, bool)
    after[:lost] = False
    before[lost : lost + won] = False
    return drop_interval(logits_of(before), logits_of(after), np.zeros(n, int))


def test_formula() -> None:
    """Bonett and Price: with 5 lost and 1 won of 100, the interval by hand."""
    p, q = 6 / 102, 2 / 102
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 102)
    assert interval(5, 1, 100) == pytest.approx((p - q - half, p - q + half))


def test_direction() -> None:
    """Losing and winning are mirror images; equal numbers give an interval around 0 that narrows with n; it holds the observed drop."""
    seen = 0
    for lost, won, n in ((5, 1, 100), (0, 9, 40), (30, 2, 400)):
        low, high = interval(lost, won, n)
        assert interval(won, lost, n) == pytest.approx((-high, -low))
        assert low <= (lost - won) / n <= high
        seen += 1
    assert seen == 3
    assert interval(3, 3, 1000)[1] < interval(3, 3, 100)[1]


@pytest.mark.parametrize(("p", "q"), [(0.01, 0.01), (0.05, 0.02), (0.02, 0.0), (0.2, 0.1)])
@pytest.mark.parametrize("n", [40, 200])
def test_coverage(p: float, q: float, n: int) -> None:
    """By exact enumeration of every outcome, 95 % intervals hold the true drop with probability 0.93 or more."""
    log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])

    def chance(lost: int, won: int) -> float:
        rest = n - lost - won
        ways = math.exp(log[n] - log[lost] - log[won] - log[rest])
        return float(ways * p**lost * q**won * (1 - p - q) ** rest)

    total = covered = 0.0
    for lost in range(min(n, int(n * p + 8 * math.sqrt(n * p + 1))) + 1):
        for won in range(min(n - lost, int(n * q + 8 * math.sqrt(n * q + 1))) + 1):
            now = chance(lost, won)
            if now < 1e-9:
                continue
            total += now
            low, high = interval(lost, won, n)
            covered += now * (low <= p - q <= high)
    assert total == pytest.approx(1, abs=1e-4)
    assert covered >= 0.93


def test_per_class() -> None:
    """Top-1 within each class; a class without images is left out."""
    logits = np.eye(4)[[0, 1, 0, 3]]
    rows = per_class(logits, np.array([0, 0, 0, 3]), ("a", "b", "c", "d"))
    assert rows == [{"label": "a", "n": 3, "top1": pytest.approx(2 / 3)}, {"label": "d", "n": 1, "top1": 1.0}]

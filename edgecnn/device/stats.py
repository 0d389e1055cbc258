"""What raw samples can carry: percentiles with intervals, accuracy intervals, paired tests, and verdicts that never rank noise.

Everything here is free of assumptions about the distribution of latencies (they are skewed and have tails), and
exact where the sample is small. Percentiles are order statistics, real samples and never interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.99

Samples = Sequence[float] | np.ndarray


def percentile(samples: Samples, q: float) -> float:
    """The smallest sample that at least a fraction `q` (0 < q <= 1) of the samples do not exceed."""
    ordered = np.sort(np.asarray(samples, dtype=float))
    return float(ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)])


def needed(q: float, confidence: float = CONFIDENCE) -> int:
    """How many samples a percentile takes: two of them lie beyond it with `confidence`, so it is not the luck of one.

    The smallest n with q^n + n (1-q) q^(n-1) <= 1 - confidence; for q below one half, the same on the other side.
    """
    q = max(q, 1 - q)
    low, high = 1, 2
    while _at_most_one_beyond(high, q) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _at_most_one_beyond(middle, q) <= 1 - confidence else (middle, high)
    return high


def _at_most_one_beyond(n: int, q: float) -> float:
    return float(q**n + n * (1 - q) * q ** (n - 1))


def interval(samples: Samples, q: float, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The order statistics that hold the true percentile `q` with at least `confidence`; None where there are too few samples.

    Assumes independent samples of one process; between processes, see `estimate`.
    """
    ordered = np.sort(np.asarray(samples, dtype=float))
    n = len(ordered)
    if n < needed(q, confidence):
        return None
    at_most = np.cumsum(np.exp(_log_binomial(n, q)))  # [k]: probability that at most k samples are below the percentile
    tail = (1 - confidence) / 2
    low = int(np.searchsorted(at_most, tail, side="right"))  # the largest l with P(fewer than l below) <= tail
    high = int(np.searchsorted(at_most, 1 - tail, side="left")) + 1  # the smallest u with P(fewer than u below) >= 1 - tail
    return float(ordered[max(low, 1) - 1]), float(ordered[min(high, n) - 1])


def _log_binomial(n: int, q: float) -> np.ndarray:
    """Logarithm of the binomial probabilities of 0..n."""
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    log: np.ndarray = factorial[n] - factorial - factorial[::-1] + k * math.log(q) + (n - k) * math.log1p(-q)
    return log


@dataclass(frozen=True)
class Estimate:
    """A percentile `q` of `n` samples in seconds, with its interval; all None where `n` is below `needed`."""

    q: float
    value: float | None
    low: float | None
    high: float | None
    n: int
    needed: int


def estimate(processes: Sequence[Samples], q: float, confidence: float = CONFIDENCE) -> Estimate:
    """The percentile `q` over all samples of one or more processes.

    The interval is that of the pooled order statistics, widened to hold each process's own percentile: calls
    of one process share its memory layout and its luck, so many calls of few processes know less than they seem to.
    Where the spread between processes rules, it holds the percentile of the typical process as `sureness` says.
    """
    pooled = np.concatenate([np.asarray(p, dtype=float) for p in processes]) if processes else np.empty(0)
    bounds = interval(pooled, q, confidence)
    if bounds is None:
        return Estimate(q, None, None, None, len(pooled), needed(q, confidence))
    own = [percentile(p, q) for p in processes if len(p)]
    return Estimate(q, percentile(pooled, q), min(bounds[0], *own), max(bounds[1], *own), len(pooled), needed(q, confidence))


def sureness(processes: int, confidence: float = CONFIDENCE) -> float:
    """How surely the interval of `estimate` holds the percentile of the typical process; of a single process, its own.

    k processes lie all above or all below the typical one with 2^(1-k).
    """
    return min(confidence, 1 - 2.0 ** (1 - processes)) if processes > 1 else confidence


def summarise(*processes: Samples) -> dict[str, Any]:
    """The latency of one process or several, as result.json has it.

    Returns:
        p50, p90 and p99 in seconds, None where the `n` samples cannot carry it; `intervals` of those given, held with
        `sureness`, and of those withheld in `needed` how many samples they take.
    """
    found = {name: estimate(processes, q) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {
        **{name: e.value for name, e in found.items()},
        "n": found["p50"].n,
        "sureness": sureness(len(processes)),
        "intervals": {name: [e.low, e.high] for name, e in found.items() if e.value is not None},
        "needed": {name: e.needed for name, e in found.items() if e.value is None},
    }


@dataclass(frozen=True)
class Spread:
    """How far medians of processes (`between`) and calls of one process (`within`) lie apart, as fractions of the median.

    Each is one standard deviation, `within` robustly (half the middle 68 % of a typical process); `between` is
    None for one process.
    """

    between: float | None
    within: float


def spread(processes: Sequence[Samples]) -> Spread:
    medians = np.array([percentile(p, 0.5) for p in processes])
    within = [(percentile(p, 0.8413) - percentile(p, 0.1587)) / 2 / m for p, m in zip(processes, medians, strict=True)]
    between = float(np.std(medians, ddof=1) / np.median(medians)) if len(medians) > 1 else None
    return Spread(between, float(np.median(within)))


Ranking = Literal["faster", "slower", "cannot tell"]


@dataclass(frozen=True)
class Comparison:
    """A contender against a baseline.

    Attributes:
        verdict: about the contender.
        ratio: contender's time / baseline's time, below 1 is faster; None where there are too few processes.
        low: of the interval of the ratio; `high` likewise.
        reason: why it cannot be told, or "".
    """

    verdict: Ranking
    ratio: float | None
    low: float | None
    high: float | None
    confidence: float
    reason: str = ""


def compare(baseline: Sequence[Samples], contender: Sequence[Samples], confidence: float = CONFIDENCE) -> Comparison:
    """Is the contender faster? One entry a fresh process, all its steady samples in it.

    The process is the unit: its median stands for it, so the spread between processes counts whatever the number of
    calls. The interval of the ratio is the exact one of Hodges and Lehmann (the Mann-Whitney test turned round, on
    the ratios of all pairs of medians), so at `confidence` 0.99 two equal contenders are ranked at most once in a hundred.
    """
    a = np.array([percentile(p, 0.5) for p in baseline if len(p)])
    b = np.array([percentile(p, 0.5) for p in contender if len(p)])
    least = processes_needed(confidence)
    cut = _pairs_to_cut(len(a), len(b), 1 - confidence)
    if cut is None:
        return Comparison("cannot tell", None, None, None, confidence, f"{len(a)} and {len(b)} processes; it takes {least} of each")
    ratios = np.sort((b[None, :] / a[:, None]).ravel())
    low, high, ratio = float(ratios[cut]), float(ratios[-1 - cut]), float(np.median(ratios))
    if high < 1:
        return Comparison("faster", ratio, low, high, confidence)
    if low > 1:
        return Comparison("slower", ratio, low, high, confidence)
    return Comparison("cannot tell", ratio, low, high, confidence, "the interval of the ratio holds 1")


def processes_needed(confidence: float = CONFIDENCE) -> int:
    """How many processes of each contender `compare` takes."""
    k = 1
    while 2 / math.comb(2 * k, k) > 1 - confidence:
        k += 1
    return k


def _pairs_to_cut(m: int, n: int, alpha: float) -> int | None:
    """How many of the m x n sorted pairs to drop at each end; None where even the whole range is not sure enough."""
    total, seen, cut = math.comb(m + n, m), 0, None
    for u, ways in enumerate(_mann_whitney_ways(m, n)):
        seen += ways
        if 2 * seen > alpha * total:
            break
        cut = u
    return cut


def _mann_whitney_ways(m: int, n: int) -> list[int]:
    """[u]: in how many orders of m and n values exactly u pairs are inverted (the Gaussian binomial coefficients)."""
    ways = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):  # times (1 - x^(n+i))
            ways[u] -= ways[u - n - i]
        for u in range(i, m * n + 1):  # divided by (1 - x^i)
            ways[u] += ways[u - i]
    return ways


@dataclass(frozen=True)
class Trend:
    """Whether a series goes up or down: `p` of Mann and Kendall's test, `drift` the change from end to end as a fraction."""

    p: float
    drift: float


def trend(samples: Samples, blocks: int = 20) -> Trend:
    """Test `samples`, in order, for a trend.

    Longer series are first reduced to the medians of `blocks` equal parts: neighbouring calls resemble each other,
    which would make the test see trends in waves. Fewer than four samples show none. `drift` is Theil and Sen's slope.
    """
    x = np.asarray(samples, dtype=float)
    if len(x) > blocks:
        x = np.array([np.median(part) for part in np.array_split(x, blocks)])
    n = len(x)
    if n < 4:
        return Trend(1.0, 0.0)
    i, j = np.triu_indices(n, 1)
    steps = x[j] - x[i]
    ties = np.unique(x, return_counts=True)[1]
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0:
        return Trend(1.0, 0.0)
    z = float(np.sign(steps).sum()) / math.sqrt(variance)
    middle = float(np.median(x))
    drift = float(np.median(steps / (j - i))) * (n - 1) / middle if middle else 0.0
    return Trend(math.erfc(abs(z) / math.sqrt(2)), drift)


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of an accuracy of `right` out of `n`, as fractions."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, zz = right / n, z * z / n
    centre, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, (centre - half) / (1 + zz)), min(1.0, (centre + half) / (1 + zz))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that two models are equally accurate.

    Args:
        only_a: images that only model a gets right.
        only_b: images that only model b gets right.
    """
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    return min(1.0, 2 * float(np.exp(_log_binomial(n, 0.5)[: k + 1]).sum()))

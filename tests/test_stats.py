"""The statistics, against scipy and against what they promise by simulation (seeded; no real clock)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as oracle

from edgecnn.device.stats import (
    compare,
    estimate,
    interval,
    mcnemar,
    needed,
    percentile,
    processes_needed,
    spread,
    summarise,
    sureness,
    trend,
    wilson,
)


def test_percentile_is_a_real_sample():
    """A percentile is the order statistic ceil(q n), as numpy's inverted_cdf, whatever the order of the samples."""
    rng = np.random.default_rng(0)
    seen = 0
    for n in (1, 2, 10, 64, 101, 1000):
        x = rng.lognormal(size=n)
        for q in (0.1, 0.5, 0.9, 0.99, 1.0):
            assert percentile(x, q) == np.quantile(x, q, method="inverted_cdf")
            assert percentile(x, q) in x
            seen += 1
    assert seen == 30


def test_needed_is_the_table():
    """At 99 % confidence p90 takes 64 samples, p95 130, p99 662, p99.9 6636, and no percentile takes fewer than p50."""
    assert [needed(q) for q in (0.9, 0.95, 0.99, 0.999)] == [64, 130, 662, 6636]
    assert needed(0.1) == needed(0.9) > needed(0.5) == 11


def test_too_small_a_sample_carries_no_percentile():
    """One sample short of `needed`, the percentile is withheld with what it would take; with it, it is given."""
    x = np.arange(1.0, 65.0)
    assert interval(x[:-1], 0.9) is None
    short = estimate([x[:-1]], 0.9)
    assert (short.value, short.low, short.high, short.n, short.needed) == (None, None, None, 63, 64)
    assert estimate([x], 0.9).value == 58.0
    assert estimate([], 0.9).n == 0


@pytest.mark.parametrize(("n", "q"), [(64, 0.9), (100, 0.5), (700, 0.99), (5000, 0.9)])
def test_interval_is_the_binomial_one(n: int, q: float):
    """The interval holds the percentile with at least 99 % by scipy's binomial, and one order statistic less does not."""
    low, high = (int(v) for v in interval(np.arange(1, n + 1), q) or ())
    below = oracle.binom(n, q)
    tail_low, tail_high = below.cdf(low - 1), 1 - below.cdf(high - 1)
    assert tail_low <= 0.005 or low == 1
    assert tail_high <= 0.005
    assert tail_low + tail_high <= 0.01
    assert below.cdf(low) > 0.005, "the lower end could be higher"
    assert 1 - below.cdf(high - 2) > 0.005, "the upper end could be lower"


def test_interval_covers_the_truth():
    """Of 400 samples of a skewed known distribution, the 99 % interval misses the true p90 in at most 3 %."""
    rng = np.random.default_rng(1)
    truth = oracle.lognorm(0.5).ppf(0.9)
    held = 0
    for _ in range(400):
        low, high = interval(rng.lognormal(0, 0.5, 200), 0.9) or (math.nan, math.nan)
        held += low <= truth <= high
    assert held >= 388


def test_estimate_is_widened_by_the_spread_between_processes():
    """Five processes of different speed: the interval holds each one's p50, which the pooled samples alone would not."""
    rng = np.random.default_rng(2)
    runs = [rng.normal(m, 0.001, 2000) for m in (1.0, 1.01, 1.02, 1.03, 1.3)]
    found = estimate(runs, 0.5)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= percentile(runs[0], 0.5)
    assert found.high >= percentile(runs[4], 0.5)
    pooled = interval(np.concatenate(runs), 0.5)
    assert pooled is not None
    assert pooled[1] < 1.1


@pytest.mark.parametrize("processes", [2, 3, 5, 8])
def test_sureness_is_what_is_covered(processes: int):
    """Where processes differ by more than their calls do, the interval holds the typical one's median as often as `sureness` says."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        found = estimate([math.exp(luck) * rng.lognormal(0, 0.005, 200) for luck in rng.normal(0, 0.05, processes)], 0.5)
        held += found.low <= 1 <= found.high
    assert held / 1000 == pytest.approx(sureness(processes), abs=0.04)
    assert summarise(*[[1.0] * 20] * processes)["sureness"] == sureness(processes) == min(0.99, 1 - 2 ** (1 - processes))


def test_summary_gives_what_the_samples_carry():
    """Of 100 samples p50 and p90 are given with intervals that hold them; p99 is withheld with the 662 it takes."""
    found = summarise(np.linspace(1, 2, 50), np.linspace(2, 3, 50))
    assert (found["n"], found["p99"], found["needed"]) == (100, None, {"p99": 662})
    seen = 0
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high
        seen += 1
    assert seen == 2


def test_spread_tells_between_from_within():
    """The two spreads come out as simulated: 5 % between processes, 1 % within."""
    rng = np.random.default_rng(3)
    found = spread([rng.normal(m, 0.01 * m, 500) for m in rng.normal(1, 0.05, 200)])
    assert found.between == pytest.approx(0.05, rel=0.15)
    assert found.within == pytest.approx(0.01, rel=0.1)
    assert spread([[1.0, 2.0]]).between is None


def _processes(rng: np.random.Generator, median_s: float, k: int = 5) -> list[np.ndarray]:
    """K simulated processes: 2 % between them, 5 % and a long tail within."""
    return [median_s * rng.lognormal(0, 0.02) * rng.lognormal(0, 0.05, 200) * (1 + (rng.random(200) < 0.02)) for _ in range(k)]


def test_equal_contenders_are_not_ranked():
    """A/A, 1,000 simulated comparisons: at most 1.5 % get a rank (the promise is 1 %)."""
    rng = np.random.default_rng(4)
    ranked = sum(compare(_processes(rng, 1.0), _processes(rng, 1.0)).verdict != "cannot tell" for _ in range(1000))
    assert ranked <= 15


def test_ten_percent_is_found():
    """A/B at +10 %, 300 simulated comparisons: called slower in at least 95 %, and the interval covers 1.1 in at least 98 %."""
    rng = np.random.default_rng(5)
    found = [compare(_processes(rng, 1.0), _processes(rng, 1.1)) for _ in range(300)]
    assert sum(c.verdict == "slower" for c in found) >= 285
    assert sum(c.low <= 1.1 <= c.high for c in found if c.low is not None and c.high is not None) >= 294


def test_compare_reads_both_ways():
    """Swapping the contenders turns faster into slower and the ratio and its interval upside down."""
    rng = np.random.default_rng(6)
    a, b = _processes(rng, 1.0, 7), _processes(rng, 1.3, 6)
    there, back = compare(a, b), compare(b, a)
    assert (there.verdict, back.verdict) == ("slower", "faster")
    assert there.low is not None
    assert there.high is not None
    assert back.low == pytest.approx(1 / there.high)
    assert back.high == pytest.approx(1 / there.low)


def test_compare_needs_processes():
    """Four processes each are never ranked, however far apart, and the reason says that it takes five; none at all is no crash."""
    assert processes_needed() == 5
    few = compare([[1.0] * 100] * 4, [[9.0] * 100] * 4)
    assert few.verdict == "cannot tell"
    assert few.ratio is None
    assert "takes 5" in few.reason
    assert compare([], []).verdict == "cannot tell"
    assert compare([[1.0]] * 5, [[9.0]] * 5).verdict == "slower"
    assert compare([[1.0]] * 5, [[1.0]] * 5).verdict == "cannot tell"


def test_compare_is_mann_whitney():
    """The verdict at 99 % is that of scipy's exact two-sided Mann-Whitney test at 1 %."""
    rng = np.random.default_rng(7)
    ranked = 0
    for _ in range(200):
        m, n = rng.integers(5, 9, 2)
        a, b = rng.normal(1, 0.05, m), rng.normal(1.1, 0.05, n)
        p = oracle.mannwhitneyu(a, b, method="exact").pvalue
        verdict = compare([[v] for v in a], [[v] for v in b]).verdict
        assert (verdict != "cannot tell") == (p <= 0.01)
        ranked += verdict != "cannot tell"
    assert 20 < ranked < 180


def test_trend_is_kendalls():
    """The p-value is that of scipy's Kendall tau against time, with ties and without."""
    rng = np.random.default_rng(8)
    seen = 0
    for slope in (0, 0.5, 2):
        for digits in (0, 8):
            x = np.round(10 + slope * np.linspace(0, 1, 20) + rng.normal(0, 0.8, 20), digits)
            assert trend(x).p == pytest.approx(oracle.kendalltau(np.arange(20), x, method="asymptotic").pvalue, rel=1e-9)
            seen += 1
    assert seen == 6


def test_trend_finds_warming_up_and_leaves_noise_alone():
    """A 10 % fall under 5 % noise is found with its size in every one of 50 runs; pure noise passes p < 0.05 about as often as 1 in 20."""
    rng = np.random.default_rng(9)
    noise = [trend(rng.lognormal(0, 0.05, 400)) for _ in range(400)]
    assert 4 <= sum(t.p < 0.05 for t in noise) <= 36
    falling = [trend(np.linspace(1.1, 1.0, 400) * rng.lognormal(0, 0.05, 400)) for _ in range(50)]
    assert all(t.p < 0.01 and -0.13 < t.drift < -0.06 for t in falling)
    assert trend([1.0] * 30) == trend([]) == trend([1.0, 2.0, 3.0])


def test_wilson_is_wilson():
    """The interval is scipy's Wilson interval, stays within 0..1, and nothing measured says nothing."""
    seen = 0
    for right, n in ((0, 10), (10, 10), (97, 100), (350, 361)):
        ours, theirs = wilson(right, n), oracle.binomtest(right, n).proportion_ci(0.95, "wilson")
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)
        seen += 1
    assert seen == 4
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_binomial_test():
    """The p-value is scipy's exact binomial one, from no discordant image to thousands, and symmetric."""
    seen = 0
    for a, b in ((0, 1), (3, 3), (2, 12), (40, 21), (2100, 1900)):
        assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(oracle.binomtest(a, a + b).pvalue, rel=1e-6)
        seen += 1
    assert seen == 5
    assert mcnemar(0, 0) == 1.0

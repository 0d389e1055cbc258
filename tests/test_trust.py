"""What changed: the statistics agree with scipy, statsmodels and published examples, and a class that was sabotaged is named."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgecnn.device.stats import mcnemar
from edgecnn.parity import drop_interval, paired_interval
from edgecnn.trust.change import Predictions, able_to_tell, classes, confusions, flips, holm, least_to_tell
from edgecnn.trust.confidence import reliability
from edgecnn.trust.examine import extra_drops, statistics, warnings

NAMES = tuple("abcdefghij")


def said(top1: np.ndarray, confidence: np.ndarray | None = None) -> Predictions:
    return Predictions(top1, np.full(len(top1), 0.9) if confidence is None else confidence)


def pair(random: np.random.Generator, n: int, accuracy: float = 0.8, flip: float = 0.06, size: int = 10) -> tuple[np.ndarray, ...]:
    """Labels, and what two models say that are equally accurate: answers move both ways by chance alone."""
    labels = np.arange(n) % size

    def noisy(right: np.ndarray) -> np.ndarray:
        return np.where(right, labels, (labels + random.integers(1, size, n)) % size)

    was = random.random(n) < accuracy
    now = np.where(random.random(n) < flip, random.random(n) < accuracy, was)
    before = noisy(was)
    return labels, before, np.where(now == was, before, noisy(now))


def test_predictions_are_argmax_and_softmax() -> None:
    """Also where the logits are many and large."""
    logits = np.random.default_rng(0).normal(0, 30, (9000, 7)).astype(np.float32)
    found = Predictions.of(logits)
    e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    assert (found.top1 == logits.argmax(1)).all()
    np.testing.assert_allclose(found.confidence, e.max(1) / e.sum(1), rtol=1e-6)


def test_flips_are_counted_both_ways() -> None:
    """By hand: right to wrong, wrong to right, wrong to another wrong, and what stayed."""
    labels, before, after = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 0, 2, 1]), np.array([1, 0, 0, 2, 2, 1])
    assert flips(labels, said(before), said(after)) == {"n": 6, "changed": 3, "lost": 1, "won": 1, "wrong_differently": 1, "p": 1.0}


def test_mcnemar_as_published() -> None:
    """The exact p-values of two worked examples: calcugator.com's tutorial of chi2_mcnemar, and stat-tools.xyz's page for 12 and 5.

    On these and other tables also statsmodels' values.
    """
    oracle = pytest.importorskip("statsmodels.stats.contingency_tables")
    assert mcnemar(11, 3) == pytest.approx(0.05737304687500008, rel=1e-12)  # 20 teenagers before and after a lecture, two-tailed
    assert mcnemar(12, 5) == pytest.approx(0.1435, abs=5e-5)
    for lost, won in ((11, 3), (12, 5), (121, 59), (25, 15), (0, 6), (7, 7), (300, 1)):
        theirs = oracle.mcnemar([[50, lost], [won, 50]], exact=True).pvalue
        assert mcnemar(lost, won) == pytest.approx(theirs, rel=1e-6)


def test_ece_as_published() -> None:
    """Nine predictions in three bins, worked by hand in M. Pavlovic's article (Towards Data Science, 2023): 0.23778."""
    confidence = np.array([0.22, 0.64, 0.92, 0.42, 0.51, 0.15, 0.70, 0.37, 0.83])
    right = (confidence > 0.5) == np.array([0, 1, 0, 0, 0, 1, 1, 0, 1], bool)
    found = reliability(confidence, right, bins=3)
    assert found["ece"] == pytest.approx(0.23778, abs=5e-6)
    assert [b["n"] for b in found["bins"]] == [2, 4, 3]
    assert reliability(np.array([1.0, 0.2]), np.array([True, False]), 5)["bins"][0]["high"] == 0.2  # closed above


def test_holm_is_statsmodels() -> None:
    """On many random sets, ties among them."""
    oracle = pytest.importorskip("statsmodels.stats.multitest")
    random = np.random.default_rng(1)
    for size in (1, 2, 10, 200):
        p = np.round(random.random(size) ** 3, 3)
        np.testing.assert_allclose(holm(list(p)), oracle.multipletests(p, method="holm")[1], atol=1e-12)


def test_the_interval_of_the_drop_covers() -> None:
    """Bonett and Price's interval holds the true drop in 93 to 98 % of 2,000 draws, and the one from counts is the one from logits."""
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(2000):
        lost, won, _ = random.multinomial(150, (0.08, 0.03, 0.89))
        low, high = paired_interval(int(lost), int(won), 150)
        hits += low <= 0.05 <= high
    assert 0.93 <= hits / 2000 <= 0.98
    labels = np.array([0] * 10)
    before, after = np.eye(2)[[0] * 8 + [1] * 2], np.eye(2)[[1] * 3 + [0] * 5 + [0, 1]]
    assert drop_interval(before, after, labels) == paired_interval(3, 1, 10)


def test_only_classes_that_could_be_significant_are_tested() -> None:
    """Tarone: 995 classes in which nothing or little changed do not dilute the five in which much did."""
    changed = dict.fromkeys(range(900), 0) | dict.fromkeys(range(900, 995), 2) | dict.fromkeys(range(995, 1000), 20)
    assert able_to_tell(changed) == list(range(995, 1000))
    assert able_to_tell({0: 5, 1: 5}) == []
    assert [least_to_tell(k) for k in (1, 10, 1000)] == [6, 9, 16]
    for tests in (1, 10, 1000):
        n = least_to_tell(tests)
        assert mcnemar(n, 0) * tests <= 0.05 < mcnemar(n - 1, 0) * tests


def test_a_sabotaged_class_is_named() -> None:
    """20 of 20: one class loses a fifth of its answers, top-1 moves by two points at most; every row says which."""
    for seed in range(20):
        random = np.random.default_rng([3, seed])
        labels, before, after = pair(random, 2000)
        victim = seed % 10
        spoiled = (labels == victim) & (after == labels) & (random.random(len(labels)) < 0.2)
        after = np.where(spoiled, (victim + 1) % 10, after)
        found = classes(labels, said(before), said(after), NAMES)
        assert found["flagged"] == [NAMES[victim]]
        assert abs(found["drop"]) < 0.03
        assert found["rows"][0]["label"] == NAMES[victim]
        assert NAMES[victim] in warnings("pi", {"classes": found})[0]


def test_untouched_models_raise_no_alarm() -> None:
    """200 pairs of equally accurate models, of 10 and of 100 classes: false alarms in at most 5 of 100."""
    for size, names in ((10, NAMES), (100, tuple(map(str, range(100))))):
        alarms = 0
        for seed in range(100):
            labels, before, after = pair(np.random.default_rng([4, seed]), 2000, size=size)
            alarms += bool(classes(labels, said(before), said(after), names)["flagged"])
        assert alarms <= 5, size


def test_a_loss_that_all_classes_share_flags_none() -> None:
    """A model that lost everywhere alike is a worse model, and no class of it is singled out."""
    random = np.random.default_rng(5)
    labels, before, _ = pair(random, 20_000)
    worse = np.where((before == labels) & (random.random(len(labels)) < 0.15), (labels + 1) % 10, before)
    found = classes(labels, said(before), said(worse), NAMES)
    assert found["drop"] > 0.1
    assert found["flagged"] == []
    assert found["tested"] == 10


def test_classes_with_too_few_images_are_said_to_be_so() -> None:
    """A class of three images that loses all of them is not flagged: it could not be, and its row says so."""
    labels = np.array([0] * 100 + [1] * 3)
    before, after = labels.copy(), np.where(labels == 1, 0, labels)
    found = classes(labels, said(before), said(after), ("large", "tiny"))
    rows = {row["label"]: row for row in found["rows"]}
    assert rows["tiny"]["small"]
    assert not rows["tiny"]["flagged"]
    assert not rows["large"]["small"]
    assert (found["small"], found["least"]) == (1, 6)
    assert rows["tiny"]["drop"] == 1.0
    assert rows["tiny"]["interval"][0] < rows["tiny"]["interval"][1]


def test_confusions_that_grew_come_first() -> None:
    """Counted as pairs of truth and answer; those that did not change are left out."""
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    before, after = np.array([0, 0, 2, 2, 1, 0, 1]), np.array([1, 1, 2, 0, 1, 0, 1])
    assert confusions(labels, said(before), said(after), ("a", "b", "c")) == [
        {"truth": "a", "said": "b", "before": 0, "after": 2},
        {"truth": "a", "said": "c", "before": 2, "after": 1},
    ]


def test_extra_drop_is_over_the_clean_drop() -> None:
    """A file that is worse on clean images by as much as on corrupted ones has no extra drop; one that breaks on blur has."""
    ones, half = np.ones(200, bool), np.arange(200) % 2 == 0
    found = extra_drops([("noise", 3), ("blur", 3)], np.stack([ones, ones]), np.stack([half, ~ones]), np.stack([ones, half]))
    noise, blur = found["rows"]
    assert (noise["extra"], blur["extra"], found["extra"]) == (0.0, 0.5, 0.25)
    assert noise["interval"][0] < 0 < noise["interval"][1]
    assert blur["interval"][0] > 0.4
    assert found["clean"] == {"before": 1.0, "after": 0.5}


def test_statistics_of_one_model_against_itself() -> None:
    """Nothing changed, nothing flagged, the same curve twice, and no figure that is not a number."""
    labels, before, _ = pair(np.random.default_rng(6), 500)
    found = statistics(labels, said(before), said(before), NAMES)
    assert found["flips"]["changed"] == 0
    assert found["classes"]["flagged"] == found["confusions"] == []
    assert found["confidence"]["float"] == found["confidence"]["file"]
    assert all(math.isfinite(row["interval"][0]) for row in found["classes"]["rows"])

"""What changed between two models on the same images: flips, classes, confusions, each with what it takes to believe it.

The test within a class is McNemar's, exact (a binomial test on the images that only one of the two gets right). Over many classes the
p-values are Holm's (1979), which holds for any dependence: the chance of naming any class by luck stays below `ALPHA`. Classes in which
too few predictions changed for any outcome to be significant are left out of the correction, as Tarone (Biometrics 46, 1990) shows one
may: what is left out depends only on how many changed, not on which way. That is what lets 1,000 classes be tested at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecnn.device.stats import mcnemar
from edgecnn.parity import paired_interval

ALPHA = 0.05
_CHUNK = 4096
_CONFUSIONS = 12

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Predictions:
    """One model on N images: the output it says and the softmax probability it gives it."""

    top1: Ints
    confidence: npt.NDArray[np.float64]

    @staticmethod
    def of(logits: np.ndarray) -> Predictions:
        """From logits N x classes, a part at a time: 50,000 x 1,000 of them may be mapped from a file."""
        top1, confidence = np.empty(len(logits), np.int64), np.empty(len(logits))
        for start in range(0, len(logits), _CHUNK):
            part = np.asarray(logits[start : start + _CHUNK], np.float32)
            best = part.argmax(1)
            peak = part[np.arange(len(part)), best]
            top1[start : start + _CHUNK] = best
            confidence[start : start + _CHUNK] = 1 / np.exp(part - peak[:, None]).sum(1, dtype=np.float64)
        return Predictions(top1, confidence)


def flips(labels: Ints, before: Predictions, after: Predictions) -> dict[str, Any]:
    """How many predictions changed, and which way.

    Returns:
        Counts: `n`, `changed`, of which `lost` (right, now wrong), `won` (wrong, now right) and `wrong_differently`; `p`, exact
        McNemar, that both models are equally accurate.
    """
    was, now = before.top1 == labels, after.top1 == labels
    changed = int((before.top1 != after.top1).sum())
    lost, won = int((was & ~now).sum()), int((~was & now).sum())
    return {
        "n": len(labels),
        "changed": changed,
        "lost": lost,
        "won": won,
        "wrong_differently": changed - lost - won,
        "p": mcnemar(lost, won),
    }


def classes(labels: Ints, before: Predictions, after: Predictions, names: tuple[str, ...]) -> dict[str, Any]:
    """What every class lost, and whether that can be told from chance.

    A class is flagged where its loss is significant after the correction (two-sided, `ALPHA` for all classes together) and the 95 %
    interval of its loss lies above what the model lost as a whole: a class that paid more than its share.

    Returns:
        `rows`, the surest loss first (`label`, `n`, `before`, `after` as top-1, `drop`, `interval`, `lost`, `won`, `p`, `p_holm` or
        None where it was not tested, `small` where even the loss of every right answer could not be told from chance, `flagged`);
        `tested`, `small` as counts, `least` right answers that it takes, `flagged` labels, `drop` of the whole.
    """
    was, now = before.top1 == labels, after.top1 == labels
    size = len(names)

    def count(mask: Bools) -> Ints:
        return np.bincount(labels[mask], minlength=size)

    n, right, lost, won = count(np.ones(len(labels), bool)), count(was), count(was & ~now), count(~was & now)
    whole = float(was.mean() - now.mean())
    there = np.flatnonzero(n)
    p = {int(c): mcnemar(int(lost[c]), int(won[c])) for c in there}
    tested = able_to_tell({c: int(lost[c] + won[c]) for c in p})
    adjusted = dict(zip(tested, holm([p[c] for c in tested]), strict=True))
    least = least_to_tell(max(1, len(tested)))
    rows = []
    for c in p:
        interval = paired_interval(int(lost[c]), int(won[c]), int(n[c]))
        rows.append(
            {
                "label": names[c],
                "n": int(n[c]),
                "before": right[c] / n[c],
                "after": (right[c] - lost[c] + won[c]) / n[c],
                "drop": (lost[c] - won[c]) / n[c],
                "interval": interval,
                "lost": int(lost[c]),
                "won": int(won[c]),
                "p": p[c],
                "p_holm": adjusted.get(c),
                "small": bool(right[c] < least),
                "flagged": adjusted.get(c, 1.0) < ALPHA and interval[0] > max(whole, 0.0),
            }
        )
    rows.sort(key=lambda row: (not row["flagged"], -row["interval"][0], -row["drop"]))
    return {
        "rows": rows,
        "tested": len(tested),
        "small": sum(row["small"] for row in rows),
        "least": least,
        "flagged": [row["label"] for row in rows if row["flagged"]],
        "drop": whole,
    }


def able_to_tell(changed: dict[int, int]) -> list[int]:
    """The hypotheses, by key, that could be significant among themselves; `changed` is how many images only one model gets right.

    Tarone's: the smallest K such that at most K of them have a least attainable p-value of at most `ALPHA` / K.
    """
    least = {key: 2 * 0.5**n if n else 1.0 for key, n in changed.items()}
    for k in range(1, len(least) + 1):
        able = [key for key, p in least.items() if p <= ALPHA / k]
        if len(able) <= k:
            return able
    return []


def holm(p: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = np.argsort(p)
    steps = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


def least_to_tell(tests: int) -> int:
    """How many right answers a class needs so that the loss of all of them is significant among so many tests."""
    n = 1
    while 2 * 0.5**n > ALPHA / tests:
        n += 1
    return n


def confusions(labels: Ints, before: Predictions, after: Predictions, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The confusions (truth, taken for) whose number changed most, worst first: `truth`, `said`, and images `before` and `after`."""
    size = len(names)
    wrong_before, wrong_after = before.top1 != labels, after.top1 != labels
    keys, where = np.unique(
        np.concatenate([(labels * size + before.top1)[wrong_before], (labels * size + after.top1)[wrong_after]]), return_inverse=True
    )
    had = np.bincount(where[: wrong_before.sum()], minlength=len(keys))
    has = np.bincount(where[wrong_before.sum() :], minlength=len(keys))
    order = np.argsort(-np.abs(has - had), kind="stable")[:_CONFUSIONS]
    found = [
        {"truth": names[keys[i] // size], "said": names[keys[i] % size], "before": int(had[i]), "after": int(has[i])}
        for i in order
        if has[i] != had[i]
    ]
    return sorted(found, key=lambda row: row["before"] - row["after"])

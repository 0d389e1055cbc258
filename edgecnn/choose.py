"""Which candidate ships, and whether the promise is kept.

Every candidate is built, and its accuracy on the choice images and its latency are measured on the exported file. The fastest that
keeps the promise wins; when two are too close to tell, the one that agrees more with the float model does. The verdict is then made on
the evaluation images, which the choice never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecnn.device.spec import Artifact, Result
from edgecnn.device.stats import compare, estimate
from edgecnn.targets.base import Candidate, Promise

PASS, FAIL, UNPROVEN = "pass", "fail", "unproven"
# No honest file keeps fewer of the float model's classes; asked only where no accuracy is promised.
COLLAPSED = 0.5
# A smaller difference between medians is not worth a worse model, even where it can be told.
CLOSE = 0.03


@dataclass(frozen=True)
class Tried:
    """A candidate and what was measured on it.

    Attributes:
        candidate: how it was made.
        eligible: whether the recipe's precision lets it ship; the others are there for comparison.
        artifact: its files, or None where building or running failed; `failure` says why.
        top1: on the choice images; `agreement` is with the float torch model there.
        divergence: mean Kullback-Leibler divergence of its class probabilities from the float model's, there.
        results: latency, one a process; empty where this machine cannot run the runtime.
    """

    candidate: Candidate
    eligible: bool
    artifact: Artifact | None
    failure: str = ""
    top1: float = 0.0
    agreement: float = 0.0
    n: int = 0
    results: tuple[Result, ...] = ()
    divergence: float = 0.0

    @property
    def p50_s(self) -> float | None:
        return self._percentile(0.5)

    @property
    def p90_s(self) -> float | None:
        return self._percentile(0.9)

    @property
    def void(self) -> str:
        """Why its latency must not be used, or ""."""
        return next((r.void for r in self.results if r.void), "")

    def _percentile(self, q: float) -> float | None:
        return estimate([r.samples_s for r in self.results], q).value if self.results else None


def choose(tried: Sequence[Tried], promise: Promise, float_top1: float) -> tuple[Tried | None, dict[str, str]]:
    """The candidate to ship, and for each candidate by name why it ships or does not.

    Args:
        tried: all candidates of one target.
        promise: of that target.
        float_top1: of the float torch model on the choice images.

    Returns:
        None as the candidate only where none could be built and run.
    """
    why = {t.candidate.name: f"not built: {t.failure}" for t in tried if t.failure}
    able = [t for t in tried if not t.failure]
    why |= {t.candidate.name: "for comparison: the recipe asks for another precision" for t in able if not t.eligible}
    able = [t for t in able if t.eligible]
    if not able:
        return None, why
    broken = {t.candidate.name: broken_promises(promise, t, float_top1) for t in able}
    keeping = [t for t in able if not broken[t.candidate.name]]
    if keeping:
        best = _fastest(keeping)
        why |= {
            t.candidate.name: "breaks the promise on the choice images: " + "; ".join(broken[t.candidate.name])
            for t in able
            if t not in keeping
        }
        why |= {t.candidate.name: _lost(t, best) for t in keeping if t is not best}
        why[best.candidate.name] = _won(best, len(keeping))
    else:
        best = _best(able)
        why |= {t.candidate.name: "breaks the promise on the choice images: " + "; ".join(broken[t.candidate.name]) for t in able}
        why[best.candidate.name] = "closest to the float model; none keeps the promise: " + "; ".join(broken[best.candidate.name])
    return best, why


def broken_promises(promise: Promise, t: Tried, float_top1: float) -> list[str]:
    """What `t` breaks by its figures on the choice images; what cannot be measured here is not held against it."""
    assert t.artifact is not None
    drop, size = float_top1 - t.top1, t.artifact.size_bytes
    return _broken(promise, top1=t.top1, drop=drop, agreement=t.agreement, size_bytes=size, p90_s=t.p90_s)


def judge(
    promise: Promise, *, top1: float, drop: float, agreement: float, size_bytes: int, p90_s: float | None, doubts: Sequence[str]
) -> tuple[str, list[str]]:
    """The verdict on the shipped file, from the evaluation images, and its reasons.

    Args:
        promise: of that target.
        top1: of the exported file on the evaluation images.
        drop: of it against the float model there.
        agreement: with the float model that it was made from, there.
        size_bytes: of its files.
        p90_s: latency, or None where it could not be measured.
        doubts: why the latency is not to be trusted.
    """
    broken = _broken(promise, top1=top1, drop=drop, agreement=agreement, size_bytes=size_bytes, p90_s=p90_s)
    if broken:
        return FAIL, broken
    if promise.p90_latency_ms is not None and p90_s is None:
        return UNPROVEN, [
            f"p90 latency of {promise.p90_latency_ms:g} ms is promised, and this machine cannot measure it: bench the bundle on the board"
        ]
    if promise.p90_latency_ms is not None and doubts:
        return UNPROVEN, [f"p90 latency was measured, but {doubt}" for doubt in doubts]
    return PASS, []


def overall(verdicts: Sequence[str]) -> str:
    """Fail if any failed, else unproven if any is."""
    return next((v for v in (FAIL, UNPROVEN) if v in verdicts), PASS)


def _broken(promise: Promise, *, top1: float, drop: float, agreement: float, size_bytes: int, p90_s: float | None) -> list[str]:
    reasons = []
    if promise.accuracy_drop is None and promise.min_accuracy is None and agreement < COLLAPSED:
        reasons.append(f"it has collapsed: {agreement:.0%} of the images keep the float model's class")
    # Fractions of image counts: without the slack, 0.01 as a sum of floats may come out above 0.01.
    if promise.accuracy_drop is not None and drop > promise.accuracy_drop + 1e-9:
        reasons.append(f"top-1 drops by {100 * drop:.2f} points, {100 * promise.accuracy_drop:g} promised")
    if promise.min_accuracy is not None and top1 < promise.min_accuracy - 1e-9:
        reasons.append(f"top-1 is {top1:.2%}, at least {promise.min_accuracy:.2%} promised")
    if promise.p90_latency_ms is not None and p90_s is not None and p90_s * 1e3 > promise.p90_latency_ms:
        reasons.append(f"p90 latency is {p90_s * 1e3:.3g} ms, {promise.p90_latency_ms:g} promised")
    if promise.size_mb is not None and size_bytes > promise.size_mb * 1e6:
        reasons.append(f"its files are {size_bytes / 1e6:.2f} MB, {promise.size_mb:g} promised")
    return reasons


def _fastest(keeping: Sequence[Tried]) -> Tried:
    """Void figures are held against each other too: the files took turns, so what disturbed one disturbed all, and widened the interval."""
    if any(t.p50_s is None for t in keeping):
        return _best(keeping)
    fastest = min(keeping, key=lambda t: t.p50_s or 0.0)
    return _best([t for t in keeping if _as_fast(t, fastest)])


def _as_fast(t: Tried, fastest: Tried) -> bool:
    """Whether the difference is within the noise, or too small to matter."""
    told = compare([r.samples_s for r in fastest.results], [r.samples_s for r in t.results])
    close = (t.p50_s or 0.0) <= (fastest.p50_s or 0.0) * (1 + CLOSE)
    return close or (told.ratio is not None and told.verdict != "slower")


def _won(best: Tried, of: int) -> str:
    if of == 1:
        return "the only one that may ship and keeps the promise"
    if best.p50_s is None:
        return "closest to the float model; latency cannot be measured here"
    return f"the fastest that keeps the promise{f'; its latency in ms is void: {best.void}' if best.void else ''}"


def _lost(t: Tried, best: Tried) -> str:
    name = best.candidate.name
    if t.p50_s is None or best.p50_s is None:
        return _worse(t, best) or f"as good as {name}, which comes first"
    if not _as_fast(t, best):
        figures = f"{t.p50_s / best.p50_s:.2f} of its time, in turns that something disturbed" if t.void or best.void else ""
        return f"slower than {name}: {figures or f'{t.p50_s * 1e3:.3g} ms against {best.p50_s * 1e3:.3g}'}"
    worse = _worse(t, best)
    return f"not measurably faster than {name}, and {worse}" if worse else f"not measurably faster or better than {name}, which comes first"


def _best(tried: Sequence[Tried]) -> Tried:
    """The closest to the float model; one trained for int8, which labels have moved away from it, must be more accurate than that."""
    plain = max((t for t in tried if not _is_qat(t)), key=_closeness, default=None)
    qat = max((t for t in tried if _is_qat(t)), key=lambda t: (t.top1, *_closeness(t)), default=None)
    if plain is None or qat is None:
        best = plain or qat
        assert best is not None
        return best
    return qat if qat.top1 > plain.top1 else plain


def _is_qat(t: Tried) -> bool:
    return bool(t.candidate.how.get("qat"))


def _closeness(t: Tried) -> tuple[float, float, float]:
    """Divergence first: on a few hundred images agreement and top-1 differ by single images, which is chance."""
    return -t.divergence, t.agreement, t.top1


def _worse(t: Tried, best: Tried) -> str:
    """In what `t` is worse on the choice images, or ""."""
    if _is_qat(t) != _is_qat(best):
        return f"{'less' if t.top1 < best.top1 else 'no more'} accurate: top-1 {t.top1:.2%} against {best.top1:.2%}"
    if t.divergence > best.divergence:
        return f"further from the float model's outputs: divergence {t.divergence:.2g} against {best.divergence:.2g}"
    if t.agreement < best.agreement:
        return f"agrees less with the float model: {t.agreement:.2%} against {best.agreement:.2%}"
    return f"less accurate: top-1 {t.top1:.2%} against {best.top1:.2%}" if t.top1 < best.top1 else ""


def slower_than_float(tried: Sequence[Tried], chosen: Tried) -> list[str]:
    """A sentence, where a float file of the same runtime is measurably faster than the one that ships."""
    floats = [t for t in tried if t.candidate.precision != "int8" and t.p50_s and not t.void]
    fastest = min(floats, key=lambda t: t.p50_s or 0.0, default=None)
    if fastest is None or fastest is chosen or not chosen.p50_s or chosen.void or _as_fast(chosen, fastest):
        return []
    times = chosen.p50_s / (fastest.p50_s or 1.0)
    return [f"{chosen.candidate.precision} is {times:.2f}x slower than {fastest.candidate.name}; precision: auto ships the fastest"]


def summaries(tried: Sequence[Tried], chosen: Tried | None, why: Mapping[str, str]) -> list[dict[str, Any]]:
    """The candidates as result.json lists them; `speedup` is over the fastest float candidate, and of latencies that are not void."""
    floats = [t.p50_s for t in tried if t.candidate.precision != "int8" and t.p50_s is not None and not t.void]
    rows = []
    for t in tried:
        p50 = t.p50_s
        rows.append(
            {
                "name": t.candidate.name,
                "precision": t.candidate.precision,
                "chosen": t is chosen,
                "eligible": t.eligible,
                "why": why[t.candidate.name],
                "how": t.candidate.how,
                "file_sha256": t.artifact.manifest.model_sha256 if t.artifact else None,
                "size_bytes": t.artifact.size_bytes if t.artifact else None,
                "choice_top1": t.top1 if t.artifact else None,
                "choice_agreement": t.agreement if t.artifact else None,
                "choice_divergence": t.divergence if t.artifact else None,
                "choice_n": t.n,
                "p50_s": p50,
                "p90_s": t.p90_s,
                "void": t.void,
                "samples_n": sum(len(r.samples_s) for r in t.results),
                "speedup": min(floats) / p50 if floats and p50 and not t.void else None,
                "notes": list(t.artifact.notes) if t.artifact else [],
            }
        )
    return rows

"""Everything that the trust section shows of one target, in one call: statistics now, images and corruptions once and stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecnn.device.files import write_atomically
from edgecnn.device.packed import Packed, open_packed, write_packed
from edgecnn.device.spec import Artifact, InputSpec
from edgecnn.floats import Float, Run, images
from edgecnn.measure import evaluate, identity_of
from edgecnn.remote import on
from edgecnn.train import predict
from edgecnn.trust import change
from edgecnn.trust.change import Predictions
from edgecnn.trust.confidence import reliability
from edgecnn.trust.corruptions import corrupt
from edgecnn.trust.pictures import take_pictures
from edgecnn.trust.predicted import Predicted, write_predictions

if TYPE_CHECKING:
    from edgecnn.targets import AnyTarget


def examine(run: Run, target: AnyTarget, artifact: Artifact, baseline: Float, logits: np.ndarray) -> dict[str, Any]:
    """Compare the exported file with the float model that its drop is counted from.

    Args:
        run: its recipe says how much is looked at.
        target: what the file is for.
        artifact: the file.
        baseline: the float model, with its logits on the evaluation images.
        logits: of the file on the same images, N x classes.

    Returns:
        `flips`, `classes`, `confusions`, `confidence`, and, where the recipe asks for them, `robustness` and `pictures`, which take
        longer than all else and are left out at `effort: quick`; see docs/result.md. Pictures lie in `pictures/` of the run folder, each
        image's predictions in `predictions/`.
    """
    labels = run.data.evaluation.labels
    before, after = Predictions.of(baseline.evaluation), Predictions.of(logits)
    write_predictions(
        run.store.root / "predictions" / f"{target.name}.npz",
        Predicted(run.data.evaluation_contents, labels, before, after, baseline.labels),
    )
    return {
        **statistics(labels, before, after, baseline.labels),
        "robustness": _robustness(run, target, artifact, baseline, before, after),
        **_pictures(run, target, artifact, baseline, before, after),
    }


def statistics(labels: change.Ints, before: Predictions, after: Predictions, names: tuple[str, ...]) -> dict[str, Any]:
    """What predictions alone tell."""
    return {
        "flips": change.flips(labels, before, after),
        "classes": change.classes(labels, before, after, names),
        "confusions": change.confusions(labels, before, after, names),
        "confidence": {
            "float": reliability(before.confidence, before.top1 == labels),
            "file": reliability(after.confidence, after.top1 == labels),
        },
    }


def warnings(name: str, found: dict[str, Any]) -> list[str]:
    """What a reader must not miss, a sentence each."""
    rows = [row for row in found["classes"]["rows"] if row["flagged"]]
    whole = 100 * found["classes"]["drop"]
    return [
        f"{name}: class {row['label']!r} lost {100 * row['drop']:.1f} points of top-1 (95 % interval {100 * row['interval'][0]:.1f} to "
        f"{100 * row['interval'][1]:.1f}, {row['n']} images) where the model as a whole lost {whole:.1f}"
        for row in rows[:5]
    ] + ([f"{name}: {len(rows) - 5} more classes lost more than the model did"] if len(rows) > 5 else [])


def _robustness(
    run: Run, target: AnyTarget, artifact: Artifact, baseline: Float, before: Predictions, after: Predictions
) -> dict[str, Any] | None:
    """Top-1 of both on corrupted evaluation images, and what the file loses beyond what the float model loses."""
    look = run.recipe.trust
    kinds = [(kind, severity) for kind in look.corruptions for severity in look.severities]
    n = min(look.corrupted_images, len(run.data.evaluation))
    if run.recipe.effort == "quick" or not n or not kinds:
        return None
    if artifact.manifest.input.image_size != "prepared":  # both models must see the same pixels
        return None
    labels = run.data.evaluation.labels[:n]
    stand_in = target.measured_as()

    def corrupted(spec: InputSpec) -> Packed:
        clean, _ = images(run, "evaluation", spec)

        def make(work: Any) -> None:
            run.screen.say(f"  corrupt {n} evaluation images in {len(kinds)} ways")
            pixels = (corrupt(clean.images[i], *kind, (run.recipe.seed, i, k)) for k, kind in enumerate(kinds) for i in range(n))
            ids = [f"{kind} {severity} {i}" for kind, severity in kinds for i in range(n)]
            write_packed(work, ids, np.tile(labels, len(kinds)), pixels, spec.geometry)

        inputs = {"images": clean.sha256, "n": n, "kinds": kinds, "seed": run.recipe.seed}
        return open_packed(run.store.once("corrupted", inputs, make).folder)

    def by_float(work: Any) -> None:
        np.save(work / "top1.npy", predict(baseline.load().module, corrupted(baseline.input), baseline.input).argmax(1))

    def by_file(work: Any) -> None:
        packed = corrupted(artifact.manifest.input)
        with on(target.device) as board:
            evaluate(artifact.folder, packed.folder, work / "logits.npy", threads=target.threads, runtime=stand_in, board=board)
        np.save(work / "top1.npy", np.load(work / "logits.npy", allow_pickle=False).argmax(1))
        (work / "logits.npy").unlink()

    seen = {"kinds": kinds, "n": n, "data": run.data.digest, "seed": run.recipe.seed}
    file = {"file": artifact.manifest.digests, "options": artifact.manifest.options, "runtime": stand_in or target.runtime}
    first = run.store.once("float-corrupted", {"model": baseline.key, **seen}, by_float)
    second = run.store.once("file-corrupted", {**file, **seen, "machine": identity_of(target.device)}, by_file)
    was, now = (np.load(entry.folder / "top1.npy", allow_pickle=False).reshape(len(kinds), n) == labels for entry in (first, second))
    clean = np.stack([before.top1[:n] == labels, after.top1[:n] == labels])
    return {"n": n, **extra_drops(kinds, was, now, clean)}


def extra_drops(kinds: Sequence[tuple[str, int]], was: change.Bools, now: change.Bools, clean: change.Bools) -> dict[str, Any]:
    """Per corruption and over all: top-1 of both models, and how much more the file loses to it than the float model loses.

    Args:
        kinds: K corruptions with their severity.
        was: K x n, whether the float model is right; `now` the file's.
        clean: 2 x n, the same of the float model and the file on the clean images.

    Returns:
        `rows` with `kind`, `severity`, `before`, `after` (top-1), `extra` and its 95 % `interval`; `extra` and `interval` of the mean over
        all; `clean` top-1 of both. `extra` is what the file lost from clean to corrupted minus what the float model lost. The unit is
        the image, since the forms of one image are not independent; the interval is Wald's with the two pseudo-images, one for each
        side, of Bonett and Price.
    """

    def mean(lost: np.ndarray) -> tuple[float, tuple[float, float]]:
        n = len(lost) + 2
        middle = float(lost.sum()) / n
        half = 1.959964 * (((float((lost**2).sum()) + 2) / n - middle**2) / n) ** 0.5
        return float(lost.mean()), (middle - half, middle + half)

    lost = was.astype(float) - now - (clean[0].astype(float) - clean[1])
    rows = []
    for k, (kind, severity) in enumerate(kinds):
        extra, interval = mean(lost[k])
        top1 = {"before": float(was[k].mean()), "after": float(now[k].mean())}
        rows.append({"kind": kind, "severity": severity, **top1, "extra": extra, "interval": interval})
    extra, interval = mean(lost.mean(0))
    return {
        "rows": rows,
        "extra": extra,
        "interval": interval,
        "clean": {"before": float(clean[0].mean()), "after": float(clean[1].mean())},
    }


def _pictures(run: Run, target: AnyTarget, artifact: Artifact, baseline: Float, before: Predictions, after: Predictions) -> dict[str, Any]:
    """Flipped and typical images with Grad-CAM of both."""
    if run.recipe.effort == "quick" or not run.recipe.trust.pictures or artifact.manifest.input.image_size != "prepared":
        return {"pictures": [], "gradcam": None}
    packed, _ = images(run, "evaluation", artifact.manifest.input)

    def make(work: Any) -> dict[str, Any]:
        run.screen.say(f"  {target.name}: look where both models look")
        return take_pictures(work, packed, artifact, baseline, before, after, run.recipe.trust.pictures)

    inputs = {
        "file": artifact.manifest.digests,
        "options": artifact.manifest.options,
        "model": baseline.key,
        "images": packed.sha256,
        "n": run.recipe.trust.pictures,
    }
    entry = run.store.once("pictures", inputs, make)
    shown = run.store.root / "pictures"
    shown.mkdir(exist_ok=True)
    for old in shown.glob(f"{target.name}-[0-9][0-9].jpg"):
        old.unlink()
    for picture in entry.facts["pictures"]:
        name = f"{target.name}-{picture['file']}"
        write_atomically(shown / name, (entry.folder / picture["file"]).read_bytes())
        picture["file"] = name
    return entry.facts

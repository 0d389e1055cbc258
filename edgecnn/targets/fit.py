"""The QDQ graph of one form with the ranges that suit the network best, and its biases corrected.

No calibration method is best everywhere: on MobileNetV4 minmax ranges cost six points, on others cutting outliers off does. All have the
same speed, so they need not be timed as candidates: each is written, run on calibration images, and the one whose outputs are closest
to the float model's (mean Kullback-Leibler divergence) is kept. Bias correction follows, and stays only where it brings them closer.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgecnn.targets.base import Source
from edgecnn.targets.bias import correct_bias
from edgecnn.targets.calibration import ranges
from edgecnn.targets.qdq import Form, write_qdq
from edgecnn.targets.sensitivity import divergence, logits, worst_layers

IMAGES = 128
COLLAPSE = 0.9  # no honest int8 file agrees less with its float model


def fit_qdq(source: Source, path: Path, form: Form, *, methods: Sequence[str], correct: bool, exclude: Collection[str] = ()) -> list[str]:
    """Write the best QDQ graph of `form` to `path`; returns sentences that say what was chosen, with figures.

    Args:
        source: the float graph, and the images to fit to.
        path: of the file to write.
        methods: of calibration, to choose among; with a single one nothing is compared.
        correct: correct biases, where it helps.
        form: what the runtime wants.
        exclude: names of nodes to keep in float.
    """
    if source.learned is not None:
        keys = ("activations", "reduce_range", "sums")
        made = next(each["ranges"] for each in source.learned if all(each["form"][key] == getattr(form, key) for key in keys))
        write_qdq(source.onnx, path, {name: (low, high) for name, (low, high) in made.items()}, form, exclude=exclude)
        return ["weights and ranges of the qat stage"]
    key = (form, tuple(methods), correct, frozenset(exclude))
    if key in source.fitted:
        graph, notes = source.fitted[key]
        path.write_bytes(graph)
        return list(notes)
    notes = _fit(source, path, form, methods, correct, exclude)
    source.fitted[key] = path.read_bytes(), notes
    return list(notes)


def _fit(source: Source, path: Path, form: Form, methods: Sequence[str], correct: bool, exclude: Collection[str]) -> list[str]:
    def outputs(graph: Path) -> np.ndarray:
        return logits(graph, source.calibration, source.input, IMAGES)

    wanted = outputs(source.onnx)
    with tempfile.TemporaryDirectory() as work:
        files, found, errors = {}, {}, {}
        for method in methods:
            files[method] = Path(work) / f"{method}.onnx"
            write_qdq(source.onnx, files[method], ranges(source.histograms(), method, symmetric=form.symmetric), form, exclude)
            found[method] = outputs(files[method])
            errors[method] = divergence(wanted, found[method])
        best = min(errors, key=errors.__getitem__)
        told = ", ".join(f"{method} {error:.2g}" for method, error in errors.items())
        note = f"ranges by {best}; divergence from the float outputs on {len(wanted)} calibration images: {told}"
        shutil.copy(files[best], path)
        if correct:
            correct_bias(source.onnx, files[best], source.calibration, source.input)
            corrected = outputs(files[best])
            after = divergence(wanted, corrected)
            note += f", {after:.2g} with corrected biases{'' if after < errors[best] else ', which was therefore left out'}"
            if after < errors[best]:
                shutil.copy(files[best], path)
                found[best] = corrected
    fallen = _collapse(source, path, wanted, found[best])
    if fallen and form.weights == "per-tensor":
        better = replace(form, weights="per-channel")
        again = fit_qdq(source, path, better, methods=methods, correct=correct, exclude=exclude)
        return [note, *fallen, "recovered: weights: per-tensor was replaced by per-channel", *again]
    return [note, *fallen]


def _collapse(source: Source, path: Path, wanted: np.ndarray, found: np.ndarray) -> list[str]:
    """Where the file gives other classes than the float model too often: that, and the layers where the error is largest."""
    agreement = (wanted.argmax(1) == found.argmax(1)).mean()
    if agreement >= COLLAPSE:
        return []
    worst = worst_layers(source.onnx, path, source.calibration, source.input)[:3]
    named = "; ".join(f"{w.name}, {w.lost_db:.0f} dB lost, float outputs from {w.low:.3g} to {w.high:.3g}" for w in worst)
    return [f"collapse: only {agreement:.0%} of {len(wanted)} calibration images keep their class. Most is lost in {named}"]

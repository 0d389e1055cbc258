"""The QDQ graph of one form with the ranges that suit the network best, and its biases corrected.

No calibration method is best everywhere: on MobileNetV4 minmax ranges cost six points, on others cutting outliers off does. All have the
same speed, so they need not be timed as candidates: each is written, run on calibration images, and the one whose outputs are closest
to the float model's (mean Kullback-Leibler divergence) is kept. Bias correction follows, and stays only where it brings them closer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from edgecnn.device.profile import layer_of
from edgecnn.targets.base import Source
from edgecnn.targets.bias import correct_bias
from edgecnn.targets.calibration import ranges
from edgecnn.targets.qdq import WEIGHTED, Form, channel_axis, weight_scale, write_qdq
from edgecnn.targets.sensitivity import divergence, logits, worst_layers

IMAGES = 128
COLLAPSE = 0.9  # no honest int8 file agrees less with its float model
FEW_STEPS = 8  # of 127, that a channel's largest weight comes to: three bits and a sign
STARVED = 0.25  # a layer's share of such channels, from where on its scale is held to be wrong
WORTH = 1.25  # times the divergence of one scale a channel, from where on a single scale has cost accuracy


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
        mine = json.dumps(asdict(form))
        made = next(each["ranges"] for each in source.learned if json.dumps(each["form"]) == mine)
        write_qdq(source.onnx, path, {name: (low, high) for name, (low, high) in made.items()}, form, exclude=exclude)
        return ["weights and ranges of the qat stage"]
    # Runtimes that want different forms only of what this network does not have share a fit.
    form = replace(form, only=tuple(sorted(set(form.only) & _operators(source.onnx))))
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
            chosen = ranges(source.histograms(), method, symmetric=form.symmetric, channels=form.channels)
            write_qdq(source.onnx, files[method], chosen, form, exclude)
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
    notes = [note, *_collapse(source, path, wanted, found[best])]
    if form.weights == "per-channel":
        return notes
    notes += _starved(source.onnx, form, exclude)
    with tempfile.TemporaryDirectory() as work:
        better = Path(work) / "per-channel.onnx"
        again = fit_qdq(source, better, replace(form, weights="per-channel"), methods=methods, correct=correct, exclude=exclude)
        single, many = divergence(wanted, found[best]), divergence(wanted, outputs(better))
        told = f"divergence {single:.2g} by it, {many:.2g} by one scale a channel"
        if single <= WORTH * many:
            return [*notes, f"weights: per-tensor costs nothing that counts: {told}"]
        shutil.copy(better, path)
        return [*notes, f"recovered: weights: per-tensor was replaced by per-channel: {told}", *again]


def _operators(model: Path) -> set[str]:
    """The operator types in the graph."""
    import onnx

    return {node.op_type for node in onnx.load(str(model)).graph.node}


def _starved(model: Path, form: Form, exclude: Collection[str]) -> list[str]:
    """Where the single scale of `form` leaves many channels of a layer almost no steps: those layers, with the ends of their ranges."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(model)).graph
    constants = {i.name: i for i in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type in WEIGHTED and node.name not in exclude and node.input[1] in constants:
            weight, axis = numpy_helper.to_array(constants[node.input[1]]), channel_axis(node)
            single, many = (
                127 * weight_scale(weight, axis, replace(form, weights=w, reduce_range=False)) for w in ("per-tensor", "per-channel")
            )
            few = float((many < single * FEW_STEPS / 127).mean())
            if few >= STARVED:
                found.append((few, f"{layer_of(node.input[1])}, {few:.0%} of its channels, which end at {many.min():.2g} to {single:.2g}"))
    if not found:
        return []
    named = "; ".join(told for _, told in sorted(found, reverse=True)[:3])
    return [f"weights: per-tensor leaves many channels less than {FEW_STEPS} of 127 steps, in {len(found)} layers: {named}"]


def _inputs(model: Path) -> dict[str, tuple[str, str]]:
    """For each node with weights the layer that it is in the torch model, and the tensor that it reads."""
    import onnx

    nodes = [node for node in onnx.load(str(model)).graph.node if node.op_type in WEIGHTED]
    return {node.name: (layer_of(node.input[1]), node.input[0]) for node in nodes}


def _collapse(source: Source, path: Path, wanted: np.ndarray, found: np.ndarray) -> list[str]:
    """Where the file gives other classes than the float model too often: that, and the layers where the error is largest."""
    agreement = (wanted.argmax(1) == found.argmax(1)).mean()
    if agreement >= COLLAPSE:
        return []
    worst = worst_layers(source.onnx, path, source.calibration, source.input)[:3]
    layers, seen = _inputs(source.onnx), ranges(source.histograms(), "minmax", symmetric=False)
    told = []
    for w in worst:
        layer, read = layers[w.name]
        low, high = seen.get(read, (np.nan, np.nan))
        told.append(
            f"{layer}, {w.lost_db:.0f} dB lost, which reads {low:.3g} to {high:.3g} and puts out {w.low:.3g} to {w.high:.3g} in float"
        )
    named = "; ".join(told)
    return [f"collapse: only {agreement:.0%} of {len(wanted)} calibration images keep their class. Most is lost in {named}"]

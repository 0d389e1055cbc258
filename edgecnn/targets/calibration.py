"""Activation ranges of an ONNX graph from calibration images, by several methods, in two passes and bounded memory.

The first pass finds each tensor's minimum and maximum, the second fills a histogram between them; one image's activations
a core are in memory at a time, however many images there are. Ranges always include zero, which padding and ReLU need exactly.

    minmax      everything seen
    mean        the mean over the images of each one's minimum and maximum
    percentile  0.01 % cut off at each end; also 0.1 and 0.001 %, as percentile-99.9 and percentile-99.999
    mse         the range with the least squared error after 8-bit rounding (Choukroun et al. 2019, arXiv:1902.06822)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgecnn.cores import each
from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise
from edgecnn.device.spec import InputSpec
from edgecnn.errors import DataError

if TYPE_CHECKING:
    import onnx

# Part of the operator in front of them in every int8 graph: they only narrow its range, which then begins at zero.
ACTIVATIONS = ("Clip", "Relu")
BINS = 2048
PERCENTILE = 1e-4
Range = tuple[float, float]


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values in equal bins from `low` to `high`, all 0 where none were taken; `mean_low` and `mean_high` are the mean
    ends of one image."""

    low: float
    high: float
    mean_low: float
    mean_high: float
    counts: np.ndarray

    @property
    def centres(self) -> np.ndarray:
        width = (self.high - self.low) / len(self.counts)
        centres: np.ndarray = self.low + width * (np.arange(len(self.counts)) + 0.5)
        return centres


def collect(model: Path, images: Packed, spec: InputSpec) -> dict[str, Histogram]:
    """Histogram of every float activation of `model` over the calibration images.

    What a ReLU alone reads, half of the numbers in a network, has ends and no counts: in every int8 graph it is rounded behind the ReLU.

    Raises:
        DataError: there are no images, or an activation is not finite.
    """
    if not len(images.labels):
        raise DataError("there are no calibration images. Give the data more images, or a larger share for calibration.")
    run, names, rounded = _all_activations(model)
    ends = np.array(each(lambda i: _ends(run(normalise(images.images[i : i + 1], spec), names), images.ids[i]), len(images)))
    lows = dict(zip(names, ends[:, :, 0].min(0).tolist(), strict=True))
    highs = dict(zip(names, ends[:, :, 1].max(0).tolist(), strict=True))
    counts = {name: np.zeros(BINS + 1, np.int64) for name in lows}
    spread = [name for name in rounded if highs[name] > lows[name]]
    adding = threading.Lock()

    def count(i: int) -> None:
        values = run(normalise(images.images[i : i + 1], spec), spread)
        for name in spread:
            scale = np.float32(BINS / (highs[name] - lows[name]))
            bins = ((values[name].ravel() - np.float32(lows[name])) * scale).astype(np.intp)
            found = np.bincount(bins, minlength=BINS + 1)  # the highest value itself comes behind the last bin
            with adding:
                counts[name] += found

    each(count, len(images))
    for bins in counts.values():
        bins[BINS - 1] += bins[BINS]
    means = dict(zip(names, ends.mean(0).tolist(), strict=True))
    return {name: Histogram(lows[name], highs[name], means[name][0], means[name][1], counts[name][:BINS]) for name in names}


def _ends(values: Mapping[str, np.ndarray], image: str) -> np.ndarray:
    """Lowest and highest of each activation, with zero between them, activations x 2."""
    ends = np.array([(value.min(), value.max()) for value in values.values()], np.float64)
    for name, pair in zip(values, ends, strict=True):
        if not np.isfinite(pair).all():
            raise DataError(
                f"activation {name!r} is not finite on calibration image {image}. Check the model's weights and the input's mean and std."
            )
    return np.stack([np.minimum(ends[:, 0], 0), np.maximum(ends[:, 1], 0)], axis=1)


def write_histograms(path: Path, histograms: Mapping[str, Histogram]) -> None:
    """Keep them as one .npz: names, ends, counts."""
    values = list(histograms.values())
    np.savez_compressed(
        path,
        names=np.array(list(histograms)),
        ends=np.array([(h.low, h.high, h.mean_low, h.mean_high) for h in values]),
        counts=np.array([h.counts for h in values]),
    )


def read_histograms(path: Path) -> dict[str, Histogram]:
    with np.load(path, allow_pickle=False) as data:
        rows = zip(data["names"], data["ends"], data["counts"], strict=True)
        return {str(name): Histogram(float(e[0]), float(e[1]), float(e[2]), float(e[3]), counts) for name, e, counts in rows}


def ranges(histograms: Mapping[str, Histogram], method: str, *, symmetric: bool) -> dict[str, Range]:
    """The range of each tensor by `method`; with `symmetric`, -x to x."""
    choose = METHODS[method]
    return {name: choose(h, symmetric) for name, h in histograms.items()}


def minmax(h: Histogram, symmetric: bool) -> Range:
    return _symmetric((h.low, h.high)) if symmetric else (h.low, h.high)


def mean(h: Histogram, symmetric: bool) -> Range:
    return _symmetric((h.mean_low, h.mean_high)) if symmetric else (h.mean_low, h.mean_high)


def percentile(h: Histogram, symmetric: bool, cut_off: float = PERCENTILE) -> Range:
    total = h.counts.sum()
    if not total:
        return minmax(h, symmetric)
    share = np.cumsum(h.counts) / total
    width = (h.high - h.low) / len(h.counts)
    low = h.low + width * int(np.searchsorted(share, cut_off))
    high = h.low + width * (int(np.searchsorted(share, 1 - cut_off)) + 1)
    cut = (min(low, 0.0), max(high, 0.0))
    return _symmetric(cut) if symmetric else cut


def mse(h: Histogram, symmetric: bool) -> Range:
    if not h.counts.sum():
        return minmax(h, symmetric)
    centres, weights = h.centres, h.counts.astype(np.float64)
    whole = minmax(h, symmetric)
    best, least = whole, np.inf
    for share in np.linspace(1.0, 0.2, 81):
        low, high = whole[0] * share, whole[1] * share
        scale = (high - low) / 255
        error = centres - np.clip(np.round(centres / scale) * scale, low, high)
        loss = float((weights * error * error).sum())
        if loss < least:
            best, least = (low, high), loss
    return best


METHODS: dict[str, Callable[[Histogram, bool], Range]] = {
    "minmax": minmax,
    "mean": mean,
    "percentile": percentile,
    "percentile-99.9": partial(percentile, cut_off=1e-3),
    "percentile-99.999": partial(percentile, cut_off=1e-5),
    "mse": mse,
}


def _symmetric(r: Range) -> Range:
    most = max(-r[0], r[1])
    return -most, most


def _all_activations(model: Path) -> tuple[Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]], list[str], list[str]]:
    """A function from a batch and names to these activations; the names of all float ones, the input first and then in the order of the
    graph; and the names of those that a QDQ graph may round."""
    import onnx
    import onnxruntime as ort

    graph = onnx.shape_inference.infer_shapes(onnx.load(str(model)))
    given = graph.graph.input[0].name
    names = _float_activations(graph)
    kept = {output.name for output in graph.graph.output}
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names if n not in kept)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Fused nodes would hide the tensors between them.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(x: np.ndarray, wanted: Sequence[str]) -> dict[str, np.ndarray]:
        made = [name for name in wanted if name != given]
        values = {given: x, **dict(zip(made, session.run(made, {given: x}), strict=True))}
        return {name: values[name] for name in wanted}

    read = {name for node in graph.graph.node if node.op_type not in ACTIVATIONS for name in node.input} | kept
    every = [given, *names]
    return run, every, [name for name in every if name in read]


def _float_activations(graph: onnx.ModelProto) -> list[str]:
    import onnx

    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.graph.value_info, *graph.graph.output]}
    return [name for node in graph.graph.node for name in node.output if types.get(name) == onnx.TensorProto.FLOAT]

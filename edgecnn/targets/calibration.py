"""Activation ranges of an ONNX graph from calibration images, by several methods, in two passes and bounded memory.

The first pass finds each tensor's minimum and maximum, the second fills a histogram between them; one image's activations
a core are in memory at a time, however many images there are. Ranges always include zero, which padding and ReLU need exactly.

    minmax      everything seen
    mean        the mean over the images of each one's minimum and maximum
    percentile  0.01 % cut off at each end; also 0.1 and 0.001 %, as percentile-99.9 and percentile-99.999
    mse         the range with the least squared error after 8-bit rounding (Choukroun et al. 2019, arXiv:1902.06822)
    entropy     the range whose 8-bit distribution is closest to the float one by Kullback-Leibler divergence (Migacz, "8-bit inference
                with TensorRT", GTC 2017)

Forms may take a scale a channel in front of a depthwise convolution, which sums over none. There the channels differ most: each then has
the range from its own minimum to its maximum, if there are `ENOUGH` images.
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
ENOUGH = 32  # images, to know the ends of channels
FLOOR = 1 / 32  # of a tensor's range, that each channel's holds
# Ends of a tensor, or of each of its channels.
Range = tuple[float, float] | tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values in equal bins from `low` to `high`, all 0 where none were taken; `mean_low` and `mean_high` are the mean
    ends of one image; `channels` the ends of each channel, 2 x C, where they can have a scale each and it pays."""

    low: float
    high: float
    mean_low: float
    mean_high: float
    counts: np.ndarray
    channels: np.ndarray | None = None

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
    run, names, rounded, deep = _all_activations(model)
    found = each(lambda i: _ends(run(normalise(images.images[i : i + 1], spec), names), images.ids[i], deep), len(images))
    ends = np.array([of_tensors for of_tensors, _ in found])
    channels = {name: np.array([of_channels[name] for _, of_channels in found]) for name in deep}
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
    # Behind a ReLU the later ones win little by it, and OpenVINO has a quicker kernel for a single zero point of 0.
    split = {
        # A channel that is dead, or was in these images, keeps a share of the tensor's range.
        name: np.stack([np.minimum(x[:, 0].min(0), lows[name] * FLOOR), np.maximum(x[:, 1].max(0), highs[name] * FLOOR)])
        for name, x in channels.items()
        if len(images) >= ENOUGH and (name == deep[0] or lows[name] < 0)
    }
    return {
        name: Histogram(lows[name], highs[name], means[name][0], means[name][1], counts[name][:BINS], split.get(name)) for name in names
    }


def _ends(values: Mapping[str, np.ndarray], image: str, deep: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Lowest and highest of each activation, with zero between them, activations x 2; and of each channel of those in `deep`, 2 x C."""
    ends = np.array([(value.min(), value.max()) for value in values.values()], np.float64)
    for name, pair in zip(values, ends, strict=True):
        if not np.isfinite(pair).all():
            raise DataError(
                f"activation {name!r} is not finite on calibration image {image}. Check the model's weights and the input's mean and std."
            )
    channels = {
        name: np.stack([values[name].min((0, 2, 3), initial=0.0), values[name].max((0, 2, 3), initial=0.0)]).astype(np.float64)
        for name in deep
    }
    return np.stack([np.minimum(ends[:, 0], 0), np.maximum(ends[:, 1], 0)], axis=1), channels


def write_histograms(path: Path, histograms: Mapping[str, Histogram]) -> None:
    """Keep them as one .npz: names, ends, counts, and the channels' ends, one tensor's behind the other's."""
    values = list(histograms.values())
    channels = [np.empty((2, 0)) if h.channels is None else h.channels for h in values]
    np.savez_compressed(
        path,
        names=np.array(list(histograms)),
        ends=np.array([(h.low, h.high, h.mean_low, h.mean_high) for h in values]),
        counts=np.array([h.counts for h in values]),
        channels=np.concatenate(channels, axis=1),
        widths=np.array([each.shape[1] for each in channels]),
    )


def read_histograms(path: Path) -> dict[str, Histogram]:
    with np.load(path, allow_pickle=False) as data:
        channels = np.split(data["channels"], np.cumsum(data["widths"])[:-1], axis=1)
        rows = zip(data["names"].tolist(), data["ends"].tolist(), data["counts"], channels, strict=True)
        return {name: Histogram(a, b, c, d, counts, split if split.size else None) for name, (a, b, c, d), counts, split in rows}


def ranges(histograms: Mapping[str, Histogram], method: str, *, symmetric: bool, channels: bool = False) -> dict[str, Range]:
    """The range of each tensor by `method`; with `symmetric`, -x to x; with `channels`, of each channel where the histogram has them."""
    choose = METHODS[method]
    split = {name: (h.channels[0], h.channels[1]) for name, h in histograms.items() if channels and h.channels is not None}
    return {name: split.get(name) or choose(h, symmetric) for name, h in histograms.items()}


def minmax(h: Histogram, symmetric: bool) -> tuple[float, float]:
    return _symmetric((h.low, h.high)) if symmetric else (h.low, h.high)


def mean(h: Histogram, symmetric: bool) -> tuple[float, float]:
    return _symmetric((h.mean_low, h.mean_high)) if symmetric else (h.mean_low, h.mean_high)


def percentile(h: Histogram, symmetric: bool, cut_off: float = PERCENTILE) -> tuple[float, float]:
    total = h.counts.sum()
    if not total:
        return minmax(h, symmetric)
    share = np.cumsum(h.counts) / total
    width = (h.high - h.low) / len(h.counts)
    low = h.low + width * int(np.searchsorted(share, cut_off))
    high = h.low + width * (int(np.searchsorted(share, 1 - cut_off)) + 1)
    cut = (min(low, 0.0), max(high, 0.0))
    return _symmetric(cut) if symmetric else cut


def mse(h: Histogram, symmetric: bool) -> tuple[float, float]:
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


def entropy(h: Histogram, symmetric: bool) -> tuple[float, float]:
    whole = minmax(h, symmetric)
    if not h.counts.sum():
        return whole
    # Zero is exact in every range. With the many that a ReLU makes, all that mattered would be how many bins share a step with theirs.
    counts, zero = h.counts.astype(np.float64), int(np.abs(h.centres).argmin())
    counts[zero] = counts[max(0, zero - 1) : zero + 2].min()
    centres, share = h.centres, counts / max(counts.sum(), 1)
    best, least = whole, np.inf
    for part in np.linspace(1.0, 0.2, 81):
        low, high = whole[0] * part, whole[1] * part
        inside = (centres >= low) & (centres <= high)
        if not share[inside].any():
            break
        # What is cut off goes to the ends; the distribution that 256 steps can tell apart has it not.
        p = share[inside].copy()
        p[0] += share[centres < low].sum()
        p[-1] += share[centres > high].sum()
        step = np.round((centres[inside] - low) / (high - low) * 255).astype(int)
        filled = share[inside] > 0
        mass, bins = np.bincount(step, share[inside], 256), np.bincount(step, filled, 256)
        q = np.where(filled, mass[step] / np.maximum(bins[step], 1), 0) / share[inside].sum()
        told = p > 0
        loss = float((p[told] * np.log(p[told] / np.maximum(q[told], 1e-12))).sum())
        if loss < least:
            best, least = (low, high), loss
    return best


METHODS: dict[str, Callable[[Histogram, bool], tuple[float, float]]] = {
    "minmax": minmax,
    "mean": mean,
    "percentile": percentile,
    "percentile-99.9": partial(percentile, cut_off=1e-3),
    "percentile-99.999": partial(percentile, cut_off=1e-5),
    "mse": mse,
    "entropy": entropy,
}


def _symmetric(r: tuple[float, float]) -> tuple[float, float]:
    most = max(-r[0], r[1])
    return -most, most


def _all_activations(model: Path) -> tuple[Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]], list[str], list[str], list[str]]:
    """A function from a batch and names to these activations; the names of all float ones, the input first and then in the order of the
    graph; of those that a QDQ graph may round; and of those that only depthwise convolutions read."""
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
    return run, every, [name for name in every if name in read], [name for name in every if name in _depthwise(graph) - kept]


def _depthwise(graph: onnx.ModelProto) -> set[str]:
    """What is read by depthwise convolutions and nothing else."""
    shapes = {i.name: list(i.dims) for i in graph.graph.initializer}
    deep: set[str] = set()
    others: set[str] = set()
    for node in graph.graph.node:
        many, each, *kernel = shapes.get(node.input[1], [0, 0]) if node.op_type == "Conv" else [0, 0]
        depthwise = each == 1 and many > 1 and len(kernel) == 2
        (deep if depthwise else others).update(node.input[:1] if depthwise else node.input)
    return deep - others


def _float_activations(graph: onnx.ModelProto) -> list[str]:
    import onnx

    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.graph.value_info, *graph.graph.output]}
    return [name for node in graph.graph.node for name in node.output if types.get(name) == onnx.TensorProto.FLOAT]

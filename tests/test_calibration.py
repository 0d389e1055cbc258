"""Calibration ranges keep their laws, on constructed histograms and on a real graph, in memory that does not grow with the images."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny import SPEC, pack, source

from edgecnn.device.packed import Packed, open_packed
from edgecnn.errors import DataError
from edgecnn.targets.calibration import ACTIVATIONS, METHODS, PERCENTILE, Histogram, collect, ranges, read_histograms, write_histograms
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.onnxruntime import Onnxruntime


def histogram(values: np.ndarray) -> Histogram:
    """As `collect` makes it, of a hundred images' worth of values."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    parts = np.array_split(values, 100)
    lows, highs = ([min(0.0, p.min()) for p in parts], [max(0.0, p.max()) for p in parts])
    return Histogram(
        low,
        high,
        float(np.mean(lows)),
        float(np.mean(highs)),
        np.histogram(values, 2048, (low, high))[0] if high > low else np.zeros(2048, np.int64),
    )


def loss(h: Histogram, low: float, high: float) -> float:
    """Squared error over the histogram of rounding to 256 levels between `low` and `high`."""
    scale = (high - low) / 255
    error = h.centres - np.clip(np.round(h.centres / scale) * scale, low, high)
    return float((h.counts * error * error).sum())


RANDOM = np.random.default_rng(0)
SHAPES = {
    "normal": RANDOM.normal(size=100_000),
    "relu": np.maximum(RANDOM.normal(size=100_000), 0),
    "heavy tails": RANDOM.standard_t(2, size=100_000),
    "all negative": -RANDOM.exponential(size=100_000) - 1,
    "one outlier": np.append(RANDOM.uniform(-1, 1, 100_000), 1e4),
    "uniform": RANDOM.uniform(-3, 1, 100_000),
    "one value": np.full(1000, 2.5),
    "zeros": np.zeros(1000),
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranges_keep_their_laws(shape: str, symmetric: bool) -> None:
    """minmax covers everything; the others lie within it; all hold zero; symmetric is symmetric; mse's error is at most minmax's."""
    values = SHAPES[shape]
    h = histogram(values)
    found = {name: choose(h, symmetric) for name, choose in METHODS.items()}
    assert set(found) >= {"minmax", "percentile", "mse", "entropy"}
    outer = found["minmax"]
    assert outer[0] <= values.min()
    assert outer[1] >= values.max()
    slack = 1e-9 + (h.high - h.low) / len(h.counts)  # of one bin
    for low, high in found.values():
        assert outer[0] - slack <= low <= 0 <= high <= outer[1] + slack
        assert np.isfinite([low, high]).all()
        assert not symmetric or low == -high
    cut = ((values < found["percentile"][0] - slack) | (values > found["percentile"][1] + slack)).mean()
    assert cut <= 2 * PERCENTILE + 1 / len(values)
    if h.high > h.low:
        assert loss(h, *found["mse"]) <= loss(h, *outer)


def test_an_outlier_does_not_set_the_percentile_range() -> None:
    """One value of 10,000 among 100,000 below 1 leaves minmax at 10,000; percentile comes back to within two bins of 1."""
    h = histogram(SHAPES["one outlier"])
    assert METHODS["minmax"](h, False)[1] == 1e4
    assert METHODS["percentile"](h, False)[1] < 1 + 2 * 1e4 / 2048


def test_mse_and_entropy_cut_outliers_and_keep_uniform() -> None:
    """Of a million values below 1 and one of 10, the range of least error gives up the one; of a uniform spread it keeps nearly all."""
    lone, uniform = histogram(np.append(RANDOM.uniform(-1, 1, 1_000_000), 10)), histogram(SHAPES["uniform"])
    for method in ("mse", "entropy"):
        assert METHODS[method](lone, True)[1] < 3, method
        assert METHODS[method](uniform, False)[0] == pytest.approx(uniform.low, rel=0.05), method


def test_what_is_collected_is_what_the_network_computes(tiny_folder: Path) -> None:
    """Of the input, and of the logits that onnxruntime gives, extremes and counts are those of all calibration images."""
    import onnxruntime as ort

    from edgecnn.device.preprocess import normalise

    images = open_packed(tiny_folder / "calibration")
    found = collect(tiny_folder / "model.onnx", images, SPEC)
    assert len(found) >= 8
    x = normalise(images.images, SPEC)
    session = ort.InferenceSession(str(tiny_folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for name, values in (("input", x), ("logits", session.run(None, {"input": x})[0])):
        h = found[name]
        assert (h.low, h.high) == pytest.approx((min(0, values.min()), max(0, values.max())), rel=1e-4)
        assert h.counts.sum() == values.size
        expected = np.histogram(values, len(h.counts), (h.low, h.high))[0]
        assert np.abs(np.cumsum(h.counts) - np.cumsum(expected)).max() <= 0.01 * values.size
    total = [h.counts.sum() for h in found.values() if h.high > h.low]
    assert all(n % len(images) == 0 for n in total), "every image counts once in each tensor"


def test_the_number_of_cores_changes_nothing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One core and four collect the same histograms, to the bit, and correct biases to the same bytes."""
    made = {}
    for n in (1, 4):
        monkeypatch.setattr("edgecnn.cores.usable_cores", lambda n=n: n)
        start, path = source(tiny_folder), tmp_path / f"{n}.onnx"
        fit_qdq(start, path, Onnxruntime(name="pi", runtime="onnxruntime").form(), methods=["minmax", "mse"], correct=True)
        ends = {name: (h.low, h.high, h.mean_low, h.mean_high, h.counts.tolist()) for name, h in start.histograms().items()}
        made[n] = ends, path.read_bytes()
    assert made[1] == made[4]


def test_what_a_relu_alone_reads_is_not_counted(tiny_folder: Path) -> None:
    """In the tiny network the outputs of convolutions before a ReLU have ends and no counts, every other tensor that varies has all."""
    graph = onnx.load(str(tiny_folder / "model.onnx")).graph
    relus = {node.input[0] for node in graph.node if node.op_type in ACTIVATIONS}
    assert relus
    for name, h in source(tiny_folder).histograms().items():
        assert (h.counts.sum() > 0) == (name not in relus and h.high > h.low), name
        assert name not in relus or h.high > 0


def test_ranges_are_chosen_for_every_tensor(tiny_folder: Path) -> None:
    """Each method gives each tensor of the real graph a range; the two narrower ones lie within minmax."""
    histograms = source(tiny_folder).histograms()
    every = {method: ranges(histograms, method, symmetric=False) for method in METHODS}
    for method, chosen in every.items():
        assert set(chosen) == set(histograms), method
        for name, (low, high) in chosen.items():
            assert every["minmax"][name][0] - 1e-6 <= low <= 0 <= high <= every["minmax"][name][1] + 1e-6


def test_histograms_come_back_from_their_file(tiny_folder: Path, tmp_path: Path) -> None:
    """Written and read, every name, end and count is the same."""
    histograms = source(tiny_folder).histograms()
    write_histograms(tmp_path / "h.npz", histograms)
    again = read_histograms(tmp_path / "h.npz")
    assert list(again) == list(histograms)
    for name, h in histograms.items():
        assert replace(again[name], counts=h.counts) == h
        np.testing.assert_array_equal(again[name].counts, h.counts)


@pytest.mark.parametrize("kernel", [[1, 1, 3], [4, 1, 3]], ids=["ECA's", "depthwise in one dimension"])
def test_a_convolution_of_one_dimension_has_no_channels_to_take_apart(tmp_path: Path, kernel: list[int]) -> None:
    """Efficient channel attention convolves over channels, and other networks over time: calibration leaves both as they are."""
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("Reshape", ["input", "shape"], ["row"], "reshape"),
                onnx.helper.make_node("Conv", ["row", "w"], ["made"], "conv", pads=[1, 1], group=kernel[0]),
                onnx.helper.make_node("Flatten", ["made"], ["logits"], "flatten"),
            ],
            "one",
            [onnx.helper.make_tensor_value_info("input", 1, [1, 3, 16, 16])],
            [onnx.helper.make_tensor_value_info("logits", 1, [1, 768])],
            [
                onnx.numpy_helper.from_array(np.array([1, kernel[0], 768 // kernel[0]]), "shape"),
                onnx.numpy_helper.from_array(np.ones(kernel, np.float32), "w"),
            ],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    found = collect(tmp_path / "model.onnx", pack(tmp_path / "images", 32, seed=1), SPEC)
    assert "row" in found
    assert all(h.channels is None for h in found.values())


def test_memory_does_not_grow_with_the_images(tiny_folder: Path, tmp_path: Path) -> None:
    """200 images take more memory than 10 by less than a twentieth of what 190 images' activations are."""
    peaks = []
    for count in (10, 200):
        images = pack(tmp_path / str(count), count, seed=1)
        found = collect(tiny_folder / "model.onnx", images, SPEC)  # what is made once is made now
        tracemalloc.start()
        collect(tiny_folder / "model.onnx", images, SPEC)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    activations = 4 * 190 * sum(int(h.counts.sum()) for h in found.values()) // 200
    assert peaks[1] - peaks[0] < activations / 20, (peaks, activations)


def test_what_is_not_finite_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    """A weight that is not a number, or infinite, is refused with the name of the first activation that it spoils."""
    for bad in (np.nan, np.inf):
        graph = onnx.load(str(tiny_folder / "model.onnx"))
        node = next(n for n in graph.graph.node if n.op_type == "Conv")
        weight = next(i for i in graph.graph.initializer if i.name == node.input[1])
        values = numpy_helper.to_array(weight).copy()
        values.flat[0] = bad
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(graph, str(tmp_path / "bad.onnx"))
        with pytest.raises(DataError, match="is not finite") as refused:
            collect(tmp_path / "bad.onnx", open_packed(tiny_folder / "calibration"), SPEC)
        assert repr(node.output[0]) in str(refused.value)
        assert "calibration image 0." in str(refused.value)


def test_no_images_are_refused(tiny_folder: Path) -> None:
    """An empty set is named as such, before anything is run."""
    images = open_packed(tiny_folder / "calibration")
    empty = Packed(images.folder, images.images[:0], images.labels[:0], (), images.geometry, images.sha256)
    with pytest.raises(DataError, match="no calibration images"):
        collect(tiny_folder / "model.onnx", empty, SPEC)

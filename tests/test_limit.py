"""Distance from the limit: what layers have to do, what a machine can do at most, and a ratio that cannot be below 1."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny

from edgecnn import bench, measure
from edgecnn.device import peaks
from edgecnn.device.bundle import verify_bundle
from edgecnn.device.limit import Distance, Work, bounds, checked, text, work_of
from edgecnn.device.peaks import Peaks, Rate, convolution, measure_peaks, multiply_adds, times
from edgecnn.errors import DeviceBug, DeviceError, guarded
from edgecnn.targets.onnxruntime import Onnxruntime
from edgecnn.targets.openvino import Openvino

# Of the tiny network at 16 x 16, by hand: a 5x5 stem to 8 x 8 x 24, a depthwise 3x3, a 1x1, and a linear layer of 24 to 4.
MACS = {"stem.0": 64 * 24 * 3 * 25, "block.0": 64 * 24 * 9, "block.3": 64 * 24 * 24, "head": 24 * 4}
PEAKS = Peaks(
    1,
    {"float32": Rate(1e9, "by hand"), "int8": Rate(4e9, "by hand")},
    ((1_000, 8e9), (10_000, 9e9), (100_000, 4e9), (1_000_000, 1e9)),
    "not available",
)


@pytest.mark.parametrize("target", [Onnxruntime, Openvino])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
def test_work_is_counted_by_hand(
    target: type[Onnxruntime] | type[Openvino], precision: str, batch: int, tiny_folder: Path, tmp_path: Path
) -> None:
    """Multiply-adds, types and bytes of every layer with weights are those of the network, in both runtimes, for any batch."""
    made = target.model_validate({"name": "t", "runtime": target.__name__.lower(), "precision": precision})
    candidate = next(c for c in made.candidates() if c.precision == precision)
    folder = made.build(candidate, tiny.source(tiny_folder), tmp_path / "t").folder
    found = work_of(folder, verify_bundle(folder), np.zeros((batch, 16, 16, 3), np.uint8))
    assert [each.macs for each in found] == [batch * macs for macs in MACS.values()]
    kept = 1 if target is Onnxruntime else 0  # the first layers stay in float: see `stem`
    types = ["int8" if precision == "int8" and i >= kept else "float32" for i in range(len(MACS))]
    assert [each.dtype for each in found] == types
    sizes = [1 if dtype == "int8" else 4 for dtype in types]
    assert [each.weight_bytes for each in found] == [size * n for size, n in zip(sizes, (24 * 75, 24 * 9, 24 * 24, 24 * 4), strict=True)]
    assert found[2].other_bytes == batch * sizes[2] * 2 * 64 * 24
    if target is Onnxruntime:
        assert [each.name for each in found] == list(MACS)


def test_bound_is_the_largest_of_three_times() -> None:
    """A layer is ruled by its arithmetic at its type's peak, by its weights from as far as all weights lie, or by all its bytes."""
    work = [
        Work("heavy", 8_000_000, "float32", 40_000, 1_000),
        Work("heavy int8", 8_000_000, "int8", 10_000, 1_000),
        Work("wide", 1_000, "float32", 150_000, 1_000),
        Work("thin", 1_000, "float32", 100, 900_000),
    ]
    found = bounds(work, PEAKS)
    assert [each.ruled_by for each in found] == ["arithmetic", "arithmetic", "weights", "bytes"]
    assert found[0].seconds == pytest.approx(0.008)
    assert found[1].seconds == pytest.approx(0.002)
    assert found[2].seconds == pytest.approx(150_000 / 4e9)  # 200,100 bytes of weights: what 100,000 and more get
    assert found[3].seconds == pytest.approx(900_100 / 9e9)
    slow = replace(PEAKS, rates={**PEAKS.rates, "bf16": Rate(5e8, "by hand")})
    (rounded,) = bounds([replace(work[0], dtype="bf16")], slow)  # could as well be computed in float32
    assert rounded.seconds == pytest.approx(0.008)


def test_bandwidth_of_what_does_not_fit() -> None:
    """Arrays get the highest bandwidth of their size and beyond, so that a dip between two caches cannot raise a bound."""
    dipped = Peaks(1, {}, ((1_000, 9e9), (10_000, 2e9), (100_000, 4e9), (1_000_000, 1e9)), "not available")
    assert [dipped.beyond(size) for size in (0, 5_000, 10_000, 200_000, 10**9)] == [9e9, 9e9, 4e9, 4e9, 1e9]
    assert (dipped.cache, dipped.memory) == (9e9, 1e9)


def test_faster_than_possible_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio below 1 ends with exit code 1 and says that the measurement is wrong; a disturbed one is void and no bug."""
    assert checked(1.0, "") == 1.0
    assert checked(0.5, "other processes") == 0.5
    assert guarded(lambda: int(checked(0.99, ""))) == 1
    assert "a bug in edgecnn" in capsys.readouterr().err


def test_bug_of_the_boards_half_reaches_the_host(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A board's half that measures the impossible makes the host's command fail as a bug, whether it says so itself or answers it."""
    monkeypatch.setattr(measure, "_here", lambda *_: (1, "", "edgecnn: 0.5 of the least time\n"))
    options = {"threads": [1], "batch": 1, "seconds": 0.01, "options": []}
    with pytest.raises(DeviceBug, match="of the least time"):
        bench.distances([bundle], **options)  # type: ignore[arg-type]
    far = Distance("m", "ab", "onnxruntime", 1, 1, 0.5, 1.0, 0.5, (), asdict(PEAKS), {})
    monkeypatch.setattr(measure, "_here", lambda *_: (0, json.dumps(asdict(far)), ""))
    with pytest.raises(DeviceBug, match=r"0\.500 of the least time"):
        bench.distances([bundle], **options)  # type: ignore[arg-type]
    monkeypatch.setattr(measure, "_here", lambda *_: (0, "{}", ""))
    with pytest.raises(DeviceError, match="no distance"):
        bench.distances([bundle], **options)  # type: ignore[arg-type]


def test_instructions_times_clock() -> None:
    """A rate above multiply-adds per cycle times clock is a bug; far below is doubted; without a clock nothing is said."""
    rates = {"float32": Rate(80e9, ""), "int8": Rate(20e9, "")}
    assert Peaks(1, rates, (), "not available").doubts() == []
    assert Peaks(1, rates, (), {"float32": 96e9, "int8": 96e9}).doubts() == []
    (doubt,) = Peaks(1, rates, (), {"float32": 96e9, "int8": 384e9}).doubts()
    assert doubt.startswith("the int8 peak is 5%")
    with pytest.raises(DeviceBug, match="are possible"):
        Peaks(1, rates, (), {"float32": 48e9, "int8": 384e9}).doubts()


def test_clock_and_instructions_are_read(tmp_path: Path) -> None:
    """The highest clocks of as many cores as there are threads count, with the widest instructions; without either: not available."""
    assert peaks._theory(1, ["float32"], tmp_path) == "not available"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags : fma avx2 avx_vnni\n\nflags : fma avx2 avx_vnni\n")
    for core, khz in enumerate((2_000_000, 4_000_000)):
        (tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq").mkdir(parents=True)
        (tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq").write_text(f"{khz}\n")
    assert peaks._theory(1, ["float32", "int8", "bf16"], tmp_path) == {"float32": 16 * 4e9, "int8": 64 * 4e9}
    assert peaks._theory(2, ["float32"], tmp_path) == {"float32": 16 * 6e9}


def test_times_with_a_clock_of_its_own() -> None:
    """Every call counts but two that warm up, for the time asked and five calls at least."""
    now, durations = 0.0, iter([0.001, 0.001, 0.05, 0.03, 0.04, 0.02, 0.06, *[0.5] * 9])

    def call() -> None:
        nonlocal now
        now += next(durations)

    assert times(call, 0.01, lambda: now) == pytest.approx([0.05, 0.03, 0.04, 0.02, 0.06])


def test_peaks_are_medians_around_the_model() -> None:
    """With a clock by which every call takes a second, but the luckiest ones before the model a tenth: peaks do not follow those."""
    now, calls = 0.0, 0

    def clock() -> float:
        nonlocal now, calls
        calls += 1
        now += 0.1 if calls % 11 == 0 else 1.0
        return now

    def model() -> int:
        return calls

    found = measure_peaks(1, model, 3, clock)
    at = [given for _, given in found]
    assert 0 < at[0] < at[1] < at[2] < calls  # something was timed before, between and after
    for told, _ in found:
        for rate in told.rates.values():
            assert rate.per_s in [multiply_adds(shape) for shape in peaks.SHAPES]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_convolution_is_sound_onnx(dtype: str) -> None:
    """The file that is written byte by byte passes onnx's own check, runs, and counts its multiply-adds rightly."""
    model, x = convolution(dtype, 8, 6, 3)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    (y,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert multiply_adds((8, 6, 3)) == y.size * 8 * 3 * 3
    assert y.shape == x.shape
    assert y.std() > 0.1
    if dtype == "int8":  # neither all the same nor all at the ends
        assert len(np.unique(y)) > 50


def test_distance_of_a_real_file(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way in a fresh process: peaks of this machine, bound and ratio of a file, through JSON, and as text."""
    (found,) = bench.distances([bundle], threads=[1], batch=1, seconds=0.05, options=[])
    told = Peaks.from_json(found.peaks)
    assert told.rates["int8"].per_s > 0
    assert told.cache >= told.memory > 0
    assert found.ratio == pytest.approx(found.steady_s / found.bound_s)
    assert found.ratio > 1 or found.void
    assert len(found.bounds) == len(MACS)
    assert Distance.from_json(json.loads(json.dumps(asdict(found)))) == found
    shown = text(found)
    assert "times the least that is possible here" in shown
    assert "multiply-adds a second and core: float32" in shown


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Onnxruntime(name="pi", runtime="onnxruntime", precision="fp32")
    return target.build(target.candidates()[0], tiny.source(tiny_folder), tmp_path_factory.mktemp("limit") / "pi").folder

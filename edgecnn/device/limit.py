"""How far a model is from what the machine could do: its latency over the time that its arithmetic and its bytes take at least.

The bound of a layer is the largest of three times: its multiply-adds at the machine's peak for their type, its weights at the bandwidth of
arrays as large as all weights together (by the next inference the others have pushed them out of smaller caches), and all its bytes at the
highest bandwidth of all. What can be fused into a layer is taken to cost nothing, as is what has no weights. So no runtime is below the
bound, and a measured ratio below 1 is a bug of the measurement. Williams et al. 2009 (roofline model, doi 10.1145/1498765.1498785).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.device import machine
from edgecnn.device.graph import Node, read_onnx
from edgecnn.device.peaks import Peaks, measure_peaks
from edgecnn.device.profile import layer_of
from edgecnn.device.quiet import silence_openvino
from edgecnn.device.spec import SCHEMA, Manifest, Result
from edgecnn.device.stats import percentile
from edgecnn.errors import DeviceBug, DeviceError, UsageError

# Of model and machine, so that what slows the host down for a second or two falls on both, or on turns that do not count.
TURNS = 5
_WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
_BYTES = {"float32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Work:
    """What one layer has to do for one batch.

    Attributes:
        name: by its weights, as in a profile.
        macs: multiply-adds.
        dtype: of the numbers that are multiplied: float32, bf16 or int8.
        weight_bytes: of its weights, in that type.
        other_bytes: of its input and its output, in that type.
    """

    name: str
    macs: int
    dtype: str
    weight_bytes: int
    other_bytes: int


@dataclass(frozen=True)
class Bound:
    """The least time of a layer, and whether arithmetic, weights or bytes rule it."""

    name: str
    seconds: float
    ruled_by: str


@dataclass(frozen=True)
class Distance:
    """A file's latency beside its bound.

    Attributes:
        steady_s: median of the turn that counts, quiet or not: see `void`.
        ratio: steady_s / bound_s; 1 cannot be surpassed.
        void: why the figures must not be used, or "".
    """

    file: str
    file_sha256: str
    runtime: str
    threads: int
    batch: int
    steady_s: float
    bound_s: float
    ratio: float
    bounds: tuple[Bound, ...]
    peaks: dict[str, Any]
    circumstances: dict[str, Any]
    doubts: tuple[str, ...] = ()
    void: str = ""
    schema: int = SCHEMA

    @staticmethod
    def from_json(data: dict[str, Any]) -> Distance:
        lists = {name: tuple(data[name]) for name in ("doubts",)}
        return Distance(**{**data, **lists, "bounds": tuple(Bound(**each) for each in data["bounds"])})


def distance(
    folder: Path, manifest: Manifest, example: np.ndarray, measured: Callable[[float], Result], seconds: float, threads: int
) -> Distance:
    """Measure model and machine in turns, in this process, which should be a fresh one; the turn with the median ratio is given.

    Args:
        folder: of the bundle or bare file, verified.
        manifest: its manifest.
        example: a batch as the file takes it.
        measured: measures the model's latency for that many seconds.
        seconds: of the model's steady state in all turns together.
        threads: of the runtime, in `measured` too.

    Raises:
        DeviceBug: the model was faster than is possible.
    """
    work = work_of(folder, manifest, example)
    before = machine.state()
    turns = measure_peaks(threads, lambda: measured(seconds / TURNS), TURNS)
    doubts, void = machine.disturbances(before, machine.state(), threads)

    def ratio(turn: tuple[Peaks, Result]) -> float:
        return percentile(turn[1].samples_s, 0.5) / math.fsum(each.seconds for each in bounds(work, turn[0]))

    peaks, result = sorted(turns, key=ratio)[TURNS // 2]
    found = bounds(work, peaks)
    reasons = "; ".join(dict.fromkeys(filter(None, (*void, result.void))))
    return Distance(
        result.file,
        result.file_sha256,
        result.runtime,
        threads,
        result.batch,
        percentile(result.samples_s, 0.5),
        math.fsum(each.seconds for each in found),
        checked(ratio((peaks, result)), reasons),
        tuple(found),
        asdict(peaks),
        result.circumstances,
        tuple(dict.fromkeys((*peaks.doubts(), *doubts, *result.doubts))),
        reasons,
    )


def bounds(work: list[Work], peaks: Peaks) -> list[Bound]:
    """The bound of each layer."""
    weights = sum(each.weight_bytes for each in work)
    streamed = peaks.beyond(weights // peaks.threads)
    found = []
    for each in work:
        # Whose numbers are bf16 or int8 can be computed in float32 too, the faster where a CPU has no instructions for them.
        rate = max(peaks.rates[dtype].per_s for dtype in {"float32", each.dtype} & peaks.rates.keys())
        times = {
            "arithmetic": each.macs / rate,
            "weights": each.weight_bytes / streamed,
            "bytes": (each.weight_bytes + each.other_bytes) / peaks.cache,
        }
        ruled_by = max(times, key=lambda name: times[name])
        found.append(Bound(each.name, times[ruled_by], ruled_by))
    return found


def checked(ratio: float, void: str) -> float:
    """`ratio`, which no measurement of an undisturbed machine can have below 1.

    Raises:
        DeviceBug: it is below 1: latency, peaks or the count of the layers' work are wrong.
    """
    if ratio < 1 and not void:
        raise DeviceBug(
            f"{ratio:.3f} of the least time that is possible was measured: a bug in edgecnn's peaks, counts or clock; report it"
        )
    return ratio


def work_of(folder: Path, manifest: Manifest, example: np.ndarray) -> list[Work]:
    """The layers of a model that have weights, with the shapes that its runtime gives them for `example`.

    Raises:
        UsageError: this runtime's files cannot be counted.
        DeviceError: the file has no such layer.
    """
    if manifest.runtime not in ("onnxruntime", "openvino"):
        raise UsageError(f"{manifest.runtime}: only onnxruntime and OpenVINO files have a known distance. Leave out --distance.")
    path = folder / manifest.model_file
    dtype = "bf16" if manifest.options.get("INFERENCE_PRECISION_HINT") == "bf16" else "float32"
    found = list(_onnx_work(path, example) if manifest.runtime == "onnxruntime" else _openvino_work(path, len(example), dtype))
    if not found:
        raise DeviceError(f"{path}: no layer with weights in it, so there is nothing to compare its latency with.")
    return found


def _onnx_work(path: Path, example: np.ndarray) -> Iterator[Work]:
    graph = read_onnx(path)
    nodes = {node.name: node for node in graph.nodes}
    made_by = {output: node for node in graph.nodes for output in node.outputs}
    for event in _onnx_shapes(path, example):
        node = nodes.get(event["name"].removesuffix("_kernel_time"))
        at = _WEIGHT_INPUT.get(event["args"]["op_name"])
        if node is None or at is None:
            continue
        (out,), (given, *others) = _shapes(event["args"]["output_type_shape"]), _shapes(event["args"]["input_type_shape"])
        name, quantized = _weight(node, at, made_by)
        weight = graph.weights.get(name) or others[0]  # a weight that was packed for its kernel is missing in the event
        if node.operator in ("Conv", "QLinearConv"):
            macs = math.prod(out) * math.prod(weight[1:])
        elif node.operator == "ConvTranspose":
            macs = math.prod(given) * math.prod(weight[1:])
        else:
            macs = math.prod(out) * given[-1]
        yield _work(layer_of(name), macs, "int8" if quantized else "float32", weight, given, out)


def _onnx_shapes(path: Path, example: np.ndarray) -> list[dict[str, Any]]:
    """A profile of one call of the graph as it is in the file, which tells every node's shapes."""
    try:
        import onnxruntime as ort
    except ImportError:
        text = (
            "onnxruntime is not installed, and the shapes of an ONNX file's layers are taken from it. Install it: pip install onnxruntime"
        )
        raise DeviceError(text) from None

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_free_dimension_override_by_name("batch", len(example))
    options.log_severity_level, options.intra_op_num_threads, options.enable_profiling = 3, 1, True
    with tempfile.TemporaryDirectory() as work:
        options.profile_file_prefix = str(Path(work) / "shapes")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, {session.get_inputs()[0].name: example})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event for event in events if event.get("cat") == "Node" and "output_type_shape" in event.get("args", {})]


def _shapes(told: list[dict[str, list[int]]]) -> list[tuple[int, ...]]:
    return [tuple(shape) for each in told for shape in each.values()]


def _weight(node: Node, at: int, made_by: dict[str, Node]) -> tuple[str, bool]:
    """The name of a node's weights, and whether they are integers in the file."""
    name, quantized = node.inputs[at], node.operator[0] == "Q"
    while name in made_by and made_by[name].inputs:
        quantized |= made_by[name].operator == "DequantizeLinear"
        name = made_by[name].inputs[0]
    return name, quantized


def _openvino_work(path: Path, batch: int, float_type: str) -> Iterator[Work]:
    silence_openvino()
    import openvino as ov

    model = ov.Core().read_model(path)
    shape = model.input(0).partial_shape
    if shape[0].is_dynamic:
        shape[0] = batch
        model.reshape(shape)
    for layer in model.get_ordered_ops():
        kind = layer.get_type_name()
        if kind not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        given, weight, out = (tuple(int(n) for n in each.get_shape()) for each in (layer.input(0), layer.input(1), layer.output(0)))
        constant, quantized = layer.input_value(1).get_node(), False
        while constant.get_type_name() != "Constant" and constant.get_input_size():
            quantized |= constant.get_type_name() == "FakeQuantize"
            constant = constant.input_value(0).get_node()
        quantized |= constant.output(0).get_element_type().get_size() == 1
        fan_in = math.prod(weight[2:] if kind == "GroupConvolution" else weight[1:])
        macs = math.prod(out) * (given[-1] if kind == "MatMul" else fan_in)
        name = constant.get_friendly_name()
        name = layer_of(name) if "weight" in name else layer.get_friendly_name()
        yield _work(name, macs, "int8" if quantized else float_type, weight, given, out)


def _work(name: str, macs: int, dtype: str, weight: tuple[int, ...], given: tuple[int, ...], out: tuple[int, ...]) -> Work:
    size = _BYTES[dtype]
    return Work(name, macs, dtype, size * math.prod(weight), size * (math.prod(given) + math.prod(out)))


def text(found: Distance) -> str:
    """A few lines for a terminal."""
    shares: dict[str, float] = {}
    for each in found.bounds:
        shares[each.ruled_by] = shares.get(each.ruled_by, 0.0) + each.seconds
    ruled = ", ".join(f"{name} {seconds / found.bound_s:.0%}" for name, seconds in sorted(shares.items(), key=lambda pair: -pair[1]))
    lines = [
        f"{found.file}: {1e3 * found.steady_s:.4g} ms is {found.ratio:.2f} times the least that is possible here",
        f"  {1e3 * found.bound_s:.4g} ms, ruled by {ruled}",
        *(f"  {line}" for line in _about_peaks(Peaks.from_json(found.peaks))),
    ]
    lines += [f"  doubt: {doubt}" for doubt in found.doubts]
    return "\n".join([*lines, f"  VOID, do not use these figures: {found.void}"] if found.void else lines)


def _about_peaks(peaks: Peaks) -> list[str]:
    each = ", ".join(f"{dtype} {rate.per_s / peaks.threads / 1e9:.4g}" for dtype, rate in peaks.rates.items())
    theory = peaks.per_cycle_times_clock
    if not isinstance(theory, str):
        theory = ", ".join(f"{dtype} {most / peaks.threads / 1e9:.4g}" for dtype, most in theory.items())
    return [
        f"G multiply-adds a second and core: {each}",
        f"by its instructions and clock at most: {theory}",
        f"GB/s: {peaks.cache / 1e9:.3g} in caches, {peaks.memory / 1e9:.3g} from memory; {peaks.threads} thread{'s' * (peaks.threads > 1)}",
    ]

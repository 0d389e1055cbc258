"""Where the time goes: each layer's share of an inference, by onnxruntime's profile or OpenVINO's counters.

A layer is called by its weights ("features.0.0.weight" is `features.0.0`), as in the torch model, so that two files of one model can be
laid side by side whatever their runtimes renamed and fused. The steady latency beside it is measured without the profiler, in
the same process, before and after; the layers' sum is within 90 to 110 % of it, or the profile says that it is not to be trusted.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.device import machine, onnx_file
from edgecnn.device.graph import Node, OnnxGraph, read_ir, read_onnx
from edgecnn.device.quiet import signal_stack_kept
from edgecnn.device.runtimes import open_runner
from edgecnn.device.runtimes.ort import AS_WRITTEN
from edgecnn.device.spec import SCHEMA, Manifest
from edgecnn.device.stats import percentile
from edgecnn.errors import DeviceError, UsageError

WARM_UP_CALLS = 20
_CHAIN, _CHAINS = 40, ((2, 1), (9, 1), (2, 4))  # nodes; their inputs, of which a QLinearConv has nine, and dimensions of each
_OWN_MOST = 0.5  # of the steady latency: beyond that, what is left when it is subtracted says little of a layer
CALLS_MOST = 500  # a profile is kept in memory and on disk
_FUSED = {"Add", "BatchNormalization", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid"}
# What a runtime adds to a node's name when it fuses, moves or reorders it.
_SUFFIX = re.compile(r"(_token_\d+|_nchwc|/WithoutBiases|_quant|_transpose|/DequantizationMultiply|/fq_output_0|_reorder\w*)$")

# Of each call, what ran: node, operator, seconds.
Runs = list[list[tuple[str, str, float]]]


@dataclass(frozen=True)
class Layer:
    """One node that the runtime ran.

    Attributes:
        name: of the layer by its weights, or of the node where it has none.
        node: as the graph calls it, without what the runtime adds.
        operator: as the runtime calls it, such as QLinearConv or Reorder.
        seconds: mean of the profiled calls, without the tenth of them at either end.
    """

    name: str
    node: str
    operator: str
    seconds: float


@dataclass(frozen=True)
class Profile:
    """The layers of one file, in the order in which they ran.

    Attributes:
        steady_s: median of calls without the profiler.
        calls: that were profiled.
        profiler_s: what the profiler itself was found to add to the layers of a call, and was subtracted.
        circumstances: as of every measurement.
        void: why the figures must not be used, or "".
    """

    file: str
    file_sha256: str
    runtime: str
    threads: int
    batch: int
    steady_s: float
    calls: int
    layers: tuple[Layer, ...]
    void: str = ""
    profiler_s: float = 0.0
    circumstances: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def covered(self) -> float:
        """The layers' sum as a fraction of the steady latency."""
        return math.fsum(layer.seconds for layer in self.layers) / self.steady_s

    @staticmethod
    def from_json(data: dict[str, Any]) -> Profile:
        return Profile(**{**data, "layers": tuple(Layer(**layer) for layer in data["layers"])})


def profile(
    folder: Path, manifest: Manifest, example: np.ndarray, *, threads: int, provider: str | None = None, seconds: float = 2.0
) -> Profile:
    """Profile the model of `folder`.

    Args:
        folder: of the bundle or bare file, verified.
        manifest: its manifest.
        example: a batch as the file takes it.
        threads: of the runtime.
        provider: None; only the CPU can be profiled.
        seconds: to measure for, about.

    Raises:
        UsageError: this runtime or provider gives no profile.
    """
    profiled = {"onnxruntime": _onnxruntime, "openvino": _openvino}.get(manifest.runtime)
    if profiled is None or provider not in (None, "CPUExecutionProvider", "CPU"):
        raise UsageError(
            f"{manifest.runtime} {provider or ''}: only onnxruntime and OpenVINO on the CPU are profiled. Leave out --profile."
        )
    before = machine.state()
    # Three turns, so that what the machine does meanwhile falls on both; one session at a time, for idle ones eat cores.
    steady: list[float] = []
    runs: Runs = []
    own: list[float] = []
    for _ in range(3):
        steady += _steady(folder, manifest, example, threads, seconds / 6)
        calls = max(10, min(CALLS_MOST // 3, round(seconds / 6 / percentile(steady, 0.5))))
        more, own_s = profiled(folder, manifest, example, threads, calls)
        runs += more
        own.append(own_s)
    after = machine.state()
    void = list(machine.disturbances(before, after, threads)[1])
    layers = _layers(runs, layer_names(folder / manifest.model_file))
    found = Profile(
        manifest.model_file,
        manifest.model_sha256,
        manifest.runtime,
        threads,
        len(example),
        percentile(steady, 0.5),
        len(runs),
        layers,
        profiler_s=percentile(own, 0.5),
        circumstances={**machine.facts(), "before": before, "after": after},
    )
    if why := _why_not(found):
        void.append(why)
    return Profile(**{**vars(found), "void": "; ".join(void)})


def _why_not(found: Profile) -> str:
    """Why the layers' times are worth nothing, or ""."""
    own = found.profiler_s / found.steady_s
    if own > _OWN_MOST:
        each_us = 1e6 * found.steady_s / max(1, len(found.layers))
        return f"layers of {each_us:.1f} us each are too small for the profiler, whose own time was {own:.0%} of the steady latency"
    if not 0.9 <= found.covered <= 1.1:
        return f"the layers add up to {found.covered:.0%} of the steady latency, not to 90-110 %: measure on a quiet machine"
    return ""


def _steady(folder: Path, manifest: Manifest, example: np.ndarray, threads: int, seconds: float) -> list[float]:
    with open_runner(folder, manifest, threads=threads, batch=len(example)) as runner:
        for _ in range(WARM_UP_CALLS):
            runner.infer(example)
        return _timed(lambda: runner.infer(example), seconds)


def _timed(call: Callable[[], object], seconds: float) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 10 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def _onnxruntime(folder: Path, manifest: Manifest, example: np.ndarray, threads: int, calls: int) -> tuple[Runs, float]:
    """Node name, operator and seconds of each node, for each call, less what the profiler itself takes; and that, for a call."""
    own_s = _profiler_s()
    runs: Runs = [[]]
    subtracted = 0.0
    for event in _ort_events(str(folder / manifest.model_file), example, threads, calls):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            own = min(own_s(event["args"]), event["dur"] * 1e-6)
            subtracted += own
            runs[-1].append((event["name"].removesuffix("_kernel_time"), event["args"]["op_name"], event["dur"] * 1e-6 - own))
        elif event.get("name") == "model_run":
            runs.append([])
    kept = [run for run in runs if run]
    return kept[WARM_UP_CALLS:], subtracted / max(1, len(kept))


def _ort_events(model: str | bytes, example: np.ndarray, threads: int, calls: int) -> list[dict[str, Any]]:
    """What onnxruntime's profiler wrote of `calls` calls and those to warm up, in the order in which it ended."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name("batch", len(example))
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as work:
        options.profile_file_prefix = str(Path(work) / "profile")
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=AS_WRITTEN)
        name = session.get_inputs()[0].name
        for _ in range(WARM_UP_CALLS + calls):
            session.run(None, {name: example})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return sorted((e for e in events if "ts" in e), key=lambda e: e["ts"] + e.get("dur", 0))


def _profiler_s() -> Callable[[dict[str, Any]], float]:
    """Seconds that the profiler adds to a node, from the arguments that it writes of it.

    onnxruntime writes a node's shapes down before it stops that node's clock: microseconds, which in an int8 MobileNetV2 add up to a tenth,
    and more than the layers themselves where these are tiny. Measured on chains of nodes that do next to nothing, by their profile and by
    calls without one, and taken to grow with a node's inputs and with all the dimensions that are written.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3

    def least(model: bytes, x: np.ndarray) -> float:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(WARM_UP_CALLS):
            session.run(None, {"x": x})
        return percentile(_timed(lambda: session.run(None, {"x": x}), 0.02), 0.5)

    written, added = [], []
    for inputs, dimensions in _CHAINS:
        x = np.ones((1,) * dimensions, np.float32)
        long, short = (_chain(length, inputs, dimensions) for length in (_CHAIN, 1))
        alone = (least(long, x) - least(short, x)) / (_CHAIN - 1)
        events = [e for e in _ort_events(long, x, 1, 50) if e["name"].endswith("_kernel_time")]
        durations = np.sort([e["dur"] * 1e-6 for e in events])
        written.append(_written(events[0]["args"]))
        added.append(float(np.mean(durations[: int(0.9 * len(events))])) - alone)
    found = np.linalg.solve(written, added)
    return lambda arguments: max(0.0, float(np.dot(found, _written(arguments))))


def _written(arguments: dict[str, Any]) -> tuple[float, float, float]:
    """One node, its inputs, and the dimensions of them and of its outputs."""
    inputs, outputs = arguments.get("input_type_shape", ()), arguments.get("output_type_shape", ())
    return 1.0, len(inputs), sum(len(shape) for each in (*inputs, *outputs) for shape in each.values())


def _chain(length: int, inputs: int, dimensions: int) -> bytes:
    """The largest of `inputs` times the same number, `length` times."""
    names = ["x", *(f"y{i}" for i in range(length))]
    nodes = [onnx_file.node("Max", [before] * inputs, after) for before, after in itertools.pairwise(names)]
    ends = [onnx_file.value(name, "float32", (1,) * dimensions) for name in (names[0], names[-1])]
    return onnx_file.model(nodes, [], *ends)


@signal_stack_kept()
def _openvino(folder: Path, manifest: Manifest, example: np.ndarray, threads: int, calls: int) -> tuple[Runs, float]:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(folder / manifest.model_file)
    shape = model.input(0).partial_shape
    if shape[0].is_dynamic:
        shape[0] = len(example)
        model.reshape(shape)
    config = {"PERFORMANCE_HINT": "LATENCY", **manifest.options, "INFERENCE_NUM_THREADS": str(threads), "PERF_COUNT": "YES"}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    runs = []
    for i in range(WARM_UP_CALLS + calls):
        request.infer({0: example}, share_inputs=True)
        if i >= WARM_UP_CALLS:
            # A node that took less than a microsecond is said not to have run: in all calls, those that never did are left out later.
            runs.append([(info.node_name, info.node_type, info.real_time.total_seconds()) for info in request.get_profiling_info()])
    return runs, 0.0  # its counters are read when a call is over


def _layers(runs: Runs, names: dict[str, str]) -> tuple[Layer, ...]:
    if not runs or len({len(run) for run in runs}) != 1:
        raise DeviceError("the runtime's profile does not have the same layers in every call. Try again, with a newer runtime.")
    # The mean, not the median: counters of whole microseconds would lose what is between. A tenth is cut on both sides: late calls.
    times = np.sort(np.array([[seconds for _, _, seconds in run] for run in runs]), axis=0)
    cut = len(times) // 10
    kept = times[cut : len(times) - cut].mean(axis=0)
    nodes = [_plain(node, names) for node, _, _ in runs[0]]
    return tuple(
        Layer(names.get(node, node), node, operator, float(t))
        for node, (_, operator, _), t in zip(nodes, runs[0], kept, strict=True)
        if t > 0
    )


def _plain(node: str, names: dict[str, str]) -> str:
    """The graph's name for a runtime's node."""
    while node not in names and (cut := _SUFFIX.sub("", node)) != node:
        node = cut
    return node


def layer_names(path: Path) -> dict[str, str]:
    """Layer name by node name, of the nodes that have weights."""
    return _ir_names(path) if path.suffix == ".xml" else _onnx_names(read_onnx(path))


def _onnx_names(graph: OnnxGraph) -> dict[str, str]:
    made_by = {output: node for node in graph.nodes for output in node.outputs}
    read_by: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            read_by.setdefault(name, []).append(node)
    names = {}
    for node in graph.nodes:
        if node.operator in ("Conv", "Gemm", "MatMul", "ConvTranspose", "QLinearConv", "QGemm") and len(node.inputs) > 1:
            weight = node.inputs[3] if node.operator in ("QLinearConv", "QGemm") else node.inputs[1]
            while weight not in graph.weights and weight in made_by and made_by[weight].inputs:
                weight = made_by[weight].inputs[0]  # through DequantizeLinear, Transpose and the like
            if weight in graph.weights:
                names[node.name] = layer = layer_of(weight)
                # Where onnxruntime fuses what follows into a layer, it calls the whole by the last output.
                output = node.outputs[0]
                names.setdefault(output, layer)
                while len(follow := read_by.get(output, [])) == 1 and follow[0].operator in _FUSED:
                    output = follow[0].outputs[0]
                    names.setdefault(output, layer)
    return names


def _ir_names(path: Path) -> dict[str, str]:
    root = read_ir(path)
    kinds = {layer.get("id"): (layer.get("type", ""), layer.get("name", "")) for layer in root.iterfind("layers/layer")}
    into: dict[str | None, dict[int, str | None]] = {}
    read_by: dict[str | None, list[str | None]] = {}
    for edge in root.iterfind("edges/edge"):
        read_by.setdefault(edge.get("from-layer"), []).append(edge.get("to-layer"))
        into.setdefault(edge.get("to-layer"), {})[int(edge.get("to-port", "0"))] = edge.get("from-layer")
    names = {}
    for number, (kind, name) in kinds.items():
        if kind not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        at = into.get(number, {}).get(1)
        for _ in range(8):  # Multiply, Subtract, Convert and Reshape lie between
            if at is None or kinds[at][0] == "Const":
                break
            at = into.get(at, {}).get(min(into.get(at, {0: None})))
        if at is not None and kinds[at][0] == "Const":
            weight = kinds[at][1]
            if "weight" in weight:  # the converter and NNCF give constants that they make or fold other names; nodes keep theirs
                names[_plain(name, {})] = layer_of(weight)
                if [kinds[reader][0] for reader in read_by.get(number, [])] == ["Add"]:  # of the bias, which may have the output's name
                    names.setdefault(kinds[read_by[number][0]][1], layer_of(weight))
    return names


def layer_of(weight: str) -> str:
    """`features.0.0` for "features.0.0.weight_quantized"."""
    return re.sub(r"[./](weight|weight[_/].*)$", "", weight)


def table(profiles: Sequence[Profile], most: int = 40) -> str:
    """The layers of one file or several side by side, and operators with their share; for a terminal."""
    lines = []
    for p in profiles:
        lines.append(
            f"{p.file}: {p.runtime}, steady {_ms(p.steady_s)} ms; layers add up to {p.covered:.0%} of it, {p.calls} calls profiled"
        )
        if p.profiler_s:
            lines.append(f"  the profiler's own time, {_ms(p.profiler_s)} ms a call, is subtracted")
        by_operator: dict[str, list[float]] = {}
        for layer in p.layers:
            by_operator.setdefault(layer.operator, []).append(layer.seconds)
        for operator, times in sorted(by_operator.items(), key=lambda pair: -sum(pair[1])):
            lines.append(f"  {operator:<32} {len(times):>4} {_ms(sum(times)):>9} ms {sum(times) / p.steady_s:>6.1%}")
        if p.void:
            lines.append(f"  VOID, do not use these figures: {p.void}")
    # What one file lost, another may have kept: a quantized IR calls its weights by numbers.
    known = {layer.node: layer.name for p in profiles for layer in p.layers if layer.name != layer.node}
    sums = [_by_name(p, known) for p in profiles]
    names = sorted({name for each in sums for name in each}, key=lambda name: -max(each.get(name, 0.0) for each in sums))
    width = max((len(name) for name in names[:most]), default=0)
    lines.append(
        f"{'layer':<{width}}"
        + "".join(f" {i:>9}" for i in range(1, len(profiles) + 1))
        + (" ms" if len(profiles) < 2 else " ms  last/first")
    )
    for name in names[:most]:
        cells = "".join(f" {_ms(each[name]) if name in each else '-':>9}" for each in sums)
        both = name in sums[0] and name in sums[-1] and sums[0][name] > 0 and len(sums) > 1
        lines.append(f"{name:<{width}}{cells}" + (f" {sums[-1][name] / sums[0][name]:>8.2f}x" if both else ""))
    if len(names) > most:
        lines.append(f"and {len(names) - most} smaller ones; --json has them all")
    return "\n".join(lines)


def _by_name(p: Profile, known: dict[str, str]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for layer in p.layers:
        name = known.get(layer.node, layer.name)
        sums[name] = sums.get(name, 0.0) + layer.seconds
    return sums


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4f}"

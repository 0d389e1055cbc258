"""What this machine can do at most: multiply-adds a second in float, bf16 and int8, bytes a second from its caches and its memory.

A board has no compiler, so the arithmetic is done by the runtimes that it has, on large, well-shaped convolutions, and the best of all
counts: no layer of a model is expected to do better. A clock that moves (boost, a neighbour on the same host) moves the luckiest call by
a sixth and not the model's median; so the best convolution takes turns with the model, and its median counts, as the model's does.
Bandwidth is numpy's, copying and reading arrays of many sizes. Where the cores' instructions and their clock are known, no rate may
exceed multiply-adds per cycle times clock.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgecnn.device import machine
from edgecnn.device.machine import NOT_AVAILABLE
from edgecnn.device.onnx_file import model, node, tensor, value
from edgecnn.device.quiet import signal_stack_kept, silence_openvino
from edgecnn.device.stats import percentile
from edgecnn.errors import DeviceBug, DeviceError

T = TypeVar("T")
Call = Callable[[], object]

# Channels, height and kernel: small ones keep everything in the cache, large ones give many threads and matrix units enough to do.
SHAPES = ((128, 28, 3), (256, 28, 3), (256, 56, 3), (512, 14, 3), (512, 28, 1), (1024, 14, 1), (2048, 16, 1))
SIZES = tuple(2**k for k in range(14, 28))  # bytes of an array, for each thread
_SECONDS = 0.1
_TURN_SECONDS = 0.15  # of a type, before a turn of the model and after it
_CALL_BYTES = 1 << 25  # of one call, so that handing it to a thread does not count

# The most multiply-adds of one core in one cycle, by the instructions it has; the first that is there counts. It is a bound: as many units
# of the full width as any such core has. Sources: Intel's optimization manual (AMX: 16 x 16 x 64 int8 in 16 cycles; two 512-bit units),
# ARM's software optimization guides (two 128-bit units in Cortex-A72, A76 and A78, four in X1).
_PER_CYCLE: dict[str, tuple[tuple[str, int], ...]] = {
    "float32": (("avx512f", 32), ("fma", 16), ("asimd", 16)),
    "bf16": (("amx_bf16", 512), ("avx512_bf16", 64), ("bf16", 64)),
    "int8": (("amx_int8", 1024), ("avx512_vnni", 128), ("avx_vnni", 64), ("avx512f", 64), ("avx2", 32), ("i8mm", 128), ("asimddp", 64)),
}


@dataclass(frozen=True)
class Rate:
    """Multiply-adds a second of all threads together, and what reached it."""

    per_s: float
    by: str


@dataclass(frozen=True)
class Peaks:
    """The machine's limits with `threads` threads.

    Attributes:
        rates: by the type of the numbers: float32, int8, and bf16 where a runtime offers it; medians.
        bandwidth: bytes of an array in each thread, and bytes a second of all threads together, rising in size.
        per_cycle_times_clock: what instructions and clock allow at most, by type, or "not available".
    """

    threads: int
    rates: dict[str, Rate]
    bandwidth: tuple[tuple[int, float], ...]
    per_cycle_times_clock: dict[str, float] | str

    @staticmethod
    def from_json(data: dict[str, Any]) -> Peaks:
        rates = {dtype: Rate(**rate) for dtype, rate in data["rates"].items()}
        return Peaks(**{**data, "rates": rates, "bandwidth": tuple(tuple(pair) for pair in data["bandwidth"])})

    @property
    def cache(self) -> float:
        """Bytes a second where it is highest."""
        return max(rate for _, rate in self.bandwidth)

    @property
    def memory(self) -> float:
        """Bytes a second of the largest arrays."""
        return self.beyond(self.bandwidth[-1][0])

    def beyond(self, size: int) -> float:
        """Bytes a second, at most, of arrays of `size` bytes or more in each thread."""
        sizes = [s for s, _ in self.bandwidth]
        first = max((i for i, s in enumerate(sizes) if s <= size), default=0)
        return max(rate for _, rate in self.bandwidth[first:])

    def doubts(self) -> list[str]:
        """What speaks against these figures.

        Raises:
            DeviceBug: a rate was measured that the instructions cannot give.
        """
        if isinstance(self.per_cycle_times_clock, str):
            return []
        doubts = []
        for dtype, most in self.per_cycle_times_clock.items():
            share = self.rates[dtype].per_s / most
            if share > 1.1:
                raise DeviceBug(f"{dtype}: {self.rates[dtype].per_s:.3g} multiply-adds a second were measured, {most:.3g} are possible")
            if share < 0.1:
                doubts.append(f"the {dtype} peak is {share:.0%} of instructions per cycle times clock: the runtime may lack kernels for it")
        return doubts


def measure_peaks(
    threads: int, model: Callable[[], T], turns: int, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[Peaks, T]]:
    """Measure this machine around each of `turns` calls of `model`, in a process that does nothing else.

    Takes about ten seconds beside the model's own. Returns what the machine did just before and just after each, and what `model` gave.

    Raises:
        DeviceError: no runtime is here.
    """
    best = _best_convolutions(threads, clock)
    if not best:
        raise DeviceError("neither onnxruntime nor OpenVINO is here to measure the machine with. Install one.")
    reached = bandwidth(threads, clock=clock)
    theory = _theory(threads, [each.dtype for each in best])
    given, took = [], [[_timed(each, threads, clock) for each in best]]
    for _ in range(turns):
        given.append(model())
        took.append([_timed(each, threads, clock) for each in best])
    found = []
    for before, after, result in zip(took, took[1:], given, strict=False):
        medians = [percentile([*one, *other], 0.5) for one, other in zip(before, after, strict=True)]
        rates = {each.dtype: Rate(each.macs / median, str(each)) for each, median in zip(best, medians, strict=True)}
        found.append((Peaks(threads, rates, reached, theory), result))
    return found


@dataclass(frozen=True)
class _Convolution:
    """One that can be timed: type of its numbers, runtime, and channels, height and kernel."""

    dtype: str
    runtime: str
    shape: tuple[int, int, int]

    @property
    def macs(self) -> int:
        return multiply_adds(self.shape)

    def __str__(self) -> str:
        channels, size, kernel = self.shape
        return f"{self.runtime}, {kernel}x{kernel} convolution of {channels} channels at {size}x{size}"


def _best_convolutions(threads: int, clock: Callable[[], float]) -> list[_Convolution]:
    """Of each type that a runtime here has, the one with the most multiply-adds a second."""
    best: dict[str, tuple[float, _Convolution]] = {}
    for runtime in filter(find_spec, _RUNTIMES):
        for dtype in ("float32", "bf16", "int8"):
            for each in (_Convolution(dtype, runtime, shape) for shape in SHAPES):
                with _opened(each, threads) as call:
                    if call is None:
                        break
                    rate = each.macs / min(times(call, _SECONDS, clock))
                if dtype not in best or rate > best[dtype][0]:
                    best[dtype] = rate, each
    return [each for _, each in best.values()]


def _timed(each: _Convolution, threads: int, clock: Callable[[], float]) -> list[float]:
    with _opened(each, threads) as call:
        assert call is not None  # it was there a moment ago
        return times(call, _TURN_SECONDS, clock)


def times(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of the calls that fit into `seconds`, five at least, after two to warm up."""
    call(), call()
    took: list[float] = []
    end = clock() + seconds
    while len(took) < 5 or clock() < end:
        start = clock()
        call()
        took.append(clock() - start)
    return took


def bandwidth(threads: int, sizes: Iterable[int] = SIZES, clock: Callable[[], float] = time.perf_counter) -> tuple[tuple[int, float], ...]:
    """Bytes a second of all threads together, each with arrays of its own of each of `sizes` bytes: copied (read and written) or read."""
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for size in sizes:
            pairs = [(np.ones(size // 4, np.float32), np.empty(size // 4, np.float32)) for _ in range(threads)]
            passes = max(1, _CALL_BYTES // size)
            rates = []
            for work, moved in ((_copy, 2 * size), (_read, size)):
                call = functools.partial(_all, pool, work, pairs, passes)
                rates.append(threads * passes * moved / min(times(call, _SECONDS / 2, clock)))
            found.append((size, max(rates)))
    return tuple(found)


def _all(pool: ThreadPoolExecutor, work: Callable[..., None], pairs: list[tuple[np.ndarray, np.ndarray]], times: int) -> None:
    list(pool.map(work, pairs, [times] * len(pairs)))


def _copy(pair: tuple[np.ndarray, np.ndarray], times: int) -> None:
    for _ in range(times):
        np.copyto(pair[1], pair[0])


def _read(pair: tuple[np.ndarray, np.ndarray], times: int) -> None:
    for _ in range(times):
        pair[0].max()


def _theory(threads: int, rates: Iterable[str], root: Path = machine.ROOT) -> dict[str, float] | str:
    """Multiply-adds per cycle times clock, of as many cores as there are threads."""
    clocks = machine.highest_clocks(root)
    known = machine.instruction_sets(root)
    if not clocks or isinstance(known, str):
        return NOT_AVAILABLE
    found = {}
    for dtype in rates:
        per_cycle = next((count for name, count in _PER_CYCLE[dtype] if name in known), None)
        if per_cycle:
            found[dtype] = per_cycle * sum(sorted(clocks)[-threads:])
    return found or NOT_AVAILABLE


@contextmanager
def _onnxruntime(model: bytes, x: np.ndarray, dtype: str, threads: int) -> Iterator[Call | None]:
    if dtype == "bf16":
        yield None
        return
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    yield lambda: session.run(None, {"x": x})


@contextmanager
def _openvino(model: bytes, x: np.ndarray, dtype: str, threads: int) -> Iterator[Call | None]:
    silence_openvino()
    import openvino as ov

    hint = "bf16" if dtype == "bf16" else "f32"
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": hint}
    with signal_stack_kept():
        core = ov.Core()
        able = dtype != "bf16" or "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        request = core.compile_model(core.read_model(model), "CPU", config).create_infer_request() if able else None
    yield (lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)) if request else None


_RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def _opened(each: _Convolution, threads: int) -> AbstractContextManager[Call | None]:
    """A call of the convolution; None where the runtime has not got the type."""
    return _RUNTIMES[each.runtime](*convolution(each.dtype, *each.shape), each.dtype, threads)


def multiply_adds(shape: tuple[int, int, int]) -> int:
    channels, size, kernel = shape
    return channels * channels * kernel * kernel * size * size


def convolution(dtype: str, channels: int, size: int, kernel: int) -> tuple[bytes, np.ndarray]:
    """An ONNX file of one convolution and an input for it; int8 is U8 activations and S8 weights between Q and DQ."""
    rng = np.random.default_rng(0)
    shape = (1, channels, size, size)
    pad = kernel // 2
    conv = {"kernel_shape": (kernel, kernel), "pads": (pad, pad, pad, pad)}
    if dtype == "int8":
        x = rng.integers(0, 256, shape).astype(np.uint8)
        weight = rng.integers(-127, 128, (channels, channels, kernel, kernel)).astype(np.int8)
        scales = {"xs": 0.02, "ys": 0.02 * 0.02 * 127 * math.sqrt(channels) * kernel / 2}
        weights = [tensor(name, np.float32(value).reshape(())) for name, value in scales.items()]
        weights += [tensor("z", np.uint8(128).reshape(())), tensor("w", weight), tensor("ws", np.full(channels, 0.02, np.float32))]
        weights += [tensor("wz", np.zeros(channels, np.int8))]
        nodes = [
            node("DequantizeLinear", ("x", "xs", "z"), "xf"),
            node("DequantizeLinear", ("w", "ws", "wz"), "wf", axis=0),
            node("Conv", ("xf", "wf"), "yf", **conv),
            node("QuantizeLinear", ("yf", "ys", "z"), "y"),
        ]
        kind = "uint8"
    else:
        x = rng.standard_normal(shape).astype(np.float32)
        weight_f = rng.standard_normal((channels, channels, kernel, kernel)).astype(np.float32) / channels
        weights = [tensor("w", weight_f)]
        nodes = [node("Conv", ("x", "w"), "y", **conv)]
        kind = "float32"
    written = model(nodes, weights, value("x", kind, shape), value("y", kind, shape))
    return written, x

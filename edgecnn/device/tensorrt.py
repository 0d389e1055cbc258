"""Builds TensorRT engines from verified ONNX, with `tensorrt` 8.6, 10 or 11 or with `tensorrt_rtx`, and keeps them in a cache.

An engine is native code for one GPU and one TensorRT: it is never inside a bundle and never accepted from anyone. The cache
is the user's own folder; its key is the model's digest, the TensorRT version, the GPU and how it is built, and a file in it begins with its
own digest, which is checked again before the engine is loaded: one that is damaged, or not ours alone, is built anew.
Precision is what the graph says. TensorRT 8.6 has no strongly typed networks, and up to 10 a DLA takes none: there the precision is allowed
by a flag as well. Run for real here is `tensorrt_rtx`; `tensorrt` and DLA need a GPU that this project's tests do not have.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecnn.device.files import write_atomically
from edgecnn.errors import DeviceError, IntegrityError, ResourceError

LIBRARIES = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Engine:
    """A built engine.

    Attributes:
        plan: what the runtime loads.
        cached: whether it was built before.
        on_gpu: names of the layers that a DLA was asked for and does not take; empty where none was asked for.
    """

    plan: bytes
    cached: bool
    on_gpu: tuple[str, ...]


@dataclass(frozen=True)
class Tensorrt:
    """One of the two packages, which have the same API."""

    module: Any
    package: str
    version: str

    @property
    def name(self) -> str:
        return f"{self.package} {self.version}"


def load_tensorrt() -> Tensorrt:
    """The installed TensorRT; `tensorrt` is taken before `tensorrt_rtx`.

    Raises:
        DeviceError: neither is installed.
    """
    for package in LIBRARIES:
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue
        return Tensorrt(module, package, module.__version__)
    raise DeviceError(
        "neither tensorrt nor tensorrt_rtx is installed. On a Jetson use JetPack's tensorrt; elsewhere: pip install tensorrt_rtx"
    )


def build_engine(tensorrt: Tensorrt, onnx: Path, *, batch: int = 1, compute_capability: str | None = None) -> bytes:
    """Parse `onnx` and build it.

    Args:
        tensorrt: the library to use.
        onnx: a graph with one input whose first dimension may be free.
        batch: the one batch size the engine takes.
        compute_capability: such as "86" to build for that GPU instead of the one here; tensorrt_rtx only, and then no GPU is needed.

    Raises:
        DeviceError: the parser or the builder refuses the graph; the message is TensorRT's own.
    """
    return _build(tensorrt, onnx.read_bytes(), str(onnx), batch, compute_capability, None, "", None).plan


def cached_engine(
    tensorrt: Tensorrt,
    onnx: Path,
    onnx_sha256: str,
    gpu: str,
    *,
    batch: int,
    precision: str = "",
    dla: int | None = None,
    compute_capability: str | None = None,
) -> Engine:
    """The engine for this GPU, from the cache if it is intact there.

    Args:
        tensorrt: the library to use.
        onnx: the graph.
        onnx_sha256: its digest; bytes with another are not built.
        gpu: name and compute capability of the GPU.
        batch: the one batch size the engine takes.
        precision: of the bundle; needed where the library does not take it from the graph.
        dla: the DLA core to use, or None for the GPU.
        compute_capability: as for `build_engine`.

    Raises:
        IntegrityError: the graph has changed since it was verified.
        DeviceError: the library refuses the graph, or has no such DLA.
    """
    made_from = (onnx_sha256, tensorrt.name, gpu, f"batch {batch}", precision, f"DLA {dla}", f"for {compute_capability}")
    path = cache_folder() / f"{_digest(made_from)}.engine"
    kept = _read_kept(path)
    if kept is not None:
        first, _, plan = kept.partition(b"\n")
        facts = _facts(first)
        if facts.get("made_from") == list(made_from):  # not another engine's file under this name
            return Engine(plan, True, tuple(facts["on_gpu"]))
    graph = onnx.read_bytes()
    if hashlib.sha256(graph).hexdigest() != onnx_sha256:
        raise IntegrityError(f"{onnx}: has changed since it was verified. Copy the bundle again from where it was made.")
    # What TensorRT learnt when it timed kernels on this GPU serves every model and batch: the next build is quicker.
    # tensorrt_rtx times nothing when it builds, and says that its timing cache does nothing.
    timings = cache_folder() / f"{_digest((tensorrt.name, gpu))}.timings" if tensorrt.package == "tensorrt" else None
    engine = _build(tensorrt, graph, str(onnx), batch, compute_capability, dla, precision, timings)
    _keep(path, json.dumps({"on_gpu": engine.on_gpu, "made_from": made_from}).encode() + b"\n" + engine.plan)
    return engine


def _build(
    tensorrt: Tensorrt,
    graph: bytes,
    where: str,
    batch: int,
    compute_capability: str | None,
    dla: int | None,
    precision: str,
    timings: Path | None,
) -> Engine:
    trt = tensorrt.module
    errors: list[str] = []
    logger = _collecting_logger(trt, errors)
    builder = trt.Builder(logger)
    if builder is None:
        raise DeviceError(f"{tensorrt.name} cannot start here: {_last(errors)}")
    if dla is not None and dla >= builder.num_DLA_cores:
        raise DeviceError(
            f"DLA core {dla} is asked for, and {tensorrt.name} finds {builder.num_DLA_cores} here. Leave it out to use the GPU; "
            "Orin and Xavier have DLAs, and TensorRT 11.0 to 11.3 does not use them."
        )
    network = builder.create_network(_network_flags(trt, dla))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        faults = [f"{_said(fault, 'node_operator')} {_said(fault, 'node_name')!r}: {' '.join(fault.desc().split())}" for fault in found]
        raise DeviceError(f"{where}: {tensorrt.name} does not parse it: {'; '.join(faults[:3]) or _last(errors)}")
    if not network.num_inputs:  # TensorRT takes bytes that are no graph for an empty one
        raise DeviceError(f"{where}: {tensorrt.name} does not parse it: there is no network in it")
    config = builder.create_builder_config()
    if compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{compute_capability}"), 0)
    for flag in _precision_flags(trt, precision, dla):
        config.set_flag(flag)
    on_gpu = _use_dla(trt, config, network, dla) if dla is not None else ()
    tensor = network.get_input(0)
    if tensor.shape[0] == -1:
        profile = builder.create_optimization_profile()
        shape = (batch, *tuple(tensor.shape)[1:])
        profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    if timings is not None:
        known = config.create_timing_cache(_read_kept(timings) or b"")
        if known is not None:
            config.set_timing_cache(known, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DeviceError(f"{where}: {tensorrt.name} does not build it: {_last(errors)}")
    if timings is not None and known is not None:
        _keep(timings, bytes(config.get_timing_cache().serialize()))
    return Engine(bytes(plan), False, on_gpu)


def _network_flags(trt: Any, dla: int | None) -> int:
    """Strongly typed where the library can: precision is then what the graph says, and nothing else."""
    flags = trt.NetworkDefinitionCreationFlag
    strong = getattr(flags, "STRONGLY_TYPED", None)  # 8.6 does not have it yet, and a library that knows nothing else need not have it
    if strong is not None and (dla is None or not hasattr(trt.BuilderFlag, "INT8")):
        return 1 << int(strong)
    explicit = getattr(flags, "EXPLICIT_BATCH", None)  # 8.6 must be told, 11 has no other
    return 0 if explicit is None else 1 << int(explicit)


def _precision_flags(trt: Any, precision: str, dla: int | None) -> list[Any]:
    """What a network that is not strongly typed must be allowed: 8.6, and a DLA up to 10. Others take the precision from the graph."""
    weak = dla is not None or getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None) is None
    if not weak or not hasattr(trt.BuilderFlag, "INT8"):
        return []
    wanted = {"fp16": ["FP16"], "int8": ["INT8"] if dla is None else ["INT8", "FP16"]}.get(precision, [])
    return [getattr(trt.BuilderFlag, name) for name in wanted]


def _use_dla(trt: Any, config: Any, network: Any, core: int) -> tuple[str, ...]:
    """Send to the DLA every layer that it takes; returns the names of the others, which the GPU does."""
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return tuple(layer.name for layer in layers if not config.can_run_on_DLA(layer))


def cache_folder() -> Path:
    """Where engines are kept: `$XDG_CACHE_HOME/edgecnn/engines`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgecnn" / "engines"


def _digest(parts: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _keep(path: Path, content: bytes) -> None:
    """Write `content` behind its own digest, for its owner alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content, mode=0o600)
    except OSError as error:
        raise ResourceError(
            f"{path.parent}: cannot be written ({error.strerror}), and engines are kept there. Name another place in XDG_CACHE_HOME."
        ) from None


def _facts(line: bytes) -> dict[str, Any]:
    """What an engine's first line says of it; nothing where it says nothing."""
    try:
        facts = json.loads(line)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) and isinstance(facts.get("on_gpu"), list) else {}


def _read_kept(path: Path) -> bytes | None:
    """What `_keep` wrote there; None where there is nothing, where a bit of it has changed, or where others may write it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as source:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            return None
        digest, _, content = source.read().partition(b"\n")
    return content if hashlib.sha256(content).hexdigest().encode() == digest else None


def _said(fault: Any, what: str) -> str:
    """What the parser tells of a fault, "?" where this version does not tell it."""
    told = getattr(fault, what, None)
    return str(told()) if told else "?"


def _collecting_logger(trt: Any, errors: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    return Logger()


def _last(errors: list[str]) -> str:
    return errors[-1] if errors else "no reason given"

"""Builds TensorRT engines from verified ONNX, with `tensorrt` 10 or 11 or with `tensorrt_rtx`, and keeps them in a cache.

An engine is native code for one GPU and one TensorRT: it is never inside a bundle and never accepted from anyone. The cache
is the user's own folder; its key is the model's digest, the TensorRT version, the GPU and the batch, and the engine's own digest
is checked again before it is loaded, so that a damaged engine is rebuilt.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecnn.device.files import write_atomically
from edgecnn.errors import DeviceError

LIBRARIES = ("tensorrt", "tensorrt_rtx")


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
    """Parse `onnx` as a strongly typed network and build it: precision is what the graph says.

    Args:
        tensorrt: the library to use.
        onnx: a graph with one input whose first dimension may be free.
        batch: the one batch size the engine takes.
        compute_capability: such as "86" to build for that GPU instead of the one here; tensorrt_rtx only, and then no GPU is needed.

    Raises:
        DeviceError: the parser or the builder refuses the graph; the message is TensorRT's own.
    """
    trt = tensorrt.module
    errors: list[str] = []
    logger = _collecting_logger(trt, errors)
    builder = trt.Builder(logger)
    if builder is None:
        raise DeviceError(f"{tensorrt.name} cannot start here: {_last(errors)}")
    # TensorRT 11 has only strongly typed networks and may drop the flag that asks for them.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx.read_bytes()):
        faults = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise DeviceError(f"{onnx}: {tensorrt.name} does not parse it: {'; '.join(faults[:3])}")
    config = builder.create_builder_config()
    if compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{compute_capability}"), 0)
    tensor = network.get_input(0)
    if tensor.shape[0] == -1:
        profile = builder.create_optimization_profile()
        shape = (batch, *tuple(tensor.shape)[1:])
        profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise DeviceError(f"{onnx}: {tensorrt.name} does not build it: {_last(errors)}")
    return bytes(engine)


def cached_engine(tensorrt: Tensorrt, onnx: Path, onnx_sha256: str, gpu: str, *, batch: int) -> tuple[bytes, bool]:
    """The engine for this GPU, from the cache if it is intact there.

    Args:
        tensorrt: the library to use.
        onnx: the verified graph.
        onnx_sha256: its digest.
        gpu: name and compute capability of the GPU.
        batch: the one batch size the engine takes.

    Returns:
        The engine, and whether it came from the cache.
    """
    key = hashlib.sha256("\n".join((onnx_sha256, tensorrt.name, gpu, str(batch))).encode()).hexdigest()
    path = cache_folder() / f"{key}.engine"
    digest = path.with_suffix(".sha256")
    try:
        engine = path.read_bytes()
        if hashlib.sha256(engine).hexdigest() == digest.read_text().strip():
            return engine, True
    except OSError:
        pass  # not there yet
    engine = build_engine(tensorrt, onnx, batch=batch)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(path, engine, mode=0o600)
    write_atomically(digest, hashlib.sha256(engine).hexdigest().encode(), mode=0o600)
    return engine, False


def cache_folder() -> Path:
    """Where engines are kept: `$XDG_CACHE_HOME/edgecnn/engines`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgecnn" / "engines"


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

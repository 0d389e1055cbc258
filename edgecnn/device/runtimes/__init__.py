"""Opens the model of a bundle in its runtime. Each runtime is imported only when a bundle asks for it."""

from __future__ import annotations

import importlib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from edgecnn.device.quiet import silence_openvino
from edgecnn.device.spec import Manifest, Takes
from edgecnn.errors import DeviceError


class Runner(Protocol):
    """A loaded model.

    Attributes:
        provider: what it really runs on, such as CPUExecutionProvider or GPU.
        version: of the runtime.
        takes: what its input is, read from the file.
    """

    provider: str
    version: str
    takes: Takes

    def infer(self, x: np.ndarray) -> np.ndarray:
        """Logits N x classes, float32, on the host when it returns, for `x` as `preprocess.to_input` makes it."""

    def __enter__(self) -> Runner: ...

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None: ...


def import_runtime(runtime: str) -> None:
    """Import the library of `runtime`; where it is not there, opening a runner says so."""
    silence_openvino()
    with suppress(ImportError):
        importlib.import_module("tensorrt_rtx" if runtime == "tensorrt" and not find_spec("tensorrt") else runtime)


def open_runner(folder: Path, manifest: Manifest, *, threads: int, provider: str | None = None, batch: int = 1) -> Runner:
    """Load the model of `folder`, which must have been verified.

    Args:
        folder: of the bundle.
        manifest: its manifest.
        threads: of the runtime's own pool.
        provider: execution provider or device to run on; None is the runtime's CPU, or the GPU for TensorRT.
        batch: the one batch size it will be called with; fixing it lets the runtime plan its memory.

    Raises:
        DeviceError: the runtime or the provider is not there, or the runtime refuses the file.
    """
    path = folder / manifest.model_file
    if manifest.runtime == "onnxruntime":
        from edgecnn.device.runtimes.ort import OrtRunner

        return OrtRunner(path, threads=threads, provider=provider, batch=batch)
    if manifest.runtime == "openvino":
        from edgecnn.device.runtimes.ov import OpenvinoRunner

        return OpenvinoRunner(path, threads=threads, device=provider, batch=batch, options=manifest.options)
    if manifest.runtime == "tensorrt":
        from edgecnn.device.runtimes.trt import TensorrtRunner

        return TensorrtRunner(folder, manifest, batch=batch, provider=provider)
    raise DeviceError(f"{folder}: runtime {manifest.runtime!r} is not known to this edgecnn. Install a newer one.")

"""TensorRT: the engine is built here, on the GPU that runs it, and cached. Never run by this project's tests: they have no GPU."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from edgecnn.device.cuda import Gpu
from edgecnn.device.spec import Manifest, Takes
from edgecnn.device.tensorrt import cached_engine, load_tensorrt
from edgecnn.errors import DeviceError


def _dla(provider: str | None) -> int | None:
    """Core of the DLA that a provider such as `DLA0` names; None for the GPU."""
    if provider is None or provider == "GPU":
        return None
    if provider[:3] != "DLA" or not provider[3:].isdecimal():
        raise DeviceError(f"TensorRT offers GPU, and DLA0 and so on where the board has them; {provider!r} is asked for. Name one.")
    return int(provider[3:])


class TensorrtRunner:
    """An engine with its buffers on the GPU, for one batch size."""

    def __init__(self, folder: Path, manifest: Manifest, *, batch: int, provider: str | None = None) -> None:
        dla = _dla(provider)
        tensorrt = load_tensorrt()
        gpu = Gpu()
        engine = cached_engine(
            tensorrt,
            folder / manifest.model_file,
            manifest.model_sha256,
            f"{gpu.name} {gpu.compute_capability}",
            batch=batch,
            precision=manifest.precision,
            dla=dla,
        )
        trt = tensorrt.module
        # Order of the fields is order of destruction: TensorRT wants its runtime to outlive the engine.
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(engine.plan)
        if self._engine is None:
            raise DeviceError(f"{folder}: {tensorrt.name} does not load the engine it built. Check that the GPU has free memory.")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        (self._input,) = (n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
        (output,) = (n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
        self.takes: Takes = "uint8" if self._engine.get_tensor_dtype(self._input) == trt.DataType.UINT8 else "float32"
        spec = manifest.input
        shape = (batch, *(spec.pixel_size or ()), spec.channels) if self.takes == "uint8" else (batch, *spec.shape)
        self._context.set_input_shape(self._input, shape)
        self._logits = np.empty(tuple(self._context.get_tensor_shape(output)), np.float32)
        self._gpu = gpu
        input_bytes = int(np.prod(shape)) * np.dtype(self.takes).itemsize
        self._buffers = {self._input: gpu.allocate(input_bytes), output: gpu.allocate(self._logits.nbytes)}
        self._output = output
        for name, address in self._buffers.items():
            self._context.set_tensor_address(name, address)
        self.provider = gpu.name if dla is None else f"{gpu.name}, DLA {dla}"
        self.version = tensorrt.name

    def infer(self, x: np.ndarray) -> np.ndarray:
        self._gpu.upload(self._buffers[self._input], np.ascontiguousarray(x, self.takes))
        if not self._context.execute_async_v3(self._gpu.stream):
            raise DeviceError(f"{self.version} failed to run the engine on {self.provider}.")
        self._gpu.download(self._logits, self._buffers[self._output])
        logits: np.ndarray = self._logits.copy()
        return logits

    def __enter__(self) -> TensorrtRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        for address in self._buffers.values():
            self._gpu.free(address)
        del self._context, self._engine, self._runtime

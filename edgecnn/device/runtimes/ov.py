"""OpenVINO: CPU, and GPU or NPU by name.

OpenVINO runs an fp32 model in bf16 on CPUs that have it unless told otherwise; the manifest's options
say what the bundle was measured with, and they are always passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from edgecnn.device.quiet import signal_stack_kept, silence_openvino
from edgecnn.device.spec import Takes
from edgecnn.errors import DeviceError


class OpenvinoRunner:
    """A compiled model on one device; a device that is not there is refused, never replaced."""

    @signal_stack_kept()
    def __init__(self, path: Path, *, threads: int, device: str | None, batch: int, options: Mapping[str, str]) -> None:
        silence_openvino()
        try:
            import openvino as ov
        except ImportError:
            raise DeviceError("openvino is not installed. Install it: pip install openvino") from None
        wanted = "CPU" if device is None else device
        core = ov.Core()
        if wanted.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
            raise DeviceError(f"OpenVINO offers {', '.join(core.available_devices)}; asked for {wanted!r}. Install its driver, or use CPU.")
        config = {"PERFORMANCE_HINT": "LATENCY", **options}
        if wanted == "CPU":
            config["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            model = core.read_model(path)
            shape = model.input(0).partial_shape
            if shape[0].is_dynamic:
                shape[0] = batch
                model.reshape(shape)
            self._compiled = core.compile_model(model, wanted, config)
        except RuntimeError as fault:
            last = next(reversed(str(fault).strip().splitlines()), type(fault).__name__)
            told = "".join(c if c.isprintable() else "?" for c in last)  # it quotes the file, which may be a stranger's
            raise DeviceError(f"{path}: OpenVINO {ov.__version__} refuses it: {told}") from None
        self._request = self._compiled.create_infer_request()
        self.takes: Takes = "uint8" if model.input(0).element_type == ov.Type.u8 else "float32"
        self.provider = wanted
        self.version = f"openvino {ov.__version__}"

    def infer(self, x: np.ndarray) -> np.ndarray:
        result = self._request.infer({0: x}, share_inputs=True)
        logits: np.ndarray = result[self._compiled.output(0)]
        return logits

    def __enter__(self) -> OpenvinoRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        del self._request, self._compiled

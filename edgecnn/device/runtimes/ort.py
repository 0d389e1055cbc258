"""onnxruntime: CPU everywhere, other execution providers where the installed package has them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from edgecnn.device.spec import Takes
from edgecnn.errors import DeviceError

CPU = "CPUExecutionProvider"
# onnxruntime would round biases that the file keeps in float, as TensorRT wants them: 1.4 % of the predictions changed.
AS_WRITTEN = ["WeightBiasQuantization"]


class OrtRunner:
    """An onnxruntime session with one execution provider; a provider that is not there is refused, never replaced.

    CPU is listed behind another provider, because onnxruntime needs it for nodes that one does not take.
    """

    def __init__(self, path: Path, *, threads: int, provider: str | None, batch: int) -> None:
        try:
            import onnxruntime as ort
        except ImportError:
            raise DeviceError("onnxruntime is not installed. Install it: pip install onnxruntime") from None
        ort.set_default_logger_severity(3)
        wanted = CPU if provider is None else provider
        offered = ort.get_available_providers()
        if wanted not in offered:
            raise DeviceError(f"onnxruntime offers {offered}, asked for {wanted!r}. Install a build of onnxruntime with it, or use {CPU}.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_free_dimension_override_by_name("batch", batch)
        options.log_severity_level = 3
        try:
            providers = [wanted] if wanted == CPU else [wanted, CPU]
            self._session = ort.InferenceSession(str(path), options, providers=providers, disabled_optimizers=AS_WRITTEN)
        except Exception as fault:  # onnxruntime raises a family of its own exceptions
            raise DeviceError(f"{path}: onnxruntime {ort.__version__} refuses it: {_first_line(fault)}") from None
        if self._session.get_providers()[0] != wanted:
            raise DeviceError(f"{path}: {wanted} was asked for, but onnxruntime fell back to {self._session.get_providers()[0]}.")
        self.provider = wanted
        self.version = f"onnxruntime {ort.__version__}"
        given = self._session.get_inputs()[0]
        self._input = given.name
        self.takes: Takes = "uint8" if given.type == "tensor(uint8)" else "float32"

    def infer(self, x: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._session.run(None, {self._input: x})[0]
        return logits

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        del self._session


def _first_line(fault: Exception) -> str:
    line = next(iter(str(fault).strip().splitlines()), type(fault).__name__)
    return "".join(c if c.isprintable() else "?" for c in line)  # it quotes the file, which may be a stranger's

"""onnxruntime: CPU everywhere, other execution providers where the installed package has them."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgecnn.device.spec import Takes
from edgecnn.errors import DeviceError

CPU = "CPUExecutionProvider"
# onnxruntime would round biases that the file keeps in float, as TensorRT wants them: 1.4 % of the predictions changed.
AS_WRITTEN = ["WeightBiasQuantization"]


class OrtRunner:
    """An onnxruntime session with one execution provider; one that is not there, or that takes no node, is refused, never replaced.

    CPU is listed behind another provider, because onnxruntime needs it for nodes that one does not take; `provider` says how many.
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
            raise DeviceError(
                f"onnxruntime offers {', '.join(offered)}; asked for {wanted!r}. Install a build of onnxruntime with it, or use {CPU}."
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_free_dimension_override_by_name("batch", batch)
        options.log_severity_level = 3
        self.version = f"onnxruntime {ort.__version__}"
        with tempfile.TemporaryDirectory() if wanted != CPU else nullcontext("") as folder:
            if wanted != CPU:
                options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
            try:
                providers = [wanted] if wanted == CPU else [wanted, CPU]
                # Its fallback would go on with other providers where one fails, at the start or in the middle.
                self._session = ort.InferenceSession(
                    str(path), options, providers=providers, disabled_optimizers=AS_WRITTEN, enable_fallback=0
                )
                given = self._session.get_inputs()[0]
                self._input = given.name
                self.takes: Takes = "uint8" if given.type == "tensor(uint8)" else "float32"
                self.provider = wanted if wanted == CPU else self._who_works(wanted, [batch, *given.shape[1:]])
            except DeviceError:
                raise
            except Exception as fault:  # onnxruntime raises a family of its own exceptions
                raise DeviceError(f"{path}: {self.version} refuses it: {_first_line(fault)}") from None

    def _who_works(self, wanted: str, shape: list[Any]) -> str:
        """Run once and look who did it; `wanted`, and how many nodes the CPU took besides.

        Raises:
            DeviceError: `wanted` took none. That an onnxruntime offers a provider does not say that it can do anything with this file.
        """
        took = {wanted: 0, CPU: 0}
        if wanted in self._session.get_providers():
            self._session.run(None, {self._input: np.zeros([n if isinstance(n, int) else 224 for n in shape], self.takes)})
        for event in json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8")):
            if event.get("cat") == "Node" and (provider := event.get("args", {}).get("provider")):
                took[provider] = took.get(provider, 0) + 1
        if not took[wanted]:
            raise DeviceError(
                f"{wanted} was asked for, and {self.version} lets the CPU do all of the work. Install what {wanted} needs, or use {CPU}."
            )
        return wanted if not took[CPU] else f"{wanted}, {took[CPU]} of {sum(took.values())} nodes on the CPU"

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

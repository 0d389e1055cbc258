"""TensorRT: one ONNX graph that says its own precision, fp32, fp16 or int8, built on the board that runs it.

int8 is explicit QDQ in TensorRT's form: symmetric int8 activations per tensor, symmetric int8 weights per channel, biases in float. A
second candidate keeps the first layers in float, where MobileNetV2 loses half of what it loses, a third those and squeeze-and-excite parts,
for EfficientNet-B0. No GPU has timed any.
TensorRT 11 knows only strongly typed networks, so precision must be in the graph; the same graph builds with TensorRT 10 and tensorrt_rtx.

Engines are never shipped. Where tensorrt or tensorrt_rtx is installed, the graph is parsed and built here for real; tensorrt_rtx needs
no GPU for that. Without a GPU nothing is run: accuracy is then that of the same graph in onnxruntime, and there is no latency.
Source: NVIDIA TensorRT documentation, "Working with Quantized Types".
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from edgecnn.device.cuda import Gpu
from edgecnn.device.spec import Artifact
from edgecnn.device.tensorrt import LIBRARIES, build_engine, load_tensorrt
from edgecnn.errors import DeviceError
from edgecnn.targets.base import Candidate, Source, Target
from edgecnn.targets.calibration import METHODS
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.qdq import Form, left_in_float

# Only what a convolution or matrix product reads, and what it adds before it rounds: TensorRT fuses the rest behind them.
FORM = Form("int8", symmetric=True, quantize_bias=False, outputs=False, sums=True, only=("Conv", "Gemm", "MatMul", "Add"))


class Tensorrt(Target):
    """An ONNX graph for TensorRT: Jetsons, and other machines with an NVIDIA GPU."""

    building: ClassVar[set[str]] = Target.building | {"compute_capability"}

    runtime: Literal["tensorrt"]
    compute_capability: str = Field(
        "86",
        pattern=r"^\d{2,3}$",
        description="GPU to build for as a check where there is none; tensorrt_rtx has 75, 80, 86, 89, 120, 121.",
    )

    def candidates(self) -> Sequence[Candidate]:
        how = {"calibrations": list(METHODS), "correct_bias": True}
        return [
            Candidate("fp32", "fp32", {}),
            Candidate("fp16", "fp16", {}),
            Candidate("int8", "int8", {**how, "float_se": False}),
            Candidate("int8-float-se", "int8", {**how, "float_se": True, "float_stem": True}),
            Candidate("int8-float-stem", "int8", {**how, "float_se": False, "float_stem": True}),
        ]

    def form(self) -> Form:
        return replace(FORM, weights=self.weights, keep_float=self.keep_float)

    def build(self, candidate: Candidate, source: Source, folder: Path) -> Artifact:
        with tempfile.TemporaryDirectory() as work:
            notes = []
            if candidate.precision == "int8":
                model = Path(work) / "model.onnx"
                notes = fit_qdq(
                    source,
                    model,
                    self.form(),
                    methods=candidate.how["calibrations"],
                    correct=candidate.how["correct_bias"],
                    exclude=left_in_float(source.onnx, self.form(), candidate.how),
                )
            else:
                model = source.onnx if candidate.precision == "fp32" else source.onnx_half()
            artifact = source.artifact(self, candidate, folder, {"model.onnx": model})
        return replace(artifact, notes=(*notes, self._built_here(folder / "model.onnx")))

    def missing(self) -> str | None:
        return None if find_spec("onnxruntime") else "onnxruntime is not installed here. Install it: pip install 'edgecnn[onnxruntime]'"

    def measured_as(self) -> str | None:
        return None if self.device or gpu_here() else "onnxruntime"

    def _built_here(self, model: Path) -> str:
        """Build the engine, throw it away, and say so; a refusal by TensorRT is an error."""
        if not any(find_spec(library) for library in LIBRARIES):
            return "not built here: neither tensorrt nor tensorrt_rtx is installed"
        tensorrt = load_tensorrt()
        if gpu_here():
            engine, where = build_engine(tensorrt, model), "this machine's GPU"
        elif tensorrt.package == "tensorrt_rtx":
            engine, where = (
                build_engine(tensorrt, model, compute_capability=self.compute_capability),
                f"compute capability {self.compute_capability}",
            )
        else:
            return f"not built here: {tensorrt.name} needs a GPU to build"
        return f"built by {tensorrt.name} for {where}: {len(engine) / 1e6:.2f} MB engine"


def gpu_here() -> bool:
    """Whether an NVIDIA driver with a GPU answers on this machine."""
    try:
        Gpu()
    except DeviceError:
        return False
    return True

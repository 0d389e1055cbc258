"""onnxruntime: fp32, and int8 as a QDQ graph in the form its fast kernels want.

int8 here is U8 activations (asymmetric) and S8 weights, per-channel symmetric: the form of the VNNI and ARM dot-product kernels. On x86
without VNNI those kernels add pairs in 16 bits and saturate, so weights are reduced to 7 bits there (`reduce_range`).

Ranges are chosen and biases corrected by `fit`. The first layers stay in float: a convolution of three channels takes its int8 kernel twice
the time of the float one. Squeeze-and-excite parts work on one position, so int8 gains nothing there and pays for the conversions: a
candidate of its own keeps them in float as well (benchmarks/int8.md).

Cost: seconds to a minute per candidate. Memory: histograms, not activations. Library: onnxruntime.quantization.
Sources: Jacob et al. 2018 (arXiv:1712.05877); onnxruntime documentation, "Quantize ONNX models".
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgecnn.device.spec import Artifact
from edgecnn.targets.base import Candidate, Source, Target
from edgecnn.targets.calibration import METHODS
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.qdq import Form, left_in_float, saturates

# What its CPU provider has integer kernels for; HardSwish is written as an addition and a product.
KERNELS = (
    "Add",
    "AveragePool",
    "Concat",
    "Conv",
    "Flatten",
    "Gemm",
    "GlobalAveragePool",
    "HardSwish",
    "MatMul",
    "MaxPool",
    "Mul",
    "ReduceMean",
    "Reshape",
    "Sigmoid",
    "Transpose",
)


class Onnxruntime(Target):
    """One ONNX file for onnxruntime's CPU provider, on x86-64 and ARM."""

    runtime: Literal["onnxruntime"]
    reduce_range: bool | None = Field(None, description="7-bit weights, for x86 without VNNI. Left out: decided by this machine's CPU.")

    def candidates(self) -> Sequence[Candidate]:
        how = {"calibrations": list(METHODS), "correct_bias": True, "reduce_range": self.form().reduce_range}
        int8 = [Candidate(name, "int8", {**how, "float_se": name == "int8-float-se"}) for name in ("int8", "int8-float-se")]
        return [Candidate("fp32", "fp32", {}), *int8]

    def form(self) -> Form:
        reduced = self.reduce_range if self.reduce_range is not None else saturates()
        return Form(
            "uint8",
            symmetric=False,
            quantize_bias=True,
            outputs=True,
            sums=False,
            only=KERNELS,
            reduce_range=reduced,
            weights=self.weights,
            float_stem=True,
            keep_float=self.keep_float,
        )

    def build(self, candidate: Candidate, source: Source, folder: Path) -> Artifact:
        if candidate.precision == "fp32":
            return source.artifact(self, candidate, folder, {"model.onnx": source.onnx})
        with tempfile.TemporaryDirectory() as work:
            model = Path(work) / "model.onnx"
            how = candidate.how
            notes = fit_qdq(
                source,
                model,
                self.form(),
                methods=how["calibrations"],
                correct=how["correct_bias"],
                exclude=left_in_float(source.onnx, self.form(), how),
            )
            if how["reduce_range"]:
                notes = [*notes, "weights reduced to 7 bits: this CPU has no VNNI"]
            return source.artifact(self, candidate, folder, {"model.onnx": model}, notes=notes)

    def missing(self) -> str | None:
        return None if find_spec("onnxruntime") else "onnxruntime is not installed here. Install it: pip install 'edgecnn[onnxruntime]'"

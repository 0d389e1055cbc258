"""onnxruntime: fp32, and int8 as a QDQ graph in the form its fast kernels want.

int8 here is U8 activations (asymmetric) and S8 weights, per-channel symmetric: the form of the VNNI and ARM dot-product kernels. On x86
without VNNI those kernels add pairs in 16 bits and saturate, so weights are reduced to 7 bits there (`reduce_range`).

Cost: one pass over the calibration images per candidate. Memory: histograms, not activations. Library: onnxruntime.quantization.
Sources: Jacob et al. 2018 (arXiv:1712.05877); onnxruntime documentation, "Quantize ONNX models".
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgecnn.device.machine import instruction_sets
from edgecnn.device.spec import Artifact
from edgecnn.targets.base import Candidate, Source, Target
from edgecnn.targets.calibration import ranges
from edgecnn.targets.qdq import write_qdq

CONV = ["Conv", "Gemm", "MatMul"]
ALL = [
    *CONV,
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "GlobalAveragePool",
    "MaxPool",
    "Mul",
    "ReduceMean",
    "Relu",
    "Reshape",
    "Sigmoid",
    "Transpose",
]


class Onnxruntime(Target):
    """One ONNX file for onnxruntime's CPU provider, on x86-64 and ARM."""

    runtime: Literal["onnxruntime"]
    reduce_range: bool | None = Field(None, description="7-bit weights, for x86 without VNNI. Left out: decided by this machine's CPU.")

    def candidates(self) -> Sequence[Candidate]:
        reduced = self.reduce_range if self.reduce_range is not None else saturates()
        int8 = [
            Candidate(f"int8-{calibration}", "int8", {"calibration": calibration, "reduce_range": reduced, "only": ALL})
            for calibration in ("minmax", "percentile", "mse")
        ]
        int8.append(Candidate("int8-conv", "int8", {"calibration": "percentile", "reduce_range": reduced, "only": CONV}))
        return [Candidate("fp32", "fp32", {}), *int8]

    def build(self, candidate: Candidate, source: Source, folder: Path) -> Artifact:
        if candidate.precision == "fp32":
            return source.artifact(self, candidate, folder, {"model.onnx": source.onnx})
        with tempfile.TemporaryDirectory() as work:
            model = Path(work) / "model.onnx"
            how = dict(candidate.how)
            chosen = ranges(source.histograms(), how.pop("calibration"), symmetric=False)
            write_qdq(source.onnx, model, chosen, activations="uint8", symmetric=False, quantize_bias=True, **how)
            notes = ["weights reduced to 7 bits: this CPU has no VNNI"] if how["reduce_range"] else []
            return source.artifact(self, candidate, folder, {"model.onnx": model}, notes=notes)

    def missing(self) -> str | None:
        return None if find_spec("onnxruntime") else "onnxruntime is not installed here. Install it: pip install 'edgecnn[onnxruntime]'"


def saturates() -> bool:
    """Whether this CPU's int8 kernels add pairs in 16 bits and so need 7-bit weights: x86-64 without VNNI."""
    return platform.machine() in ("x86_64", "AMD64") and not {"avx512_vnni", "avx_vnni"} & set(instruction_sets())

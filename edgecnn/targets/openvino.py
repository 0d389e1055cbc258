"""OpenVINO: fp32, fp16 weights, bf16 arithmetic, and int8 by NNCF's post-training quantization or from the QDQ graph of our own fit.

NNCF's int8 uses its mixed preset (symmetric weights, asymmetric activations), per channel where OpenVINO's kernels have it. Bias is
corrected, in the fast way or fully, layer by layer (full costs minutes and rescues MobileNetV3-like models). Library: nncf.
Sources: NNCF documentation, "Post-training quantization"; Nagel et al. 2019 (arXiv:1906.04721) for bias correction.

Precision at run time is always stated: without INFERENCE_PRECISION_HINT, OpenVINO silently runs an fp32 file in bf16 on CPUs that have it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgecnn.device.machine import instruction_sets
from edgecnn.device.preprocess import normalise
from edgecnn.device.profile import layer_names
from edgecnn.device.quiet import signal_stack_kept, silence_openvino
from edgecnn.device.spec import Artifact
from edgecnn.screen import hushed
from edgecnn.targets.base import Candidate, Effort, Source, Target
from edgecnn.targets.calibration import METHODS
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.preprocess_graph import openvino_take_pixels
from edgecnn.targets.qdq import Form, kept_in_float, left_in_float, saturates

# What takes integers; OpenVINO computes activation functions in float behind a convolution, and rounds once, where the next one reads.
KERNELS = ("Add", "AveragePool", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "Mul", "ReduceMean")


class Openvino(Target):
    """OpenVINO IR, for Intel CPUs, GPUs and NPUs, and ARM CPUs."""

    runtime: Literal["openvino"]

    def candidates(self) -> Sequence[Candidate]:
        def quickly(*asked: str) -> Effort:
            """At `effort: quick` too, where it may ship; for comparison fp32 is enough there."""
            return "quick" if self.precision in asked else "normal"

        every = [
            Candidate("fp32", "fp32", {"compress": False, "hint": "f32"}),
            # Smaller than fp32 and as fast: the arithmetic is the same.
            Candidate("fp16", "fp16", {"compress": True, "hint": "f32"}, quickly("fp16")),
        ]
        if {"avx512_bf16", "amx_bf16", "bf16"} & set(instruction_sets()):
            every.append(Candidate("bf16", "bf16", {"compress": True, "hint": "bf16"}, quickly("auto", "bf16")))
        how = {"hint": "f32", "calibrations": list(METHODS), "correct_bias": True, "reduce_range": saturates()}
        every += [
            Candidate("int8-qdq", "int8", {**how, "float_se": False}),
            Candidate("int8-qdq-float-se", "int8", {**how, "float_se": True}),
            Candidate("int8-fast-bc", "int8", {"hint": "f32", "fast_bias_correction": True}, "normal"),
            Candidate("int8-full-bc", "int8", {"hint": "f32", "fast_bias_correction": False}, "normal"),
        ]
        return every

    def form(self) -> Form:
        return Form(
            "uint8",
            symmetric=False,
            quantize_bias=False,
            outputs=False,
            sums=True,
            only=KERNELS,
            reduce_range=saturates(),
            weights=self.weights,
            keep_float=self.keep_float,
            channels=True,
        )

    def build(self, candidate: Candidate, source: Source, folder: Path) -> Artifact:
        silence_openvino()
        import openvino as ov

        with tempfile.TemporaryDirectory() as work, hushed():
            notes: list[str] = []
            graph = source.onnx
            if "calibrations" in candidate.how:
                graph = Path(work) / "qdq.onnx"
                notes = fit_qdq(
                    source,
                    graph,
                    self.form(),
                    methods=candidate.how["calibrations"],
                    correct=candidate.how["correct_bias"],
                    exclude=left_in_float(source.onnx, self.form(), candidate.how),
                )
            model = ov.convert_model(str(graph))
            _name_weights(model, layer_names(graph))
            compress = candidate.how.get("compress", False)
            if "fast_bias_correction" in candidate.how:
                kept = kept_in_float(source.onnx, self.keep_float)
                model = _quantize(model, source, kept, fast_bias_correction=candidate.how["fast_bias_correction"])
            xml = Path(work) / "model.xml"
            if self.input == "uint8":
                model = openvino_take_pixels(model, self.file_input(source.input))
            ov.save_model(model, xml, compress_to_fp16=compress)
            _strip(xml)
            files = {"model.xml": xml, "model.bin": xml.with_suffix(".bin")}
            return source.artifact(self, candidate, folder, files, options={"INFERENCE_PRECISION_HINT": candidate.how["hint"]}, notes=notes)

    def missing(self) -> str | None:
        if not find_spec("openvino"):
            return "openvino is not installed here. Install it: pip install 'edgecnn[openvino]'"
        return None if find_spec("nncf") else "nncf is not installed here. Install it: pip install 'edgecnn[host]'"


def _name_weights(model: Any, layers: Mapping[str, str]) -> None:
    """Call depthwise weights by their layers again, given by node: the converter makes new ones, and a profile tells layers by them."""
    for op in model.get_ops():
        layer = layers.get(op.get_friendly_name().removesuffix("/WithoutBiases"))
        if layer and op.get_type_name() == "GroupConvolution" and op.input_value(1).get_node().get_type_name() == "Constant":
            op.input_value(1).get_node().set_friendly_name(f"{layer}.weight")


def _named(model: Any, nodes: Collection[str]) -> list[str]:
    """The operations that the converter made of ONNX `nodes`; what it folded away has none, and a bias is an operation of its own."""
    names = [op.get_friendly_name() for op in model.get_ops()]
    return [name for name in names if name.removesuffix("/WithoutBiases") in set(nodes)]


@signal_stack_kept()
def _quantize(model: Any, source: Source, kept: Collection[str], *, fast_bias_correction: bool) -> Any:
    import nncf

    images = source.calibration

    def tensor(i: int) -> np.ndarray:
        return normalise(images.images[i : i + 1], source.input)

    return nncf.quantize(
        model,
        nncf.Dataset(range(len(images.labels)), tensor),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images.labels),
        ignored_scope=nncf.IgnoredScope(names=_named(model, kept)),
        fast_bias_correction=fast_bias_correction,
    )


def _strip(xml: Path) -> None:
    """Take out what changes the digest and not the result.

    `rt_info` of the whole model holds conversion arguments with local paths; names such as Reshape_8263 hold the number of objects that
    OpenVINO has made in this process, and are numbered anew.
    """
    import xml.etree.ElementTree as tree

    document = tree.parse(xml)
    root = document.getroot()
    for info in root.findall("rt_info"):
        root.remove(info)
    numbered: dict[str, str] = {}
    for layer in root.iter("layer"):
        name = layer.get("name", "")
        layer.set("name", re.sub(r"\b([A-Z][A-Za-z]*)_\d+(?!\d)", lambda m: numbered.setdefault(m[0], f"{m[1]}_{len(numbered)}"), name))
    document.write(xml, encoding="utf-8", xml_declaration=True)

"""What rounding the weights costs, and what rounding the activations costs: the most that a better rounding of weights could win.

    python benchmarks/int8_parts.py OUT NAME ...          # from the folders that int8_prepare.py made

Each model in onnxruntime's and in TensorRT's form, with the ranges that `fit` chooses and biases as they are: the whole file, the same with
float activations, and the same with float weights. Divergence and agreement with the float model on the evaluation images.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from int8_accuracy import TARGETS, source_of

from edgecnn.device.packed import open_packed
from edgecnn.targets.calibration import METHODS
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.sensitivity import divergence, logits


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        folder = out / name
        source, evaluation = source_of(folder), open_packed(folder / "evaluation")
        wanted = np.load(folder / "float-evaluation.npy")
        for runtime in ("onnxruntime", "tensorrt"):
            form = TARGETS[runtime].model_validate({"name": runtime, "runtime": runtime}).form()
            assert form is not None
            with tempfile.TemporaryDirectory() as work:
                path = Path(work) / "q.onnx"
                fit_qdq(source, path, replace(form, quantize_bias=False), methods=list(METHODS), correct=False)
                told = []
                for part in ("both", "weights", "activations"):
                    graph = Path(work) / f"{part}.onnx"
                    keep_only(part, source.onnx, path, graph)
                    found = logits(graph, evaluation, source.input, len(evaluation))
                    agreement = (found.argmax(1) == wanted.argmax(1)).mean()
                    change = 100 * float((found.argmax(1) == evaluation.labels).mean() - (wanted.argmax(1) == evaluation.labels).mean())
                    told.append(f"{part} {divergence(wanted, found):.4f}, {agreement:.2%}, {change:+.2f}")
            print(f"{name} {runtime}: {'; '.join(told)}", flush=True)


def keep_only(part: str, model: Path, quantized: Path, path: Path) -> None:
    """Write `quantized` to `path` with only its weights, or only its activations, in int8, or as it is."""
    graph = onnx.load(str(quantized))
    floats = {i.name: i for i in onnx.load(str(model)).graph.initializer}
    back = {}
    for node in graph.graph.node:
        if node.op_type == "QuantizeLinear" and part == "weights":
            back[node.input[0] + "_DequantizeLinear_Output"] = node.input[0]
        name = node.output[0].removesuffix("_DequantizeLinear_Output")
        if node.op_type == "DequantizeLinear" and name in floats and part == "activations":
            back[node.output[0]] = name
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = back.get(name, name)
    used = {name for node in graph.graph.node for name in node.input} | {o.name for o in graph.graph.output}
    kept = [n for n in graph.graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear") or n.output[0] in used]
    used = {name for node in kept for name in node.input}
    kept = [n for n in kept if n.op_type != "QuantizeLinear" or n.output[0] in used]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)
    there = {i.name for i in graph.graph.initializer}
    graph.graph.initializer.extend(floats[name] for name in back.values() if name in floats and name not in there)
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString())


if __name__ == "__main__":
    main()

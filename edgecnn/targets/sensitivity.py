"""Which layers quantization hurts: the signal-to-noise ratio of each layer's output, float against the QDQ graph, on the same images.

Errors add up on the way, so the layer to blame is not the one with the least ratio but the one where it falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise
from edgecnn.device.spec import InputSpec

IMAGES = 16
SOUND_DB = 40.0  # of one tensor rounded to 8 bits, about


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product.

    Attributes:
        sqnr_db: 10 log10(signal power / error power) of its output.
        lost_db: how much less that is than the least of the layers before it; the first is held against `SOUND_DB`.
        low: end of its float output; `high` likewise.
    """

    name: str
    sqnr_db: float
    lost_db: float
    low: float
    high: float


def worst_layers(model: Path, quantized: Path, images: Packed, spec: InputSpec) -> list[Layer]:
    """All layers, the one where the signal-to-noise ratio falls most first: there the error comes in that all later ones inherit.

    Args:
        model: the float graph that the QDQ graph `quantized` was made from; layers are matched by name.
        quantized: the QDQ graph.
        images: the first `IMAGES` are used.
        spec: preprocessing.
    """
    import onnx
    import onnxruntime as ort

    def opened(path: Path, names: list[str]) -> tuple[ort.InferenceSession, list[str]]:
        graph = onnx.load(str(path))
        outputs = {node.name: node.output[0] for node in graph.graph.node}
        wanted = [outputs[name] for name in names]
        kept = {o.name for o in graph.graph.output}
        graph.graph.output.extend(onnx.helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None) for t in wanted if t not in kept)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"]), wanted

    there = {node.name for node in onnx.load(str(quantized)).graph.node}
    nodes = onnx.load(str(model)).graph.node
    layers = [node.name for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul") and node.name in there]
    (before, names), (after, renamed) = opened(model, layers), opened(quantized, layers)
    given = before.get_inputs()[0].name
    signal, noise = np.zeros(len(layers)), np.zeros(len(layers))
    low, high = np.full(len(layers), np.inf), np.full(len(layers), -np.inf)
    for i in range(min(IMAGES, len(images))):
        x = {given: normalise(images.images[i : i + 1], spec)}
        for k, (a, b) in enumerate(zip(before.run(names, x), after.run(renamed, x), strict=True)):
            signal[k] += float(np.square(a, dtype=np.float64).sum())
            noise[k] += float(np.square(a - b, dtype=np.float64).sum())
            low[k], high[k] = min(low[k], float(a.min())), max(high[k], float(a.max()))
    tiny = np.finfo(np.float64).tiny
    sqnr = 10 * np.log10(np.maximum(signal, tiny) / np.maximum(noise, tiny))
    least = np.minimum.accumulate([SOUND_DB, *sqnr])[:-1]
    rows = zip(layers, sqnr.tolist(), (least - sqnr).tolist(), low.tolist(), high.tolist(), strict=True)
    return sorted((Layer(*row) for row in rows), key=lambda layer: -layer.lost_db)

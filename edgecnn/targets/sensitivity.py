"""Which layers quantization hurts: the signal-to-noise ratio of each layer's output, float against the QDQ graph, on the same images.

Errors add up on the way, so the layer to blame is not the one with the least ratio but the one where it falls. `costs` takes every layer
alone as well: the network with that layer in int8 and all others in float, and how many images change their class by it.

Cost: a graph written and a few images run for each layer: seconds for a small network, half a minute for MobileNetV2 at 224 px.
Library: onnxruntime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecnn.cores import each
from edgecnn.device.evaluate import softmax
from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise
from edgecnn.device.profile import layer_of
from edgecnn.device.spec import InputSpec
from edgecnn.targets.calibration import Range
from edgecnn.targets.qdq import WEIGHTED, Form, ranges_of, write_qdq

IMAGES = 16
ALONE_IMAGES = 32
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


@dataclass(frozen=True)
class Cost:
    """What a layer loses in int8.

    Attributes:
        name: by its weights, as in the torch model.
        node: as the ONNX graph calls it.
        operator: ONNX operator type.
        sqnr_db: signal-to-noise ratio of its output, with all layers in int8.
        lost_db: how much less that is than the least before it.
        flips: share of `ALONE_IMAGES` calibration images that change their class when this layer alone is int8.
        divergence: mean Kullback-Leibler divergence of the class probabilities then, in nats.
    """

    name: str
    node: str
    operator: str
    sqnr_db: float
    lost_db: float
    flips: float
    divergence: float


def costs(model: Path, quantized: Path, form: Form, images: Packed, spec: InputSpec) -> list[Cost]:
    """All layers that `quantized` has in int8, in the order of the graph; its ranges are those of the layers alone.

    Args:
        model: the float graph.
        quantized: its QDQ graph in `form`.
        form: of the graphs with one layer in int8.
        images: of calibration.
        spec: preprocessing.
    """
    import onnx

    nodes = {node.name: node for node in onnx.load(str(model)).graph.node}
    found = {layer.name: layer for layer in worst_layers(model, quantized, images, spec)}
    made: Mapping[str, Range] = ranges_of(quantized, form)
    every = [name for name, node in nodes.items() if node.op_type in form.only]
    wanted = logits(model, images, spec, ALONE_IMAGES)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "alone.onnx"
        for name in (n for n in every if n in found):
            write_qdq(model, path, made, form, [n for n in every if n != name])
            got = logits(path, images, spec, ALONE_IMAGES)
            flips = float((got.argmax(1) != wanted.argmax(1)).mean())
            node, layer = nodes[name], found[name]
            label = layer_of(node.input[1])
            rows.append(Cost(label, name, node.op_type, layer.sqnr_db, layer.lost_db, flips, divergence(wanted, got)))
    return rows


def parts(model: Path) -> dict[str, str]:
    """For each node and each tensor of the float graph, by name, the layer that it belongs to: the nearest one with weights before it.

    So an activation function, a pooling or an addition counts for the layer that it follows.
    """
    import onnx

    graph = onnx.load(str(model)).graph
    constants = {i.name for i in graph.initializer}
    order: dict[str, int] = {}
    of: dict[str, str] = {i.name: "" for i in graph.input}
    for i, node in enumerate(graph.node):
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in constants:
            layer = layer_of(node.input[1])
            order[layer] = i
        else:
            layer = max((of[name] for name in node.input if name in of), key=lambda name: order.get(name, -1), default="")
        of |= dict.fromkeys([node.name, *node.output], layer)
    return of


def nodes_of(model: Path, layers: Collection[str]) -> list[str]:
    """The nodes of the float graph that belong to `layers`, in its order."""
    import onnx

    of = parts(model)
    return [node.name for node in onnx.load(str(model)).graph.node if of[node.name] in layers]


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
    sqnr = 10 * (np.log10(np.maximum(signal, tiny)) - np.log10(np.maximum(noise, tiny)))  # no ratio: a layer without noise overflows it
    least = np.minimum.accumulate([SOUND_DB, *sqnr])[:-1]
    rows = zip(layers, sqnr.tolist(), (least - sqnr).tolist(), low.tolist(), high.tolist(), strict=True)
    return sorted((Layer(*row) for row in rows), key=lambda layer: -layer.lost_db)


def logits(model: Path, images: Packed, spec: InputSpec, most: int) -> np.ndarray:
    """Of the first `most` images, N x classes, by onnxruntime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def one(i: int) -> np.ndarray:
        found: np.ndarray = session.run(None, {given.name: normalise(images.images[i : i + 1], spec)})[0]
        return found

    return np.concatenate(each(one, min(most, len(images))))


def divergence(wanted: np.ndarray, found: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the classes' probabilities, in nats, from logits N x classes; 0 is equal."""
    p, q = softmax(wanted.astype(np.float64)), softmax(found.astype(np.float64))
    tiny = np.finfo(np.float64).tiny
    return float((p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(1).mean())

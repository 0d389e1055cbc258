"""A QDQ graph keeps the laws of quantization, on every Q/DQ pair and every weight of a real graph."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from tiny import SPEC, images, pack, source

from edgecnn.device.preprocess import normalise
from edgecnn.device.runtimes.ov import OpenvinoRunner
from edgecnn.errors import ModelError
from edgecnn.fake_quant import FakeQuantized
from edgecnn.targets.calibration import ENOUGH, collect, ranges, read_histograms, write_histograms
from edgecnn.targets.onnxruntime import KERNELS
from edgecnn.targets.openvino import Openvino
from edgecnn.targets.qdq import Form, kept_in_float, ranges_of, write_qdq
from edgecnn.targets.tensorrt import FORM

FORMS = {
    "onnxruntime": Form("uint8", False, quantize_bias=True, outputs=True, sums=False, only=KERNELS),
    "openvino": Openvino(name="nuc", runtime="openvino").form(),
    "tensorrt": FORM,
}


def write(folder: Path, path: Path, form: str, exclude: Collection[str] = (), **changes: Any) -> onnx.ModelProto:
    changed = replace(FORMS[form], **changes)
    chosen = ranges(source(folder).histograms(), "minmax", symmetric=changed.symmetric)
    write_qdq(folder / "model.onnx", path, chosen, changed, exclude)
    return onnx.load(str(path))


def constants(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}


@pytest.mark.parametrize("form", FORMS)
def test_rounding_costs_at_most_half_a_scale(tiny_folder: Path, tmp_path: Path, form: str) -> None:
    """Within the range of each Q/DQ pair, x and what comes back differ by at most scale / 2; outside it comes back as the nearest end."""
    graph = write(tiny_folder, tmp_path / "q.onnx", form)
    values, seen = constants(graph), 0
    taken = {name: node for node in graph.graph.node for name in node.input}
    for q in (node for node in graph.graph.node if node.op_type == "QuantizeLinear"):
        dq = taken[q.output[0]]
        assert dq.op_type == "DequantizeLinear"
        assert list(q.input[1:]) == list(dq.input[1:]), "Q and DQ share their scale and zero point"
        scale, zero = float(values[q.input[1]]), values[q.input[2]]
        ends = (np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max)
        low, high = ((end - int(zero)) * scale for end in ends)
        assert low <= 0 <= high
        x = np.concatenate([np.linspace(low, high, 10_001), [low * 3 - 1, high * 3 + 1]]).astype(np.float32)
        back = _run(graph, q, dq, x)
        assert np.abs(back - x)[:-2].max() <= scale / 2 * (1 + 1e-3)
        np.testing.assert_allclose(back[-2:], [low, high], rtol=1e-5, atol=1e-7)
        assert _run(graph, q, dq, np.zeros(1, np.float32))[0] == 0, "zero is exact, for padding and ReLU"
        seen += 1
    assert seen >= 4


def test_hard_swish_in_integers_is_within_half_a_step_of_its_gate(tmp_path: Path) -> None:
    """Of all 256 inputs, x * gate differs from the float HardSwish by at most |x| times half of the gate's step, 1 / 255."""
    value = helper.make_tensor_value_info
    node = helper.make_node("HardSwish", ["input"], ["logits"], "swish")
    model = helper.make_model(
        helper.make_graph([node], "swish", [value("input", 1, ["n"])], [value("logits", 1, ["n"])]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    form = FORMS["onnxruntime"]
    write_qdq(tmp_path / "model.onnx", tmp_path / "q.onnx", {"input": (-5.0, 7.75)}, form)
    session = ort.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
    x = ((np.arange(256) - 100) * np.float32(0.05)).astype(np.float32)
    got = session.run(None, {"input": x})[0]
    assert np.all(np.abs(got - x * np.clip(x / 6 + 0.5, 0, 1)) <= np.abs(x) * 0.5 / 255 * (1 + 1e-3) + 1e-6)
    assert {n.op_type for n in onnx.load(str(tmp_path / "q.onnx")).graph.node} == {"QuantizeLinear", "DequantizeLinear", "Add", "Mul"}


def test_training_simulates_hard_swish_in_integers(tmp_path: Path) -> None:
    """What qat trains through is what onnxruntime computes, with the rounding inside HardSwish, whose scales are not learned."""
    value, weight = helper.make_tensor_value_info, np.random.default_rng(0).normal(0, 1, (4, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["between"], "conv"),
        helper.make_node("HardSwish", ["between"], ["swished"], "swish"),
        helper.make_node("GlobalAveragePool", ["swished"], ["logits"], "pool"),
    ]
    graph = helper.make_graph(
        nodes,
        "swish",
        [value("input", 1, [1, 3, 8, 8])],
        [value("logits", 1, [1, 4, 1, 1])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    form = FORMS["onnxruntime"]
    # No round steps, whose ties each side breaks as it likes.
    ranges = {"input": (-2.0, 2.0), "between": (-5.03, 4.91), "swished": (-0.375, 4.83)}
    write_qdq(tmp_path / "model.onnx", tmp_path / "q.onnx", ranges, form)
    simulated = FakeQuantized(tmp_path / "model.onnx", [tmp_path / "q.onnx"], ["w"])
    assert simulated.ranges(0).keys() == ranges.keys()
    x = np.random.default_rng(1).uniform(-2, 2, (1, 3, 8, 8)).astype(np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (wanted,) = ort.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"]).run(None, {"input": x})
    with torch.no_grad():
        found = simulated.eval()(torch.from_numpy(x)).numpy()
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_training_rounds_weights_and_biases_as_the_file_does(tmp_path: Path, form: str) -> None:
    """Weights halfway between two steps too: a weight that goes to another step in training shifts a whole channel of what is trained."""
    value, rng = helper.make_tensor_value_info, np.random.default_rng(0)
    most = rng.uniform(0.01, 3, (16, 1)).astype(np.float32)
    weight = np.hstack([most, ((rng.integers(-120, 120, (16, 63)) + 0.5) * (most / 127)).astype(np.float32)])
    bias = rng.normal(0, 100, 16).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "w", "b"], ["logits"], "conv")],
        "ties",
        [value("input", 1, [1, 64, 1, 1])],
        [value("logits", 1, [1, 16, 1, 1])],
        [numpy_helper.from_array(weight[..., None, None], "w"), numpy_helper.from_array(bias, "b")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    write_qdq(tmp_path / "model.onnx", tmp_path / "q.onnx", {"input": (-0.93, 1.71)}, FORMS[form])
    simulated = FakeQuantized(tmp_path / "model.onnx", [tmp_path / "q.onnx"], ["w", "b"])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
    for i in range(64):  # one weight of each channel at a time, off the halfway points of the input
        x = np.zeros((1, 64, 1, 1), np.float32)
        x[0, i] = 1.7
        with torch.no_grad():
            found = simulated.eval()(torch.from_numpy(x)).numpy().ravel()
        np.testing.assert_allclose(found, session.run(None, {"input": x})[0].ravel(), rtol=1e-5, atol=most.min() / 127 / 10)


def test_what_a_depthwise_convolution_reads_has_a_scale_a_channel(tmp_path: Path) -> None:
    """Channels a hundred times apart are rounded to their own ranges; file, training and OpenVINO then compute the same."""
    value, rng = helper.make_tensor_value_info, np.random.default_rng(0)
    weights = {
        "w": rng.normal(0, 1, (8, 3, 3, 3)) * np.array([1e-40, *np.geomspace(0.01, 1, 7)])[:, None, None, None],  # the first is dead
        "dw": rng.normal(0, 1, (8, 1, 3, 3)) * np.array([1, *np.geomspace(100, 1, 7)])[:, None, None, None],
        "pw": rng.normal(0, 1, (4, 8, 1, 1)),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w"], ["wide"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("HardSwish", ["wide"], ["swished"], "swish"),
            helper.make_node("Conv", ["swished", "dw"], ["deep"], "depthwise", pads=[1, 1, 1, 1], group=8),
            helper.make_node("Conv", ["deep", "pw"], ["narrow"], "pointwise"),
            helper.make_node("GlobalAveragePool", ["narrow"], ["pooled"], "pool"),
            helper.make_node("Flatten", ["pooled"], ["logits"], "flatten"),
        ],
        "depthwise",
        [value("input", 1, [1, 3, 16, 16])],
        [value("logits", 1, [1, 4])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    histograms = collect(tmp_path / "model.onnx", pack(tmp_path / "images", ENOUGH, seed=3), SPEC)
    assert [name for name, h in histograms.items() if h.channels is not None] == ["swished"]
    write_histograms(tmp_path / "h.npz", histograms)
    np.testing.assert_array_equal(read_histograms(tmp_path / "h.npz")["swished"].channels, histograms["swished"].channels)

    x = normalise(images(64, seed=7)[0], SPEC) + np.float32(1e-4)
    found = {}
    for channels in (False, True):
        path, form = tmp_path / f"{channels}.onnx", replace(FORMS["openvino"], channels=channels)
        write_qdq(tmp_path / "model.onnx", path, ranges(histograms, "minmax", symmetric=False, channels=channels), form)
        found[channels] = _unfused(path, x)
    values = constants(onnx.load(str(tmp_path / "True.onnx")))
    assert values["swished_scale"].shape == values["swished_zero_point"].shape == (8,)
    wanted = _unfused(tmp_path / "model.onnx", x)
    apart = {channels: float(np.abs(y - wanted).mean()) for channels, y in found.items()}
    assert apart[True] < apart[False] / 2, apart

    simulated = FakeQuantized(tmp_path / "model.onnx", [tmp_path / "True.onnx"], list(weights))
    with torch.no_grad():
        np.testing.assert_allclose(simulated.eval()(torch.from_numpy(x)).numpy(), found[True], atol=apart[True])
    again = simulated.ranges(0)
    write_qdq(tmp_path / "model.onnx", tmp_path / "again.onnx", json.loads(json.dumps(again)), FORMS["openvino"])
    np.testing.assert_allclose(ranges_of(tmp_path / "again.onnx", FORMS["openvino"])["swished"], again["swished"], rtol=1e-5, atol=1e-6)
    with OpenvinoRunner(tmp_path / "True.onnx", threads=1, device=None, batch=1, options={"INFERENCE_PRECISION_HINT": "f32"}) as runner:
        seen = np.concatenate([runner.infer(x[i : i + 1]) for i in range(len(x))])
    assert float(np.abs(seen - found[True]).mean()) < apart[True] / 3


def _unfused(path: Path, x: np.ndarray) -> np.ndarray:
    """What the graph says, node by node, one image at a time."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": x[i : i + 1]})[0] for i in range(len(x))])


def _run(graph: onnx.ModelProto, q: onnx.NodeProto, dq: onnx.NodeProto, x: np.ndarray) -> np.ndarray:
    """The pair alone, in onnxruntime."""
    value = helper.make_tensor_value_info
    needed = [i for i in graph.graph.initializer if i.name in q.input]
    pair = helper.make_graph([q, dq], "pair", [value(q.input[0], 1, ["n"])], [value(dq.output[0], 1, ["n"])], needed)
    model = helper.make_model(pair, opset_imports=graph.opset_import, ir_version=graph.ir_version)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    back: np.ndarray = session.run(None, {q.input[0]: x})[0]
    return back


@pytest.mark.parametrize("reduce_range", [False, True], ids=["8-bit", "7-bit"])
@pytest.mark.parametrize("form", FORMS)
def test_each_channel_of_each_weight_is_within_half_a_scale(tiny_folder: Path, tmp_path: Path, form: str, reduce_range: bool) -> None:
    """Every weight comes back within scale / 2 of its channel, and with 7 bits none is beyond 64."""
    graph = write(tiny_folder, tmp_path / "q.onnx", form, reduce_range=reduce_range)
    floats, values, seen = constants(onnx.load(str(tiny_folder / "model.onnx"))), constants(graph), 0
    for node in graph.graph.node:
        if node.op_type != "DequantizeLinear" or values.get(node.input[0], np.zeros(0)).ndim < 2:
            continue
        integers, scale = values[node.input[0]], values[node.input[1]]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        assert integers.dtype == np.int8
        assert len(scale) == integers.shape[axis]
        scale = scale.reshape([-1 if i == axis else 1 for i in range(integers.ndim)])
        # Of several floats of that shape, the one it was made from is the closest.
        alike = [v for v in floats.values() if v.shape == integers.shape]
        error = min(float((np.abs(integers * scale - v) / scale).max()) for v in alike)
        assert error <= 0.5 * (1 + 1e-3)
        assert np.abs(integers.astype(int)).max() <= (64 if reduce_range else 127)
        seen += 1
    assert seen == 4, "three convolutions and the linear layer"


@pytest.mark.parametrize("form", FORMS)
def test_excluded_nodes_stay_in_float(tiny_folder: Path, tmp_path: Path, form: str) -> None:
    """A convolution that is excluded has float weights and its neighbours have not; the result is closer to the float one."""
    float_graph = onnx.load(str(tiny_folder / "model.onnx"))
    names = [node.name for node in float_graph.graph.node if node.op_type == "Conv"]
    graph = write(tiny_folder, tmp_path / "q.onnx", form, exclude=[names[0]])
    values = constants(graph)
    kept = {node.name: node.input[1] in values for node in graph.graph.node if node.op_type == "Conv"}
    assert [kept[name] for name in names] == [True, False, False]


@pytest.mark.parametrize("form", FORMS)
def test_only_the_named_operators_are_quantized(tiny_folder: Path, tmp_path: Path, form: str) -> None:
    """With `only: [Gemm]` the linear layer has Q/DQ around it and no convolution has."""
    graph = write(tiny_folder, tmp_path / "q.onnx", form, only=("Gemm",))
    made = {output: node.op_type for node in graph.graph.node for output in node.output}
    assert {made.get(node.input[1]) for node in graph.graph.node if node.op_type == "Conv"} == {None}
    assert {made.get(node.input[1]) for node in graph.graph.node if node.op_type == "Gemm"} == {"DequantizeLinear"}


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_is_valid_and_its_input_and_output_are_the_float_ones(tiny_folder: Path, tmp_path: Path, form: str) -> None:
    """onnx's full check passes; input and output keep name, type and free batch; written twice, the bytes are equal."""
    graph = write(tiny_folder, tmp_path / "q.onnx", form)
    onnx.checker.check_model(graph, full_check=True)
    before = onnx.load(str(tiny_folder / "model.onnx"))
    for got, wanted in zip([*graph.graph.input, *graph.graph.output], [*before.graph.input, *before.graph.output], strict=True):
        assert (got.name, got.type) == (wanted.name, wanted.type)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim[1:]] == list(SPEC.shape)
    write(tiny_folder, tmp_path / "again.onnx", form)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()


def test_layers_are_pinned_to_float_by_name_pattern_and_by_type(tiny_folder: Path) -> None:
    """A pattern of names and an operator type find their nodes; one that matches nothing is refused with what there is."""
    model = tiny_folder / "model.onnx"
    nodes = list(onnx.load(str(model)).graph.node)
    convolutions = [node.name for node in nodes if node.op_type == "Conv"]
    assert len(convolutions) == 3
    assert kept_in_float(model, ["Conv"]) == convolutions
    assert kept_in_float(model, [f"{convolutions[0][:-1]}?"])[0] == convolutions[0]
    assert kept_in_float(model, []) == []
    with pytest.raises(ModelError, match=r"'Swish' matches no layer.*Conv"):
        kept_in_float(model, ["Conv", "Swish"])


def test_openvino_rounds_no_convolution_that_an_addition_ends(tiny_folder: Path, tmp_path: Path) -> None:
    """Which is why its form has `sums`: what qat trains is what OpenVINO computes, though the file may have a pair there."""
    given = normalise(images(64, seed=7)[0], SPEC) + np.float32(1e-4)  # off the halfway points, where pixels may lie exactly
    found = {}
    for sums in (False, True):
        path = tmp_path / f"{sums}.onnx"
        write(tiny_folder, path, "onnxruntime", sums=sums)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found[sums] = session.run(None, {session.get_inputs()[0].name: given})[0]
    with OpenvinoRunner(tmp_path / "False.onnx", threads=1, device=None, batch=64, options={"INFERENCE_PRECISION_HINT": "f32"}) as runner:
        seen = runner.infer(given)
    apart = {sums: float(np.abs(seen - each).mean()) for sums, each in found.items()}
    assert apart[True] < apart[False] / 2, apart

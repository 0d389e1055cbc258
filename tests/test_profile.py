"""Where the time goes: layers by their weights' names in both runtimes, and what makes a profile void."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgecnn import bench
from edgecnn.device import profile as profiling
from edgecnn.device.bundle import verify_bundle
from edgecnn.device.profile import Layer, Profile, layer_of, profile, table
from edgecnn.errors import UsageError
from edgecnn.targets.onnxruntime import Onnxruntime
from edgecnn.targets.openvino import Openvino

CONVOLUTIONS = {"stem.0", "block.0", "block.3"}


@pytest.mark.parametrize("target", [Onnxruntime, Openvino])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_layers_have_the_models_names(
    target: type[Onnxruntime] | type[Openvino], precision: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Every convolution of the torch model is in the profile of each runtime; in a quantized IR, under the graph's name."""
    made = target.model_validate({"name": "t", "runtime": target.__name__.lower(), "precision": precision, "input": "float"})
    candidate = next(c for c in made.candidates() if c.precision == precision)
    folder = made.build(candidate, tiny.source(tiny_folder), tmp_path / "t").folder
    found = profile(folder, verify_bundle(folder), np.zeros((1, 3, 16, 16), np.float32), threads=1, seconds=0.05)
    names = {layer.name for layer in found.layers}
    nodes = {layer.node for layer in found.layers}
    if target is Onnxruntime or precision == "fp32":
        assert names >= CONVOLUTIONS
    assert sum(node.startswith("node_Conv") for node in nodes) == 3 or target is Onnxruntime
    assert "logits" not in names  # as OpenVINO calls a classifier with its bias
    assert sum("onv" in layer.operator for layer in found.layers) == 3
    assert all(layer.seconds >= 0 for layer in found.layers)
    assert found.calls >= 30
    assert Profile.from_json({**vars(found), "layers": [vars(layer) for layer in found.layers]}) == found


def made_up(file: str, layers: list[Layer], steady_s: float = 0.003) -> Profile:
    return Profile(file, "ab", "fake", 1, 1, steady_s, 30, tuple(layers))


def test_side_by_side() -> None:
    """Two files' layers meet by name, also where one calls them by nodes, with the ratio; operators are summed with their share."""
    float_ = made_up("a", [Layer("stem", "node_1", "Conv", 0.002), Layer("head", "node_2", "Gemm", 0.001)])
    int8 = made_up("b", [Layer("node_1", "node_1", "QLinearConv", 0.001), Layer("Reorder", "Reorder", "Reorder", 0.0005)], 0.0015)
    lines = table([float_, int8]).split("\n")
    (stem,) = (line for line in lines if line.startswith("stem"))
    assert stem.split() == ["stem", "2.0000", "1.0000", "0.50x"]
    assert any(line.split()[:2] == ["QLinearConv", "1"] and "66.7%" in line for line in lines)
    assert not any(line.startswith("node_1") for line in lines)
    assert float_.covered == pytest.approx(1.0)


def test_void_is_shown() -> None:
    """A void profile says so beside its figures."""
    found = Profile("a", "ab", "fake", 1, 1, 0.003, 30, (Layer("a", "a", "Conv", 0.001),), "layers add up to 33%")
    assert "VOID" in table([found])
    assert "VOID" in bench.layers_text([found])


def test_layer_names() -> None:
    """A weight's name gives its layer, quantized or not."""
    assert layer_of("features.0.0.weight") == "features.0.0"
    assert layer_of("features.0.0.weight_quantized") == "features.0.0"
    assert layer_of("onnx::Conv_12") == "onnx::Conv_12"


def test_gpu_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """What cannot be profiled is refused, not profiled elsewhere."""
    target = Onnxruntime(name="t", runtime="onnxruntime", precision="fp32")
    folder = target.build(target.candidates()[0], tiny.source(tiny_folder), tmp_path / "t").folder
    with pytest.raises(UsageError, match="only onnxruntime and OpenVINO on the CPU"):
        profile(folder, verify_bundle(folder), np.zeros((1, 3, 16, 16), np.float32), threads=1, provider="CUDAExecutionProvider")


def test_profilers_own_time_is_known() -> None:
    """What onnxruntime's profiler adds to a node is found on this machine: above zero, and far below a millisecond."""
    node = {"input_type_shape": [{"float": [1, 3, 8, 8]}, {"float": [3]}], "output_type_shape": [{"float": [1, 3, 8, 8]}]}
    assert profiling._written(node) == (1, 2, 9)
    assert 0 < profiling._profiler_s()(node) < 1e-3


def test_what_a_profile_is_not_worth() -> None:
    """Layers that do not add up, and layers too small for the profiler, however they add up, are told apart."""
    found = made_up("a", [Layer("a", "a", "Conv", 0.002)] * 2)
    assert "133% of the steady latency, not to 90-110 %: measure on a quiet machine" in profiling._why_not(found)
    small = replace(found, steady_s=0.004, profiler_s=0.006)
    assert "2000.0 us each are too small for the profiler, whose own time was 150% of the steady latency" in profiling._why_not(small)
    assert "own time, 6.0000 ms a call, is subtracted" in table([small])
    assert profiling._why_not(replace(small, profiler_s=0.001)) == ""


@pytest.mark.parametrize(("inputs", "dimensions"), profiling._CHAINS)
def test_chain_runs_as_many_nodes(inputs: int, dimensions: int) -> None:
    """The chains that it is found on keep all their nodes through onnxruntime's optimizer."""
    events = profiling._ort_events(profiling._chain(40, inputs, dimensions), np.ones((1,) * dimensions, np.float32), 1, 1)
    kernels = [e for e in events if e["name"].endswith("_kernel_time")]
    assert len(kernels) == 40 * (profiling.WARM_UP_CALLS + 1)
    assert {profiling._written(e["args"]) for e in kernels} == {(1, inputs, (inputs + 1) * dimensions)}

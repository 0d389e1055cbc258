"""Every candidate of every target takes the tiny network: it builds, it runs, and it is the same model."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import HERE, SPEC, source, trained

from edgecnn.device.bundle import verify_bundle
from edgecnn.device.evaluate import infer_all
from edgecnn.device.packed import open_packed
from edgecnn.device.preprocess import normalise
from edgecnn.device.runtimes import open_runner
from edgecnn.device.spec import Artifact
from edgecnn.device.tensorrt import LIBRARIES, build_engine, load_tensorrt
from edgecnn.errors import DeviceError
from edgecnn.targets import AnyTarget
from edgecnn.targets.base import Candidate, Target
from edgecnn.targets.onnx import strip
from edgecnn.targets.openvino import Openvino

KINDS = get_args(get_args(AnyTarget)[0])
TARGETS: dict[str, Target] = {
    (runtime := get_args(kind.model_fields["runtime"].annotation)[0]): kind.model_validate({"name": runtime, "runtime": runtime})
    for kind in KINDS
}
# The tiny network has no squeeze-and-excite parts to keep in float.
ALL = [(runtime, c) for runtime, target in TARGETS.items() for c in target.candidates() if not c.name.endswith("-float-se")]
IDS = [f"{runtime}-{candidate.name}" for runtime, candidate in ALL]
# Largest difference of a logit, as a share of the logits' range: what arithmetic with that many bits of mantissa may lose.
CLOSE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2}

# Built in a process of its own, in the home of a user whose name would be recognised.
ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_targets import ALL, TARGETS
from tiny import prepare, source

here = Path.cwd()
made = source(prepare(here))
for runtime, candidate in ALL:
    TARGETS[runtime].build(candidate, made, here / f"{runtime}-{candidate.name}")
"""


@pytest.fixture(scope="session")
def build(tiny_folder: Path) -> Any:
    """Builds a candidate of a runtime, once a session."""
    made = source(tiny_folder)

    @cache
    def build(runtime: str, name: str) -> Artifact:
        candidate = next(c for c in TARGETS[runtime].candidates() if c.name == name)
        return TARGETS[runtime].build(candidate, made, tiny_folder / f"{runtime}-{name}")

    return build


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All candidates again, built in a process of its own by another user in another folder, with another seed for Python's hashes."""
    home = tmp_path_factory.mktemp("elsewhere") / "zebedee"
    home.mkdir()
    env = {**os.environ, "HOME": str(home), "USER": "zebedee", "LOGNAME": "zebedee", "PYTHONHASHSEED": "7"}
    env["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(HERE)], cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return home


@cache
def torch_logits(folder: Path) -> np.ndarray:
    logits: np.ndarray = trained().module(torch.from_numpy(normalise(open_packed(folder).images, SPEC))).detach().numpy()
    return logits


def model_of(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(str(artifact.folder / artifact.manifest.model_file))


def constants(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}


def test_the_three_runtimes_are_here() -> None:
    """The registry holds the targets that the tests below go through, and each offers float candidates before int8 ones."""
    assert set(TARGETS) == {"onnxruntime", "openvino", "tensorrt"}
    assert len(ALL) >= 9
    for target in TARGETS.values():
        candidates = target.candidates()
        assert candidates[0].precision == "fp32"
        int8 = [c.precision == "int8" for c in candidates]
        assert int8 == sorted(int8)
        assert any(int8)
        assert len({c.name for c in candidates}) == len(candidates)


@pytest.mark.parametrize(("runtime", "candidate"), ALL, ids=IDS)
def test_it_runs_and_is_the_same_model(build: Any, tiny_folder: Path, runtime: str, candidate: Candidate) -> None:
    """fp32 equals torch to 1e-4, fp16 and bf16 to their mantissa, int8 agrees on 62 of 64 images; TensorRT's graph in onnxruntime."""
    artifact = build(runtime, candidate.name)
    manifest = verify_bundle(artifact.folder)
    assert (manifest.runtime, manifest.precision, manifest.candidate) == (runtime, candidate.precision, candidate.name)
    assert artifact.size_bytes == sum((artifact.folder / name).stat().st_size for name in manifest.digests)
    stand_in = {"tensorrt": "onnxruntime"}.get(runtime, runtime)
    images = open_packed(tiny_folder / "evaluation")
    with open_runner(artifact.folder, type(manifest)(**{**vars(manifest), "runtime": stand_in}), threads=1) as runner:
        logits = infer_all(runner, images, SPEC)
    wanted = torch_logits(tiny_folder / "evaluation")
    assert logits.dtype == np.float32
    assert (wanted.argmax(1) == images.labels).mean() > 0.95, "the float model has learnt the images"
    worst = np.abs(logits - wanted).max()
    if candidate.precision in CLOSE:
        assert worst <= CLOSE[candidate.precision] * np.ptp(wanted)
        assert candidate.precision != "fp32" or worst < 1e-4
    assert (logits.argmax(1) == wanted.argmax(1)).sum() >= 62
    # Not the float file under another name.
    if candidate.precision != "fp32" and runtime != "openvino":
        assert worst > 1e-4


@pytest.mark.parametrize(("runtime", "candidate"), ALL, ids=IDS)
def test_the_same_inputs_give_the_same_bytes(build: Any, elsewhere: Path, runtime: str, candidate: Candidate) -> None:
    """Another process, folder, user and hash seed give the same digests of every file."""
    manifest = build(runtime, candidate.name).manifest
    assert verify_bundle(elsewhere / f"{runtime}-{candidate.name}") == manifest
    assert len(manifest.digests) >= 1


def test_nothing_in_a_bundle_tells_where_it_was_made(elsewhere: Path) -> None:
    """No file of any candidate holds the user's name, the home folder, the folder of the packages, or an absolute path to Python code."""
    hints = [b"zebedee", str(HERE.parent).encode(), str(Path(torch.__file__).parents[1]).encode(), b".py", b"/tmp/", b"/home/", b"/root"]
    seen = 0
    for folder in elsewhere.iterdir():
        for path in folder.iterdir() if (folder / "manifest.json").is_file() else ():
            seen += 1
            found = [hint for hint in hints if hint in path.read_bytes()]
            assert not found, (path, found)
    assert seen >= 4 * len(ALL)


def test_everything_that_tells_is_stripped() -> None:
    """No documentation string and no metadata is left of the model, its graph, its nodes and its values; the computation is."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    weight = numpy_helper.from_array(np.ones(1, np.float32), "w")
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    inner = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1])
    nodes = [onnx.helper.make_node("Add", ["x", "w"], ["z"]), onnx.helper.make_node("Relu", ["z"], ["y"])]
    graph = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [value], [result], [weight], value_info=[inner]))
    inside = graph.graph
    parts = [graph, inside, *inside.node, *inside.input, *inside.output, *inside.value_info, *inside.initializer]
    for part in parts:
        part.doc_string = "/home/zebedee"
        part.metadata_props.add(key="trace", value="/home/zebedee/net.py")
    assert graph.SerializeToString().count(b"zebedee") == 2 * len(parts) == 16
    assert b"zebedee" not in strip(graph).SerializeToString()
    onnx.checker.check_model(graph)


@pytest.mark.parametrize("name", [c.name for runtime, c in ALL if runtime == "tensorrt" and c.precision == "int8"])
def test_tensorrt_int8_is_in_tensorrts_form(build: Any, name: str) -> None:
    """int8 everywhere, every zero point 0, weights per channel along their first axis, biases in float."""
    graph = model_of(build("tensorrt", name))
    values = constants(graph)
    pairs = [node for node in graph.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) >= 9
    for node in pairs:
        zero = values[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    assert not [name for name, value in values.items() if value.dtype in (np.uint8, np.int32)], "uint8, or an int32 bias"
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    made = {output: node for node in graph.graph.node for output in node.output}
    assert len(convolutions) == 3
    first = int(name == "int8-float-stem")
    assert all(node.input[1] in values for node in convolutions[:first])
    for node in convolutions[first:]:
        weight = made[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert len(values[weight.input[1]]) == values[weight.input[0]].shape[0] == 24
        assert values[node.input[2]].dtype == np.float32


@pytest.mark.parametrize("name", [c.name for runtime, c in ALL if runtime == "onnxruntime" and c.precision == "int8"])
def test_onnxruntime_int8_is_in_its_kernels_form(build: Any, name: str) -> None:
    """Activations are uint8, weights int8, symmetric and per channel, biases int32; the convolution of the image is float."""
    graph = model_of(build("onnxruntime", name))
    values = constants(graph)
    quantized = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) >= 4
    assert all(values[node.input[2]].dtype == np.uint8 for node in quantized)
    made = {output: node for node in graph.graph.node for output in node.output}
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    assert convolutions[0].input[1] in values
    for node in convolutions[1:]:
        _, weight, bias = (made[name] for name in node.input)
        assert values[weight.input[0]].dtype == np.int8
        assert values[weight.input[1]].shape == (24,)
        assert not values[weight.input[2]].any()
        assert values[bias.input[0]].dtype == np.int32


def test_openvino_is_told_its_precision(build: Any) -> None:
    """Every OpenVINO bundle says in its manifest what to calculate in, and bf16 only where that is what it is."""
    hints = {c.name: build("openvino", c.name).manifest.options for runtime, c in ALL if runtime == "openvino"}
    assert hints == {name: {"INFERENCE_PRECISION_HINT": "bf16" if name == "bf16" else "f32"} for name in hints}
    assert len(hints) >= 4


@pytest.mark.parametrize("name", ["int8-qdq", "int8-fast-bc"])
def test_openvino_keeps_pinned_layers_in_float(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    """By either quantizer: with convolutions pinned, the linear layer alone has int8 weights."""
    counts = {}
    for keep in ((), ("Conv",)):
        target = Openvino(name="nuc", runtime="openvino", keep_float=keep)
        candidate = next(c for c in target.candidates() if c.name == name)
        made = target.build(candidate, source(tiny_folder), tmp_path / f"kept{len(keep)}")
        counts[keep] = (made.folder / "model.xml").read_text().count('element_type="i8"')
    assert counts == {(): 4, ("Conv",): 1}


def test_openvino_int8_is_int8(build: Any) -> None:
    """The int8 IR holds FakeQuantize operations and a weight file of less than the fp32 one, the fp16 one of half of it."""
    for candidate in (c for runtime, c in ALL if runtime == "openvino"):
        fakes = (build("openvino", candidate.name).folder / "model.xml").read_text().count('type="FakeQuantize"')
        assert (fakes > 3) == (candidate.precision == "int8"), candidate.name
    sizes = {c.name: (build(runtime, c.name).folder / "model.bin").stat().st_size for runtime, c in ALL if runtime == "openvino"}
    assert sizes["fp16"] < 0.55 * sizes["fp32"]
    assert sizes["int8-fast-bc"] < 0.75 * sizes["fp32"]


@pytest.mark.skipif(not any(find_spec(library) for library in LIBRARIES), reason="neither tensorrt nor tensorrt_rtx is installed")
def test_tensorrt_was_built_by_the_real_builder(build: Any) -> None:
    """Each candidate's note says which TensorRT built it, for what, and how large the engine is; no engine is in the bundle."""
    for candidate in (c for runtime, c in ALL if runtime == "tensorrt"):
        artifact = build("tensorrt", candidate.name)
        assert artifact.notes[-1].startswith(f"built by {load_tensorrt().name} for ")
        assert set(artifact.manifest.digests) == {"model.onnx"}


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_what_tensorrt_refuses_is_an_error(tmp_path: Path) -> None:
    """Bytes that are no graph, and an operator that TensorRT does not have, end in one line that names the file and TensorRT's reason."""
    (tmp_path / "noise.onnx").write_bytes(b"\x00\x01 this is no graph")
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nowhere")
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1, 3])], [value("y", 1, [1, 3])])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nowhere", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), str(tmp_path / "unknown.onnx"))
    for name, reason in (("noise.onnx", "parse"), ("unknown.onnx", "NoSuchOperator")):
        with pytest.raises(DeviceError, match=reason) as refused:
            build_engine(load_tensorrt(), tmp_path / name, compute_capability="86")
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("runtime", "package", "words"),
    [
        ("onnxruntime", "onnxruntime", "edgecnn[onnxruntime]"),
        ("openvino", "openvino", "edgecnn[openvino]"),
        ("openvino", "nncf", "edgecnn[host]"),
        ("tensorrt", "onnxruntime", "edgecnn[onnxruntime]"),
    ],
)
def test_a_missing_package_is_told_before_any_work(runtime: str, package: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose package is not installed says which, and how to install it; installed, it says nothing."""
    assert TARGETS[runtime].missing() is None
    monkeypatch.setitem(sys.modules, package, None)
    told = TARGETS[runtime].missing()
    assert told is not None
    assert told.startswith(f"{package} is not installed")
    assert f"pip install '{words}'" in told


def test_without_tensorrt_it_says_not_built_here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither TensorRT is installed, the bundle is written all the same, and its note says that nothing was built."""
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    target = TARGETS["tensorrt"]
    artifact = target.build(target.candidates()[0], source(tiny_folder), tmp_path / "b")
    assert artifact.notes == ("not built here: neither tensorrt nor tensorrt_rtx is installed",)
    verify_bundle(artifact.folder)


def test_the_batch_is_free(build: Any) -> None:
    """Each fp32 bundle answers a batch of 5 as it answers five single images."""
    x = np.random.default_rng(0).integers(0, 256, (5, SPEC.height, SPEC.width, SPEC.channels), np.uint8)
    for runtime in ("onnxruntime", "openvino"):
        artifact = build(runtime, "fp32")
        with open_runner(artifact.folder, artifact.manifest, threads=1, batch=5) as runner:
            together = runner.infer(x)
        with open_runner(artifact.folder, artifact.manifest, threads=1) as runner:
            single = np.concatenate([runner.infer(x[i : i + 1]).copy() for i in range(5)])
        np.testing.assert_allclose(together, single, atol=1e-4)


def test_precision_decides_what_is_tried(tiny_folder: Path) -> None:
    """`int8` ships only int8 and measures every float for comparison; `auto` may ship all; `fp32` measures no int8."""
    for runtime, target in TARGETS.items():
        every = list(target.candidates())
        for precision in ("auto", "int8", "fp32"):
            wanted = type(target).model_validate({"name": "x", "runtime": runtime, "precision": precision})
            tried = wanted.tried()
            assert [c.name for c in tried if c.precision != "int8"] == [c.name for c in every if c.precision != "int8"]
            quick = {c.precision for c in wanted.tried("quick")}
            assert "fp32" in quick
            assert precision == "auto" or quick <= {"fp32", precision} or runtime != "openvino"
            assert any(c.precision == "int8" for c in tried) == (precision != "fp32")
            assert all(wanted.may_ship(c) == (precision in ("auto", c.precision)) for c in every)

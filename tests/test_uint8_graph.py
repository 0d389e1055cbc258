"""A file that takes pixels is the same model as the one that takes the tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tiny import SPEC, source

from edgecnn.device.evaluate import infer_all
from edgecnn.device.packed import open_packed
from edgecnn.device.preprocess import normalise, to_input, to_pixels
from edgecnn.device.runtimes import open_runner
from edgecnn.device.spec import InputSpec, Manifest
from edgecnn.device.tensorrt import build_engine, load_tensorrt
from edgecnn.targets.base import Candidate, Target
from edgecnn.targets.onnxruntime import Onnxruntime
from edgecnn.targets.openvino import Openvino
from edgecnn.targets.preprocess_graph import add_head, take_pixels
from edgecnn.targets.tensorrt import Tensorrt

IMAGENET = InputSpec(3, 20, 28, 20, "crop", "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = InputSpec(1, 12, 12, 12, "squash", "bicubic", (0.3,), (0.2,))
RUNTIMES = {"onnxruntime": Onnxruntime, "openvino": Openvino, "tensorrt": Tensorrt}


def identity(spec: InputSpec) -> onnx.ModelProto:
    """A graph that hands its input on, so that what the head made can be looked at."""
    shape = ["batch", *spec.shape]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "out"))
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["out"])], "identity", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def every_pixel(spec: InputSpec) -> np.ndarray:
    """Three images in which every channel takes every value."""
    count = 3 * spec.height * spec.width
    rows = np.stack([(np.arange(count) * (2 * c + 1)) % 256 for c in range(spec.channels)], axis=1)
    return rows.reshape(3, spec.height, spec.width, spec.channels).astype(np.uint8)


@pytest.mark.parametrize("spec", [IMAGENET, GREY, SPEC], ids=["imagenet", "grey", "tiny"])
def test_the_tensor_behind_the_head_is_training_s_bit_for_bit(spec: InputSpec) -> None:
    """In onnxruntime, with all its rewriting on, for every value of every channel."""
    graph = identity(spec)
    add_head(graph, spec)
    onnx.checker.check_model(graph, full_check=True)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = every_pixel(spec)
    assert len(np.unique(pixels[..., 0])) == 256
    (tensor,) = session.run(None, {"image": pixels})
    assert tensor.tobytes() == normalise(pixels, spec).tobytes()


def made(runtime: str, given: str, precision: str, tiny_folder: Path, folder: Path) -> tuple[Path, Manifest]:
    target: Target = RUNTIMES[runtime].model_validate({"name": "t", "runtime": runtime, "input": given})
    candidate: Candidate = next(c for c in target.candidates() if c.precision == precision)
    artifact = target.build(candidate, source(tiny_folder), folder / f"{runtime}-{given}-{precision}")
    return artifact.folder, artifact.manifest


@pytest.mark.parametrize(
    ("runtime", "precision", "bound"),
    [
        ("onnxruntime", "fp32", 0.0),
        ("onnxruntime", "int8", 0.0),
        ("openvino", "fp32", 1e-3),
        ("openvino", "int8", None),
        ("tensorrt", "fp32", 0.0),
        ("tensorrt", "fp16", 0.0),
        ("tensorrt", "int8", 0.0),
    ],
)
def test_logits_are_those_of_the_float_file(runtime: str, precision: str, bound: float | None, tiny_folder: Path, tmp_path: Path) -> None:
    """Equal in onnxruntime, quantized or not; within 1e-3 in OpenVINO's fp32; its int8 agrees on every image. TensorRT in onnxruntime."""
    images = open_packed(tiny_folder / "evaluation")
    logits = {}
    for given, takes in (("uint8", "uint8"), ("float", "float32")):
        folder, manifest = made(runtime, given, precision, tiny_folder, tmp_path)
        stand_in = replace(manifest, runtime={"tensorrt": "onnxruntime"}.get(runtime, runtime))
        with open_runner(folder, stand_in, threads=1) as runner:
            assert runner.takes == manifest.takes == takes
            logits[given] = infer_all(runner, images, SPEC)
    if bound is None:
        assert (logits["uint8"].argmax(1) == logits["float"].argmax(1)).all()
    else:
        assert np.abs(logits["uint8"] - logits["float"]).max() <= bound


def test_int8_kernels_are_the_same_behind_the_head(tiny_folder: Path, tmp_path: Path) -> None:
    """onnxruntime fuses as many integer convolutions with the head as without, and nothing of the head is between them."""
    counts = {}
    for given in ("uint8", "float"):
        folder, manifest = made("onnxruntime", given, "int8", tiny_folder, tmp_path)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{given}.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(str(folder / manifest.model_file), options, providers=["CPUExecutionProvider"])
        operators = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        counts[given] = sum(op == "QLinearConv" for op in operators)
        assert sum(op in ("Conv", "FusedConv") for op in operators) == 1  # the first layer stays in float
    assert counts["uint8"] == counts["float"] == 2


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    """A graph that could only be exported for one image takes one image of pixels."""
    graph = identity(IMAGENET)
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    (tmp_path / "in.onnx").write_bytes(graph.SerializeToString())
    written = onnx.load(str(take_pixels(tmp_path / "in.onnx", tmp_path / "out.onnx", IMAGENET)))
    assert [d.dim_value for d in written.graph.input[0].type.tensor_type.shape.dim] == [1, 20, 28, 3]


def test_tensorrt_builds_what_takes_pixels_and_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    """The real builder takes the graph that ships, and its engine's one input is uint8, N x H x W x C."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    folder, manifest = made("tensorrt", "uint8", "int8", tiny_folder, tmp_path)
    assert build_engine(load_tensorrt(), folder / manifest.model_file, compute_capability="86")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse((folder / manifest.model_file).read_bytes())
    assert network.num_inputs == 1
    assert network.get_input(0).dtype == trt.DataType.UINT8
    assert tuple(network.get_input(0).shape) == (-1, SPEC.height, SPEC.width, SPEC.channels)


@pytest.mark.shared
def test_photos_of_odd_sizes_are_classified_as_in_training(shared: Path, tmp_path: Path) -> None:
    """375 photos by MobileNetV2: the file that takes pixels gives torch's top-1 on all, and its logits within 1e-3."""
    import torch
    import torchvision

    from edgecnn.stages.base import TorchModel
    from edgecnn.targets.onnx import export_onnx

    spec = InputSpec(3, 224, 224, 256, "crop", "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    module = torchvision.models.mobilenet_v2()
    module.load_state_dict(torch.load(shared / "models/mobilenet_v2_imagenet.pth", weights_only=True))
    model = TorchModel(module.eval(), spec, tuple(map(str, range(1000))), {"name": "mobilenet_v2"})
    export_onnx(model, tmp_path / "float.onnx")
    take_pixels(tmp_path / "float.onnx", tmp_path / "model.onnx", spec)
    theirs = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(256),
            torchvision.transforms.CenterCrop(224),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(spec.mean, spec.std),
        ]
    )
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    manifest = Manifest("t", "onnxruntime", "fp32", "fp32", {"model": "model.onnx"}, {}, spec, model.labels, options=options)
    photos = sorted((shared / "data/imagenet500/val").rglob("*.JPEG"))[:375]
    sizes, worst, same = set(), 0.0, 0
    runners = [open_runner(tmp_path, replace(manifest, runtime=r), threads=1) for r in ("onnxruntime", "openvino")]
    for path in photos:
        with Image.open(path) as photo:
            image = photo.convert("RGB")
        sizes.add(image.size)
        with torch.no_grad():
            wanted = module(theirs(image)[None]).numpy()
        pixels = to_pixels(image, spec)[None]
        for runner in runners:
            got = runner.infer(to_input(pixels, spec, runner.takes))
            worst = max(worst, float(np.abs(got - wanted).max()))
            same += int(got.argmax() == wanted.argmax())
    assert len(photos) == 375
    assert len(sizes) > 50
    assert same == 2 * 375
    assert worst < 1e-3

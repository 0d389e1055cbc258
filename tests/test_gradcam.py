"""Where models look: Grad-CAM finds the evidence on a task whose evidence has a known place, in torch and in exported int8 files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from edgecnn.device.packed import write_packed
from edgecnn.device.preprocess import normalise, to_input
from edgecnn.device.spec import Artifact, InputSpec
from edgecnn.errors import ModelError
from edgecnn.stages.base import TorchModel
from edgecnn.targets.base import Source
from edgecnn.targets.calibration import collect
from edgecnn.targets.onnx import export_onnx
from edgecnn.targets.onnxruntime import Onnxruntime
from edgecnn.targets.openvino import Openvino
from edgecnn.trust import gradcam
from edgecnn.trust.halves import halves

SIDE, PATCH = 64, 28
SPEC = InputSpec(3, SIDE, SIDE, SIDE, "crop", "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES = ("level", "rising", "upright", "falling")


class Pooled(nn.Module):
    """Three convolutions, average pooling and one linear layer: the head for which the file's map is Grad-CAM itself."""

    def __init__(self, head: str = "pooled") -> None:
        super().__init__()
        layers = ((3, 24, 3, 2), (24, 48, 3, 2), (48, 48, 1, 1))
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, size, stride, size // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, size, stride in layers
            )
        )
        self.late = nn.Conv2d(48, 48, 3, stride=8) if head == "strided" else None
        self.head = nn.Linear(48, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.late is not None:
            x = torch.relu(self.late(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def located(count: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[tuple[int, int, int, int]]]:
    """Noise with a patch of stripes in one of four directions at a random place: pixels, classes, and the boxes."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    pixels = np.clip(random.normal(128, 18, (count, SIDE, SIDE, 3)), 0, 255)
    y, x = np.mgrid[:PATCH, :PATCH]
    boxes = []
    for i, label in enumerate(labels):
        angle = np.pi * label / 4
        wave = np.sin((x * np.sin(angle) + y * np.cos(angle)) * 2 * np.pi / 5 + random.uniform(0, 6.3))
        top, left = random.integers(0, SIDE - PATCH, 2)
        pixels[i, top : top + PATCH, left : left + PATCH] += 70 * wave[:, :, None]
        boxes.append((int(top), int(left), int(top + PATCH), int(left + PATCH)))
    return np.clip(pixels, 0, 255).astype(np.uint8), labels, boxes


def fitted(head: str = "pooled") -> TorchModel:
    torch.manual_seed(0)
    module = Pooled(head)
    pixels, labels, _ = located(256, 1)
    x, y = torch.from_numpy(normalise(pixels, SPEC)), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(module.parameters(), 0.005, weight_decay=0.05)
    for step in range(60):
        some = torch.from_numpy(np.random.default_rng(step).permutation(256)[:64])
        loss = nn.functional.cross_entropy(module(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return TorchModel(module.eval(), SPEC, CLASSES)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, Artifact]]:
    """The fitted network and the files that the targets make of it, fp32 and int8."""
    folder = tmp_path_factory.mktemp("located")
    model = fitted()
    export_onnx(model, folder / "model.onnx")
    pixels, labels, _ = located(64, 2)
    packed = write_packed(folder / "calibration", [str(i) for i in range(64)], labels, pixels, SPEC.geometry)
    graph = folder / "model.onnx"
    source = Source(graph, lambda: graph, SPEC, CLASSES, packed, lambda: collect(graph, packed, SPEC), 0)
    files = {}
    for target in (Onnxruntime(name="a", runtime="onnxruntime"), Openvino(name="b", runtime="openvino")):
        for name in ("fp32", "int8" if target.runtime == "onnxruntime" else "int8-qdq"):
            candidate = next(c for c in target.candidates() if c.name == name)
            files[f"{target.runtime} {name}"] = target.build(candidate, source, folder / f"{target.runtime}-{name}")
    return model.module, files


def test_finds_the_place(built: tuple[nn.Module, dict[str, Artifact]]) -> None:
    """At least 80 % of the energy lies inside the true box, for float Grad-CAM and for the int8 files; 60 of 64 images are right."""
    module, files = built
    pixels, labels, boxes = located(64, 3)
    cuts = {name: halves(a.folder, a.manifest, gradcam.LEAST) for name, a in files.items()}
    shares: dict[str, list[float]] = {name: [] for name in ("float", *cuts)}
    right = 0
    for i, box in enumerate(boxes):
        x = normalise(pixels[i : i + 1], SPEC)
        output = int(labels[i])
        right += int(module(torch.from_numpy(x)).argmax()) == output
        shares["float"].append(gradcam.inside(gradcam.grad_cam(module, torch.from_numpy(x), output), box))
        for name, cut in cuts.items():
            seen = gradcam.by_places(cut, to_input(pixels[i : i + 1], SPEC, files[name].manifest.takes), output, (SIDE, SIDE))
            shares[name].append(gradcam.inside(seen, box))
    means = {name: round(float(np.mean(values)), 4) for name, values in shares.items()}
    print("energy inside the true box:", means)
    assert right >= 60
    assert min(means.values()) >= 0.8, means
    assert PATCH**2 / SIDE**2 < 0.2  # what a map that knows nothing would have


def test_the_files_map_is_grad_cam_for_a_pooled_head(built: tuple[nn.Module, dict[str, Artifact]]) -> None:
    """fp32 files give the gradients' map to four digits, int8 files to a cosine of 0.99; and so does the torch model cut like a file."""
    module, files = built
    pixels, labels, _ = located(8, 4)
    for name, artifact in files.items():
        cut = halves(artifact.folder, artifact.manifest, gradcam.LEAST)
        for i, label in enumerate(labels):
            x = normalise(pixels[i : i + 1], SPEC)
            proper = gradcam.grad_cam(module, torch.from_numpy(x), int(label))
            assert proper.shape == (SIDE, SIDE)
            assert proper.max() <= 1 + 1e-6
            given = to_input(pixels[i : i + 1], SPEC, artifact.manifest.takes)
            seen = gradcam.by_places(cut, given, int(label), (SIDE, SIDE))
            assert gradcam.likeness(proper, seen) > (0.9999 if name.endswith("fp32") else 0.99), (name, i)
            assert gradcam.likeness(gradcam.by_places(gradcam.torch_halves(module), x, int(label), (SIDE, SIDE)), proper) > 0.9999


def test_the_halves_are_the_file(built: tuple[nn.Module, dict[str, Artifact]]) -> None:
    """Run one after the other they give the logits of the whole file, one image or many maps at a time."""
    from edgecnn.device.runtimes import open_runner

    pixels, _, _ = located(5, 5)
    for name, artifact in built[1].items():
        cut = halves(artifact.folder, artifact.manifest, gradcam.LEAST)
        given = [to_input(pixels[i : i + 1], SPEC, artifact.manifest.takes) for i in range(5)]
        maps = np.concatenate([cut.front(x) for x in given])
        with open_runner(artifact.folder, artifact.manifest, threads=1) as runner:
            whole = np.concatenate([runner.infer(x) for x in given])
        assert maps.shape == (5, 48, 16, 16)
        np.testing.assert_allclose(cut.tail(maps), whole, atol=0.15 if "int8" in name else 1e-4)
        np.testing.assert_allclose(cut.tail(np.repeat(maps, 30, 0))[::30], cut.tail(maps), atol=1e-5)


def test_another_head_is_looked_at_the_same_way(tmp_path: Path) -> None:
    """Where a convolution follows the map, torch and the exported file still agree on every place's worth."""
    model = fitted("strided")
    export_onnx(model, tmp_path / "model.onnx")
    pixels, labels, _ = located(4, 6)
    packed = write_packed(tmp_path / "set", list("abcd"), labels, pixels, SPEC.geometry)
    graph = tmp_path / "model.onnx"
    target = Onnxruntime(name="a", runtime="onnxruntime")
    source = Source(graph, lambda: graph, SPEC, CLASSES, packed, lambda: collect(graph, packed, SPEC), 0)
    artifact = target.build(next(c for c in target.candidates() if c.name == "fp32"), source, tmp_path / "built")
    cut = halves(artifact.folder, artifact.manifest, gradcam.LEAST)
    for i in range(4):
        x = normalise(pixels[i : i + 1], SPEC)
        ours = gradcam.by_places(gradcam.torch_halves(model.module), x, 0, (SIDE, SIDE))
        theirs = gradcam.by_places(cut, to_input(pixels[i : i + 1], SPEC, artifact.manifest.takes), 0, (SIDE, SIDE))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_model_without_a_map_is_refused_in_words(built: tuple[nn.Module, dict[str, Artifact]]) -> None:
    """A file or a network whose last map is too small says so."""
    artifact = next(iter(built[1].values()))
    with pytest.raises(ModelError, match="feature map of at least 100"):
        halves(artifact.folder, artifact.manifest, 100)
    with pytest.raises(ModelError, match="feature map"):
        gradcam.grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(1, 3, 2, 2), 0)


def test_energy_and_likeness() -> None:
    """By hand; an empty map has neither."""
    seen = np.zeros((4, 4), np.float32)
    assert np.isnan(gradcam.inside(seen, (0, 0, 2, 2)))
    seen[0, 0], seen[3, 3] = 3, 1
    assert gradcam.inside(seen, (0, 0, 2, 2)) == 0.75
    assert gradcam.likeness(seen, seen) == pytest.approx(1)
    assert gradcam.likeness(seen, np.roll(seen, 1, 0)) == 0

"""A tiny network and 96 generated images: whole pipelines in seconds.

The images are stripes in one of four directions, so that the network, 3,000 parameters of the kinds that real ones have, learns them
in a few epochs. Commands in a process of their own find `tiny:network` when they run in `HERE` or with `HERE` in PYTHONPATH.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from edgecnn.device.packed import Packed, open_packed, write_packed
from edgecnn.device.spec import InputSpec
from edgecnn.stages.base import TorchModel
from edgecnn.targets.base import Source
from edgecnn.targets.calibration import collect
from edgecnn.targets.onnx import export_onnx

HERE = Path(__file__).parent
CLASSES = ("level", "rising", "upright", "falling")
SIZE = 16
SPEC = InputSpec(3, SIZE, SIZE, SIZE, "crop", "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Tiny(nn.Module):
    """A convolution, a depthwise-separable residual block, pooling and a linear layer."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 24, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 24, 1, bias=False),
            nn.BatchNorm2d(24),
        )
        self.head = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = nn.functional.max_pool2d(x + self.block(x), 2)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def network(num_classes: int = len(CLASSES), in_chans: int = 3) -> nn.Module:
    """What a recipe names as `entry: tiny:network`."""
    return Tiny(num_classes, in_chans)


def wide(num_classes: int = len(CLASSES), in_chans: int = 3) -> nn.Module:
    """A network that is faster by far with fewer channels, on any machine."""
    first, second = nn.Conv2d(in_chans, 96, 3, padding=1), nn.Conv2d(96, 96, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, num_classes))


def images(count: int = 96, seed: int = 0) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Stripes of random phase, wavelength and tint under noise: uint8 N x 16 x 16 x 3, and their directions, 0 to 3 in turn."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    y, x = np.mgrid[:SIZE, :SIZE]
    pixels = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for i, label in enumerate(labels):
        angle = np.pi * label / len(CLASSES) + random.normal(0, 0.08)
        wave = np.sin((x * np.sin(angle) + y * np.cos(angle)) * 2 * np.pi / random.uniform(4, 6) + random.uniform(0, 2 * np.pi))
        tinted = 128 + 70 * wave[:, :, None] * random.uniform(0.6, 1, 3) + random.normal(0, 20, (SIZE, SIZE, 3))
        pixels[i] = np.clip(tinted, 0, 255)
    return pixels, labels


def trained(seed: int = 0) -> TorchModel:
    """The network fitted to 128 of the images in a second, on the CPU and from the seed."""
    torch.manual_seed(seed)
    module = network()
    pixels, labels = images(128, seed=1)
    x = torch.from_numpy((pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).float()
    y = torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(module.parameters(), 0.02)
    for _ in range(60):
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    origin = {"source": "python", "name": "tiny:network", "in_chans": 3, "num_classes": len(CLASSES), "options": {}}
    return TorchModel(module.eval(), SPEC, CLASSES, origin)


def pack(folder: Path, count: int, seed: int) -> Packed:
    """The images as a prepared set."""
    pixels, labels = images(count, seed)
    return write_packed(folder, [str(i) for i in range(count)], labels, pixels, SPEC.geometry)


def prepare(folder: Path) -> Path:
    """Write what `source` reads to `folder`: the exported graphs and two sets of images."""
    model = trained()
    export_onnx(model, folder / "model.onnx")
    export_onnx(model, folder / "half.onnx", half=True)
    pack(folder / "calibration", 32, seed=2)
    pack(folder / "evaluation", 64, seed=3)
    return folder


def source(folder: Path) -> Source:
    """What a target builds from, of a folder that `prepare` filled."""
    graph, calibration = folder / "model.onnx", open_packed(folder / "calibration")
    return Source(graph, lambda: folder / "half.onnx", SPEC, CLASSES, calibration, lambda: collect(graph, calibration, SPEC), 0)


def write_images(folder: Path, count: int = 96) -> list[Path]:
    """The images as PNG files in a folder a class."""
    paths = []
    for i, (pixels, label) in enumerate(zip(*images(count), strict=True)):
        path = folder / CLASSES[label] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


RECIPE = """\
name: tiny
seed: 0
model:
  source: python
  entry: tiny:network
  input: {{size: 16, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}}
data:
  source: imagefolder
  path: {images}
  split: {{evaluation: 0.25, choice: 0.25}}
stages:
  - {{stage: train, epochs: 12, batch: 8, lr: 0.02, augment: none}}
targets:
  - {{name: pi, runtime: onnxruntime, precision: int8}}
  - {{name: nuc, runtime: openvino, precision: int8}}
  - {{name: orin, runtime: tensorrt, precision: int8}}
promise: {{accuracy_drop: 0.25}}
bench: {{processes: 1, seconds: 0.05}}
"""


def write_recipe(folder: Path) -> Path:
    """A recipe of the tiny network for all three targets, and its images, in `folder`; change it with `--set` or by replacing text."""
    write_images(folder / "images")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(images=folder / "images"))
    return path

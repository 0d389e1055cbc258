"""Makes what the int8 benchmarks start from: each checkpoint exported, its images prepared, its float logits.

    python benchmarks/int8_prepare.py --models DIR --imagenet500 DIR --cifar10 DIR --out DIR [--size 64] [--few N] [NAME ...]

One folder for each model in `--out`: model.onnx, the sets calibration, choice and evaluation, and float-choice.npy and
float-evaluation.npy. MobileNetV2 uses 125, 125 and 250 photos; the CIFAR-10 models 300 and 1,000 images of train and the 5,000 of val.
`--few` keeps the first N of each set: for latency alone. With another size than 64 the folder is called NAME_SIZE.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from edgecnn.data import load_data, pack
from edgecnn.models import TimmModel, TorchvisionModel, load_model
from edgecnn.screen import Screen
from edgecnn.sources import ImageFolder
from edgecnn.targets.onnx import export_onnx
from edgecnn.train import predict

CIFAR = ("mobilenetv3_small_100", "mobilenetv3_large_100", "efficientnet_b0", "efficientnet_lite0", "mobilenetv4_conv_small")
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("models", "imagenet500", "cifar10", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--few", type=int)
    parser.add_argument("names", nargs="*", default=["mobilenet_v2", *CIFAR])
    given = parser.parse_args()
    for name in given.names:
        prepare(name, given, given.out / (name if given.size == 64 else f"{name}_{given.size}"))


def prepare(name: str, given: argparse.Namespace, out: Path) -> None:
    screen = Screen(quiet=True)
    if name == "mobilenet_v2":
        index = {key: str(given.imagenet500 / f"{key}.json") for key in ("class_index", "class_names")}
        split = {"train": 0, "calibration": 0.25, "choice": 0.25, "evaluation": 0.5}
        data = load_data(ImageFolder(source="imagefolder", path=str(given.imagenet500 / "val"), split=split, **index), 0, screen)
        config = TorchvisionModel(source="torchvision", name=name, checkpoint=str(given.models / "mobilenet_v2_imagenet.pth"))
    else:
        split = {"train": 0, "calibration": 0.006, "choice": 0.02}
        data = load_data(ImageFolder(source="imagefolder", path=str(given.cifar10), split=split), 0, screen)
        config = TimmModel(
            source="timm",
            name=name,
            checkpoint=str(given.models / f"{name}_cifar10_64px.safetensors"),
            input={"size": given.size, "mean": MEAN, "std": STD, "interpolation": "bilinear", "fit": "squash"},
        )
    model = load_model(config, data.outputs, data.names, trains=False)
    out.mkdir(parents=True, exist_ok=True)
    export_onnx(model, out / "model.onnx")
    (out / "input.json").write_text(json.dumps(asdict(model.input)))
    for part in ("calibration", "choice", "evaluation"):
        images = getattr(data, part)
        packed = pack(images.subset(range(min(given.few or len(images), len(images)))), model.input, out / part)
        logits = predict(model.module, packed, model.input)
        np.save(out / f"float-{part}.npy", logits)
        print(f"{name}: {len(packed)} {part} images, float top-1 {(logits.argmax(1) == packed.labels).mean():.2%}", flush=True)


if __name__ == "__main__":
    main()

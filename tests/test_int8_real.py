"""int8 on real checkpoints and photos, whole runs of the command: a sabotaged setting is named and mended, memory stays bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.shared

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def compress(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], int]:
    """The result of `edgecnn compress`, and the peak memory of its largest process in bytes."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"seed": 0, "effort": "quick", "promise": {"accuracy_drop": 0.05}, **recipe}))
    command = [sys.executable, "-m", "edgecnn", "compress", "--recipe", str(path), "--out", str(folder / "out")]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 4), (folder / "said").read_text()
    return json.loads((folder / "out/result.json").read_text()), used.ru_maxrss * 1024


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "efficientnet_b0"])
def test_per_tensor_weights_on_a_real_network(name: str, shared: Path, tmp_path: Path) -> None:
    """With one scale for each weight tensor the file collapses: the result names that and the layers, and per-channel weights ship."""
    with zipfile.ZipFile(shared / "data/cifar10.zip") as archive:
        for part, of_class in (("train", 60), ("val", 100)):
            seen: dict[str, int] = {}
            for member in sorted(archive.namelist()):
                words = member.split("/")
                if len(words) == 4 and words[1] == part and words[3] and seen.get(words[2], 0) < of_class:
                    seen[words[2]] = seen.get(words[2], 0) + 1
                    archive.extract(member, tmp_path)
    checkpoint = shared / f"models/{name}_cifar10_64px.safetensors"
    size = {"size": 64, "mean": MEAN, "std": STD, "interpolation": "bilinear", "fit": "squash"}
    split = {"train": 0, "calibration": 0.5, "choice": 0.5}
    recipe = {
        "name": "sabotaged",
        "model": {"source": "timm", "name": name, "checkpoint": str(checkpoint), "input": size},
        "data": {"source": "imagefolder", "path": str(tmp_path / "cifar10"), "split": split},
        "targets": [{"name": "pi", "runtime": "onnxruntime", "precision": "int8", "weights": "per-tensor"}],
    }
    result, _ = compress(recipe, tmp_path)
    (target,) = result["targets"]
    notes = " ".join(target["notes"])
    print(notes)
    assert "collapse: only " in notes
    assert "Most is lost in " in notes
    assert "weights: per-tensor was replaced by per-channel" in notes
    assert target["top1_drop"] <= 0.02


def test_memory_of_calibrating_on_500_photos(shared: Path, tmp_path: Path) -> None:
    """MobileNetV2 at 224 px, calibrated on 500 photos for both CPU runtimes: no process takes more than 2.5 GB."""
    root = shared / "data/imagenet500"
    for photo in sorted((root / "val").rglob("*.JPEG")):
        for copy in ("a", "b"):  # the second half is there to choose and judge
            place = tmp_path / "photos" / photo.parent.name / f"{copy}-{photo.name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(photo)
    split = {"train": 0, "calibration": 0.5, "choice": 0.05, "evaluation": 0.05}
    index = {key: str(root / f"{key}.json") for key in ("class_index", "class_names")}
    recipe = {
        "name": "memory",
        "model": {"source": "torchvision", "name": "mobilenet_v2", "checkpoint": str(shared / "models/mobilenet_v2_imagenet.pth")},
        "data": {"source": "imagefolder", "path": str(tmp_path / "photos"), "split": split, **index},
        "targets": [{"name": runtime, "runtime": runtime, "precision": "int8"} for runtime in ("onnxruntime", "openvino")],
    }
    result, peak = compress(recipe, tmp_path)
    assert result["data"]["calibration"] == 500
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < 2.5e9

"""int8 on real checkpoints and photos, whole runs of the command: memory stays bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.shared


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

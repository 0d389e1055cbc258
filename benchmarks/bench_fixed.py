"""The fixed set that `make bench` measures: the demo's bundles, and MobileNetV2 where ../shared has its weights.

    python benchmarks/bench_fixed.py [--demo out/int8/bundles] [--shared ../shared] [--out out/bench] [--min-time 1]

Writes OUT/bench.json, every raw sample with its circumstances, and OUT/bench.md, the tables with the command that made them. A set that is
not there is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from edgecnn import bench
from edgecnn.device.machine import facts
from edgecnn.errors import guarded
from edgecnn.screen import Screen
from edgecnn.sources import ImageFolder


def mobilenet_v2(shared: Path, out: Path) -> list[Path]:
    """Bundles of MobileNetV2, fp32 and int8 for onnxruntime and OpenVINO, made once."""
    from edgecnn.data import load_data, pack
    from edgecnn.models import TorchvisionModel, load_model
    from edgecnn.targets.base import Source
    from edgecnn.targets.calibration import collect
    from edgecnn.targets.onnx import export_onnx
    from edgecnn.targets.onnxruntime import Onnxruntime
    from edgecnn.targets.openvino import Openvino

    folders = [out / name for name in ("ort-fp32", "ort-int8", "ov-fp32", "ov-int8")]
    if all(folder.is_dir() for folder in folders):
        return folders
    out.mkdir(parents=True, exist_ok=True)
    photos = shared / "data" / "imagenet500"
    index = {key: str(photos / f"{key}.json") for key in ("class_index", "class_names")}
    split = {"train": 0, "calibration": 0.1, "choice": 0.1, "evaluation": 0.8}
    data = load_data(ImageFolder(source="imagefolder", path=str(photos / "val"), split=split, **index), 0, Screen(quiet=True))
    checkpoint = str(shared / "models" / "mobilenet_v2_imagenet.pth")
    model = load_model(
        TorchvisionModel(source="torchvision", name="mobilenet_v2", checkpoint=checkpoint), data.outputs, data.names, trains=False
    )
    graph = out / "model.onnx"
    export_onnx(model, graph)
    images = pack(data.calibration, model.input, out / "calibration")
    found = collect(graph, images, model.input)
    source = Source(graph, lambda: graph, model.input, model.labels, images, lambda: found, 0)
    for folder, target, name in (
        (folders[0], Onnxruntime(name="ort-fp32", runtime="onnxruntime"), "fp32"),
        (folders[1], Onnxruntime(name="ort-int8", runtime="onnxruntime"), "int8"),
        (folders[2], Openvino(name="ov-fp32", runtime="openvino"), "fp32"),
        (folders[3], Openvino(name="ov-int8", runtime="openvino"), "int8-qdq"),
    ):
        if not folder.is_dir():
            target.build(next(c for c in target.candidates() if c.name == name), source, folder)
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("out/int8/bundles"))
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--min-time", type=float, default=1.0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[Path]] = {}
    missing = []
    if demo := [path for name in ("pi", "nuc") if (path := given.demo / name).is_dir()]:
        sets["the demo's bundles"] = demo
    else:
        missing.append("The demo's bundles are not there: `make demo` makes them.")
    if (given.shared / "models" / "mobilenet_v2_imagenet.pth").is_file():
        sets["MobileNetV2, 224 pixels"] = mobilenet_v2(given.shared, given.out / "mobilenet_v2")
    else:
        missing.append("MobileNetV2 was left out: its weights are not there.")
    here = facts()
    command = shlex.join(["python", *sys.argv])
    told = {"command": command, "machine": here, "missing": missing, "sets": {}}
    lines = ["# Latency", "", f"Made by `{command}`, one thread, batch 1, on {here['cpu']}, {here['system']}.", "", *missing]
    for title, paths in sets.items():
        print(title, file=sys.stderr)
        compared = bench.bench(paths, threads=[1], batch=1, seconds=given.min_time, processes=5, options=[], screen=Screen(), seed=0)
        far = bench.distances(paths, threads=[1], batch=1, seconds=given.min_time, options=[])
        told["sets"][title] = {**compared.to_json(), "distance": [each.ratio if not each.void else None for each in far]}
        head = (*bench.head(compared), "times the least possible")
        lines += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row, each in zip(bench.rows(compared), far, strict=True):
            lines.append("| " + " | ".join([*row, "void" if each.void else f"{each.ratio:.2f}"]) + " |")
        lines += ["", *(f"- {remark}" for remark in bench.remarks(compared))]
    (given.out / "bench.json").write_text(json.dumps(told) + "\n")
    (given.out / "bench.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if sets else 2


if __name__ == "__main__":
    sys.exit(guarded(main))

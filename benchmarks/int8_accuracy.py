"""Accuracy of every int8 candidate on the evaluation images, from the folders that int8_prepare.py made.

    python benchmarks/int8_accuracy.py OUT NAME [RUNTIME ...]

Prints for each candidate the drop in top-1, the agreement with the float model, and how it was made. TensorRT's graph runs in onnxruntime.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from edgecnn.device.evaluate import infer_all
from edgecnn.device.packed import open_packed
from edgecnn.device.runtimes import open_runner
from edgecnn.device.runtimes.ort import OrtRunner
from edgecnn.device.spec import InputSpec
from edgecnn.errors import EdgecnnError
from edgecnn.targets.base import Source, Target
from edgecnn.targets.calibration import collect
from edgecnn.targets.onnxruntime import Onnxruntime
from edgecnn.targets.openvino import Openvino
from edgecnn.targets.tensorrt import Tensorrt

TARGETS: dict[str, type[Target]] = {"onnxruntime": Onnxruntime, "openvino": Openvino, "tensorrt": Tensorrt}


def main() -> None:
    folder, runtimes = Path(sys.argv[1]) / sys.argv[2], sys.argv[3:] or list(TARGETS)
    evaluation, wanted = open_packed(folder / "evaluation"), np.load(folder / "float-evaluation.npy")
    source = source_of(folder)
    for runtime in runtimes:
        target = TARGETS[runtime].model_validate({"name": runtime, "runtime": runtime})
        for candidate in target.candidates():
            if candidate.precision != "int8":
                continue
            begun, built = time.monotonic(), folder / f"{runtime}-{candidate.name}"
            shutil.rmtree(built, ignore_errors=True)
            try:
                artifact = target.build(candidate, source, built)
            except EdgecnnError as fault:
                print(f"{folder.name} {runtime} {candidate.name}: not built: {fault}", flush=True)
                continue
            seconds = time.monotonic() - begun
            with (
                OrtRunner(built / "model.onnx", threads=1, provider=None, batch=1)
                if runtime == "tensorrt"
                else open_runner(built, artifact.manifest, threads=1)
            ) as runner:
                found = infer_all(runner, evaluation, source.input)
            top1, before = ((each.argmax(1) == evaluation.labels).mean() for each in (found, wanted))
            agreement = (found.argmax(1) == wanted.argmax(1)).mean()
            print(
                f"{folder.name} {runtime} {candidate.name}: top-1 {top1:.2%} ({100 * (top1 - before):+.2f}), agreement {agreement:.2%}, "
                f"built in {seconds:.0f} s; {'; '.join(artifact.notes)}",
                flush=True,
            )


def source_of(folder: Path) -> Source:
    """What a model's candidates start from."""
    spec = InputSpec.from_json(json.loads((folder / "input.json").read_text()))
    calibration, graph = open_packed(folder / "calibration"), folder / "model.onnx"
    labels = tuple(map(str, range(np.load(folder / "float-evaluation.npy", mmap_mode="r").shape[1])))
    return Source(graph, lambda: graph, spec, labels, calibration, functools.cache(lambda: collect(graph, calibration, spec)), 0)


if __name__ == "__main__":
    main()

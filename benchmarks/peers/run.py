"""The other toolkits side by side with edgecnn: same float graph, calibration images, evaluation images, runtimes and timing.

    make peers                                                 # once: one environment for each peer
    python benchmarks/int8_prepare.py --models DIR --imagenet500 DIR --cifar10 DIR --out OUT
    python benchmarks/peers/run.py quantize OUT [NAME ...]     # every peer's default and best way; a failure is kept with its reason
    python benchmarks/peers/run.py edgecnn OUT [NAME ...]      # edgecnn's own int8 candidates
    python benchmarks/peers/run.py evaluate OUT [NAME ...]     # accuracy of every file in both runtimes
    python benchmarks/peers/run.py race OUT [NAME ...]         # latency, on a machine with nothing else to do
    python benchmarks/peers/run.py table OUT                   # results.json and results.md beside this file

Every step goes on where it was stopped: what has a result is not done again. OUT/NAME/peers/PEER-WAY holds the file, what was said
(log.txt), result.json and the logits; OUT/NAME/race-RUNTIME.json every raw sample.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tables import markdown, rows, tried

from edgecnn import measure
from edgecnn.bench import Contender, race
from edgecnn.device.files import sha256_file
from edgecnn.device.packed import open_packed
from edgecnn.device.preprocess import normalise
from edgecnn.device.spec import InputSpec, Result
from edgecnn.screen import Screen

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = Path(os.environ.get("PEERS", HERE / ".envs"))
RUNTIMES = ("onnxruntime", "openvino")
# Script, environment, ways.
PEERS = {
    "ort_static": ("onnxruntime", ("default", "recommended", "percentile")),
    "nncf_onnx": ("nncf", ("default", "best")),
    "nncf_openvino": ("nncf", ("default", "best")),
    "olive_static": ("olive", ("default", "best")),
    "modelopt_onnx": ("modelopt", ("default", "best")),
    "inc": ("inc", ("default", "best")),
    "aimet": ("aimet", ("default", "best")),
    "quark_onnx": ("quark", ("default", "best")),
}
# Below that a file is shown as collapsed and not timed: nobody would ship it, however fast.
COLLAPSED = -0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (quantize, edgecnn, evaluate, race_all, table):
        sub = commands.add_parser(command.__name__.removesuffix("_all"))
        sub.set_defaults(command=command)
        sub.add_argument("out", type=Path)
        sub.add_argument("names", nargs="*")
        if command is quantize:
            sub.add_argument("--peers", nargs="*", default=list(PEERS))
            sub.add_argument("--ways", nargs="*", help="these only; left out: all of each peer")
            sub.add_argument("--timeout", type=float, default=1800, help="seconds for one way")
        if command in (edgecnn, race_all):
            sub.add_argument("--runtimes", nargs="*", default=RUNTIMES)
        if command is edgecnn:
            sub.add_argument("--candidates", nargs="*", help="these only; left out: every int8 one")
        if command is race_all:
            sub.add_argument("--processes", type=int, default=5)
            sub.add_argument("--seconds", type=float, default=0.3)
            sub.add_argument("--again", action="store_true")
            sub.add_argument("--only", nargs="*", default=[""], help="files whose names begin so; all others are left out")
            sub.add_argument("--rivals", action="store_true", help="besides --only: peers' files at least as accurate as one of edgecnn's")
    given = parser.parse_args()
    folders = [given.out / name for name in given.names] or sorted(p.parent for p in given.out.glob("*/model.onnx"))
    given.command(given, folders)


# ---- files


def quantize(given: argparse.Namespace, folders: list[Path]) -> None:
    for folder in folders:
        images = folder / "calibration.npy"
        if not images.exists():
            spec, packed = input_of(folder), open_packed(folder / "calibration")
            np.save(images, np.concatenate([normalise(packed.images[i : i + 1], spec) for i in range(len(packed))]))
        for peer in given.peers:
            environment, ways = PEERS[peer]
            for way in (way for way in ways if way in (given.ways or ways)):
                out = folder / "peers" / f"{peer}-{way}"
                if not (out / "result.json").exists():
                    print(folder.name, peer, way, quantize_one(environment, peer, way, folder, out, given.timeout), flush=True)


def quantize_one(environment: str, peer: str, way: str, folder: Path, out: Path, timeout_s: float) -> str:
    """Run one way of one peer in its environment; what came of it."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        return f"{python} is not there: run `make peers`"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    quiet = {"OPENVINO_TELEMETRY_OPT_OUT": "1", "NNCF_TELEMETRY": "0", "OLIVE_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "2"}
    here, out = folder.resolve(), out.resolve()
    command = [python.absolute(), HERE / f"{peer}.py", way, here / "model.onnx", here / "calibration.npy", out]
    around = {**os.environ, "PYTHONPATH": "", **quiet}
    begun = time.monotonic()
    with (out / "log.txt").open("w") as log:
        try:
            # In the folder, where the leavings of some (nc_workspace, quantized_info.csv) belong.
            done = subprocess.run(list(map(str, command)), stdout=log, stderr=log, timeout=timeout_s, env=around, cwd=out, check=False)
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    model = model_of(out)
    fault = "" if model and code == 0 else f"no file after {timeout_s:g} s" if code is None else last_line(out / "log.txt")
    write(out, {"peer": peer, "way": way, "seconds": round(time.monotonic() - begun), "versions": versions(environment), "fault": fault})
    return fault or "made"


def edgecnn(given: argparse.Namespace, folders: list[Path]) -> None:
    """edgecnn's own rows: every int8 candidate of its two CPU targets, built as `edgecnn compress` builds them."""
    from edgecnn.errors import EdgecnnError
    from edgecnn.targets.base import Source
    from edgecnn.targets.calibration import collect
    from edgecnn.targets.onnxruntime import Onnxruntime
    from edgecnn.targets.openvino import Openvino

    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
    for folder in folders:
        graph, spec, packed = folder / "model.onnx", input_of(folder), open_packed(folder / "calibration")
        histograms = functools.cache(functools.partial(collect, graph, packed, spec))
        labels = tuple(map(str, range(np.load(folder / "float-evaluation.npy", mmap_mode="r").shape[1])))
        source = Source(graph, lambda graph=graph: graph, spec, labels, packed, histograms, 0)
        for runtime in given.runtimes:
            for old in (folder / "peers").glob(f"edgecnn-{runtime}-*"):
                if not given.candidates or old.name.removeprefix(f"edgecnn-{runtime}-") in given.candidates:
                    shutil.rmtree(old)
            # As the peers' files: the tensor goes in, not pixels.
            kind = {"onnxruntime": Onnxruntime, "openvino": Openvino}[runtime]
            target = kind.model_validate({"name": runtime, "runtime": runtime, "input": "float"})
            for candidate in target.candidates():
                if candidate.precision != "int8" or candidate.name not in (given.candidates or [candidate.name]):
                    continue
                out, begun, fault = folder / "peers" / f"edgecnn-{target.runtime}-{candidate.name}", time.monotonic(), ""
                try:
                    target.build(candidate, source, out)
                except EdgecnnError as refused:
                    fault = str(refused)
                out.mkdir(parents=True, exist_ok=True)
                about = {"peer": "edgecnn", "way": candidate.name, "for": target.runtime, "versions": {"edgecnn": head.stdout.strip()}}
                write(out, {**about, "seconds": round(time.monotonic() - begun), "fault": fault})
                print(folder.name, out.name, fault or "made", flush=True)


# ---- accuracy


def evaluate(given: argparse.Namespace, folders: list[Path]) -> None:
    for folder in folders:
        labels, wanted = open_packed(folder / "evaluation").labels, np.load(folder / "float-evaluation.npy").argmax(1)
        for out in tried(folder):
            about = json.loads((out / "result.json").read_text())
            model = model_of(out)
            if about["fault"] or not model:
                continue
            digest = digest_of(model)
            for runtime in RUNTIMES:
                other = about.get("for", runtime) != runtime or (model.suffix == ".xml" and runtime == "onnxruntime")
                if other or about.get(runtime, {}).get("sha256") == digest:
                    continue
                found = evaluate_one(folder, model, runtime, out / f"{runtime}.npy")
                if isinstance(found, str):
                    about[runtime] = {"sha256": digest, "fault": found}
                else:
                    hits, before = (found == labels).sum(), (wanted == labels).sum()
                    about[runtime] = {
                        "sha256": digest,
                        "fault": "",
                        "top1": float(hits / len(labels)),
                        "drop": float((before - hits) / len(labels)),
                        "agreement": float((found == wanted).mean()),
                    }
                write(out, about | {"bytes": sum(f.stat().st_size for f in model.parent.glob(f"{model.stem}.*"))})
                about = json.loads((out / "result.json").read_text())
                print(folder.name, out.name, runtime, about[runtime], flush=True)


def evaluate_one(folder: Path, model: Path, runtime: str, logits: Path) -> np.ndarray | str:
    """Classes of the evaluation images, or why there are none."""
    words = [model, runtime, folder / "input.json", folder / "evaluation", logits]
    around = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run([sys.executable, HERE / "evaluate.py", *words], capture_output=True, text=True, env=around, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"died with exit code {done.returncode}"])[-1]
    return np.asarray(np.load(logits).argmax(1))


# ---- latency


def race_all(given: argparse.Namespace, folders: list[Path]) -> None:
    for folder in folders:
        for runtime in given.runtimes:
            record = folder / f"race-{runtime}.json"
            if record.exists() and not given.again:
                continue
            contenders = [Contender("float", folder / "model.onnx", 1)]
            contenders += [Contender(out.name, model_of(out), 1) for out in worth_timing(folder, runtime, tuple(given.only), given.rivals)]

            def once(contender: Contender, runtime: str = runtime) -> Result:
                return measure.bench(contender.path, "--runtime", runtime, "--threads", 1, "--seconds", given.seconds)

            found = race(contenders, once, processes=given.processes, seed=0, screen=Screen())
            record.write_text(json.dumps(found.to_json()))
            print(folder.name, runtime, *[f"{c.name} {p50(found.results[c.name]):.3f}" for c in contenders], sep="\n  ", flush=True)


def worth_timing(folder: Path, runtime: str, only: tuple[str, ...], rivals: bool) -> list[Path]:
    """The evaluated files that did not collapse; of those with the same bytes one."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for out in tried(folder):
        about = json.loads((out / "result.json").read_text())
        measured = about.get(runtime, {"fault": "not evaluated"})
        if not measured["fault"] and -measured["drop"] >= COLLAPSED and about.get("for", runtime) == runtime:
            found.setdefault(measured["sha256"], (out, about))
    floor = min((about[runtime]["top1"] for _, about in found.values() if about["peer"] == "edgecnn"), default=0)
    return [
        out
        for out, about in found.values()
        if out.name.startswith(only) or (rivals and about["peer"] != "edgecnn" and about[runtime]["top1"] >= floor)
    ]


def p50(results: list[Result]) -> float:
    """Median of the processes' medians, in milliseconds."""
    return 1e3 * float(np.median([np.median(r.samples_s) for r in results])) if results else float("nan")


# ---- results


def table(given: argparse.Namespace, folders: list[Path]) -> None:
    found = {folder.name: rows(folder) for folder in folders}
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "results.md").write_text(markdown(found))


# ---- small things


def input_of(folder: Path) -> InputSpec:
    return InputSpec.from_json(json.loads((folder / "input.json").read_text()))


def model_of(out: Path) -> Path | None:
    return next((out / name for name in ("model.onnx", "model.xml") if (out / name).exists()), None)


def digest_of(model: Path) -> str:
    """Of the file, with an IR of its weights too: two models may share their .xml."""
    weights = model.with_suffix(".bin")
    return sha256_file(model) + (f"+{sha256_file(weights)}" if model.suffix == ".xml" else "")


def write(out: Path, about: dict[str, Any]) -> None:
    (out / "result.json").write_text(json.dumps(about, indent=1) + "\n")


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "said nothing"


def versions(environment: str) -> dict[str, str]:
    """What the environment's requirements file pins."""
    lines = (HERE / "requirements" / f"{environment}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


if __name__ == "__main__":
    main()

"""Checks of `edgecnn bench` itself, on the machine that it runs on; see README.md.

    python benchmarks/latency.py same              20 races of one file against itself: at least 19 must end in "cannot tell"
    python benchmarks/latency.py slower            20 races against one slowed by 10 %: at least 19 "slower", 18 intervals hold 1.1
    python benchmarks/latency.py busy MODEL        with a busy loop on every core: void or unsteady, never a ranking
    python benchmarks/latency.py benchmark_app MODEL   OpenVINO's own tool, interleaved, five rounds: medians within 5 %

The contenders of the first two are processes whose "inference" waits for an exact time, so that the truth is known. Each check ends
with one JSON object on stdout, with every verdict; exit code 1 where the bar was missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn import bench as host
from edgecnn import measure
from edgecnn.bench import Contender, race
from edgecnn.device.bench import measure as loop
from edgecnn.device.machine import facts
from edgecnn.device.spec import Result
from edgecnn.screen import Screen

SLOWED = 1.1
BASE_S = 0.002


class Waiting:
    """A runner that keeps its core busy for exactly `seconds`, on the clock it is measured with."""

    provider, version, takes = "waiting", "waiting", "float32"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def infer(self, x: np.ndarray) -> np.ndarray:
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return x

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def child(seconds: float, steady_s: float) -> None:
    result = loop(
        lambda: Waiting(seconds), np.zeros(1), file="waiting", file_sha256="", runtime="waiting", threads=1, batch=1, min_seconds=steady_s
    )
    print(json.dumps(asdict(result)))


def waiting(contender: Contender, steady_s: float) -> Result:
    words = [sys.executable, __file__, "child", str(contender.path), str(steady_s)]
    return Result.from_json(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))


def races(ratio: float, count: int, steady_s: float) -> list[host.Verdict]:
    contenders = [Contender("a", Path(str(BASE_S)), 1), Contender("b", Path(str(BASE_S * ratio)), 1)]
    found = []
    for seed in range(count):
        compared = race(contenders, lambda c: waiting(c, steady_s), processes=5, seed=seed, screen=Screen(quiet=True))
        found += compared.verdicts
        print(f"  {seed + 1}/{count} {found[-1]}", file=sys.stderr, flush=True)
    return found


def spin() -> None:
    while True:
        pass


def busy(model: Path) -> list[host.Verdict]:
    load = [multiprocessing.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in load:
        process.start()
    try:
        found = host.bench([model, model], threads=[1], batch=1, seconds=0.5, processes=5, options=[], screen=Screen())
    finally:
        for process in load:
            process.terminate()
    return list(found.verdicts)


def benchmark_app(model: Path, rounds: int = 5) -> dict[str, Any]:
    """Medians in ms of both tools, in turns: same model, one thread, batch 1, latency hint, float arithmetic."""
    app = Path(sys.executable).with_name("benchmark_app")
    command = [app, "-m", model, "-d", "CPU", "-hint", "none", "-nireq", "1", "-nstreams", "1", "-nthreads", "1", "-api", "sync"]
    command += ["-t", "3", "-infer_precision", "f32"]
    ours, theirs, void = [], [], []
    for _ in range(rounds):
        result = measure.bench(model, "--seconds", 3, "--runtime", "openvino")
        ours.append(1e3 * statistics.median(result.samples_s))
        void.append(result.void)
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        match = re.search(r"Median:\s+([\d.]+) ms", told)
        assert match, told[-2000:]
        theirs.append(float(match[1]))
    return {
        "ours_ms": ours,
        "theirs_ms": theirs,
        "void": void,
        "ratio": statistics.median(ours) / statistics.median(theirs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["same", "slower", "busy", "benchmark_app", "child"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.3, help="steady-state seconds in each process")
    arguments = parser.parse_args()
    if arguments.check == "child":
        child(*map(float, arguments.words))
        return 0
    answer: dict[str, Any] = {"command": sys.argv[1:], "machine": facts()}
    if arguments.check == "benchmark_app":
        answer |= benchmark_app(Path(arguments.words[0]))
        kept = abs(answer["ratio"] - 1) <= 0.05
    else:
        if arguments.check == "busy":
            verdicts = busy(Path(arguments.words[0]))
            kept = all(v.verdict in ("void", "unsteady") for v in verdicts)
        elif arguments.check == "same":
            verdicts = races(1.0, arguments.races, arguments.seconds)
            kept = sum(v.verdict not in ("faster", "slower") for v in verdicts) >= 0.95 * len(verdicts)
        else:
            verdicts = races(SLOWED, arguments.races, arguments.seconds)
            covered = sum(v.low <= SLOWED <= v.high for v in verdicts if v.low is not None and v.high is not None)
            kept = sum(v.verdict == "slower" for v in verdicts) >= 0.95 * len(verdicts) and covered >= 0.9 * len(verdicts)
            answer["covered"] = covered
        answer["verdicts"] = [asdict(v) for v in verdicts]
        answer["counts"] = {name: sum(v.verdict == name for v in verdicts) for name in sorted({v.verdict for v in verdicts})}
    answer["kept"] = kept
    print(json.dumps(answer))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

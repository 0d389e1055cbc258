"""Checks of `edgecnn bench` itself, on the machine that it runs on; see README.md.

    python benchmarks/latency.py same MODEL        20 races of one file against itself: at least 19 must end in "cannot tell"
    python benchmarks/latency.py slower            20 races against one slowed by 10 %: at least 19 "slower", 18 intervals hold 1.1
    python benchmarks/latency.py busy MODEL        with a busy loop on every core: void or unsteady, never a ranking
    python benchmarks/latency.py benchmark_app MODEL   OpenVINO's own tool, interleaved, five rounds: medians within 5 %
    python benchmarks/latency.py profile MODEL...  layer times add up to 90-110 % of the steady latency

The contenders of `slower` are processes whose "inference" keeps a core busy for a time of a known distribution: each process has
its luck, each call its scatter, as real ones have, and the ratio of the typical process is 1.1 exactly.

Each check ends with one JSON object on stdout, with every verdict; exit code 1 where the bar was missed. With `--record FILE` every
race is written to FILE as it ends, and the same command goes on where it was stopped: for machines that are quiet only now and then.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn import bench as host
from edgecnn import measure
from edgecnn.bench import Contender, race
from edgecnn.device.bench import measure as loop
from edgecnn.device.graph import bare_manifest
from edgecnn.device.machine import facts
from edgecnn.device.spec import Result
from edgecnn.screen import Screen

SLOWED = 1.1
BASE_S = 0.002
# Standard deviations, as fractions, between processes and between calls of one; chosen: intervals come out about as wide as a real file's.
LUCK, SCATTER = 0.015, 0.05


class Waiting:
    """A runner that keeps its core busy for a time drawn from a known distribution, on the clock it is measured with."""

    provider, version, takes = "waiting", "waiting", "float32"

    def __init__(self, seconds: float) -> None:
        random = np.random.default_rng()
        self.seconds = iter(seconds * random.lognormal(0, LUCK) * random.lognormal(0, SCATTER, 100_000))

    def infer(self, x: np.ndarray) -> np.ndarray:
        end = time.perf_counter() + next(self.seconds)
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


def raced(once: Callable[[int], host.Comparison], count: int, record: Path | None) -> list[host.Verdict]:
    """`count` races, with those that `record` holds; what was disturbed is told, counts for nothing, and is run again."""
    lines = record.read_text().splitlines() if record and record.exists() else []
    found = [host.Verdict(**json.loads(line)) for line in lines][:count]
    seed = len(found)
    while len(found) < count and seed < 2 * count:
        compared = once(seed)
        seed += 1
        (verdict,) = compared.verdicts
        void = [result.void for results in compared.void.values() for result in results]
        disturbed = f"; {len(void)} disturbed processes, such as: {void[0]}" if void else ""
        print(f"  {len(found) + 1}/{count} {verdict}{disturbed}", file=sys.stderr, flush=True)
        if verdict.verdict == "void":
            continue
        found.append(verdict)
        if record:
            with record.open("a") as out:
                out.write(json.dumps(asdict(verdict)) + "\n")
    return found


def against_itself(model: Path, steady_s: float) -> Callable[[int], host.Comparison]:
    quiet = Screen(quiet=True)
    return lambda seed: host.bench([model, model], threads=[1], batch=1, seconds=steady_s, processes=5, options=[], screen=quiet, seed=seed)


def slowed(ratio: float, steady_s: float) -> Callable[[int], host.Comparison]:
    contenders = [Contender("a", Path(str(BASE_S)), 1), Contender("b", Path(str(BASE_S * ratio)), 1)]
    return lambda seed: race(contenders, lambda c: waiting(c, steady_s), processes=5, seed=seed, screen=Screen(quiet=True))


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
    shape = "[" + ",".join(map(str, (1, *bare_manifest(model).input.shape))) + "]"
    # Its latency hint takes no number of threads; one stream is what the hint comes to.
    command = [app, "-m", model, "-d", "CPU", "-hint", "none", "-nstreams", "1", "-nireq", "1", "-nthreads", "1", "-api", "sync"]
    command += ["-shape", shape, "-t", "3", "-infer_precision", "f32"]
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


def profiles(models: Sequence[Path]) -> dict[str, Any]:
    """What share of the steady latency the layers add up to, for each model."""
    found = host.profiles(models, threads=[1], batch=1, seconds=3, options=[])
    return {
        str(model): {"covered": p.covered, "steady_ms": 1e3 * p.steady_s, "void": p.void} for model, p in zip(models, found, strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["same", "slower", "busy", "benchmark_app", "profile", "child"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.3, help="steady-state seconds in each process")
    parser.add_argument("--record", type=Path, help="file that keeps each race as it ends, to go on from")
    arguments = parser.parse_args()
    if arguments.check == "child":
        child(*map(float, arguments.words))
        return 0
    models = [Path(word) for word in arguments.words]
    answer: dict[str, Any] = {"command": sys.argv[1:], "machine": facts()}
    if arguments.check == "benchmark_app":
        answer |= benchmark_app(models[0])
        kept = abs(answer["ratio"] - 1) <= 0.05
    elif arguments.check == "profile":
        answer["profiles"] = profiles(models)
        kept = all(0.9 <= told["covered"] <= 1.1 for told in answer["profiles"].values())
    else:
        if arguments.check == "busy":
            verdicts = busy(models[0])
            kept = all(v.verdict in ("void", "unsteady") for v in verdicts)
        elif arguments.check == "same":
            verdicts = raced(against_itself(models[0], arguments.seconds), arguments.races, arguments.record)
            kept = sum(v.verdict == "cannot tell" for v in verdicts) >= 0.95 * len(verdicts)
        else:
            verdicts = raced(slowed(SLOWED, arguments.seconds), arguments.races, arguments.record)
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

"""Measures an exported file the way a board would: by `python -m edgecnn.device` in a fresh process, never inside this one.

A process of its own keeps torch's threads and memory out of the figure; contenders take turns in random order, so that a machine
that slows down slows all of them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import edgecnn
from edgecnn.device.spec import Result
from edgecnn.errors import DeviceError

TIMEOUT_S = 3600


def evaluate(bundle: Path, images: Path, logits: Path, *, threads: int, runtime: str | None = None) -> dict[str, Any]:
    """Run every prepared image through the bundle's file; `logits` gets N x classes float32.

    Args:
        bundle: its folder.
        images: a prepared set.
        logits: `.npy` to write.
        threads: of the runtime.
        runtime: another runtime to run the same graph in, or None for the bundle's own.

    Returns:
        What `eval --json` prints: top1, n, interval, provider, runtime, file_sha256 ...

    Raises:
        DeviceError: the runtime refuses the file, or the process died.
    """
    return device("eval", bundle, "--data", images, "--logits", logits, "--threads", threads, *(("--runtime", runtime) if runtime else ()))


def latencies(bundles: Mapping[str, Path], *, threads: int, processes: int, seconds: float, seed: int) -> dict[str, list[Result]]:
    """Time each bundle in `processes` fresh processes of `seconds` steady state each, all taking turns in random order."""
    results: dict[str, list[Result]] = {name: [] for name in bundles}
    order = random.Random(seed)
    for _ in range(processes):
        names = list(bundles)
        order.shuffle(names)
        for name in names:
            results[name].append(Result.from_json(device("bench", bundles[name], "--seconds", seconds, "--threads", threads)))
    return results


def device(*words: object) -> dict[str, Any]:
    """Run one command of the board's half and return the JSON it prints."""
    package = str(Path(edgecnn.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "edgecnn.device", *map(str, words), "--json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": path}, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"{words[0]} {words[1]}: no answer in {TIMEOUT_S} s. The runtime hangs on this file; try another candidate."
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"died with exit code {done.returncode}"]
        raise DeviceError(lines[-1].removeprefix("edgecnn: "))
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer

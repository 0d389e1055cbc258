"""Measures an exported file the way a board would: by `python -m edgecnn.device` in a fresh process, never inside this one.

A process of its own keeps torch's threads and memory out of the figure; contenders take turns in random order, so that a machine
that slows down slows all of them. The same commands run on this machine or, through a `remote.Board`, on a board.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import edgecnn
from edgecnn.device.bench import share
from edgecnn.device.bundle import MANIFEST
from edgecnn.device.graph import bare_manifest
from edgecnn.device.machine import NOT_AVAILABLE, RUNTIMES, identity, versions
from edgecnn.device.meters import Energy
from edgecnn.device.spec import Result, read_manifest
from edgecnn.errors import BUG, INTERRUPTED, BoardError, DeviceBug, DeviceError, ResourceError, printable
from edgecnn.remote import Board, Out, on, parse_address

# For what a command does besides measuring for the time that it was asked to.
TIMEOUT_S = 3600
# Between them lies what a call, a load or a process can take.
_SHORTEST_S, LONGEST_S, _MOST_BYTES = 1e-9, 1e6, 2**60


def evaluate(
    bundle: Path, images: Path, logits: Path, *, threads: int, runtime: str | None = None, board: Board | None = None
) -> dict[str, Any]:
    """Run every prepared image through the bundle's file; `logits` gets N x classes float32.

    Args:
        bundle: its folder.
        images: a prepared set.
        logits: `.npy` to write.
        threads: of the runtime.
        runtime: another runtime to run the same graph in, or None for the bundle's own.
        board: where; None is this machine.

    Returns:
        What `eval --json` prints: top1, n, interval, provider, runtime, file_sha256 ...

    Raises:
        DeviceError: the runtime refuses the file, or the process died.
    """
    options = ("--runtime", runtime) if runtime else ()
    return device("eval", bundle, "--data", images, "--logits", Out(logits), "--threads", threads, *options, board=board)


def latencies(
    bundles: Mapping[str, Path], *, threads: int, processes: int, seconds: float, seed: int, board: Board | None = None
) -> dict[str, list[Result]]:
    """Time each bundle in `processes` fresh processes of `seconds` steady state each, all taking turns in random order."""

    def once(name: str) -> Result:
        return bench(bundles[name], "--seconds", seconds, "--threads", threads, board=board)

    return interleaved(list(bundles), once, processes, random.Random(seed))


@functools.cache
def identity_of(address: str | None) -> dict[str, Any]:
    """The machine at `address` (None is this one), as far as it decides speed and rounding; of a board also its versions.

    Raises:
        DeviceError: the board does not tell.
    """
    if address is None:
        return identity()
    with on(address) as board:
        answer = device("machine", board=board)
    told, found = answer.get("identity"), answer.get("versions")
    if not (isinstance(told, dict) and isinstance(told.get("cpu"), str) and isinstance(found, dict)):
        raise DeviceError(f"{address}: does not tell what machine it is: {printable(json.dumps(answer))[:200]}. Is its Python sound?")
    return {**told, "cpu": printable(told["cpu"]), "versions": {name: str(found.get(name, NOT_AVAILABLE)) for name in ("numpy", *RUNTIMES)}}


def versions_of(address: str | None) -> dict[str, str]:
    """Of numpy and the runtimes at `address`; `NOT_AVAILABLE` for what is not installed."""
    return versions() if address is None else dict(identity_of(address)["versions"])


def place(address: str | None) -> str:
    """The machine at `address` for people: `ssh://pi@board (Cortex-A76)`, without the path of its Python."""
    called = "this machine" if address is None else str(parse_address(address)) if "://" in address else address
    return f"{called} ({identity_of(address)['cpu']})"


def in_turns(bundle: Path, whole: Path, *, threads: int, seconds: float, board: Board | None = None) -> float:
    """What `bundle` takes of the latency of `whole`, the two taking turns in one fresh process.

    Raises:
        DeviceError: also where the answer is not what a measurement can be, or one of something else.
    """
    answer = device("bench", bundle, "--against", whole, "--threads", threads, "--seconds", seconds, board=board)
    samples: list[Any] = [answer.get("samples_s"), answer.get("against_s")]
    for each in samples:
        if not (isinstance(each, list) and each and all(isinstance(t, float) and _SHORTEST_S < t < LONGEST_S for t in each)):
            raise _no_measurement(bundle, board, answer)
    if (_digest(bundle), _digest(whole), threads) != tuple(map(answer.get, ("file_sha256", "against_sha256", "threads"))):
        raise _another(bundle, board)
    return share(*samples)


def interleaved(names: Sequence[str], once: Callable[[str], Result], rounds: int, order: random.Random) -> dict[str, list[Result]]:
    """Measure each of `names` once in each of `rounds`, every round in an order of its own.

    Args:
        names: the contenders.
        once: measures one of them in a fresh process.
        rounds: how often.
        order: of the contenders in each round.
    """
    results: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in order.sample(list(names), len(names)):
            results[name].append(once(name))
    return results


def bench(bundle: Path, *options: object, board: Board | None = None) -> Result:
    """One measurement in one fresh process.

    Raises:
        DeviceError: also where the answer is not what a measurement can be, or one of something else, as that of a board that lies.
    """
    answer = device("bench", bundle, *options, board=board)
    try:
        result = Result.from_json(answer)
        times = [result.load_s, result.first_s, *result.samples_s, *result.warmup_s]
        real = bool(result.samples_s) and all(isinstance(t, float) and 0 <= t < LONGEST_S for t in times)
        real &= min(result.samples_s) > _SHORTEST_S
        real &= isinstance(result.void, str) and all(isinstance(doubt, str) for doubt in result.doubts)
        for each in result.energy if isinstance(result.energy, tuple) else ():
            told = Energy(**each)
            real &= isinstance(told.source, str) and all(isinstance(w, float) for w in (told.idle_w, told.working_w))
            real &= isinstance(told.per_inference_j, float | None)
        real &= isinstance(result.energy, str | tuple) and isinstance(result.circumstances, dict)
        sizes = (result.peak_rss_bytes, result.circumstances.get("rss_before_load_bytes", 0))
        real &= all(size == NOT_AVAILABLE or (isinstance(size, int) and 0 <= size < _MOST_BYTES) for size in sizes)
    except (TypeError, ValueError):
        real = False
    if not real:
        raise _no_measurement(bundle, board, answer)
    asked = (_digest(bundle), int(str(_given(options, "--threads", 1))), int(str(_given(options, "--batch", 1))))
    if asked != (result.file_sha256, result.threads, result.batch):
        raise _another(bundle, board)
    return result


def _no_measurement(bundle: Path, board: Board | None, answer: Mapping[str, Any]) -> DeviceError:
    said = printable(json.dumps(answer))[:200]
    return DeviceError(f"{_told_by(board)}{bundle}: the answer is no measurement: {said}. Is the board's Python sound?")


def _another(bundle: Path, board: Board | None) -> DeviceError:
    return DeviceError(
        f"{_told_by(board)}{bundle}: the answer is of another file, or of other threads or another batch than were asked for."
    )


def _told_by(board: Board | None) -> str:
    return "" if board is None else f"{board.address}: "


def _given(words: Sequence[object], option: str, default: object) -> object:
    return words[words.index(option) + 1] if option in words else default


def _digest(bundle: Path) -> str:
    """Of the model's file, which a measurement must name."""
    return bare_manifest(bundle).model_sha256 if bundle.is_file() else read_manifest(bundle / MANIFEST).model_sha256


def device(*words: object, board: Board | None = None) -> dict[str, Any]:
    """Run one command of the board's half, here or on `board`, and return the JSON it prints.

    Args:
        words: of the command; a Path is a file or folder that it reads, an `Out` a file that it writes.
        board: where; None is this machine.
    """
    timeout_s = TIMEOUT_S + 4 * float(str(_given(words, "--seconds", 0)))
    if board is None:
        code, out, err = _here(words, timeout_s)
    else:
        code, out, err = board.run(*words, "--json", timeout_s=timeout_s)
    if code:
        lines = [line for line in err.splitlines() if line.strip()] or [f"died with exit code {code}"]
        if lines[-1].startswith("edgecnn: this is a bug"):
            lines[-1] = f"{lines[-2][:500] if len(lines) > 1 else ''} ({lines[-1].removeprefix('edgecnn: ')})"
        if code == -signal.SIGKILL:
            lines = [f"{words[0]} {words[1]}: was killed. Is the machine out of memory?"]
        told = _told_by(board) + printable(lines[-1].removeprefix("edgecnn: "))
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code in (ResourceError.exit_code, -signal.SIGKILL):  # says nothing about the file
            raise (ResourceError if board is None else BoardError)(told)
        raise (DeviceBug if code == BUG else DeviceError)(told)
    try:
        answer = json.loads(out)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise DeviceError(f"{words[0]}: the answer is no JSON object: {printable(out[:200])!r}. Is the board's Python sound?")
    return answer


def _here(words: Sequence[object], timeout_s: float) -> tuple[int, str, str]:
    package = str(Path(edgecnn.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    texts = [str(word.path) if isinstance(word, Out) else str(word) for word in words]
    # A run that is killed leaves nobody who writes into its folder. Not by preexec_fn: Python in a fork goes ill with threads and Ctrl-C.
    start = f"from edgecnn.device.agent import die_with_parent as d; d({os.getpid()}); from edgecnn.device.__main__ import main; "
    command = [sys.executable, "-c", start + "raise SystemExit(main(own_process=True))", *texts, "--json"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"{words[0]} {words[1]}: no answer in {timeout_s:g} s. The runtime hangs on this file; try another candidate."
        ) from None
    return done.returncode, done.stdout, done.stderr

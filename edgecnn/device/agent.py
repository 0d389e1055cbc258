"""What runs on a board while a host talks to it: takes files by their digests, runs the board's half on them, answers, cleans up.

The host sends this file's source over ssh to a Python that runs what it reads, so it needs nothing on the board but the standard
library, and nothing of it stays there. On the wire, after the source: one JSON object a line in each direction; files follow the lines
that announce them, as raw bytes. Names and words travel inside the JSON and never reach a shell.

Files are kept under their digests in `~/.cache/edgecnn/board`, so that a second measurement sends nothing again and a broken transfer
goes on where it stopped; the oldest go when they exceed `KEEP_BYTES`. Everything else is gone when the connection is.
One agent works on a board at a time, whoever's it is: it holds an abstract socket, which the kernel takes away with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOCK = "\0edgecnn-board"
WAITING_EVERY_S = 5.0  # and working: what the host hears, or it would take the board to hang
KEEP_BYTES = 2_000_000_000
OUTPUT_MOST_BYTES = 64_000_000
_CHUNK = 1 << 20


class Fault(Exception):
    """Told to the host as one line."""


def serve() -> None:
    """Answer the host on stdin and stdout until it hangs up."""
    os.write(1, b"\n")  # what the login printed may lack its line's end
    if sys.version_info < (3, 10):  # noqa: UP036  a board may have an older one
        sys.stdout.write(json.dumps({"error": f"Python {sys.version.split()[0]} is too old: edgecnn needs 3.10 or newer"}) + "\n")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(1))
    work = None
    try:
        greeting = json.loads(_line())
        lock = _lock(greeting["wait_s"])
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgecnn" / "board"
        work = base / "work"
        # Nobody else holds the lock: what lies there is of an agent that was killed.
        shutil.rmtree(work, ignore_errors=True)
        (base / "files").mkdir(parents=True, exist_ok=True)
        _say({"hello": greeting["token"], "python": sys.version.split()[0]})
        while line := _line():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _answer(json.loads(line), base / "files", work)
        lock.close()
    except (Fault, OSError) as fault:
        text = str(fault) if isinstance(fault, Fault) else _cannot_keep(fault)
        with contextlib.suppress(OSError):  # a host that is gone hears nothing
            _say({"error": text})
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _cannot_keep(fault: OSError) -> str:
    where = f" {fault.filename}" if fault.filename else "s"
    return f"cannot keep the file{where}: {fault.strerror or fault}. Make room there, or mend its rights"


def _lock(wait_s: float) -> socket.socket:
    """Hold the board; who waits for it says so again and again, for a host cannot tell a long wait from a board that hangs."""
    end = time.monotonic() + wait_s
    said = 0.0
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            held.bind(LOCK)
            return held
        except OSError:
            if time.monotonic() >= end:
                raise Fault(
                    f"another edgecnn measures on this board, and two at once would disturb each other; waited {wait_s:g} s"
                ) from None
            if time.monotonic() >= said + WAITING_EVERY_S:
                said = time.monotonic()
                _say({"waiting": "another edgecnn measures on this board"})
            if select.select([0], [], [], 0.2)[0]:
                raise Fault("the host hung up") from None


def _answer(request: dict[str, Any], files: Path, work: Path) -> None:
    tree: dict[str, list[Any]] = request["tree"]
    for name, (digest, size) in tree.items():
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\0" in name or len(digest) != 64 or digest.strip("0123456789abcdef") or size < 0:
            raise Fault(f"the host names a file {name!r}")
    wanted: dict[str, int] = dict(tree.values())
    there = {digest: _there(files / digest, size) for digest, size in wanted.items()}
    need = {digest: have for digest, have in there.items() if have != wanted[digest] or not (files / digest).exists()}
    try:
        _make_room(files, set(wanted), sum(wanted[digest] - have for digest, have in need.items()))
        _say({"need": need})
        for digest, have in need.items():
            _take(files / digest, have, wanted[digest])
    except OSError as fault:
        for digest in need:
            (files / f"{digest}.part").unlink(missing_ok=True)
        raise Fault(_cannot_keep(fault)) from None
    for name, (digest, _) in tree.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.utime(files / digest)
        try:
            os.link(files / digest, path)
        except OSError:  # a file system without links
            shutil.copyfile(files / digest, path)
    code, out, err = _run(request["words"], work, float(request["timeout_s"]))
    outputs = [name for name in request["outputs"] if (work / name).is_file() and code == 0]
    _say({"code": code, "out": out, "err": err, "outputs": {name: (work / name).stat().st_size for name in outputs}})
    for name in outputs:
        with (work / name).open("rb") as source:
            while block := source.read(_CHUNK):
                _write(block)


def _there(path: Path, size: int) -> int:
    """How many of a file's bytes are here: all, checked against the digest; those of a broken transfer; or none."""
    if path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as source:
            while block := source.read(_CHUNK):
                digest.update(block)
        if digest.hexdigest() == path.name:
            return size
        path.unlink()
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.is_file() else 0
    return have if have < size else 0


def _take(path: Path, have: int, size: int) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("ab" if have else "wb") as out:
        while have < size:
            block = os.read(0, min(_CHUNK, size - have))
            if not block:
                raise Fault("the host hung up")
            out.write(block)
            have += len(block)
    part.replace(path)
    if _there(path, size) != size or path.stat().st_size != size:
        path.unlink(missing_ok=True)
        raise Fault("a file came with another digest than it was announced with; send it again")


def _make_room(files: Path, wanted: set[str], more: int) -> None:
    """Remove the longest unused files until `more` bytes fit into what may be kept, and onto the disk."""
    kept = sorted(
        (path.stat().st_mtime, path.stat().st_size, path) for path in files.iterdir() if path.name.partition(".")[0] not in wanted
    )
    total = sum(size for _, size, _ in kept)
    for _, size, path in kept:
        if total + more <= KEEP_BYTES and shutil.disk_usage(files).free >= more:
            break
        path.unlink()
        total -= size


def _run(words: list[str], work: Path, timeout_s: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the board's half; it is killed when the host hangs up, with everything it started."""
    start = "import sys; sys.path.insert(0, 'code'); from edgecnn.device.__main__ import main; sys.exit(main(own_process=True))"
    child = subprocess.Popen(
        [sys.executable, "-B", "-c", start, *words],
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    assert child.stdout is not None
    assert child.stderr is not None
    pipes = {child.stdout.fileno(): bytearray(), child.stderr.fileno(): bytearray()}
    outputs = list(pipes.values())
    end = time.monotonic() + timeout_s
    try:
        while pipes:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise Fault(f"no answer in {timeout_s:g} s: {words[0]} hangs on this board")
            ready = select.select([0, *pipes], [], [], min(left_s, WAITING_EVERY_S))[0]
            if not ready:
                _say({"working": words[0]})
            if 0 in ready:
                raise Fault("the host hung up")
            for pipe in ready:
                block = os.read(pipe, _CHUNK)
                pipes[pipe] += block
                if len(pipes[pipe]) > OUTPUT_MOST_BYTES:
                    raise Fault(f"{words[0]} printed more than {OUTPUT_MOST_BYTES} bytes")
                if not block:
                    del pipes[pipe]
        code = child.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    out, err = (bytes(output).decode("utf-8", "replace") for output in outputs)
    return code, out, err


def die_with_parent(parent: int) -> None:
    """End this process when the one that started it ends, however that ends; at once if that, `parent`, is gone already."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _line() -> bytes:
    """A line of the host, or nothing where it hung up; byte by byte, for what follows it is not ours to read here."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def _say(answer: dict[str, Any]) -> None:
    _write(json.dumps(answer).encode() + b"\n")


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    serve()

"""Every file of a stranger's comes in through here: capped, copied where nobody can change it, parsed in a process without rights.

    size checked -> private copy and its digest -> `parser.py` in a confined process -> plain numbers -> checked again

The copy has no name in any folder, so neither the file's owner nor a killed run can leave anything of it. Images are the exception:
they are decoded in this process, by Pillow, from a short list of formats (`device/preprocess.py`); and a bundle's own files are
known by their digests and opened by the device program, which confines itself (`device/confine.py`).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgecnn.errors import DataError, EdgecnnError, ModelError, ResourceError
from edgecnn.parser import SAVE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MOST_BYTES = 4 << 30
_ANSWER_MOST_BYTES = 64 << 20
_START_S = 120  # of the parser's process, which imports torch
PROGRAM = (
    "import json, sys, socket; sys.path[:] = json.loads(sys.argv[1]); from edgecnn.parser import serve; serve(socket.socket(fileno=0))"
)


@dataclass(frozen=True)
class Weights:
    """A checkpoint's content.

    Attributes:
        tensors: on the CPU, finite; an OrderedDict in the file's order, with torch's `_metadata` where the file has it.
        metadata: of a safetensors file.
        sha256: of the file as it was read.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def read_weights(path: Path) -> Weights:
    """Read a checkpoint without running anything in it.

    Raises:
        ModelError: no such file; not weights; code in the pickle; damaged; a bomb; NaN or infinite values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    what = f"checkpoint {path}"
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file" if not path.exists() else "not a regular file"
        raise ModelError(f"{what}: {found}. Give the path of a .safetensors, .pt or .pth file of weights.")
    with _private_copy(path, what, ModelError) as (copy, sha256), tempfile.TemporaryFile() as numbers:
        told = _parsed("weights", path, copy, numbers, ModelError)
        numbers.seek(0)
        try:
            found_tensors = load(numbers.read())
            tensors = OrderedDict((str(name), found_tensors[name]) for name in told["names"])
            versions = {str(name): {"version": int(version)} for name, version in told["versions"].items()}
            metadata = {str(key): str(value) for key, value in told["metadata"].items()}
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError):
            raise ModelError(f"{what}: its parser answered what is no answer. Take the file from another source.") from None
    if versions:
        tensors._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    _check_finite(what, tensors)
    return Weights(tensors, metadata, sha256)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays `images` and `labels` of an `.npz`, read-only and mapped from an unnamed file.

    Raises:
        DataError: it cannot be read, has other arrays, or is a bomb.
    """
    import numpy as np

    with _private_copy(path, str(path), DataError) as (copy, _), tempfile.TemporaryFile() as numbers:
        told = _parsed("arrays", path, copy, numbers, DataError)
        size = os.fstat(numbers.fileno()).st_size
        arrays = {}
        try:
            for name in ("images", "labels"):
                kind, shape, start = np.dtype(told[name][0]), tuple(int(n) for n in told[name][1]), int(told[name][2])
                if kind.hasobject or min(shape, default=1) < 0 or start < 0 or start + math.prod(shape) * kind.itemsize > size:
                    raise ValueError
                empty = not math.prod(shape)
                arrays[name] = np.empty(shape, kind) if empty else np.memmap(numbers, kind, "r", start, shape)
        except (KeyError, TypeError, ValueError, IndexError):
            raise DataError(f"{path}: its parser answered what is no answer. Take the file from another source.") from None
    return arrays


def _check_finite(what: str, tensors: dict[str, Tensor]) -> None:
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise ModelError(
                f"{what}: {name} holds {bad} NaN or infinite of {tensor.numel()} values: training diverged or it is damaged. "
                "Take an earlier checkpoint."
            )


@contextmanager
def _private_copy(path: Path, what: str, kind: type[EdgecnnError]) -> Iterator[tuple[IO[bytes], str]]:
    """The file's bytes in a file without a name, and their sha256."""
    with tempfile.TemporaryFile() as copy:
        try:
            # A pipe or a device would block, or never end.
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as reason:
            raise kind(f"{what}: {(reason.strerror or 'unreadable').lower()}. Mend its rights, or give another file.") from None
        try:
            about = os.fstat(source)
            if not stat.S_ISREG(about.st_mode):
                raise kind(f"{what}: not a readable file, but a folder, pipe or device. Give the path of a file.")
            if about.st_size > MOST_BYTES:
                raise kind(f"{what}: {about.st_size} bytes, more than the {MOST_BYTES} that are read.")
            digest, left = hashlib.sha256(), about.st_size
            while left and (block := os.read(source, min(left, 1 << 20))):
                digest.update(block)
                copy.write(block)
                left -= len(block)
        finally:
            os.close(source)
        copy.flush()
        copy.seek(0)  # from here on only by its descriptor: the parser's reading moves the same offset
        yield copy, digest.hexdigest()


def _parsed(kind: str, path: Path, content: IO[bytes], numbers: IO[bytes], fault: type[EdgecnnError]) -> dict[str, Any]:
    """What the confined process says of `content`; the numbers are then in `numbers`.

    Raises:
        EdgecnnError: what the parser found wrong, or `fault`, where it was ended: by its limits, by the clock or by a crash.
    """
    size = os.fstat(content.fileno()).st_size
    with tempfile.TemporaryFile() as answer:
        job = {"kind": kind, "path": str(path), "wall_s": 9 + size / (10 << 20)}
        end = _PARSER.ask(job, (content.fileno(), numbers.fileno(), answer.fileno()))
        if end["late"] or end["status"]:
            why = "takes longer than its size explains" if end["late"] else f"ends its parser ({_ended(end['status'])})"
            raise fault(f"{path}: {why}: damaged, or made to harm. Nothing in it was run. Take the file from another source.")
        answer.seek(0)
        try:
            told = json.loads(answer.read(_ANSWER_MOST_BYTES))
        except (ValueError, RecursionError):
            told = None
    if not isinstance(told, dict):
        raise fault(f"{path}: its parser answered what is no answer. Take the file from another source.")
    if "error" in told:
        raise {"DataError": DataError, "ModelError": ModelError}.get(str(told.get("is")), fault)(str(told["error"]))
    return told


def _ended(status: int) -> str:
    return {-9: "out of time or memory", -11: "it crashed", -24: "out of time", -6: "it crashed"}.get(status, f"status {status}")


class _Parser:
    """The process of `parser.py`: started when first asked, one for this process, ended with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._owner = 0

    def ask(self, job: dict[str, Any], files: tuple[int, ...]) -> dict[str, Any]:
        """How the parsing ended: `late`, and the exit `status` of the fork."""
        with self._lock:
            if self._owner != os.getpid() or self._process is None or self._process.poll() is not None:
                self._start()
            assert self._channel is not None
            try:
                socket.send_fds(self._channel, [json.dumps(job).encode()], files)
                # The parser's own clock ends its fork; this one is for a parser that is still importing torch, or is gone.
                if not select.select([self._channel], [], [], _START_S + job["wall_s"])[0]:
                    raise ResourceError(f"{job['path']}: the process that parses it does not answer. Is the machine overloaded?")
                message = self._channel.recv(1 << 16)
                if not message:
                    raise OSError
            except OSError:
                self.close()
                raise ResourceError(f"{job['path']}: the process that parses it was ended. Is the machine out of memory?") from None
            except BaseException:  # Ctrl-C too: its late answer must not be taken for the next one's
                self.close()
                raise
            found: dict[str, Any] = json.loads(message)
            return found

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = [entry for entry in sys.path if entry and Path(entry).is_absolute()]
        # -I: neither the current folder nor PYTHON* variables choose what it imports; it is told.
        command = [sys.executable, "-I", "-c", PROGRAM, json.dumps(path)]
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **one_thread}
            )
        self._channel, self._owner = ours, os.getpid()

    def close(self) -> None:
        if self._channel is not None and self._owner == os.getpid():
            self._channel.close()  # which ends it
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._process = self._channel = None


_PARSER = _Parser()
atexit.register(_PARSER.close)

__all__ = ["SAVE", "Weights", "read_arrays", "read_weights"]

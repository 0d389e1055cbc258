"""The run folder: every step's result under the digest of all that decides it, so that nothing is done twice and nothing stale is reused.

    recipe.json           which recipe the folder belongs to
    store/KEY/            a finished step: its files and done.json with their digests; KEY covers its inputs, our code and the libraries
    work/KEY/             an unfinished step; goes on from there
    bundles/NAME/ result.json report.html evaluation/ run.log

A step is made in work/ and renamed to store/ when it is whole: at any instant it is there or not, never half.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgecnn import __version__
from edgecnn.device.files import fsync_folder, sha256_file, write_atomically
from edgecnn.errors import ResourceError, UsageError
from edgecnn.targets.base import installed

# Whose versions can change a result.
LIBRARIES = (
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnxslim",
    "onnxruntime",
    "openvino",
    "nncf",
    "torch-pruning",
    "tensorrt",
    "tensorrt_rtx",
    "Pillow",
)
# Our own files that only show results: a change there redoes nothing.
SHOWING = ("cli.py", "doctor.py", "screen.py", "report", "__main__.py", "errors.py")
MIN_FREE_BYTES = 256 << 20


@dataclass(frozen=True)
class Entry:
    """A finished step.

    Attributes:
        key: digest of what decides it; part of the inputs of what is made from it.
        folder: its files, not to be changed.
        facts: what the step returned, from done.json.
        resumed: it was there already.
    """

    key: str
    folder: Path
    facts: dict[str, Any]
    resumed: bool


@dataclass
class Store:
    """The results below one run folder. Only one process holds it at a time.

    Attributes:
        root: the run folder.
        made: how many steps were made, not found, since it was opened.
    """

    root: Path
    made: int = 0

    def once(self, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any] | None]) -> Entry:
        """The result of `make` for these inputs, made now or found.

        Args:
            kind: of step, part of the key.
            inputs: everything that decides the result and is not code; JSON-able.
            make: writes its files into the folder it is given, which holds what an interrupted attempt left there; returns facts.
        """
        key = key_of(kind, inputs)
        folder = self.root / "store" / f"{kind}-{key}"
        facts = _read_done(folder)
        if facts is not None:
            return Entry(key, folder, facts, True)
        shutil.rmtree(folder, ignore_errors=True)  # damaged: made again
        work = self.root / "work" / f"{kind}-{key}"
        work.mkdir(parents=True, exist_ok=True)
        facts = dict(make(work) or {})
        digests = {str(p.relative_to(work)): sha256_file(p) for p in sorted(work.rglob("*")) if p.is_file()}
        write_atomically(
            work / "done.json", json.dumps({"kind": kind, "inputs": inputs, "facts": facts, "digests": digests}, indent=1).encode()
        )
        folder.parent.mkdir(exist_ok=True)
        work.rename(folder)
        fsync_folder(folder.parent)
        self.made += 1
        return Entry(key, folder, json.loads(json.dumps(facts)), False)

    def write(self, name: str, content: str) -> Path:
        """Write a result file of the whole run."""
        path = self.root / name
        write_atomically(path, content.encode())
        return path


def key_of(kind: str, inputs: Mapping[str, Any]) -> str:
    """Digest of a step's inputs, our code and the libraries, 24 hex digits."""
    whole = {"kind": kind, "inputs": inputs, "code": code_digest(), "libraries": installed(*LIBRARIES)}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]


@cache
def code_digest() -> str:
    """Digest of the version and of the source that makes results."""
    package = Path(__file__).parent
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] not in SHOWING:
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def open_store(out: Path, recipe_name: str) -> Iterator[Store]:
    """Hold the run folder `out`, making it where it is not there.

    Raises:
        UsageError: the folder cannot be written, belongs to another recipe, holds other files, or another run holds it.
        ResourceError: the disk is nearly full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UsageError(f"--out {out}: cannot be made a folder ({fault.strerror}). Choose another.") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: not writable. Choose another folder, or mend its rights.")
    owner = out / "recipe.json"
    if owner.exists():
        try:
            name = json.loads(owner.read_text())["name"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{owner}: not the record of an edgecnn run. Choose another folder, or remove that file.") from None
        if name != recipe_name:
            raise UsageError(f"--out {out}: belongs to the recipe {name!r}, this one is {recipe_name!r}. Choose another folder.")
    elif any(p.name != "run.lock" and not (p.name.startswith(".recipe.json.") and p.suffix == ".tmp") for p in out.iterdir()):
        raise UsageError(f"--out {out}: holds files that are not of an edgecnn run. Choose a new or empty folder.")
    free = shutil.disk_usage(out).free
    if free < MIN_FREE_BYTES:
        raise ResourceError(
            f"--out {out}: {free >> 20} MiB free on its disk, a run needs {MIN_FREE_BYTES >> 20} or more. Free some, or choose another."
        )
    with _locked(out / "run.lock"):
        write_atomically(owner, json.dumps({"name": recipe_name}).encode())
        _sweep(out)
        yield Store(out)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the kernel when its holder dies, however it dies
        except OSError:
            lock.seek(0)
            raise UsageError(
                f"--out {path.parent}: another run holds it ({lock.read().strip() or 'unknown'}). Wait for it, or choose another folder."
            ) from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield
        lock.truncate(0)


def _sweep(out: Path) -> None:
    """Remove what a killed run left half written; we hold the lock, so nobody is writing."""
    for folder in (out, out / "bundles"):
        for path in folder.glob(".*"):
            if path.suffix in (".tmp", ".old"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_done(folder: Path) -> dict[str, Any] | None:
    """The facts of a finished step, or None where it is not there or not intact."""
    try:
        done = json.loads((folder / "done.json").read_text())
        for name, digest in done["digests"].items():
            if sha256_file(folder / name) != digest:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    facts: dict[str, Any] = done["facts"]
    return facts

"""The run folder: every step's result under the digest of all that decides it, so that nothing is done twice and nothing stale is reused.

    recipe.json           which recipe the folder belongs to, and which steps its last finished run used
    store/KEY/            a finished step: its files and done.json with their digests; KEY covers its inputs, our code and the libraries
    work/KEY/             an unfinished step; goes on from there
    bundles/NAME/ result.json report.html evaluation/ run.log progress.jsonl

A step is made in work/, synced to the disk, and renamed to store/ when it is whole: at any instant it is there or not, never half.
Its digests are checked the first time a process reads it. Steps of earlier recipes stay until `edgecnn clean`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from edgecnn import __version__
from edgecnn.device.files import fsync_folder, sha256_file, write_atomically
from edgecnn.errors import EdgecnnError, ResourceError, UsageError
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
SHOWING = ("cli.py", "doctor.py", "screen.py", "report", "watch", "verdict.py", "compare.py", "__main__.py", "errors.py")
MIN_FREE_BYTES = 256 << 20
# Where results are renamed into place, besides store/: what a killed run left half written there is removed by the next.
SWEPT = (".", "bundles", "pictures", "predictions")


@dataclass(frozen=True)
class Entry:
    """A finished step.

    Attributes:
        key: digest of what decides it; part of the inputs of what is made from it.
        folder: its files, not to be changed.
        facts: what the step returned, from done.json.
        resumed: an earlier run made it.
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
        made: the steps that were made, not found, since it was opened, by the names of their folders.
        used: facts of every step that was asked for, by the name of its folder.
    """

    root: Path
    made: set[str] = field(default_factory=set)
    used: dict[str, dict[str, Any]] = field(default_factory=dict)

    def found(self, kind: str, inputs: Mapping[str, Any]) -> bool:
        """Whether `once` would make nothing for these inputs."""
        name = f"{kind}-{key_of(kind, inputs)}"
        return name in self.used or any(_read_done(self.root / place / name) is not None for place in ("store", "work"))

    def once(self, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any] | None]) -> Entry:
        """The result of `make` for these inputs, made now or found.

        Args:
            kind: of step, part of the key.
            inputs: everything that decides the result and is not code; JSON-able.
            make: writes its files into the folder it is given, which holds what an interrupted attempt left there; returns facts.

        Raises:
            ResourceError: the disk is full or broken, in whatever words a library said so.
        """
        key = key_of(kind, inputs)
        name = f"{kind}-{key}"
        folder, work = self.root / "store" / name, self.root / "work" / name
        facts = self.used.get(name) or _read_done(folder)
        resumed = facts is not None and name not in self.made
        if facts is None:
            if folder.exists():
                shutil.rmtree(folder)  # damaged: made again
            work.mkdir(parents=True, exist_ok=True)
            facts = _read_done(work)  # whole, where a run was ended just before the rename
            if facts is None:
                _clear(work)
                with _disk_faults(work):
                    facts = dict(make(work) or {})
                    _seal(work, {"kind": kind, "inputs": inputs, "facts": facts})
                facts = json.loads(json.dumps(facts))
                self.made.add(name)
            folder.parent.mkdir(exist_ok=True)
            work.rename(folder)
            fsync_folder(folder.parent)
            fsync_folder(work.parent)
        self.used[name] = facts
        return Entry(key, folder, facts, resumed)

    def finish(self) -> None:
        """Record which steps this run used, and remove what unfinished ones left: none is left to go on with."""
        shutil.rmtree(self.root / "work", ignore_errors=True)
        owner = json.loads((self.root / "recipe.json").read_text())
        self.write("recipe.json", json.dumps({**owner, "used": sorted(self.used)}))

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
    _refuse_links(out)
    owner = out / "recipe.json"
    if owner.exists():
        try:
            name = json.loads(owner.read_text())["name"]
        except (ValueError, KeyError, TypeError, RecursionError):
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
    with _locked(out / "run.lock"), _temporary():
        if not owner.exists():
            write_atomically(owner, json.dumps({"name": recipe_name}).encode())
        _sweep(out)
        yield Store(out)


def unused(out: Path) -> dict[Path, int]:
    """The steps in `out` that its last finished run did not use, and their bytes.

    Raises:
        UsageError: it is not the folder of a finished run.
    """
    _refuse_links(out)
    try:
        used = set(json.loads((out / "recipe.json").read_text())["used"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{out}: not the folder of a finished run. Give one that `edgecnn compress` has finished.") from None
    found = [p for p in sorted((out / "store").glob("*")) if p.is_dir() and not p.is_symlink() and p.name not in used]
    return {path: sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) for path in found}


def clean(out: Path) -> dict[Path, int]:
    """Remove the steps in `out` that its last finished run did not use; returns them and their bytes.

    Raises:
        UsageError: it is not the folder of a finished run, or a run holds it.
    """
    unused(out)
    with _locked(out / "run.lock"):
        found = unused(out)
        for path in found:
            shutil.rmtree(path)
    return found


def _refuse_links(out: Path) -> None:
    """Whoever gave us the folder must not lead us out of it: we remove, write and truncate in it."""
    for name in (*SWEPT[1:], "store", "work", "recipe.json", "run.lock"):
        if (out / name).is_symlink():
            raise UsageError(f"{out / name}: a link, which edgecnn does not make there. Remove it, or choose another folder.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the kernel when its holder dies, however it dies
        except BlockingIOError:
            lock.seek(0)
            raise UsageError(
                f"--out {path.parent}: another run holds it ({lock.read().strip() or 'unknown'}). Wait for it, or choose another folder."
            ) from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        yield
        lock.truncate(0)


def _hold(folder: Path) -> int:
    """Hold a folder, as its living owner does; the kernel frees it when that one dies, however it dies.

    Raises:
        BlockingIOError: it is held.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _own_folder(prefix: str) -> tuple[Path, int]:
    """A new temporary folder, held."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            handle = _hold(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another run sweeps it, in the instant before it is held
        except BaseException:
            folder.rmdir()
            raise
        if folder.exists():
            return folder, handle
        os.close(handle)


@contextmanager
def _temporary() -> Iterator[None]:
    """A folder of this run's own for everything temporary, its children's too; those of runs that died are removed.

    Not in the run folder: the names of sockets in it would become too long.
    """
    prefix = f"edgecnn-run-{os.getuid()}-"
    parent, before = Path(tempfile.gettempdir()), tempfile.tempdir
    for left in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            handle = _hold(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
    folder, handle = _own_folder(prefix)
    tempfile.tempdir, environment = str(folder), os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if environment is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = environment
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _sweep(out: Path) -> None:
    """Remove what a killed run left half written; we hold the lock, so nobody is writing."""
    for folder in SWEPT:
        for path in (out / folder).glob(".*"):
            if path.suffix in (".tmp", ".old"):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _clear(work: Path) -> None:
    """Remove from an interrupted attempt what was half written; the rest is for the next attempt to use."""
    (work / "done.json").unlink(missing_ok=True)
    for path in [*work.rglob(".*.tmp"), *work.rglob("*.npy.tmp"), *work.rglob("tmp????????")]:
        _remove(path)


def _seal(work: Path, about: dict[str, Any]) -> None:
    """Sync every file of a step to the disk, and write done.json, with their digests and its own, last."""
    digests = {}
    for path in sorted(work.rglob("*"), reverse=True):  # what is inside before the folder
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            digests[str(path.relative_to(work))] = sha256_file(path)
    whole = {**about, "digests": digests}
    write_atomically(work / "done.json", json.dumps({**whole, "sha256": _digest(whole)}, indent=1).encode())


def _digest(whole: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _read_done(folder: Path) -> dict[str, Any] | None:
    """The facts of a finished step, or None where it is not there or not intact: nothing missing, changed or added.

    Raises:
        OSError: it cannot be told, for the disk or this process fails; what is finished must not be taken for damaged then.
    """
    try:
        whole = json.loads((folder / "done.json").read_text())
        sha256, facts, digests = whole.pop("sha256"), whole["facts"], whole["digests"]
        if sha256 != _digest(whole) or not isinstance(facts, dict):
            return None
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()} - {"done.json"}
        if there != set(digests) or any(sha256_file(folder / name) != digest for name, digest in digests.items()):
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts


# What libraries say, in exceptions of their own, when the disk is full or broken.
_DISK = (
    "No space left",
    "os error 28",
    "Input/output error",
    "os error 5)",
    "Too many open files",
    "os error 24",
    "PytorchStreamWriter failed",
)


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """Tell the disk's faults from a library's."""
    try:
        yield
    except (EdgecnnError, OSError):
        raise
    except Exception as fault:
        said = next((word for word in _DISK if word in str(fault)), None)
        if said is None and shutil.disk_usage(folder).free >= 1 << 20:
            raise
        raise ResourceError(
            f"{folder}: cannot be written ({said or 'no space left on its disk'}). Nothing finished was lost: mend that, "
            "then run the same command again."
        ) from None

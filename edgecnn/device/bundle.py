"""A bundle is a folder: the model, its manifest, what people and boards need besides, and SHA256SUMS over all of it, written last.

`sha256sum -c SHA256SUMS` reads the sums too. A signature, SHA256SUMS.sig, may lie beside them; it is over the sums, so it is not in them.
Names are plain on purpose: what a terminal, a shell or another file system could take for something else is refused.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from edgecnn.device.files import fsync_folder, sha256_file
from edgecnn.device.spec import Manifest, read_manifest
from edgecnn.errors import IntegrityError, UsageError, is_the_machines

MANIFEST = "manifest.json"
LABELS = "labels.txt"
README = "README.md"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
MOST_FILES = 1000
MOST_SUMS_BYTES = 1 << 18
LONGEST_NAME = 100  # what the header of a tar file holds

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


def write_bundle(
    folder: Path, manifest: Manifest, files: Mapping[str, Path], readme: str = "", extra: Mapping[str, bytes | Path] | None = None
) -> Manifest:
    """Write a bundle to `folder`, replacing one that is there; at no instant is there half a bundle under that name.

    Where the file system can exchange two folders, as Linux's own can, one of the two is there at every instant. One writer at a time:
    what an earlier one left behind when it was killed is removed.

    Args:
        folder: the bundle's folder.
        manifest: without `digests`, which are computed here.
        files: name inside the bundle to the file to copy: those of the model.
        readme: for the board; none is written where empty.
        extra: name, which may have folders in it as in "a/b.txt", to content or to the file to copy.

    Returns:
        The manifest as written.
    """
    extra = extra or {}
    fault = _names_fault([*files, *extra, MANIFEST, LABELS, *([README] if readme else [])])
    if fault:
        raise IntegrityError(f"{folder}: cannot be written as a bundle: {fault}. Give the file another name.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        work.chmod(0o755)
        for name, source in {**files, **extra}.items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                path.write_bytes(source)
            else:
                shutil.copyfile(source, path)
        manifest = replace(manifest, digests={name: sha256_file(work / name) for name in files})
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        # One label a line: a line break inside a label would shift all that follow.
        (work / LABELS).write_text("".join(" ".join(label.split()) + "\n" for label in manifest.labels), encoding="utf-8")
        if readme:
            (work / README).write_text(readme, encoding="utf-8")
        paths = dict(_walk(work))
        names = sorted(name for name, path in paths.items() if not path.is_dir())
        (work / SUMS).write_text("".join(f"{sha256_file(work / name)}  {name}\n" for name in names), encoding="ascii")
        for name in (*names, SUMS):
            _fsync_file(work / name)
        for path in (*(path for path in paths.values() if path.is_dir()), work):
            fsync_folder(path)
        old = _put(work, folder)
        fsync_folder(folder.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def verify_bundle(folder: Path) -> Manifest:
    """Check every file of the bundle against SHA256SUMS, and that there is nothing else: no other file, no other folder, no engine.

    Raises:
        IntegrityError: naming every missing, changed, extra or irregular file.
    """
    if not folder.is_dir():
        raise IntegrityError(f"{folder}: not a folder. Give the folder of a bundle, with {MANIFEST} in it.")
    sums = _read_sums(folder / SUMS)
    folders = folders_of(sums)
    found: dict[str, Path] = {}
    faults = []
    for name, path in _walk(folder, folders):
        mode = path.lstat().st_mode
        if name in (SUMS, SIGNATURE) or name in sums:
            if not stat.S_ISREG(mode):
                faults.append(f"{name} is not a regular file")
            found[name] = path
        elif name not in folders:
            faults.append(f"{shown(name)} does not belong to it")
        elif not stat.S_ISDIR(mode):
            faults.append(f"{name} is not a folder")
    faults += [f"{name} is missing" for name in sums if name not in found]
    for name in sums if not faults else ():
        if sha256_file(found[name]) != sums[name]:
            faults.append(f"{name} has changed")
        elif is_engine(name, _head(found[name])):
            faults.append(f"{name} is a TensorRT engine, native code that is only ever built where it runs")
    if faults:
        told = ", ".join(faults[:10]) + (f" and {len(faults) - 10} more" if len(faults) > 10 else "")
        advice = "Keep files of your own outside, and copy it again from where it was made."
        raise IntegrityError(f"{folder}: not the bundle that was made: {told}. {advice}")
    manifest = read_manifest(folder / MANIFEST)
    for name, digest in manifest.digests.items():
        if sums.get(name) != digest:
            raise IntegrityError(
                f"{folder}: {MANIFEST} and {SUMS} disagree on {shown(name)}. Copy the bundle again from where it was made."
            )
    if "model" not in manifest.files or set(manifest.files.values()) != set(manifest.digests):
        raise IntegrityError(f"{folder}: {MANIFEST} does not name a model and a digest for each of its files. Make the bundle again.")
    return manifest


def parse_sums(content: bytes, where: str) -> dict[str, str]:
    """Name to digest, of the content of a SHA256SUMS; `where` is for the message.

    Raises:
        IntegrityError: it is not one that `write_bundle` writes.
    """
    if len(content) > MOST_SUMS_BYTES:
        raise IntegrityError(f"{where}: longer than any that edgecnn writes. Copy the bundle again from where it was made.")
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        raise IntegrityError(f"{where}: cannot be read. A bundle without it is unfinished or not a bundle.") from None
    sums: dict[str, str] = {}
    names = []
    lines = text.split("\n")  # `splitlines` would also split at other bytes than sha256sum does
    if lines.pop():
        raise IntegrityError(f"{where}: its last line has no end. Copy the bundle again from where it was made.")
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise IntegrityError(f"{where}: the line {line[:200]!r} is not one that edgecnn writes. Copy the bundle again.")
        names.append(match[2])
        sums[match[2]] = match[1]
    fault = _names_fault(names)
    if fault:
        raise IntegrityError(f"{where}: {fault}. edgecnn writes no such bundle: get it again from who made it.")
    if MANIFEST not in sums:
        raise IntegrityError(f"{where}: does not name {MANIFEST}. Copy the bundle again.")
    return sums


def folders_of(names: Iterable[str]) -> set[str]:
    """The folders that files of these names lie in."""
    return {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}


def is_engine(name: str, head: bytes) -> bool:
    """Whether a file is a TensorRT engine, by its suffix or its first four bytes: a letter for the edition, and "trt"."""
    return name.lower().endswith(_ENGINE_SUFFIXES) or head[1:4] == b"trt"


def refuse_inside_a_bundle(path: Path, option: str) -> None:
    """Nothing is written into a bundle: it would then have a file too many, or one that has changed.

    Raises:
        UsageError: `path`, given as `option`, lies in one.
    """
    for folder in path.resolve().parents:
        if (folder / SUMS).is_file() and (folder / MANIFEST).is_file():
            raise UsageError(f"{option} {path}: lies in the bundle {folder}, which would not be intact any more. Name another place.")


def shown(name: str) -> str:
    """A name that somebody else chose, so that a terminal shows it and does nothing else with it."""
    return name[:120] if _NAME.fullmatch(name[:120]) else ascii(name[:120])


def _names_fault(names: list[str]) -> str | None:
    """What is wrong with the names of a bundle's files, or None."""
    if len(names) > MOST_FILES:
        return f"{len(names)} files; a bundle has {MOST_FILES} at most"
    seen = {SUMS.casefold(), SIGNATURE.casefold()}
    for name in names:
        if len(name) > LONGEST_NAME or not _NAME.fullmatch(name):
            return f"{shown(name)} is no name of a bundle's file (up to {LONGEST_NAME} letters, digits and _.+-, none hidden)"
        if name.casefold() in seen:
            return f"{name} is there twice, at least where upper and lower case are the same"
        seen.add(name.casefold())
    clash = {folder.casefold() for folder in folders_of(names)} & seen
    return f"{min(clash)} is both a file and a folder" if clash else None


def _walk(folder: Path, into: set[str] | None = None, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Name and path of all that lies in `folder`; goes only into folders named in `into`, where it is given, and follows no links."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = prefix + entry.name
            yield name, Path(entry.path)
            if entry.is_dir(follow_symlinks=False) and (into is None or name in into):
                yield from _walk(Path(entry.path), into, name + "/")


def _head(path: Path) -> bytes:
    with path.open("rb") as source:
        return source.read(4)


def _read_sums(path: Path) -> dict[str, str]:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise IntegrityError(f"{path}: not a regular file. Copy the bundle again from where it was made.")
        with path.open("rb") as source:
            content = source.read(MOST_SUMS_BYTES + 1)
    except OSError as fault:
        if is_the_machines(fault):
            raise
        raise IntegrityError(f"{path}: cannot be read. A bundle without it is unfinished or not a bundle.") from None
    return parse_sums(content, str(path))


def _fsync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(work: Path, folder: Path) -> Path | None:
    """Rename `work` to `folder`; returns where the old folder is now, if there was one."""
    if not folder.exists():
        work.rename(folder)
        return None
    if _exchange(work, folder):
        return work
    # A folder cannot be renamed over one that is not empty: for an instant there is none.
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    folder.rename(old / "old")
    work.rename(folder)
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step by renameat2(2); False where the system or the file system has no such thing."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sweep(folder: Path) -> None:
    """Remove the unfinished folders of writers that were killed."""
    ours = re.compile(rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}\.tmp")  # as tempfile names them
    for left in folder.parent.iterdir():
        if ours.fullmatch(left.name) and left.is_dir():
            shutil.rmtree(left)

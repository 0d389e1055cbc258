"""A bundle is a folder: the model, its manifest, a README for the board, and SHA256SUMS over all of it, written last.

`sha256sum -c SHA256SUMS` reads the sums too.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgecnn.device.files import fsync_folder, sha256_file
from edgecnn.device.spec import Manifest, read_manifest
from edgecnn.errors import IntegrityError

MANIFEST = "manifest.json"
LABELS = "labels.txt"
README = "README.md"
SUMS = "SHA256SUMS"


def write_bundle(folder: Path, manifest: Manifest, files: Mapping[str, Path], readme: str = "") -> Manifest:
    """Write a bundle to `folder`, replacing one that is there; at no instant is there half a bundle under that name.

    Args:
        folder: the bundle's folder.
        manifest: without `digests`, which are computed here.
        files: name inside the bundle to the file to copy.
        readme: for the board; none is written where empty.

    Returns:
        The manifest as written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        work.chmod(0o755)
        for name, source in files.items():
            shutil.copyfile(source, work / name)
        manifest = replace(manifest, digests={name: sha256_file(work / name) for name in files})
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        # One label a line: a line break inside a label would shift all that follow.
        (work / LABELS).write_text("".join(" ".join(label.split()) + "\n" for label in manifest.labels), encoding="utf-8")
        if readme:
            (work / README).write_text(readme, encoding="utf-8")
        names = sorted(p.name for p in work.iterdir())
        (work / SUMS).write_text("".join(f"{sha256_file(work / name)}  {name}\n" for name in names), encoding="ascii")
        for path in work.iterdir():
            _fsync_file(path)
        fsync_folder(work)
        old = _set_aside(folder)
        work.rename(folder)
        fsync_folder(folder.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def verify_bundle(folder: Path) -> Manifest:
    """Check every file of the bundle against SHA256SUMS, and that there is no other file.

    Raises:
        IntegrityError: naming every missing, changed, extra or irregular file.
    """
    if not folder.is_dir():
        raise IntegrityError(f"{folder}: not a folder. Give the folder of a bundle, with {MANIFEST} in it.")
    sums = _read_sums(folder / SUMS)
    found = {p.name: p for p in folder.iterdir() if p.name != SUMS}
    faults = [f"{name} is missing" for name in sorted(sums.keys() - found.keys())]
    faults += [f"{name} does not belong to it" for name in sorted(found.keys() - sums.keys())]
    for name in sorted(sums.keys() & found.keys()):
        if not stat.S_ISREG(found[name].lstat().st_mode):
            faults.append(f"{name} is not a regular file")
        elif sha256_file(found[name]) != sums[name]:
            faults.append(f"{name} has changed")
    if faults:
        raise IntegrityError(f"{folder}: not the bundle that was made: {', '.join(faults)}. Copy it again from where it was made.")
    manifest = read_manifest(folder / MANIFEST)
    for name, digest in manifest.digests.items():
        if sums.get(name) != digest:
            raise IntegrityError(f"{folder}: {MANIFEST} and {SUMS} disagree on {name}. Copy the bundle again from where it was made.")
    if set(manifest.files.values()) != set(manifest.digests):
        raise IntegrityError(f"{folder}: {MANIFEST} does not give a digest for each of its files. Make the bundle again.")
    return manifest


def _read_sums(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        raise IntegrityError(f"{path}: cannot be read. A bundle without it is unfinished or not a bundle.") from None
    sums: dict[str, str] = {}
    for line in lines:
        digest, gap, name = line[:64], line[64:66], line[66:]
        plain = name and name == os.path.basename(name) and name not in (".", "..", SUMS)  # noqa: PTH119  Path would hide "a/."
        if gap != "  " or not plain or name in sums or len(digest.strip("0123456789abcdef")):
            raise IntegrityError(f"{path}: the line {line!r} is not one that edgecnn writes. Copy the bundle again.")
        sums[name] = digest
    if MANIFEST not in sums:
        raise IntegrityError(f"{path}: does not name {MANIFEST}. Copy the bundle again.")
    return sums


def _fsync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _set_aside(folder: Path) -> Path | None:
    """Move the old folder out of the way: a folder cannot be renamed over one that is not empty."""
    if not folder.exists():
        return None
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    folder.rename(old / "old")
    return old

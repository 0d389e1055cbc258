"""A bundle as one file, `NAME.edgecnn`: a plain tar that anyone's tar opens, and that edgecnn reads with a reader of its own.

`tarfile` has written outside its folder with every filter it has, so it is not used. The file holds SHA256SUMS first, then the signature
if there is one, then the files that the sums name, in their order; each header is the one that `pack` writes for that name and size, and
is compared with it byte by byte. So there is nothing to interpret: links, devices, other names or orders are simply another file.
The same bundle makes the same archive.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgecnn.device.bundle import MOST_SUMS_BYTES, SIGNATURE, SUMS, is_engine, parse_sums, verify_bundle
from edgecnn.device.files import fsync_folder, sha256_file
from edgecnn.device.signature import MOST_BYTES as MOST_SIGNATURE_BYTES
from edgecnn.device.signature import State, check_signature
from edgecnn.device.spec import Manifest
from edgecnn.errors import IntegrityError, UsageError

SUFFIX = ".edgecnn"
MOST_BYTES = 4 << 30
_BLOCK = 512
_END = bytes(2 * _BLOCK)


@dataclass(frozen=True)
class _Entry:
    """A file in the archive: `size` bytes from `start` on. `sha256` is None for the two that the sums do not name."""

    name: str
    start: int
    size: int
    sha256: str | None


def pack(bundle: Path, out: Path) -> str:
    """Write the verified bundle to the archive `out`, replacing one that is there; returns its sha256.

    Raises:
        IntegrityError: the bundle is not what was made, or is larger than any archive may be.
        UsageError: `out` is there and no regular file.
    """
    verify_bundle(bundle)
    sums = (bundle / SUMS).read_bytes()
    if out.exists() and not out.is_file():  # a folder, or a device, which the rename below would replace
        raise UsageError(f"{out}: there, and no regular file. Name a new file with --out.")
    first = [SUMS, SIGNATURE] if (bundle / SIGNATURE).exists() else [SUMS]
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp")
    work = Path(name)
    try:
        with os.fdopen(handle, "wb") as target:
            for name in [*first, *parse_sums(sums, str(bundle / SUMS))]:
                with (bundle / name).open("rb") as source:
                    size = os.fstat(source.fileno()).st_size
                    target.write(_header(name, size))
                    shutil.copyfileobj(source, target, 1 << 20)
                target.write(bytes(-size % _BLOCK))
            target.write(_END)
            target.flush()
            os.fchmod(target.fileno(), 0o644)
            os.fsync(target.fileno())
        with work.open("rb") as packed:  # what is handed out has been read back
            _read(packed, str(out))
        digest = sha256_file(work)
        work.replace(out)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
    fsync_folder(out.parent)
    return digest


def unpack(archive: Path, folder: Path) -> Manifest:
    """Write the bundle in `archive` to `folder`, which must not be there yet; nothing is written unless all of the archive is right.

    Raises:
        UsageError: `folder` is there.
        IntegrityError: it is not an archive as `pack` writes them, or a file in it has changed.
    """
    if folder.is_symlink() or folder.exists():
        raise UsageError(f"{folder}: is there already. Remove it, or name another folder to unpack to.")
    with _opened(archive) as source:
        entries, _ = _read(source, str(archive))
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            work.chmod(0o755)
            for entry in entries:
                path = work / entry.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as target:
                    for block in _content(source, entry):
                        target.write(block)
                    target.flush()
                    os.fsync(target.fileno())
            manifest = verify_bundle(work)
            for path in {work, *((work / entry.name).parent for entry in entries)}:
                fsync_folder(path)
            work.rename(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    fsync_folder(folder.parent)
    return manifest


def verify_archive(archive: Path) -> tuple[int, State]:
    """Check every byte of the archive; returns how many files it holds, and what of its signature is known. Writes nothing.

    Raises:
        IntegrityError: it is not an archive as `pack` writes them, or a file in it has changed.
    """
    with _opened(archive) as source:
        entries, state = _read(source, str(archive))
        return len(entries), state


def _opened(archive: Path) -> BinaryIO:
    if not archive.is_file():
        raise IntegrityError(f"{archive}: not a file. Give an archive that `edgecnn pack` made.")
    return archive.open("rb")


def _read(source: BinaryIO, where: str) -> tuple[list[_Entry], State]:
    """Every entry, each one's header and content checked, and nothing between or after them; and the signature's state."""
    size = os.fstat(source.fileno()).st_size
    if size > MOST_BYTES:
        raise IntegrityError(f"{where}: {size} bytes, more than the {MOST_BYTES} that an archive may have. Get it again from who made it.")
    first = _entry(source, where, SUMS, 0, None, MOST_SUMS_BYTES)
    text = b"".join(_content(source, first))
    sums = parse_sums(text, f"{where}: {SUMS}")
    entries = [first]
    state: State = "none"
    if _name_at(source, _after(first)) == SIGNATURE:
        entries.append(_entry(source, where, SIGNATURE, _after(first), None, MOST_SIGNATURE_BYTES))
        state = check_signature(text, b"".join(_content(source, entries[-1])), where)
    for name, digest in sums.items():
        entries.append(_entry(source, where, name, _after(entries[-1]), digest, size))
    end = _after(entries[-1])
    source.seek(end)
    if size != end + len(_END) or source.read(len(_END)) != _END:
        raise IntegrityError(f"{where}: does not end where its last file ends. Copy it again from where it was made.")
    for entry in entries:
        source.seek(entry.start + entry.size)
        if source.read(-entry.size % _BLOCK).strip(b"\0"):
            raise IntegrityError(f"{where}: there is something behind {entry.name}. Copy it again from where it was made.")
        if entry.sha256 is not None and _digest(source, entry) != entry.sha256:
            raise IntegrityError(f"{where}: {entry.name} has changed. Copy it again from where it was made.")
        source.seek(entry.start)
        if entry.sha256 is not None and is_engine(entry.name, source.read(min(4, entry.size))):
            raise IntegrityError(f"{where}: {entry.name} is a TensorRT engine, native code that is only ever built where it runs.")
    return entries, state


def _entry(source: BinaryIO, where: str, name: str, at: int, sha256: str | None, most: int) -> _Entry:
    """The entry at `at`, which must be the file `name` of at most `most` bytes."""
    source.seek(at)
    header = source.read(_BLOCK)
    digits = header[124:135]
    size = int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
    if size < 0 or header != _header(name, size):
        raise IntegrityError(f"{where}: {name} is not where edgecnn puts it. Give an archive that `edgecnn pack` made, or copy it again.")
    if size > most or at + _BLOCK + size > os.fstat(source.fileno()).st_size:
        raise IntegrityError(f"{where}: ends within {name}, or {name} is too long. Copy it again from where it was made.")
    return _Entry(name, at + _BLOCK, size, sha256)


def _header(name: str, size: int) -> bytes:
    """The tar header (POSIX ustar) of a regular file anyone may read, owned by nobody in particular, without a time."""
    fields = (
        name.encode("ascii").ljust(100, b"\0"),
        b"0000644\0",
        b"0000000\0" * 2,
        b"%011o\0" % size,
        b"%011o\0" % 0,
        b" " * 8,  # the checksum, for its own computation
        b"0".ljust(101, b"\0"),  # regular file, no link
        b"ustar\0" + b"00",
        bytes(_BLOCK - 265),
    )
    header = b"".join(fields)
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _name_at(source: BinaryIO, at: int) -> str:
    source.seek(at)
    return source.read(100).rstrip(b"\0").decode("ascii", "replace")


def _after(entry: _Entry) -> int:
    return entry.start + entry.size + -entry.size % _BLOCK


def _content(source: BinaryIO, entry: _Entry) -> Iterator[bytes]:
    source.seek(entry.start)
    left = entry.size
    while left and (block := source.read(min(left, 1 << 20))):
        left -= len(block)
        yield block


def _digest(source: BinaryIO, entry: _Entry) -> str:
    digest = hashlib.sha256()
    for block in _content(source, entry):
        digest.update(block)
    return digest.hexdigest()

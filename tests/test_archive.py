"""An archive is exactly what `pack` writes, or nothing of it is written anywhere."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bundle import make

from edgecnn.device.archive import _header, pack, unpack, verify_archive
from edgecnn.device.bundle import LONGEST_NAME, MANIFEST, MOST_FILES, SUMS, verify_bundle, write_bundle
from edgecnn.device.files import sha256_file
from edgecnn.errors import IntegrityError, UsageError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with folders in it."""
    (tmp_path / "made").mkdir()
    manifest = make(tmp_path / "made" / "plain")
    files = {name: tmp_path / "made/plain.source" / name for name in manifest.digests}
    write_bundle(
        tmp_path / "pi", manifest, files, "read me\n", {"edgecnn/device/a.py": b"1\n", "edgecnn/b.py": b"", "golden.bin": bytes(600)}
    )
    return tmp_path / "pi"


@pytest.fixture
def archive(bundle: Path) -> Path:
    pack(bundle, bundle.parent / "pi.edgecnn")
    return bundle.parent / "pi.edgecnn"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below, and the content of the files."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


def unpack_command(archive: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgecnn.device", "unpack", archive, "--out", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refused(archive: Path, where: Path) -> str:
    """Unpacking is refused, and leaves nothing in `where`, an empty folder."""
    with pytest.raises(IntegrityError) as fault:
        unpack(archive, where / "out")
    assert not list(where.iterdir())
    with pytest.raises(IntegrityError):
        verify_archive(archive)
    assert "\n" not in str(fault.value)
    assert len(str(fault.value)) < 1000
    return str(fault.value)


def test_what_was_packed_comes_back(bundle: Path, archive: Path, tmp_path: Path) -> None:
    """Unpacked, every file and folder is there with its content, and the bundle verifies; the same bundle packs to the same bytes."""
    assert unpack(archive, tmp_path / "out") == verify_bundle(bundle)
    assert tree(tmp_path / "out") == tree(bundle)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert verify_archive(archive) == (9, "none")
    assert pack(tmp_path / "out", tmp_path / "again.edgecnn") == sha256_file(archive)


def test_anyones_tar_opens_it(bundle: Path, archive: Path, tmp_path: Path) -> None:
    """`tar xf` and Python's tarfile read the same files out of it."""
    (tmp_path / "tar").mkdir()
    subprocess.run(["tar", "xf", archive, "-C", tmp_path / "tar"], check=True)
    assert tree(tmp_path / "tar") == tree(bundle)
    with tarfile.open(archive) as opened:
        assert {m.name for m in opened} == {n for n, content in tree(bundle).items() if content is not None}


def test_a_thousand_flipped_bits_are_found(archive: Path, tmp_path: Path) -> None:
    """Whichever bit of an archive is flipped, it is refused and nothing is written."""
    good, where, draw = archive.read_bytes(), tmp_path / "flips", random.Random(0)
    where.mkdir()
    flips = 0
    for _ in range(1000):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        (tmp_path / "bad.edgecnn").write_bytes(bad)
        refused(tmp_path / "bad.edgecnn", where)
        flips += 1
    assert flips == 1000


def test_every_truncation_is_found(archive: Path, tmp_path: Path) -> None:
    """Cut at 200 places, or with something behind its end, an archive is refused and nothing is written."""
    good, where, draw = archive.read_bytes(), tmp_path / "cuts", random.Random(0)
    where.mkdir()
    lengths = draw.sample(range(len(good)), 200)
    for length in lengths:
        (tmp_path / "bad.edgecnn").write_bytes(good[:length])
        refused(tmp_path / "bad.edgecnn", where)
    assert len(lengths) == 200
    for more in (b"\0", bytes(512), good):
        (tmp_path / "bad.edgecnn").write_bytes(good + more)
        refused(tmp_path / "bad.edgecnn", where)


# ---- the traversal corpus: each entry makes the bytes of an archive that an attacker could send


def _tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as target:
        for info, content in members:
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _raw(files: list[tuple[str, bytes]]) -> bytes:
    """An archive in edgecnn's own form of these files, whatever they are called."""
    return b"".join(_header(name, len(c)) + c + bytes(-len(c) % 512) for name, c in files) + bytes(1024)


def _sums_of(names: list[str], content: bytes = b"x") -> bytes:
    import hashlib

    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name in names).encode("utf-8", "surrogateescape")


def _evil(*names: str, content: bytes = b"x") -> bytes:
    """A self-consistent archive whose sums name these files besides the manifest."""
    every = [MANIFEST, *names]
    return _raw([(SUMS, _sums_of(every, content)), *((name, content) for name in every if len(name.encode()) <= 100)])


NAMES = {
    "parent": "../canary",
    "parent inside": "a/../../canary",
    "parent at the end": "a/..",
    "dot": "./canary",
    "absolute": "/tmp/canary",
    "double slash": "a//canary",
    "slash at the end": "canary/",
    "home": "~/canary",
    "backslash": "..\\canary",
    "drive": "C:canary",
    "hidden": ".canary",
    "hidden folder": ".ssh/authorized_keys",
    "option": "-rf",
    "empty": "",
    "space": "a canary",
    "carriage return": "canary\r",
    "escape code": "\x1b[2Jcanary",
    "nul": "canary\0x",
    "tab": "a\tb",
    "glob": "*",
    "dollar": "$HOME",
    "the sums": "SHA256SUMS",
    "the sums in small": "sha256sums",
    "the signature": "SHA256SUMS.sig",
    "long": "a" * (LONGEST_NAME + 1),
    "very long": "a/" * 2000 + "canary",
}
CORPUS: dict[str, Callable[[], bytes]] = {name: (lambda path=path: _evil(path)) for name, path in NAMES.items()}
CORPUS |= {
    "nothing": lambda: b"",
    "only the end": lambda: bytes(1024),
    "not a tar": lambda: b"PK\x03\x04" + bytes(2000),
    "duplicates": lambda: _evil("canary", "canary"),
    "case clash": lambda: _evil("canary", "Canary"),
    "case clash of folders": lambda: _evil("a/b", "A"),
    "a file that is a folder": lambda: _evil("a", "a/b"),
    "an engine by its suffix": lambda: _evil("model.engine"),
    "an engine by its magic": lambda: _evil("model.onnx", content=b"ftrt and more"),
    "symbolic link": lambda: _tar((_member("canary", tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "hard link": lambda: _tar((_member("canary", tarfile.LNKTYPE, "../canary"), b"")),
    "link, then a file through it": lambda: _tar((_member("a", tarfile.SYMTYPE, ".."), b""), (_member("a/canary"), b"x")),
    "character device": lambda: _tar((_member("canary", tarfile.CHRTYPE), b"")),
    "block device": lambda: _tar((_member("canary", tarfile.BLKTYPE), b"")),
    "pipe": lambda: _tar((_member("canary", tarfile.FIFOTYPE), b"")),
    "folder": lambda: _tar((_member("canary", tarfile.DIRTYPE), b"")),
    "GNU long name": lambda: _tar((_member("a" * 200), b"x"), form=tarfile.GNU_FORMAT),
    "pax": lambda: _tar((_member("ü" * 200), b"x"), form=tarfile.PAX_FORMAT),
    "the sums are a link": lambda: _tar((_member(SUMS, tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "the sums not first": lambda: _raw([(MANIFEST, b"x"), (SUMS, _sums_of([MANIFEST]))]),
    "a file the sums do not name": lambda: _raw([(SUMS, _sums_of([MANIFEST])), (MANIFEST, b"x"), ("canary", b"x")]),
    "a file of the sums missing": lambda: _raw([(SUMS, _sums_of([MANIFEST, "a", "b"])), (MANIFEST, b"x"), ("a", b"x")]),
    "another order": lambda: _raw([(SUMS, _sums_of([MANIFEST, "a", "b"])), (MANIFEST, b"x"), ("b", b"x"), ("a", b"x")]),
    "something behind a file": lambda: _header(SUMS, len(_sums_of([MANIFEST]))) + _sums_of([MANIFEST]).ljust(512, b"!"),
    "no manifest": lambda: _raw([(SUMS, _sums_of(["canary"])), ("canary", b"x")]),
    "a manifest that is none": lambda: _evil("canary"),
    "sums without an end": lambda: _raw([(SUMS, b"\n" * 200_000)]),
    "sums too long": lambda: _raw([(SUMS, bytes(300_000))]),
    "one file too many": lambda: _evil(*(f"f{i}" for i in range(MOST_FILES))),
    "100,000 entries": lambda: _evil(*(f"f{i}" for i in range(100_000))),
    "100,000 entries of another tar": lambda: _tar((_member("f"), b""))[:512] * 100_000,
    "a bomb: the size is a lie": lambda: _header(SUMS, 8**11 - 1) + bytes(2048),
    "a bomb further in": lambda: _raw([(SUMS, _sums_of([MANIFEST]))])[:-1024] + _header(MANIFEST, 8**11 - 1) + bytes(2048),
    "a negative size": lambda: _header(SUMS, 0).replace(b"00000000000", b"-0000000001", 1) + bytes(1024),
    "a size in base 256": lambda: _header(SUMS, 0)[:124] + b"\x80" + bytes(10) + b"\1" + _header(SUMS, 0)[136:] + bytes(1024),
}


@pytest.mark.parametrize("name", CORPUS)
def test_the_traversal_corpus_writes_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is sent instead of an archive is refused with exit code 7 in one line, and nothing at all is written."""
    where = tmp_path / "a" / "b"
    where.mkdir(parents=True)
    (tmp_path / "evil.edgecnn").write_bytes(CORPUS[name]())
    before = tree(tmp_path)
    from edgecnn.device.__main__ import main

    assert main(["unpack", str(tmp_path / "evil.edgecnn"), "--out", str(where / "out")]) == 7
    assert tree(tmp_path) == before
    assert not Path("/tmp/canary").exists()
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("edgecnn: ")
    assert "\x1b" not in said.err


def test_a_huge_sparse_file_is_refused_at_once(tmp_path: Path) -> None:
    """A file that claims more than the largest archive is refused before it is read."""
    with (tmp_path / "big.edgecnn").open("wb") as big:
        big.truncate(1 << 40)
    with pytest.raises(IntegrityError, match="more than"):
        unpack(tmp_path / "big.edgecnn", tmp_path / "out")


def test_what_is_there_is_not_replaced(archive: Path, tmp_path: Path) -> None:
    """A folder, a file or a dangling link at the place to unpack to is left as it is, with exit code 2."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = tree(tmp_path / "folder")
    for name in ("folder", "file", "link"):
        with pytest.raises(UsageError):
            unpack(archive, tmp_path / name)
    assert tree(tmp_path / "folder") == before
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "gone").exists()


def test_a_failing_write_leaves_nothing(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk fails in the middle of unpacking, nothing is left of it."""
    (tmp_path / "empty").mkdir()
    calls = []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        unpack(archive, tmp_path / "empty" / "out")
    assert not list((tmp_path / "empty").iterdir())


def test_a_broken_bundle_is_not_packed(bundle: Path) -> None:
    """A bundle with a changed file is refused, and an older archive of that name stays."""
    (bundle.parent / "pi.edgecnn").write_bytes(b"old")
    (bundle / "golden.bin").write_bytes(b"other")
    with pytest.raises(IntegrityError):
        pack(bundle, bundle.parent / "pi.edgecnn")
    assert (bundle.parent / "pi.edgecnn").read_bytes() == b"old"
    assert not [p for p in bundle.parent.iterdir() if p.name.endswith(".tmp")]


def test_the_commands(bundle: Path) -> None:
    """`pack` and `unpack` default to beside each other; `verify` reads the archive; an archive inside its own bundle is refused."""

    def device(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "edgecnn.device", *map(str, words)], capture_output=True, text=True, check=False)

    archive = bundle.parent / "pi.edgecnn"
    assert device("pack", bundle).returncode == 0
    assert "as they were packed" in device("verify", archive).stdout
    assert device("unpack", archive).returncode == 2, "the bundle itself is there"
    bundle.rename(bundle.parent / "before")
    assert device("unpack", archive).returncode == 0
    assert tree(bundle) == tree(bundle.parent / "before")
    assert device("pack", bundle, "--out", bundle / "in.edgecnn").returncode == 2
    archive.write_bytes(archive.read_bytes()[:-1])
    done = device("verify", archive)
    assert (done.returncode, done.stdout) == (7, "")


def test_only_a_regular_file_is_replaced(bundle: Path, tmp_path: Path) -> None:
    """A folder or a named pipe under the archive's name is refused and stays, as a device would."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "folder").mkdir()
    for there in (pipe, tmp_path / "folder"):
        with pytest.raises(UsageError, match="no regular file"):
            pack(bundle, there)
    assert pipe.is_fifo()
    assert (tmp_path / "folder").is_dir()

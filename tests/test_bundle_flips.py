"""Many random changes to a bundle with folders in it: each is found, and nothing says that all is well on the way."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bundle import PLAIN, make

from edgecnn.device.__main__ import main
from edgecnn.device.bundle import MANIFEST, SIGNATURE, SUMS, verify_bundle, write_bundle
from edgecnn.device.files import sha256_file
from edgecnn.errors import IntegrityError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    manifest = make(tmp_path / "plain", random.Random(1).randbytes(5000))
    files = {name: tmp_path / "plain.source" / name for name in manifest.digests}
    write_bundle(tmp_path / "pi", PLAIN, files, "read me\n", {"edgecnn/device/bundle.py": b"import os\n", "golden.npz": bytes(3000)})
    return tmp_path / "pi"


def paths(bundle: Path) -> list[Path]:
    return sorted(p for p in bundle.rglob("*") if p.is_file())


def refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["verify", str(bundle)]) == 7
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err


def test_a_thousand_flipped_bits_are_found(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 1,000 single-bit flips anywhere in the bundle ends `verify` with 7 and no word of success."""
    draw, every = random.Random(0), paths(bundle)
    weights = [p.stat().st_size for p in every]
    hit: set[str] = set()
    for flips in range(1000):
        # Half by size and half by file, so that small files get their share too.
        (path,) = draw.choices(every, weights if flips % 2 else None)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        refused(bundle, capsys)
        path.write_bytes(good)
        hit.add(path.name)
    assert flips == 999
    assert hit == {p.name for p in every}
    verify_bundle(bundle)


def test_every_truncation_is_found(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 200 files cut short is found."""
    draw = random.Random(0)
    cuts = [draw.choice(paths(bundle)) for _ in range(200)]
    for path in cuts:
        good = path.read_bytes()
        path.write_bytes(good[: draw.randrange(len(good))])
        refused(bundle, capsys)
        path.write_bytes(good)
    assert len(cuts) == 200
    verify_bundle(bundle)


def test_added_renamed_and_swapped_files_are_found(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 60 files that were added, renamed or swapped for another of the bundle is found."""
    draw, done = random.Random(0), 0
    for i in range(20):
        copy = shutil.copytree(bundle, bundle.parent / f"copy{i}")
        folder = draw.choice([copy, copy / "edgecnn", copy / "edgecnn/device"])
        added = folder / draw.choice([f"x{i}", ".hidden", "model.bin.bak", "numpy.py", "usercustomize.py", "__init__.py"])
        added.write_bytes(draw.randbytes(draw.randrange(3)))
        told = refused(copy, capsys)
        assert added.name in told
        assert "Keep files of your own outside" in told
        added.unlink()
        one, other = draw.sample(paths(copy), 2)
        one.rename(one.with_name("renamed"))
        refused(copy, capsys)
        one.with_name("renamed").rename(one)
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        refused(copy, capsys)
        done += 3
    assert done == 60


IRREGULAR: dict[str, Callable[[Path], object]] = {
    "an empty folder": lambda b: (b / "new").mkdir(),
    "an empty folder further in": lambda b: (b / "edgecnn/new").mkdir(),
    "a byte-code cache": lambda b: ((b / "edgecnn/__pycache__").mkdir(), (b / "edgecnn/__pycache__/b.pyc").write_bytes(b"x")),
    "a link for a file": lambda b: ((b / "golden.npz").rename(b.parent / "g"), (b / "golden.npz").symlink_to(b.parent / "g")),
    "a link for a folder": lambda b: ((b / "edgecnn").rename(b.parent / "e"), (b / "edgecnn").symlink_to(b.parent / "e")),
    "a file for a folder": lambda b: (shutil.rmtree(b / "edgecnn"), (b / "edgecnn").write_text("")),
    "a pipe": lambda b: ((b / "golden.npz").unlink(), os.mkfifo(b / "golden.npz")),
    "a pipe for the sums": lambda b: ((b / SUMS).unlink(), os.mkfifo(b / SUMS)),
    "a link for the signature": lambda b: (b / SIGNATURE).symlink_to(b / SUMS),
    "a folder for the signature": lambda b: (b / SIGNATURE).mkdir(),
    "a dangling link": lambda b: (b / "new").symlink_to("nowhere"),
    "an escape code in a name": lambda b: (b / "\x1b[2J").write_text(""),
    "a line break in a name": lambda b: (b / "a\nb").write_text(""),
    "a name that is no text": lambda b: Path(os.fsdecode(os.fsencode(b) + b"/\xff")).write_text(""),
    "3,000 more files": lambda b: [(b / f"f{i}").touch() for i in range(3000)],
}


@pytest.mark.parametrize("change", IRREGULAR)
def test_what_is_no_plain_file_of_the_bundle_is_found(bundle: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Links, pipes, folders and hostile names are found, in one line that a terminal can show."""
    IRREGULAR[change](bundle)
    said = refused(bundle, capsys)
    assert "\x1b" not in said
    assert len(said) < 1500


def test_an_engine_is_refused_whoever_vouches_for_it(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file called as an engine, or beginning as one, is refused though its digest is right."""
    source = bundle.parent / "plain.source"
    for name, content in (
        ("model.engine", b"x"),
        ("Model.PLAN", b"x"),
        ("a/b.trt", b"x"),
        ("data.bin", b"ftrt..."),
        ("data.bin", b"vtrt..."),
    ):
        write_bundle(bundle, PLAIN, {n: source / n for n in ("model.xml", "model.bin")}, extra={name: content})
        assert "engine" in refused(bundle, capsys)


def test_names_are_kept_plain_when_writing(bundle: Path) -> None:
    """No bundle is written with a name that would be refused when reading, and the bundle that was there stays."""
    before = sha256_file(bundle / SUMS)
    names = ("../out", "/out", "a/../b", "a b", ".a", "é", SUMS, SIGNATURE, "Manifest.json", "model.bin/x", "a" * 101, "")
    for name in names:
        with pytest.raises(IntegrityError):
            write_bundle(bundle, PLAIN, {}, extra={name: b"", "model.bin": b""})
    assert sha256_file(bundle / SUMS) == before
    assert len(names) == 12


def test_sha256sum_reads_folders_too(bundle: Path) -> None:
    """`sha256sum -c` agrees on a bundle with folders in it, and the sums name each of its files once."""
    assert subprocess.run(["sha256sum", "-c", "--strict", "--quiet", SUMS], cwd=bundle, check=False).returncode == 0
    named = [line[66:] for line in (bundle / SUMS).read_text().splitlines()]
    assert named == sorted(str(p.relative_to(bundle)) for p in paths(bundle) if p.name != SUMS)
    assert {MANIFEST, "edgecnn/device/bundle.py"} <= set(named)


def test_verify_writes_nothing(bundle: Path) -> None:
    """Verifying leaves no trace in the bundle, so that it verifies again."""
    before = {p: p.stat().st_mtime_ns for p in [bundle, *bundle.rglob("*")]}
    subprocess.run([sys.executable, "-m", "edgecnn.device", "verify", bundle], check=True, capture_output=True)
    assert {p: p.stat().st_mtime_ns for p in [bundle, *bundle.rglob("*")]} == before

"""A bundle is found to be exactly what was made, or refused; at any instant there is the old one, the new one or none."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgecnn.device.bundle import LABELS, MANIFEST, README, SUMS, verify_bundle, write_bundle
from edgecnn.device.files import sha256_file
from edgecnn.device.spec import InputSpec, Manifest, read_manifest
from edgecnn.errors import IntegrityError, exit_code_of

SPEC = InputSpec(3, 16, 16, 16, "crop", "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PLAIN = Manifest(
    name="pi",
    runtime="openvino",
    precision="int8",
    candidate="int8",
    files={"model": "model.xml", "weights": "model.bin"},
    digests={},
    input=SPEC,
    labels=("cat", "dog"),
    evidence={"top1": 0.5},
)


def make(folder: Path, content: bytes = b"weights") -> Manifest:
    source = folder.parent / f"{folder.name}.source"
    source.mkdir()
    (source / "model.xml").write_bytes(b"<net/>")
    (source / "model.bin").write_bytes(content)
    return write_bundle(folder, PLAIN, {name: source / name for name in ("model.xml", "model.bin")}, "How to use it.\n")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make(tmp_path / "pi")
    return tmp_path / "pi"


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgecnn.device", "verify", folder], capture_output=True, text=True, check=False)


def sha256sum(folder: Path) -> int:
    return subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=folder, capture_output=True, check=False).returncode


def test_what_was_written_is_read_back(bundle: Path) -> None:
    """The manifest comes back equal, with the digest of each file; every file of the folder is in the sums; anyone may read it."""
    manifest = verify_bundle(bundle)
    assert replace(manifest, digests={}) == PLAIN
    assert manifest.digests == {name: sha256_file(bundle / name) for name in ("model.xml", "model.bin")}
    assert {p.name for p in bundle.iterdir()} == {"model.xml", "model.bin", MANIFEST, LABELS, README, SUMS}
    assert len((bundle / SUMS).read_text().splitlines()) == 5
    assert (bundle / LABELS).read_text() == "cat\ndog\n"
    assert bundle.stat().st_mode & 0o777 == 0o755
    assert sha256sum(bundle) == 0


def test_one_flipped_byte_is_found_in_every_file(bundle: Path) -> None:
    """Whichever byte of whichever file is flipped, the bundle is refused, and the file is named; `sha256sum -c` agrees."""
    flips = 0
    for path in sorted(bundle.iterdir()):
        good = path.read_bytes()
        for at in sorted({0, len(good) // 3, len(good) // 2, len(good) - 1} | (set(range(len(good))) if path.name == SUMS else set())):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(IntegrityError) as refused:
                verify_bundle(bundle)
            assert path.name in str(refused.value) or path.name == SUMS
            flips += 1
        assert sha256sum(bundle) != 0
        path.write_bytes(good)
    assert flips > 300
    verify_bundle(bundle)


def _truncate(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"weigh")


def _empty(folder: Path) -> None:
    (folder / LABELS).write_bytes(b"")


def _extra(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text("")


def _extra_folder(folder: Path) -> None:
    (folder / "sub").mkdir()


def _missing(folder: Path) -> None:
    (folder / "model.bin").unlink()


def _renamed(folder: Path) -> None:
    (folder / "model.bin").rename(folder / "model2.bin")


def _symlink(folder: Path) -> None:
    (folder / "model.bin").rename(folder.parent / "elsewhere.bin")
    (folder / "model.bin").symlink_to(folder.parent / "elsewhere.bin")


def _folder_for_file(folder: Path) -> None:
    (folder / "model.bin").unlink()
    (folder / "model.bin").mkdir()


def _sums_symlink(folder: Path) -> None:
    (folder / SUMS).rename(folder.parent / "sums")
    (folder / SUMS).symlink_to(folder.parent / "sums")


def _no_sums(folder: Path) -> None:
    (folder / SUMS).unlink()


def _sums_without_a_file(folder: Path) -> None:
    """A whole line is taken out: the file it named is then one that does not belong."""
    (folder / SUMS).write_text("".join(line for line in (folder / SUMS).read_text().splitlines(True) if "model.bin" not in line))


def _line(name: str, digest: str = "0" * 64) -> str:
    return f"{digest}  {name}\n"


def _sums_point_outside(folder: Path) -> None:
    (folder / SUMS).write_text((folder / SUMS).read_text() + _line("../pi.source/model.bin", sha256_file(folder / "model.bin")))


def _sums_twice(folder: Path) -> None:
    (folder / SUMS).write_text((folder / SUMS).read_text() * 2)


def _sums_binary(folder: Path) -> None:
    (folder / SUMS).write_bytes(b"\xff\xfe\0")


def _manifest_disagrees(folder: Path) -> None:
    """Somebody changes the model and mends the sums, and not the manifest."""
    old = sha256_file(folder / "model.bin")
    (folder / "model.bin").write_bytes(b"other")
    (folder / SUMS).write_text((folder / SUMS).read_text().replace(old, sha256_file(folder / "model.bin")))


def _manifest_with(folder: Path, **changes: object) -> None:
    old = sha256_file(folder / MANIFEST)
    (folder / MANIFEST).write_text(json.dumps({**json.loads((folder / MANIFEST).read_text()), **changes}))
    (folder / SUMS).write_text((folder / SUMS).read_text().replace(old, sha256_file(folder / MANIFEST)))


def _manifest_without_a_digest(folder: Path) -> None:
    _manifest_with(folder, digests={"model.xml": sha256_file(folder / "model.xml")})


def _manifest_without_a_model(folder: Path) -> None:
    _manifest_with(folder, files={"weights": "model.bin"}, digests={"model.bin": sha256_file(folder / "model.bin")})


def _manifest_of_the_future(folder: Path) -> None:
    _manifest_with(folder, schema=99)


def _manifest_is_a_list(folder: Path) -> None:
    old = sha256_file(folder / MANIFEST)
    (folder / MANIFEST).write_text("[1]")
    (folder / SUMS).write_text((folder / SUMS).read_text().replace(old, sha256_file(folder / MANIFEST)))


def _manifest_wrong_types(folder: Path) -> None:
    _manifest_with(folder, files=["model.xml", "model.bin"], schema="1")


SABOTAGE = [
    _truncate,
    _empty,
    _extra,
    _extra_folder,
    _missing,
    _renamed,
    _symlink,
    _folder_for_file,
    _sums_symlink,
    _no_sums,
    _sums_without_a_file,
    _sums_point_outside,
    _sums_twice,
    _sums_binary,
    _manifest_disagrees,
    _manifest_without_a_digest,
    _manifest_without_a_model,
    _manifest_of_the_future,
    _manifest_is_a_list,
    _manifest_wrong_types,
]


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=[s.__name__[1:] for s in SABOTAGE])
def test_a_bundle_that_is_not_the_one_made_is_refused(bundle: Path, sabotage: object) -> None:
    """Each way to differ ends `verify` with exit code 7, one line, and no word of success."""
    sabotage(bundle)  # type: ignore[operator]
    done = verify(bundle)
    assert (done.returncode, done.stdout) == (7, ""), done
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("edgecnn: ")
    assert str(bundle) in done.stderr


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    """A folder that is not there, a file and an empty folder are each refused by name, with exit code 7."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("gone", "file", "empty"):
        done = verify(tmp_path / name)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (7, "", 1), done
        assert str(tmp_path / name) in done.stderr


def test_verify_says_so_once_in_text_and_in_json(bundle: Path) -> None:
    """A good bundle ends with 0, says so, and --json prints one object with the model's digest."""
    assert "every file is as it was made" in verify(bundle).stdout
    done = subprocess.run([sys.executable, "-m", "edgecnn.device", "verify", bundle, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "verified": True,
        "name": "pi",
        "runtime": "openvino",
        "precision": "int8",
        "file_sha256": sha256_file(bundle / "model.xml"),
        "signature": "none",
    }


def test_a_new_bundle_replaces_the_old_and_leaves_nothing_else(tmp_path: Path) -> None:
    """Written over an old one, none of the old one's files stay, in the folder or beside it."""
    make(tmp_path / "pi")
    shutil.rmtree(tmp_path / "pi.source")
    make(tmp_path / "pi", b"newer")
    assert (tmp_path / "pi" / "model.bin").read_bytes() == b"newer"
    assert {p.name for p in tmp_path.iterdir()} == {"pi", "pi.source"}


def test_it_replaces_where_folders_cannot_be_exchanged(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that cannot exchange two folders, the new bundle takes the place of the old one all the same."""
    monkeypatch.setattr("edgecnn.device.bundle._exchange", lambda one, other: False)
    write_bundle(bundle, replace(PLAIN, name="new"), {name: bundle.parent / "pi.source" / name for name in ("model.xml", "model.bin")})
    assert verify_bundle(bundle).name == "new"
    assert {p.name for p in bundle.parent.iterdir()} == {"pi", "pi.source"}


def test_a_failed_write_leaves_the_old_bundle(bundle: Path) -> None:
    """Where a source file is missing, the old bundle stays whole and no half of a new one is left beside it."""
    with pytest.raises(FileNotFoundError):
        write_bundle(bundle, PLAIN, {"model.xml": bundle / "model.xml", "model.bin": bundle / "not there"})
    verify_bundle(bundle)
    assert {p.name for p in bundle.parent.iterdir()} == {"pi", "pi.source"}


def test_labels_keep_one_line_each(tmp_path: Path) -> None:
    """A line break inside a label does not shift the labels that follow."""
    source = tmp_path / "m.onnx"
    source.write_bytes(b"x")
    write_bundle(tmp_path / "b", replace(PLAIN, files={"model": "m.onnx"}, labels=("a\nb", "c", "ü")), {"m.onnx": source})
    assert (tmp_path / "b" / LABELS).read_text(encoding="utf-8") == "a b\nc\nü\n"
    assert read_manifest(tmp_path / "b" / MANIFEST).labels == ("a\nb", "c", "ü")


# Forks once for each step that touches the disk and dies there as by `kill -9`, until one writes to the end.
KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from edgecnn.device.bundle import verify_bundle, write_bundle

folder, source = Path(sys.argv[1]), Path(sys.argv[2])
old = verify_bundle(folder)
seen, step, armed = 0, 0, False

def hook(event, arguments):
    global step
    if armed and event.startswith(("open", "os.", "shutil.", "ctypes.")):
        step += 1
        if step == seen:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
while True:
    seen += 1
    child = os.fork()
    if not child:
        armed = True
        write_bundle(folder, replace(old, evidence={"seen": seen}, digests={}), {n: source / n for n in old.digests})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    there = verify_bundle(folder)
    print(seen, there.evidence.get("seen", "old"), flush=True)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


def test_killed_anywhere_it_leaves_the_old_or_the_new_bundle(bundle: Path) -> None:
    """Killed at each step that touches the disk, a verified bundle is there: the last whole one or the new one."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, bundle, bundle.parent / "pi.source"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) > 20
    newest = "old"
    for seen, there in rows:
        assert there in (newest, seen)
        newest = there
    assert newest == rows[-1][0]
    assert {p.name for p in bundle.parent.iterdir()} == {"pi", "pi.source"}, "the last writer clears up after those that were killed"


def test_sums_without_their_last_byte_are_refused(bundle: Path) -> None:
    """Found by mutants: the end of the last line alone was missing, and the bundle was verified."""
    whole = (bundle / SUMS).read_bytes()
    (bundle / SUMS).write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match="has no end"):
        verify_bundle(bundle)


@pytest.mark.parametrize("read", [lambda folder: read_manifest(folder / MANIFEST), verify_bundle], ids=["manifest", "bundle"])
def test_want_of_open_files_is_not_the_bundles_fault(bundle: Path, read: Callable[[Path], object]) -> None:
    """Too many open files are told as such, with exit code 5, not as a bundle that cannot be read."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            read(bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert exit_code_of(caught.value)[0] == 5

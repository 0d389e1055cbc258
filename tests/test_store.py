"""The run folder: whose it is, who holds it, what it keeps and what it makes again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecnn.errors import ResourceError, UsageError
from edgecnn.store import clean, key_of, open_store, unused

ROOT = Path(__file__).parent.parent


def write(work: Path) -> dict[str, int]:
    (work / "a").write_text("a")
    return {"n": 1}


def test_a_step_is_made_once(tmp_path: Path) -> None:
    """The same inputs are found, other inputs or another kind are made; facts come back as they were; only another run resumes."""
    with open_store(tmp_path / "o", "r") as store:
        first = store.once("k", {"x": 1}, write)
        assert (store.once("k", {"x": 1}, write).resumed, len(store.made)) == (False, 1)
        assert not store.once("k", {"x": 2}, write).resumed
        assert not store.once("j", {"x": 1}, write).resumed
        assert (first.facts, len(store.made)) == ({"n": 1}, 3)
    with open_store(tmp_path / "o", "r") as store:
        assert store.once("k", {"x": 1}, write).resumed


def test_every_input_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key changes with kind, inputs, our code and the libraries, and with nothing else, such as the order of keys."""
    keys = {key_of("k", {"x": 1, "y": 2}), key_of("k", {"x": 1, "y": 3}), key_of("j", {"x": 1, "y": 2})}
    assert key_of("k", {"y": 2, "x": 1}) in keys
    monkeypatch.setattr("edgecnn.store.code_digest", lambda: "other")
    keys.add(key_of("k", {"x": 1, "y": 2}))
    monkeypatch.setattr("edgecnn.store.installed", lambda *_: {"torch": "0"})
    keys.add(key_of("k", {"x": 1, "y": 2}))
    assert len(keys) == 5


@pytest.mark.parametrize("spoil", ["flip", "remove", "add", "no record", "half a record", "another fact"])
def test_damaged_step_is_made_again(tmp_path: Path, spoil: str) -> None:
    """A step whose files are not what its record says, or whose record is gone or changed, is made again by the next run."""
    with open_store(tmp_path / "o", "r") as store:
        folder = store.once("k", {}, write).folder
    record = folder / "done.json"
    if spoil == "flip":
        (folder / "a").write_text("b")
    elif spoil == "remove":
        (folder / "a").unlink()
    elif spoil == "add":
        (folder / "b").write_text("b")
    elif spoil == "no record":
        record.unlink()
    elif spoil == "half a record":
        record.write_text(record.read_text()[:40])
    else:
        record.write_text(record.read_text().replace('"n": 1', '"n": 2'))
    with open_store(tmp_path / "o", "r") as store:
        again = store.once("k", {}, write)
        assert not again.resumed
        assert again.facts == {"n": 1}
        assert sorted(p.name for p in again.folder.iterdir()) == ["a", "done.json"]


def test_ended_just_before_the_rename(tmp_path: Path) -> None:
    """A step that was whole when its run was killed, but not yet renamed, is taken over and not made again."""
    with open_store(tmp_path / "o", "r") as store:
        folder = store.once("k", {}, write).folder
    work = tmp_path / "o" / "work"
    work.mkdir(exist_ok=True)
    folder.rename(work / folder.name)
    with open_store(tmp_path / "o", "r") as store:
        assert store.once("k", {}, write).facts == {"n": 1}
        assert not store.made


def test_a_failing_disk_does_not_condemn_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a finished step cannot be read for want of files or by an I/O error, the run ends; the step is not thrown away."""
    with open_store(tmp_path / "o", "r") as store:
        folder = store.once("k", {}, write).folder
    with open_store(tmp_path / "o", "r") as store:
        with monkeypatch.context() as patch:

            def fail(path: Path) -> str:
                raise OSError(5, "Input/output error", str(path))

            patch.setattr("edgecnn.store.sha256_file", fail)
            with pytest.raises(OSError, match="Input/output"):
                store.once("k", {}, write)
        assert (folder / "a").exists()
        assert store.once("k", {}, write).resumed


def test_half_written_files_of_an_attempt_go(tmp_path: Path) -> None:
    """Temporary files that a killed attempt left in its folder are no part of the step when it is whole."""

    def half(work: Path) -> None:
        for name in (".weights.npy.abc.tmp", "images.npy.tmp", "tmpabcd1234", "checkpoint.pt"):
            (work / name).write_text("half")
        raise KeyboardInterrupt

    with open_store(tmp_path / "o", "r") as store:
        with pytest.raises(KeyboardInterrupt):
            store.once("k", {}, half)
        folder = store.once("k", {}, write).folder
        assert sorted(p.name for p in folder.iterdir()) == ["a", "checkpoint.pt", "done.json"]


def test_temporary_folders_of_the_dead_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run left in the temporary folder is removed by the next run, that of a living one stays; a run leaves nothing."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    code = (
        "import sys, tempfile, time; from pathlib import Path; from edgecnn.store import open_store\n"
        "tempfile.tempdir = sys.argv[2]\n"
        "with open_store(Path(sys.argv[1]), 'r'):\n    (Path(tempfile.mkdtemp()) / 'x').touch(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "o"), str(tmp_path / "t")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with open_store(tmp_path / "other", "r"):
            assert len(list((tmp_path / "t").iterdir())) == 2
        assert len(list((tmp_path / "t").rglob("x"))) == 1
        holder.kill()
    with open_store(tmp_path / "o", "r"):
        assert not list((tmp_path / "t").rglob("x"))
    assert not list((tmp_path / "t").iterdir())


def test_clean(tmp_path: Path) -> None:
    """`clean` removes what the last finished run did not use, and nothing before any run has finished."""
    out = tmp_path / "o"
    with open_store(out, "r") as store:
        old = store.once("k", {"x": 1}, write).folder
        with pytest.raises(UsageError, match="not the folder of a finished run"):
            clean(out)
    with open_store(out, "r") as store:
        new = store.once("k", {"x": 2}, write).folder
        store.finish()
    assert list(unused(out)) == [old]
    assert list(clean(out)) == [old]
    assert new.exists()
    assert not old.exists()


def test_interrupted_step_goes_on(tmp_path: Path) -> None:
    """What a failed attempt left in its folder is there for the next one, and is not taken for a result."""

    def fail(work: Path) -> None:
        (work / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    def finish(work: Path) -> None:
        assert (work / "checkpoint").read_text() == "half"

    with open_store(tmp_path / "o", "r") as store:
        with pytest.raises(KeyboardInterrupt):
            store.once("k", {}, fail)
        assert not list((tmp_path / "o").glob("store/*"))
        assert not store.once("k", {}, finish).resumed


def test_another_recipes_folder(tmp_path: Path) -> None:
    """A folder of another recipe is refused, and both are named."""
    with open_store(tmp_path / "o", "mine"):
        pass
    with (
        pytest.raises(UsageError, match=r"belongs to the recipe 'mine', this one is 'yours'. Choose another"),
        open_store(tmp_path / "o", "yours"),
    ):
        pass


@pytest.mark.parametrize("name", ["store", "work", "bundles", "pictures", "predictions", "run.lock", "recipe.json"])
def test_links_are_not_followed(tmp_path: Path, name: str) -> None:
    """A run folder of a stranger that leads elsewhere is refused by a run and by `clean`; what it leads to stays."""
    out, victim = tmp_path / "o", tmp_path / "victim"
    with open_store(out, "r") as store:
        store.once("k", {}, write)
        store.finish()
    kept = out / name
    if kept.is_file() or name == "run.lock":
        victim.write_text(kept.read_text() if name == "recipe.json" else "mine")
        kept.unlink(missing_ok=True)
    else:
        (victim / "photos").mkdir(parents=True)
        (victim / "photos" / "a.tmp").write_text("mine")
        shutil.rmtree(kept, ignore_errors=True)
    kept.symlink_to(victim)
    before = {path: path.read_bytes() for path in (victim, *victim.rglob("*")) if path.is_file()}
    with pytest.raises(UsageError, match=f"{name}: a link"), open_store(out, "r"):
        pass
    with pytest.raises(UsageError, match=f"{name}: a link"):
        clean(out)
    assert {path: path.read_bytes() for path in before} == before


def test_a_link_among_the_steps_stays(tmp_path: Path) -> None:
    """`clean` removes folders of its own, not what a link between them leads to, nor the link."""
    out = tmp_path / "o"
    with open_store(out, "r") as store:
        store.finish()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a").write_text("mine")
    (out / "store").mkdir(exist_ok=True)
    (out / "store" / "x").symlink_to(tmp_path / "photos")
    assert clean(out) == {}
    assert (out / "store" / "x" / "a").read_text() == "mine"


@pytest.mark.parametrize("record", ["", "[]", "{", '"x"', "[" * 200_000])
def test_spoiled_record_of_the_owner(tmp_path: Path, record: str) -> None:
    """A recipe.json that is not one of ours is refused in one line, as files of others are."""
    (tmp_path / "recipe.json").write_text(record)
    with pytest.raises(UsageError, match=r"recipe\.json"), open_store(tmp_path, "r"):
        pass


def test_foreign_files(tmp_path: Path) -> None:
    """A folder with files of others is refused, and they stay."""
    (tmp_path / "thesis.doc").write_text("dear")
    with pytest.raises(UsageError, match="holds files that are not of an edgecnn run"), open_store(tmp_path, "r"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]


def test_a_file_as_folder(tmp_path: Path) -> None:
    """--out that names a file is refused."""
    (tmp_path / "f").write_text("")
    for out in (tmp_path / "f", tmp_path / "f" / "below"):
        with pytest.raises(UsageError, match="cannot be made a folder"), open_store(out, "r"):
            pass


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A second process in the folder of a running one is refused and told who holds it; when the first is killed, the folder is free."""
    code = (
        "import sys, time; from pathlib import Path; from edgecnn.store import open_store\n"
        "with open_store(Path(sys.argv[1]), 'r'):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "o")], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"another run holds it .pid {holder.pid} on .*Wait for it"), open_store(tmp_path / "o", "r"):
            pass
        holder.kill()
    with open_store(tmp_path / "o", "r") as store:
        assert not store.made


def test_leftovers_are_swept(tmp_path: Path) -> None:
    """Half-written files of a killed run go when the folder is opened; other hidden files stay."""
    with open_store(tmp_path, "r"):
        pass
    left = (".result.json.x.tmp", "bundles/.pi.x.old", "pictures/.pi-04.jpg.x.tmp", "predictions/.pi.npz.x.tmp")
    for name in (*left, ".keep"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with open_store(tmp_path, "r"):
        assert not any((tmp_path / name).exists() for name in left)
        assert (tmp_path / ".keep").exists()


def test_unwritable_folder(tmp_path: Path) -> None:
    """A folder that this user may not write ends with 2 and says so; asked as an unprivileged user, for root may write anywhere."""
    folder = tmp_path / "o"
    folder.mkdir(mode=0o755)
    code = (
        "import sys; from pathlib import Path\nfrom edgecnn.errors import UsageError, guarded\nfrom edgecnn.store import open_store\n"
        "def main():\n    with open_store(Path(sys.argv[1]), 'r'):\n        pass\nsys.exit(guarded(main))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root, and no setpriv to become another user")
        for parent in (tmp_path, *tmp_path.parents):
            if not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode | 0o011)  # pytest's folders: let the other user look inside
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    else:
        folder.chmod(0o555)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "Permission denied" in done.stderr and "Traceback" in done.stderr and "edgecnn/" not in done.stderr:
        pytest.skip("the other user cannot read this checkout or its Python")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [f"edgecnn: --out {folder}: not writable. Choose another folder, or mend its rights."]
    assert not list(folder.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_nearly_full(small_disk: Path) -> None:
    """Too little room is told before any work."""
    with pytest.raises(ResourceError, match=r"[01] MiB free on its disk"), open_store(small_disk / "o", "r"):
        pass


def test_disk_full_in_a_step(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up ends the step with 5 and loses nothing finished; with room again it goes on."""
    from edgecnn.errors import exit_code_of

    monkeypatch.setattr("edgecnn.store.MIN_FREE_BYTES", 0)

    def big(work: Path) -> None:
        (work / "big").write_bytes(bytes(2 << 20))

    with open_store(small_disk / "o", "r") as store:
        kept = store.once("k", {}, write)
        with pytest.raises(OSError, match="No space") as full:
            store.once("big", {}, big)
        code, line = exit_code_of(full.value)
        assert code == 5
        assert "no space left" in str(line)
        assert store.once("k", {}, write).folder == kept.folder
        assert len(store.made) == 1
        next((small_disk / "o/work").glob("big-*/big")).unlink()
        assert not store.once("big", {}, lambda work: None).resumed


def test_killed_at_its_first_write(tmp_path: Path) -> None:
    """A folder in which the very first file was left half written is taken up again, not called foreign."""
    (tmp_path / ".recipe.json.abc.tmp").write_text("{")
    with open_store(tmp_path, "r"):
        assert not (tmp_path / ".recipe.json.abc.tmp").exists()

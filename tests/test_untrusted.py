"""Foreign files: nothing in them runs, nothing small becomes large, and what comes back is plain numbers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import LEVEL
from hostile import array_bombs, bombs, gadgets, torch_zip
from safetensors.torch import save_file

from edgecnn import untrusted
from edgecnn.device.confine import landlock_version
from edgecnn.errors import DataError, ModelError
from edgecnn.untrusted import read_arrays, read_weights

ROOT = Path(__file__).parent.parent
needs_landlock = pytest.mark.skipif(not landlock_version(), reason="this kernel has no Landlock")

# The controls, each switched off by a line before the parser's own program.
SWITCHED_OFF = {
    "weights_only": "import torch; _load = torch.load; torch.load = lambda f, **k: _load(f, **{**k, 'weights_only': False})",
    "landlock": "import edgecnn.parser; edgecnn.parser.confine = lambda **k: 0",
    "limits": "import edgecnn.parser; edgecnn.parser.limit = lambda **k: None",
}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Start a parser with some of its controls switched off."""
    parser = untrusted._Parser()

    def off(*names: str) -> None:
        path, _, rest = untrusted.PROGRAM.partition("from edgecnn.parser")
        lines = "".join(f"{SWITCHED_OFF[name]}\n" for name in names)
        monkeypatch.setattr(untrusted, "PROGRAM", f"{path}{lines}from edgecnn.parser{rest}")
        monkeypatch.setattr(untrusted, "_PARSER", parser)

    yield off
    parser.close()


def touched(folder: Path, path: Path) -> bool:
    """Whether reading the file made anything appear in `folder`; cleans up."""
    before = set(folder.iterdir())
    with contextlib.suppress(ModelError):
        read_weights(path)
    new = set(folder.iterdir()) - before
    gone = before - set(folder.iterdir())
    for one in new:
        subprocess.run(["rm", "-rf", one], check=True)
    return bool(new or gone)


def put(container: str, path: Path, data: bytes) -> None:
    if container == "zip":
        torch_zip(path, data)
    elif container == "bare":
        path.write_bytes(data)
    else:  # of torch before 1.6
        head = io.BytesIO()
        for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
            pickle.dump(part, head, 2)
        path.write_bytes(head.getvalue() + data)


def test_malicious_pickles_run_nothing(tmp_path: Path) -> None:
    """Every gadget, in a container of three in turn, is refused in one line; no canary is touched and no file changes."""
    (tmp_path / "c").mkdir()
    path, found = tmp_path / "evil.pth", gadgets(tmp_path / "c" / "canary")
    for i, (name, data) in enumerate(found.items()):
        put(("zip", "bare", "legacy")[i % 3], path, data)
        before = path.read_bytes()
        assert not touched(tmp_path / "c", path), name
        assert path.read_bytes() == before
        with pytest.raises(ModelError, match=r"evil\.pth"):
            read_weights(path)
    assert len(found) >= 60


@pytest.mark.faults
def test_sabotage_weights_only(tmp_path: Path, without) -> None:  # type: ignore[no-untyped-def]
    """With the confinement and torch's restricted reader both switched off, canaries are touched: the test above can fail."""
    without("weights_only", "landlock")
    (tmp_path / "c").mkdir()
    path, seen = tmp_path / "evil.pth", []
    for name, data in gadgets(tmp_path / "c" / "canary").items():
        put("zip", path, data)
        if touched(tmp_path / "c", path):
            seen.append(name)
    assert len(seen) >= 30


@pytest.mark.faults
def test_restricted_reader_holds_alone(tmp_path: Path, without) -> None:  # type: ignore[no-untyped-def]
    """Even where nothing is confined, as on a kernel without Landlock, torch's restricted reader runs nothing."""
    without("landlock")
    _touch_nothing(tmp_path)


@pytest.mark.faults
@needs_landlock
def test_confinement_holds_alone(tmp_path: Path, without) -> None:  # type: ignore[no-untyped-def]
    """Even where the pickles do run, for torch's restricted reader is switched off, the confined process touches nothing."""
    without("weights_only")
    _touch_nothing(tmp_path)


def _touch_nothing(folder: Path) -> None:
    (folder / "c").mkdir()
    path, found = folder / "evil.pth", gadgets(folder / "c" / "canary")
    for name, data in found.items():
        put("zip", path, data)
        assert not touched(folder / "c", path), name
    assert len(found) >= 60


def test_bombs_are_refused(tmp_path: Path) -> None:
    """Bombs are refused within 10 s, their parsers using less than 2 GB."""
    save_file({"w": torch.zeros(1)}, tmp_path / "warm.safetensors")
    read_weights(tmp_path / "warm.safetensors")
    peaks: list[int] = []
    ask = untrusted._PARSER.ask

    def watched(job, files):  # type: ignore[no-untyped-def]
        answer = ask(job, files)
        peaks.append(answer["peak_bytes"])
        return answer

    tried = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untrusted._PARSER, "ask", watched)
        for made, read, kind in ((bombs, read_weights, ModelError), (array_bombs, read_arrays, DataError)):
            for name, path in made(tmp_path):
                if not LEVEL and any(word in name for word in ("hash", "such", "million", "blanks", "5,000")):
                    continue  # they take seconds each: for `make faults`
                begun = time.monotonic()
                with pytest.raises(kind) as fault:
                    read(path)
                assert time.monotonic() - begun < 10 * _slowness(), name
                assert "\n" not in str(fault.value)
                tried += 1
    assert tried >= (20 if not LEVEL else 26)
    assert max(peaks) < 2 << 30


def _slowness() -> float:
    """How many times slower than alone this process runs: the promise is about an idle machine."""
    begun, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.05:
        pass
    return max(1.0, (time.monotonic() - begun) / 0.05)


@pytest.mark.faults
def test_sabotage_limits(tmp_path: Path, without) -> None:  # type: ignore[no-untyped-def]
    """Without limits the bytearray bomb takes more memory than it may: the test above can fail."""
    without("limits")
    path = tmp_path / "big.pt"
    torch_zip(path, b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (3 << 30).to_bytes(5, "little") + b"\x85R.")
    peak = 0
    ask = untrusted._PARSER.ask

    def watched(job, files):  # type: ignore[no-untyped-def]
        nonlocal peak
        answer = ask(job, files)
        peak = answer["peak_bytes"]
        return answer

    untrusted._PARSER.ask = watched  # type: ignore[method-assign]
    with pytest.raises(ModelError):
        read_weights(path)
    assert peak > 2 << 30


CONFINED = """
import os, socket, sys
from pathlib import Path
from edgecnn.device.confine import confine
ours, others = Path(sys.argv[1]), Path(sys.argv[2])
kept = open(others / "open", "w")
print(confine(writable=[ours]))
(ours / "file").write_text("x"); (ours / "folder").mkdir(); os.rename(ours / "file", ours / "moved"); (ours / "moved").unlink()
kept.write("still open")
Path("/dev/null").write_text("x")
done = []
def tries(what, do):
    try:
        do()
    except (PermissionError, OSError) as fault:
        if not isinstance(fault, PermissionError) and fault.errno != 18: raise
    else:
        done.append(what)
tries("write", lambda: (others / "new").write_text("x"))
tries("change", lambda: (others / "old").write_text("x"))
tries("truncate", lambda: os.truncate(others / "old", 0))
tries("remove", lambda: (others / "old").unlink())
tries("rename", lambda: os.rename(others / "old", others / "older"))
tries("move in", lambda: os.rename(others / "old", ours / "older"))
tries("link", lambda: os.link(others / "old", ours / "linked"))
tries("mkdir", lambda: (others / "d").mkdir())
tries("symlink", lambda: (others / "s").symlink_to("x"))
tries("fifo", lambda: os.mkfifo(others / "p"))
tries("child", lambda: os.system(f"touch {others}/child 2>/dev/null") and (_ for _ in ()).throw(PermissionError()))
if int(sys.argv[3]):
    tries("connect", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 5))
    tries("listen", lambda: socket.socket().bind(("127.0.0.1", 0)))
print(done)
"""


@needs_landlock
@pytest.mark.parametrize("off", [False, True])
def test_confined_process_writes_in_its_folder_only(tmp_path: Path, off: bool) -> None:
    """A confined process cannot write, change, remove, move or link outside, nor its children, nor use TCP; not confined, it can."""
    ours, others = tmp_path / "ours", tmp_path / "others"
    ours.mkdir()
    others.mkdir()
    (others / "old").write_text("old")
    code = CONFINED.replace("confine(writable=[ours])", "0") if off else CONFINED
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if landlock_version() >= 4 else 0
        done = subprocess.run([sys.executable, "-c", code, ours, others, str(port)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or off, done.stderr
    if off:
        assert done.stdout.startswith("0\n")
        assert (others / "new").exists()
    else:
        assert done.stdout == f"{landlock_version()}\n[]\n"
        assert (others / "old").read_text() == "old"
        assert (others / "open").read_text() == "still open"
        assert sorted(p.name for p in others.iterdir()) == ["old", "open"]


def test_digest_is_of_what_was_parsed(tmp_path: Path) -> None:
    """The sha256 is that of the bytes that were read, and the tensors are those of the file, in its order, with its metadata."""
    import hashlib

    state = {"b": torch.randn(3, 4), "a": torch.arange(5), "c": torch.randn(2).bfloat16(), "d": torch.tensor(3)}
    path = tmp_path / "w.safetensors"
    save_file(state, path, {"edgecnn.pruned": "{}"})
    read = read_weights(path)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.metadata == {"edgecnn.pruned": "{}"}
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in state.items())
    torch.save(state, tmp_path / "w.pt")
    assert list(read_weights(tmp_path / "w.pt").tensors) == list(state)


def test_shared_and_sliced_tensors_come_back_whole(tmp_path: Path) -> None:
    """Tensors that share memory, are parts of a larger one or are not contiguous come back as what they are."""
    whole = torch.arange(24.0).reshape(4, 6)
    state = {"whole": whole, "same": whole, "part": whole[1:3], "turned": whole.t(), "parameter": torch.nn.Parameter(torch.ones(2))}
    torch.save(state, tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt").tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert not any(tensor.requires_grad for tensor in read.values())


def test_versions_of_layouts_survive(tmp_path: Path) -> None:
    """The version of a module's layout, which torch's files carry for old ones, comes through the parser as numbers."""
    state = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)).state_dict()
    torch.save(state, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").tensors._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    """Images and labels of an .npz, packed or not, are equal to what was saved and cannot be written to."""
    images, labels = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8), np.arange(7)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images=images, labels=labels, other=np.zeros(2))
        read = read_arrays(tmp_path / "a.npz")
        assert np.array_equal(read["images"], images)
        assert np.array_equal(read["labels"], labels)
        with pytest.raises(ValueError, match="read-only"):
            read["images"][0] = 0


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading leaves no temporary file, and none has a name while it is read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    save_file({"w": torch.zeros(4)}, tmp_path / "w.safetensors")
    seen: list[str] = []
    ask = untrusted._PARSER.ask

    def watched(job, files):  # type: ignore[no-untyped-def]
        seen.extend(os.listdir(tmp_path / "tmp"))  # noqa: PTH208
        return ask(job, files)

    monkeypatch.setattr(untrusted._PARSER, "ask", watched)
    read_weights(tmp_path / "w.safetensors")
    assert seen == list((tmp_path / "tmp").iterdir()) == []


def test_a_parser_that_is_gone_is_started_again(tmp_path: Path) -> None:
    """When the parser's process was killed, the next file gets a new one."""
    save_file({"w": torch.zeros(4)}, tmp_path / "w.safetensors")
    read_weights(tmp_path / "w.safetensors")
    process = untrusted._PARSER._process
    assert process is not None
    process.kill()
    process.wait()
    assert json.dumps(list(read_weights(tmp_path / "w.safetensors").tensors)) == '["w"]'

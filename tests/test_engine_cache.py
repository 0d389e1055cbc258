"""An engine comes out of the cache only if it is the very one that would be built; through the real tensorrt_rtx, which needs no GPU."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgecnn.device import tensorrt as cache
from edgecnn.device.files import sha256_file
from edgecnn.device.runtimes.trt import _dla
from edgecnn.device.tensorrt import Engine, Tensorrt, build_engine, cache_folder, cached_engine, load_tensorrt
from edgecnn.errors import DeviceError, IntegrityError, ResourceError

trt = pytest.importorskip("tensorrt_rtx", reason="builds with tensorrt_rtx, which is not installed")


def write_graph(path: Path, seed: int = 0) -> Path:
    """A convolution and a ReLU, of random weights."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    weights = np.random.default_rng(seed).normal(size=(8, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["logits"], "relu"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, 8, 8]) for n, c in (("input", 3), ("logits", 8))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weights, "w")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_graph(tmp_path / "model.onnx")


def get(onnx: Path, *, tensorrt: Tensorrt | None = None, gpu: str = "Orin 8.7", **more: Any) -> Engine:
    arguments = {"batch": 1, "compute_capability": "86", **more}
    return cached_engine(tensorrt or load_tensorrt(), onnx, sha256_file(onnx), gpu, **arguments)


def engines() -> list[Path]:
    return sorted(cache_folder().glob("*.engine"))


def test_the_second_time_it_comes_from_the_cache(onnx: Path) -> None:
    """Asked for again, the same bytes come without a build; nothing else is in the folder."""
    first, second = get(onnx), get(onnx)
    assert (first.cached, second.cached) == (False, True)
    assert first.plan == second.plan
    assert len(first.plan) > 1000
    assert len(engines()) == 1
    assert list(cache_folder().iterdir()) == engines()


def test_what_an_engine_depends_on_makes_another(onnx: Path, tmp_path: Path) -> None:
    """Another model, TensorRT version or package, GPU, batch, precision or compute capability is built; the first is still there after."""
    real = load_tensorrt()
    get(onnx)
    changes: list[dict[str, Any]] = [
        {"onnx": write_graph(tmp_path / "other.onnx", seed=1)},
        {"tensorrt": replace(real, version="99.0")},
        {"tensorrt": replace(real, package="tensorrt_rtx2")},
        {"gpu": "Orin 8.6"},
        {"batch": 2},
        {"precision": "int8"},
        {"compute_capability": "89"},
    ]
    for made, change in enumerate(changes):
        arguments = {"onnx": onnx, **change}
        path = arguments.pop("onnx")
        assert not get(path, **arguments).cached, change
        assert get(path, **arguments).cached, change
        assert len(engines()) == made + 2
    assert get(onnx).cached
    assert len(changes) == 7


def test_a_moved_model_is_the_same_model(onnx: Path, tmp_path: Path) -> None:
    """Where the file lies and what it is called does not count."""
    get(onnx)
    assert get(onnx.rename(tmp_path / "moved.onnx")).cached


def test_one_flipped_bit_means_rebuild(onnx: Path) -> None:
    """Whichever of 500 bits of the cached file is flipped, it is never handed out; each time it is tried, the engine is built again."""
    good = get(onnx).plan
    (path,) = engines()
    kept, draw, refused, rebuilt = path.read_bytes(), random.Random(0), 0, 0
    for at in [0, 63, 64, 65, len(kept) - 1, *(draw.randrange(len(kept)) for _ in range(495))]:
        bad = bytearray(kept)
        bad[at] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        assert cache._read_kept(path) is None
        refused += 1
        if refused % 50:
            continue
        engine = get(onnx)
        assert not engine.cached
        assert engine.plan == good
        rebuilt += 1
    assert (refused, rebuilt) == (500, 10)
    assert get(onnx).cached


@pytest.mark.parametrize("length", [0, 1, 64, 65, 1000])
def test_a_truncated_engine_means_rebuild(onnx: Path, length: int) -> None:
    """Cut short, as a full disk leaves a file, it is built again."""
    get(onnx)
    (path,) = engines()
    path.write_bytes(path.read_bytes()[:length])
    assert not get(onnx).cached
    assert get(onnx).cached


def test_what_is_not_ours_alone_is_not_taken(onnx: Path) -> None:
    """A file that others may read or write, a link or a folder is not taken for an engine, whole as it may be."""
    get(onnx)
    (path,) = engines()
    for mode in (0o644, 0o660, 0o602):
        path.chmod(mode)
        assert not get(onnx).cached, f"{mode:o}"
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))
    assert not get(onnx).cached
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        get(onnx)


def test_only_its_owner_reads_it(onnx: Path) -> None:
    """Engines are 0600 in a folder 0700."""
    get(onnx)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in cache_folder().iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700


def test_a_model_that_changed_after_verifying_is_not_built(onnx: Path) -> None:
    """Only bytes with the verified digest are built."""
    digest = sha256_file(onnx)
    write_graph(onnx, seed=1)
    with pytest.raises(IntegrityError, match="changed since"):
        cached_engine(load_tensorrt(), onnx, digest, "Orin 8.7", batch=1, compute_capability="86")
    assert not engines()


def test_a_refused_graph_leaves_no_engine(onnx: Path) -> None:
    """What TensorRT refuses is told and not kept."""
    onnx.write_bytes(b"no graph")
    for _ in range(2):
        with pytest.raises(DeviceError, match="does not parse it"):
            get(onnx)
    assert not engines()


@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX")
def test_timings_are_kept_and_a_damaged_file_of_them_is_not_read(onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second build, of another model, gets the timings that the first wrote, and none of them if a bit is flipped.

    tensorrt_rtx, which has the calls but writes nothing into them, stands in for tensorrt.
    """
    seen: list[bytes] = []
    real = replace(load_tensorrt(), package="tensorrt")
    config = real.module.IBuilderConfig
    make = config.create_timing_cache
    monkeypatch.setattr(config, "create_timing_cache", lambda self, content: (seen.append(bytes(content)), make(self, content))[1])
    get(onnx, tensorrt=real)
    (path,) = cache_folder().glob("*.timings")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    get(write_graph(tmp_path / "other.onnx", seed=1), tensorrt=real)
    bad = bytearray(path.read_bytes())
    bad[-1] ^= 1
    path.write_bytes(bad)
    get(write_graph(tmp_path / "third.onnx", seed=2), tensorrt=real)
    assert [bool(content) for content in seen] == [False, True, False]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_may_not_be_written_is_told(onnx: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """No room for the cache is an error that names the way out, and not a traceback."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache, "write_atomically", refuse)
    with pytest.raises(ResourceError, match="XDG_CACHE_HOME"):
        get(onnx)


def test_a_file_in_place_of_the_cache_is_told(onnx: Path) -> None:
    """The cache's folder cannot be made where a file lies."""
    cache_folder().parent.parent.write_text("a file")
    with pytest.raises(ResourceError, match="XDG_CACHE_HOME"):
        get(onnx)


def test_an_intact_engine_of_another_key_means_rebuild(onnx: Path) -> None:
    """One GPU's engine under another's name is not handed out, nor is a file whose digest is right and which says nothing of itself."""
    get(onnx, gpu="Orin 8.7")
    (mine,) = engines()
    get(onnx, gpu="Xavier 7.2")
    (other,) = set(engines()) - {mine}
    mine.write_bytes(other.read_bytes())
    assert not get(onnx, gpu="Orin 8.7").cached
    assert get(onnx, gpu="Orin 8.7").cached
    for junk in (b"junk", b"[]\njunk", b"{}\njunk"):
        mine.write_bytes(hashlib.sha256(junk).hexdigest().encode() + b"\n" + junk)
        assert not get(onnx, gpu="Orin 8.7").cached


def test_a_dla_that_is_not_there_is_refused(onnx: Path) -> None:
    """Asked for a DLA where there is none, nothing is built for the GPU instead."""
    with pytest.raises(DeviceError, match="DLA core 0 is asked for"):
        get(onnx, dla=0)
    assert not engines()


def test_names_of_providers() -> None:
    """GPU and DLA cores are read from the provider's name; anything else is refused."""
    assert [_dla(name) for name in (None, "GPU", "DLA0", "DLA1")] == [None, None, 0, 1]
    for name in ("", "CPU", "DLA", "DLAx", "dla0", "CUDAExecutionProvider"):
        with pytest.raises(DeviceError):
            _dla(name)


def test_flags_of_the_versions_that_are_not_here() -> None:
    """The tables of flags, for libraries that look like 8.6, 10 and 11: this shows which flags are asked for, and not that they work."""

    def looks_like(network: dict[str, int], builder: dict[str, str]) -> Any:
        return SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(**network), BuilderFlag=SimpleNamespace(**builder))

    both = {"INT8": "INT8", "FP16": "FP16"}
    v8, v10, v11 = looks_like({"EXPLICIT_BATCH": 0}, both), looks_like({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, both), looks_like({}, {})
    assert [cache._network_flags(v, None) for v in (v8, v10, v11)] == [1, 2, 0]
    assert [cache._network_flags(v, 0) for v in (v8, v10, v11)] == [1, 1, 0]
    rows = [("int8", None), ("fp16", None), ("fp32", None), ("int8", 0), ("fp16", 0)]
    assert [cache._precision_flags(v8, *row) for row in rows] == [["INT8"], ["FP16"], [], ["INT8", "FP16"], ["FP16"]]
    assert [cache._precision_flags(v10, *row) for row in rows] == [[], [], [], ["INT8", "FP16"], ["FP16"]]
    assert [cache._precision_flags(v11, *row) for row in rows] == [[]] * 5


def test_building_without_a_cache_is_the_same_engine(onnx: Path) -> None:
    """What the check at export builds is what the cache would hold."""
    assert build_engine(load_tensorrt(), onnx, compute_capability="86") == get(onnx).plan

"""Weights come out of a file whole or not at all, and nothing in the file runs."""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import gadgets, torch_zip
from safetensors.torch import save_file
from torch import nn

from edgecnn.checkpoint import differences, fit_weights, load_weights
from edgecnn.errors import ModelError

PACKAGE = Path(__file__).parent.parent / "edgecnn"


def net(width: int = 4, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def same(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == state.keys() and all(torch.equal(weights[k], state[k]) for k in state)


# ---- what is read ----


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_weights_survive_the_file(tmp_path: Path, suffix: str) -> None:
    """What was saved is what is loaded, in every format that is read."""
    state, path = net().state_dict(), tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert same(load_weights(path), state)


def test_legacy_torch_file_is_read(tmp_path: Path) -> None:
    """A file of torch before 1.6, which is not a zip archive, is read as well."""
    state, path = net().state_dict(), tmp_path / "w.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert same(load_weights(path), state)


def test_format_is_read_from_the_bytes(tmp_path: Path) -> None:
    """A safetensors file named .pth is read as safetensors, never handed to the pickle reader."""
    state, path = net().state_dict(), tmp_path / "w.pth"
    save_file(state, path)
    assert same(load_weights(path), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
        lambda s: {"model_state_dict": s, "loss": 0.1},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "args": argparse.Namespace(lr=0.1)},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {
            "model": {k: v * 0 for k, v in s.items()},
            "model_ema": {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in s.items()}},
        },
        lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
    ],
    ids=["state_dict", "model", "model_state_dict", "ddp", "compiled-ddp", "torchvision-ema", "timm-ema"],
)
def test_training_wrappers_are_taken_off(tmp_path: Path, wrap: Any) -> None:
    """The state dict is found in what training programs save, the averaged one first."""
    state, path = net().state_dict(), tmp_path / "w.pth"
    torch.save(wrap(state), path)
    assert same(load_weights(path), state)


# ---- what runs: nothing ----


def test_refusal_names_the_code_and_the_way_out(tmp_path: Path) -> None:
    """The message names the function the pickle wanted, and the line that exports weights."""
    path = tmp_path / "evil.pt"
    torch_zip(path, gadgets(tmp_path / "canary")["os.system"])
    with pytest.raises(ModelError, match=r"holds code \((posix|os)\.system\).*torch\.save\(model\.state_dict\(\)"):
        load_weights(path)


# ---- what is refused ----


def test_whole_module_is_refused_with_the_line_that_exports_weights(tmp_path: Path) -> None:
    """A pickled module is code; the message names its class."""
    path = tmp_path / "module.pt"
    torch.save(net(), path)
    with pytest.raises(ModelError, match=r"torch\.nn\.modules\.container\.Sequential.*state_dict\(\)"):
        load_weights(path)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    """TorchScript is a program; the message says how to get the weights out."""
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(net().eval(), torch.zeros(1, 3, 8, 8)), path)
    with pytest.raises(ModelError, match=r"TorchScript.*torch\.jit\.load\('script\.pt'\)\.state_dict\(\)"):
        load_weights(path)


def keras_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")
    return out.getvalue()


def other_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "Keras"),
        ("m.keras", keras_zip(), "Keras"),
        ("m.onnx", b"\x08\x07\x12\x07pytorch" + bytes(32), "ONNX"),
        ("m.tflite", b"\x1c\0\0\0TFL3" + bytes(32), "TensorFlow Lite"),
        ("m.engine", b"ptrt" + bytes(64), "TensorRT engine"),
        ("m.pth", b"GGUF" + bytes(32), "GGUF"),
        ("m.pth", other_zip(), "zip archive without torch weights"),
        ("m.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "neither a safetensors nor a torch file"),
        ("m.pth", b"<!DOCTYPE html><html>", "neither a safetensors nor a torch file"),
        ("m.pth", b"", "empty"),
        ("m.safetensors", b"\x00\x01", "damaged"),
        ("m.pth", b"PK\x03\x04" + bytes(100), "damaged"),
        ("m.pth", b"\x80\x02}q\x00", "nothing in it was run|damaged"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """A file that is not weights is refused by what it is, in one line."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as fault:
        load_weights(path)
    assert "\n" not in str(fault.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """A path that is no file is said to be none, or a folder."""
    with pytest.raises(ModelError, match="no such file"):
        load_weights(tmp_path / "none.pt")
    with pytest.raises(ModelError, match="is a folder"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 3},
        {"a": {"b": 1}},
        [torch.zeros(1)],
        torch.zeros(2),
        {"state_dict": {}},
        {"model": {"model": {"model": {"model": {}}}}},
    ],
)
def test_torch_file_without_weights(tmp_path: Path, content: Any) -> None:
    """A torch file with no state dict in it is refused, with what it holds."""
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(ModelError, match=r"no state dict|pickled"):
        load_weights(path)


@pytest.mark.parametrize("name", ["a\nverdict: pass", "\x1b[2J", "x" * 1000])
def test_tensor_names_cannot_write_on_the_terminal(tmp_path: Path, name: str) -> None:
    """A name with a line break, an escape code or no end is refused and not shown."""
    save_file({name: torch.zeros(1)}, tmp_path / "w.safetensors")
    torch.save({name: 1}, tmp_path / "w.pt")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        with pytest.raises(ModelError) as fault:
            load_weights(path)
        assert str(fault.value).isprintable()
        assert len(str(fault.value)) < 600


def test_safetensors_that_declare_more_than_they_hold(tmp_path: Path) -> None:
    """A header that declares gigabytes over a few bytes is refused before any memory is taken."""
    path, tried = tmp_path / "bomb.safetensors", 0
    shape = [1 << 20, 1 << 20]
    for entry in (
        {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 << 40]},
        {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        "x",
    ):
        header = json.dumps({"w": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(ModelError, match="damaged"):
            load_weights(path)
        tried += 1
    for length in (1 << 62, 200_000_000, 0):
        path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(8))
        with pytest.raises(ModelError):
            load_weights(path)
        tried += 1
    assert tried == 11


def test_compressed_torch_archive_is_refused(tmp_path: Path) -> None:
    """A torch archive that unpacks to more than its size is refused before it is unpacked."""
    plain, path = tmp_path / "plain.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert path.stat().st_size < 50_000
    with pytest.raises(ModelError, match="declares more"):
        load_weights(path)


def test_view_that_declares_more_than_the_file_is_refused(tmp_path: Path) -> None:
    """A tensor of stride 0 can declare any size over one stored number."""
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(1).expand(1 << 30)}, path)
    with pytest.raises(ModelError, match=r"w declares 1073741824 values"):
        load_weights(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """NaN and infinity are refused with the tensor's name and how many there are."""
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in net().state_dict().items()}
    state["0.weight"].view(-1)[5:7] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"0\.weight holds 2 NaN or infinite of 108 values"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    """Sparse, quantized, complex and meta tensors are not float weights."""
    odd = [
        torch.zeros(3, 3).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
    ]
    for tensor in odd:
        torch.save({"w": tensor}, tmp_path / "w.pt")
        with pytest.raises(ModelError, match="w is not a plain float tensor"):
            load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_end_in_one_line_or_in_weights(tmp_path: Path, suffix: str) -> None:
    """300 mutations and cuts of a real file: each gives finite weights or a one-line ModelError, never another exception."""
    good, path = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    save_file(net().state_dict(), good) if suffix == ".safetensors" else torch.save(net().state_dict(), good)
    content, draw = good.read_bytes(), random.Random(0)
    refused = lines = tried = 0
    for tried in range(1, 301):
        bad = bytearray(content)
        if tried % 3:
            for _ in range(draw.choice((1, 4, 32))):
                bad[draw.randrange(len(bad))] = draw.randrange(256)
        else:
            del bad[draw.randrange(len(bad)) :]
        path.write_bytes(bad)
        try:
            weights = load_weights(path)
        except ModelError as fault:
            refused += 1
            lines += len(str(fault).splitlines())
        else:
            assert all(bool(torch.isfinite(t.float()).all()) for t in weights.values())
    assert tried == 300
    assert lines == refused > 100


# ---- fitting ----


def test_weights_fit_their_own_architecture() -> None:
    """After fitting, the module computes what the saved one did."""
    source, target, x = net().eval(), net().eval(), torch.randn(2, 3, 8, 8)
    fit_weights(target, source.state_dict())
    assert torch.equal(source(x), target(x))


def test_half_precision_weights_become_float32() -> None:
    """fp16 weights are loaded into a float32 module as float32."""
    target = net()
    fit_weights(target, net().half().state_dict())
    assert {tensor.dtype for tensor in target.parameters()} == {torch.float32}


def test_old_weights_without_batch_counts_fit() -> None:
    """`num_batches_tracked`, which old files lack and inference does not use, may be missing."""
    state = {name: tensor for name, tensor in net().state_dict().items() if not name.endswith("num_batches_tracked")}
    fit_weights(net(), state)


def test_other_architecture_says_which_names_and_shapes_differ() -> None:
    """A checkpoint of another architecture: missing names, unknown names and shapes are counted and the first ones named."""
    state = net(width=6).state_dict()
    state["extra.weight"] = torch.zeros(1)
    del state["4.bias"]
    module = net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ModelError) as fault:
        fit_weights(module, state, what="timm x")
    text = str(fault.value)
    assert "1 missing from the file (4.bias)" in text
    assert "1 unknown to the model (extra.weight)" in text
    assert "0.weight 6x3x3x3 in the file, 4x3x3x3 in the model" in text
    assert "timm x" in text
    assert same(before, module.state_dict())  # nothing was loaded by halves


def test_skipped_names_keep_the_modules_own_values() -> None:
    """A head made anew is not loaded; everything else is."""
    source, target = net(classes=9), net(classes=3)
    head = target.state_dict()["4.weight"].clone()
    fit_weights(target, source.state_dict(), skip={"4.weight", "4.bias"})
    assert torch.equal(target.state_dict()["4.weight"], head)
    assert torch.equal(target.state_dict()["0.weight"], source.state_dict()["0.weight"])
    assert not differences(target, source.state_dict(), {"4.weight", "4.bias"})

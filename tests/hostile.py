"""Files that are made to harm: pickles that run code, and bombs that small files unpack into."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Gadget:
    """Pickles to a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def gadgets(canary: Path) -> dict[str, bytes]:
    """Pickles that would touch `canary` or one of `canaries`, or reach the means to, each in another way."""
    import builtins
    import bz2
    import cProfile
    import ctypes
    import dbm.dumb
    import functools
    import gzip
    import importlib
    import logging
    import lzma
    import operator
    import runpy
    import shelve
    import shutil
    import sqlite3
    import subprocess
    import tarfile
    import tempfile
    import timeit
    import types
    import webbrowser

    code, shell, name = f"open({str(canary)!r}, 'w').close()", f"touch {canary}", str(canary)
    script = canary.with_suffix(".py")
    script.write_text(code)
    nested = pickle.dumps(Gadget(os.system, shell))
    calls: dict[str, Any] = {
        "os.system": Gadget(os.system, shell),
        "os.popen": Gadget(os.popen, shell),
        "os.open": Gadget(os.open, name, os.O_CREAT),
        "os.mkdir": Gadget(os.mkdir, name),
        "os.makedirs": Gadget(os.makedirs, name),
        "os.mkfifo": Gadget(os.mkfifo, name),
        "os.mknod": Gadget(os.mknod, name),
        "os.symlink": Gadget(os.symlink, "x", name),
        "os.link": Gadget(os.link, str(script), name),
        "os.rename": Gadget(os.rename, str(script), name),
        "os.replace": Gadget(os.replace, str(script), name),
        "os.spawnvp": Gadget(os.spawnvp, os.P_WAIT, "touch", ["touch", name]),
        "os.posix_spawnp": Gadget(os.posix_spawnp, "touch", ["touch", name], {}),
        "os.execvp": Gadget(os.execvp, "touch", ["touch", name]),
        "eval": Gadget(builtins.eval, code),
        "exec": Gadget(builtins.exec, code),
        "open": Gadget(builtins.open, name, "w"),
        "io.open": Gadget(io.open, name, "w"),
        "io.FileIO": Gadget(io.FileIO, name, "w"),
        "__import__": Gadget(builtins.__import__, "this"),
        "getattr": Gadget(builtins.getattr, Path(name), "touch"),
        "compile": Gadget(builtins.compile, code, "x", "exec"),
        "import_module": Gadget(importlib.import_module, "antigravity"),
        "subprocess.run": Gadget(subprocess.run, ["touch", name]),
        "subprocess.call": Gadget(subprocess.call, ["touch", name]),
        "subprocess.Popen": Gadget(subprocess.Popen, ["touch", name]),
        "subprocess.getoutput": Gadget(subprocess.getoutput, shell),
        "check_output": Gadget(subprocess.check_output, ["touch", name]),
        "runpy": Gadget(runpy.run_path, str(script)),
        "shutil.copy": Gadget(shutil.copy, str(script), name),
        "shutil.copytree": Gadget(shutil.copytree, str(script.parent), name),
        "shutil.move": Gadget(shutil.move, str(script), name),
        "Path.touch": Gadget(Path.touch, canary),
        "Path.mkdir": Gadget(Path.mkdir, canary),
        "Path.write_text": Gadget(Path.write_text, canary, "x"),
        "functools.partial": Gadget(functools.partial(os.system, shell)),
        "functools.reduce": Gadget(functools.reduce, os.open, [name, os.O_CREAT]),
        "methodcaller": Gadget(operator.methodcaller("touch"), canary),
        "attrgetter": Gadget(operator.attrgetter("touch"), canary),
        "map": Gadget(builtins.map, os.system, [shell]),
        "webbrowser": Gadget(webbrowser.open, f"file://{canary}"),
        "logging": Gadget(logging.FileHandler, name),
        "shelve": Gadget(shelve.open, name),
        "dbm": Gadget(dbm.dumb.open, name, "c"),
        "sqlite3": Gadget(sqlite3.connect, name),
        "zipfile": Gadget(zipfile.ZipFile, name, "w"),
        "tarfile": Gadget(tarfile.open, name, "w"),
        "gzip": Gadget(gzip.open, name, "w"),
        "bz2": Gadget(bz2.open, name, "w"),
        "lzma": Gadget(lzma.open, name, "w"),
        "mkstemp": Gadget(tempfile.mkstemp, "", "", str(canary.parent)),
        "mkdtemp": Gadget(tempfile.mkdtemp, "", "", str(canary.parent)),
        "timeit": Gadget(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "cProfile": Gadget(cProfile.run, code),
        "ctypes": Gadget(ctypes.CDLL, "libc.so.6"),
        "types": Gadget(types.SimpleNamespace),
        "numpy.save": Gadget(np.save, name, 1),
        "numpy.savetxt": Gadget(np.savetxt, name, [1]),
        "numpy.memmap": Gadget(np.memmap, name, "u1", "w+", 0, (1,)),
        "numpy.tofile": Gadget(np.ndarray.tofile, np.zeros(1), name),
        "numpy.load": Gadget(np.load, str(script), None, True),
        "torch.load": Gadget(torch.load, str(script)),
        "torch.jit.load": Gadget(torch.jit.load, str(script)),
        "torch.save": Gadget(torch.save, 1, name),
        "torch.load_library": Gadget(torch._C._load_for_lite_interpreter, str(script), None),
        "torch.hub": Gadget(torch.hub.download_url_to_file, f"file://{script}", name),
        "torch._load_from_bytes": Gadget(torch.storage._load_from_bytes, nested),
        "pickle.loads": Gadget(pickle.loads, nested),
        "nested": {"state_dict": OrderedDict(a=torch.zeros(1), b=Gadget(os.system, shell))},
        "as a key": {Gadget(os.getpid): torch.zeros(1)},
        "in a list": [torch.zeros(1), Gadget(os.system, shell)],
    }
    found = {}
    for call, content in calls.items():
        try:
            found[call] = pickle.dumps(content, 2)
        except (pickle.PicklingError, TypeError, AttributeError):  # this Python does not pickle the function by name
            continue
    # by hand: opcodes that a pickler would not write
    text = b"X" + struct.pack("<I", len(shell)) + shell.encode()
    found["inst"] = b"(S'" + shell.encode() + b"'\nios\nsystem\n."
    found["obj"] = b"(cos\nsystem\nS'" + shell.encode() + b"'\no."
    found["stack_global"] = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(shell)]) + shell.encode() + b"\x85R."
    found["posix"] = b"\x80\x02cposix\nsystem\n" + text + b"\x85R."
    found["build"] = b"\x80\x02ccollections\nOrderedDict\n)R(cposix\nsystem\n" + text + b"Rtb."
    found["ext"] = b"\x80\x02\x82\x01."
    found["newobj_ex"] = b"\x80\x04cposix\nsystem\n" + text + b"\x85}\x92."
    found["dotted"] = b"\x80\x04\x8c\x08builtins\x8c\x0deval.__call__\x93" + text + b"\x85R."
    found["persistent"] = b"\x80\x02" + text + b"Q."
    found["setattr"] = b"\x80\x02cargparse\nNamespace\n)R}X\x09\0\0\0__class__cposix\nsystem\nsb."
    return found


def torch_zip(path: Path, data: bytes, **more: bytes) -> None:
    """A torch archive whose pickle is `data`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **more}.items():
            archive.writestr(f"w/{name}", content)


def _tensor(size: bytes, stride: bytes, numel: int = 4) -> bytes:
    """The pickle of {"w": tensor} with the given pickled size and stride over a storage of `numel` floats."""
    return (
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
        + b"X\x01\0\0\x000X\x03\0\0\0cpu\x8a\x08"
        + struct.pack("<q", numel)
        + b"tQK\0"
        + size
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def bombs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each bomb, made one after the other: small files that ask for memory or time without end."""

    def file(name: str, content: bytes) -> tuple[str, Path]:
        path = folder / name.replace(" ", "_")
        path.write_bytes(content)
        return name, path

    def zipped(name: str, data: bytes, **more: bytes) -> tuple[str, Path]:
        path = folder / f"{name.replace(' ', '_')}.pt"
        torch_zip(path, data, **more)
        return name, path

    def long(number: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", number)

    def header(told: Any) -> bytes:
        text = told if isinstance(told, bytes) else json.dumps(told).encode()
        return struct.pack("<Q", len(text)) + text + bytes(8)

    plain, deflated = folder / "plain.pt", folder / "deflated.pt"
    torch.save({"w": torch.zeros(64 << 20, dtype=torch.uint8)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    plain.unlink()
    yield "deflated weights", deflated
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, folder / "stride.pt")
    yield "a view of stride 0", folder / "stride.pt"
    half = torch.zeros(1 << 18)
    torch.save({f"w{i}": half for i in range(5000)}, folder / "shared.pt")
    yield "5,000 names of one tensor", folder / "shared.pt"
    yield zipped("a storage of 2^50", _tensor(long(1 << 50) + b"\x85", b"K\x01\x85", 1 << 50), **{"data/0": bytes(16)})
    yield zipped("a size of 2^60", _tensor(long(1 << 60) + b"\x85", b"K\0\x85"), **{"data/0": bytes(16)})
    yield zipped("a negative size", _tensor(long(-(1 << 40)) + b"\x85", b"K\x01\x85"), **{"data/0": bytes(16)})
    yield zipped("a bytearray of 2^40", b"\x80\x02c__builtin__\nbytearray\n" + long(1 << 40) + b"\x85R.")
    levels = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    yield zipped("a key whose hash takes 2^60 steps", b"\x80\x02}N)q\x00" + levels + b"K\x01s.")
    yield zipped("a set of such", b"\x80\x04\x8f(N)q\x00" + levels + b"\x90.")
    yield zipped("4 million lists", b"\x80\x02" + b"]" * (4 << 20) + b".")
    yield zipped("nested a million deep", b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".")
    yield zipped("text of 2^62", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.")
    yield zipped("a number of 2 GB", b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.")
    yield file("a bare pickle of a bytearray.pth", b"\x80\x02c__builtin__\nbytearray\n" + long(1 << 40) + b"\x85R.")
    yield file("a header of 2^62.safetensors", struct.pack("<Q", 1 << 62) + b"{}")
    yield file("4 TB declared.safetensors", header({"w": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 4 << 40]}}))
    yield file("a shape that overflows.safetensors", header({"w": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}}))
    yield file(
        "a million tensors.safetensors", header({f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(1_000_000)})
    )
    yield file("a header 2 million deep.safetensors", header(b"[" * 2_000_000))
    yield file("a header of blanks.safetensors", header(b"{" + b" " * 50_000_000 + b"}"))
    sparse = folder / "sparse.pt"
    with sparse.open("wb") as out:
        out.truncate(100 << 30)
    yield "100 GB of nothing", sparse
    sparse.unlink()
    device = folder / "zero.pt"
    device.symlink_to("/dev/zero")
    yield "a device", device
    pipe = folder / "pipe.pt"
    os.mkfifo(pipe)
    yield "a pipe", pipe


def array_bombs(folder: Path) -> Iterator[tuple[str, Path]]:
    """The same for `.npz`."""
    path = folder / "zeros.npz"
    np.savez_compressed(path, images=np.zeros((512, 1024, 1024), np.uint8), labels=np.zeros(512, np.int64))
    yield "512 MB in 512 KB", path
    for name, shape in (("2^50 images", (1 << 50, 4, 4)), ("a shape that overflows", (1 << 40, 1 << 40))):
        npy = io.BytesIO()
        np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": shape})
        path = folder / f"{name.replace(' ', '_')}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", npy.getvalue())
            archive.writestr("labels.npy", npy.getvalue())
        yield name, path
    path = folder / "deep.npz"
    with zipfile.ZipFile(path, "w") as archive:
        told = b"{'descr': " + b"[" * 30_000 + b"}"
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(told)) + told)
        archive.writestr("labels.npy", b"")
    yield "a header 30,000 deep", path
    path = folder / "objects.npz"
    np.savez(path, images=np.array([Gadget(sys.exit)], object), labels=np.zeros(1, int))
    yield "objects", path

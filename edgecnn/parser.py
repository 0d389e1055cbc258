"""The process that parses foreign files: it holds torch ready, and a fork of it, confined and limited, reads each one file.

A parser is code that a stranger's bytes drive. Here it has nothing to win: the fork gets three open files (the stranger's, already
copied; one for tensors; one for the answer) and no right to open another for writing, to read outside Python's own folders, to use TCP,
or to use more memory or time than the file can need. What comes back is data: plain numbers, and a table of JSON.

`untrusted.py` starts this process, and is its only caller. Formats: weights (safetensors, or torch's pickles with `weights_only`, whose
reader knows tensors and nothing that could act) and arrays (`.npz` without objects).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import select
import signal
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from edgecnn.device.confine import confine, limit
from edgecnn.errors import DataError, EdgecnnError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Where training programs keep the weights. The averaged ones (EMA) come first: they are what those programs report and publish.
_NESTS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "weights", "net", "params")
# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")

_HEADER_CAP = 100_000_000  # the safetensors library's own
_MOST_TENSORS = 100_000
_SPARE_BYTES = 512 << 20  # that a parser may use besides what the file holds
SAVE = "In the program that made it: torch.save(model.state_dict(), 'weights.pt')"
_NOT_TORCH = "What is read: torch weights. Take those of the same architecture from timm or torchvision"
_TORCHSCRIPT = "With the file's maker trusted: torch.save(torch.jit.load('{name}').state_dict(), 'weights.pt')"


# ---- the server


def serve(channel: socket.socket) -> None:
    """Answer one request at a time until the other side hangs up.

    A request is `{kind, path, size, wall_s}` and three files: the content, where the numbers go, where the answer goes.
    """
    import numpy  # noqa: F401  what a fork would otherwise import each time
    import torch

    torch.set_num_threads(1)  # a fork has one thread, whatever torch believes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks; when it goes, so does this one
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 16, 3)
        if not message:
            return
        job = json.loads(message)
        pid = os.fork()
        if pid == 0:
            _child(job, *files)
        for file in files:
            os.close(file)
        watch = os.pidfd_open(pid)
        late = not select.select([watch], [], [], job["wall_s"])[0]
        os.close(watch)
        try:
            os.killpg(pid, signal.SIGKILL)  # it leads a group of its own: nothing that it may have started stays
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
        told = {"late": late, "status": os.waitstatus_to_exitcode(status), "peak_bytes": used.ru_maxrss << 10}
        channel.send(json.dumps(told).encode())


def _child(job: dict[str, Any], source: int, numbers: int, answer: int) -> NoReturn:
    """Parse one file, in a process that does nothing else and never returns."""
    try:
        os.setpgid(0, 0)
        with open(source, "rb") as content, open(numbers, "wb") as out, open(answer, "wb") as told:
            told.write(json.dumps(parse(job["kind"], Path(job["path"]), content, out)).encode())
        os._exit(0)
    finally:
        os._exit(1)


def parse(kind: str, path: Path, content: IO[bytes], out: IO[bytes]) -> dict[str, Any]:
    """Confine this process, parse `content`, write the numbers to `out`; returns the rest of the answer, or `error` and its kind."""
    size = os.fstat(content.fileno()).st_size
    confine(readable=[Path(sys.prefix), Path(sys.base_prefix), *(Path(p) for p in sys.path if p), Path("/proc/self")])
    try:
        declared = _declared(path, content) if kind == "arrays" else size
        limit(
            memory_bytes=_SPARE_BYTES + 4 * max(size, declared),
            cpu_s=6 + size // (20 << 20),
            file_bytes=2 * max(size, declared) + (64 << 20),
        )
        return PARSERS[kind](path, content, out)
    except EdgecnnError as fault:
        return {"error": str(fault), "is": type(fault).__name__}
    except MemoryError:
        return {"error": f"{path}: it asks for more memory than its size explains: damaged, or made to harm."}


# ---- weights


def _foreign(path: Path, start: bytes) -> ModelError | None:
    """Why a file with these first bytes cannot be weights, or None where it may be."""
    suffix = path.suffix.lower()
    if not start:
        return ModelError(f"checkpoint {path}: the file is empty. Copy or download it again.")
    if start[:4] == b"PK\x03\x04":
        return None
    if start[:8] == b"\x89HDF\r\n\x1a\n" or suffix in (".h5", ".keras"):
        return _refused(path, "a Keras model", _NOT_TORCH)
    if suffix == ".onnx":
        return _refused(path, "an ONNX graph", f"Start from the torch model it was exported from. {SAVE}")
    if start[4:8] == b"TFL3" or suffix == ".tflite":
        return _refused(path, "a TensorFlow Lite model", f"Start from a torch model. {SAVE}")
    if suffix in (".engine", ".plan", ".trt") or start[1:4] == b"trt":
        return _refused(path, "a TensorRT engine", f"An engine is native code and its weights cannot be taken out. {SAVE}")
    if start[:4] == b"GGUF":
        return _refused(path, "a GGUF file", f"What is read: safetensors and torch state dicts. {SAVE}")
    # A pickle of protocol 2 or later begins with 0x80: torch before 1.6.
    if start[8:9] == b"{" or suffix == ".safetensors" or start[:1] == b"\x80":
        return None
    return _refused(path, "neither a safetensors nor a torch file", f"Check the path, or copy the file again. {SAVE}")


def _weights(path: Path, content: IO[bytes], out: IO[bytes]) -> dict[str, Any]:
    """Write the state dict in `content` to `out` as safetensors.

    Raises:
        ModelError: not weights (a pickled module, TorchScript, Keras, ONNX ...); code in the pickle; damaged; more declared than held.
    """
    from safetensors.torch import save

    start = content.read(16)
    content.seek(0)
    if (fault := _foreign(path, start)) is not None:
        raise fault
    size = os.fstat(content.fileno()).st_size
    metadata: dict[str, str] = {}
    if start[:4] == b"PK\x03\x04":
        _check_zip(path, content, size)
        weights = _unwrapped(path, read_torch(path, content))
    elif start[8:9] == b"{" or path.suffix.lower() == ".safetensors":
        tensors, metadata = _read_safetensors(path, content, size)
        weights = _unwrapped(path, tensors)
    else:
        weights = _unwrapped(path, read_torch(path, content))
    _check_plain(path, weights, size)
    seen: set[int] = set()
    own = {}
    for name, tensor in weights.items():
        where = tensor.data_ptr()
        shared = where in seen or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        own[name] = tensor.detach().clone().contiguous() if shared else tensor.detach().contiguous()
        seen.add(where)
    out.write(save(own))
    return {"names": list(own), "versions": _versions(weights), "metadata": metadata}


def _versions(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Which version of its layout each module's tensors are in, as torch's files carry it."""
    found = getattr(weights, "_metadata", None)
    if not isinstance(found, dict):
        return {}
    return {
        name: told["version"]
        for name, told in found.items()
        if isinstance(name, str) and isinstance(told, dict) and type(told.get("version")) is int
    }


def _check_zip(path: Path, content: IO[bytes], size: int) -> None:
    """Refuse a zip archive that is not torch's weights, which are in `<folder>/data.pkl`, stored as they are."""
    try:
        with zipfile.ZipFile(content) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, IndexError, OverflowError, UnicodeDecodeError) as fault:
        raise _damaged(path, fault) from None
    finally:
        content.seek(0)
    inside = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise _refused(path, "TorchScript, which is a program", _TORCHSCRIPT.format(name=path.name))
    if any(entry.filename in ("config.json", "model.weights.h5") for entry in entries):
        raise _refused(path, "a Keras model", _NOT_TORCH)
    if "archive_format" in inside or path.suffix.lower() == ".pt2":
        raise _refused(path, "an exported torch program", SAVE)
    if "data.pkl" not in inside:
        raise _refused(path, "a zip archive without torch weights", f"Unpack it and give the file inside. {SAVE}")
    # torch stores its records uncompressed; compressed or shared ones are how a small file unpacks into all the memory there is.
    if sum(entry.file_size for entry in entries) > size:
        raise _refused(path, "a torch archive that declares more than the file holds", SAVE)


def _refused(path: Path, what: str, instead: str) -> ModelError:
    return ModelError(f"checkpoint {path}: this is {what}, not a file of weights. {instead}.")


def _damaged(path: Path, fault: BaseException) -> ModelError:
    reason = _plain(str(fault), 160) or type(fault).__name__
    return ModelError(f"checkpoint {path}: damaged or cut short ({reason}). Copy or download it again.")


def _plain(text: str, most: int) -> str:
    """A library's words about a stranger's bytes, so that a terminal shows them and does nothing else."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:most]


def _read_safetensors(path: Path, content: IO[bytes], size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    length = int.from_bytes(content.read(8), "little")
    if length > min(size - 8, _HEADER_CAP):
        raise _damaged(path, ValueError(f"a header of {length} bytes in a file of {size}"))
    try:
        header = json.loads(content.read(length))
    except (ValueError, RecursionError) as fault:
        raise _damaged(path, fault) from None
    if not isinstance(header, dict):
        raise _damaged(path, ValueError("the header is not a table"))
    _check_count(path, len(header))  # before the library makes them: 300,000 empty ones took it eleven seconds
    content.seek(0)
    try:
        tensors = load(content.read())  # it checks every shape and offset against the file
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, AttributeError) as fault:
        raise _damaged(path, fault) from None
    metadata = header.get("__metadata__") or {}
    if not all(isinstance(word, str) for pair in metadata.items() for word in pair):
        raise _damaged(path, ValueError("metadata that are not words"))
    return tensors, metadata


def _check_count(path: Path, tensors: int) -> None:
    if tensors > _MOST_TENSORS:
        raise ModelError(f"checkpoint {path}: {tensors} tensors, more than any network has. {SAVE}.")


def read_torch(path: Path, content: IO[bytes] | None = None) -> Any:
    """The one call of torch's reader in the package, and always of the one that knows no code.

    Args:
        path: what it is called, and where it is unless `content` is given.
        content: an open file.
    """
    import torch

    try:
        # Namespace is where training programs keep their settings; it holds values and does nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # it warns of a foreign pickle before it refuses it
            return torch.load(path if content is None else content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        raise _code(path, str(fault)) from None
    except MemoryError:
        raise ModelError(f"checkpoint {path}: it asks for more memory than there is. {SAVE}.") from None
    except Exception as fault:  # a hostile or damaged pickle can make the reader fail in any way, and all of them mean this
        raise _damaged(path, fault) from None


def _code(path: Path, reason: str) -> ModelError:
    """The message for a pickle with more in it than weights, naming what it wanted."""
    wanted = re.search(r"GLOBAL ([\w.<>]+)", reason) or re.search(r"(?:function|class|module|type) '?([\w.]+\.[\w.]+)'?", reason)
    if wanted:
        return ModelError(
            f"checkpoint {path}: the pickle holds code ({wanted[1][:80]}), not only weights; "
            f"it was refused and nothing in it was run. {SAVE}."
        )
    return ModelError(f"checkpoint {path}: not a readable file of weights ({_plain(reason, 120)}); nothing in it was run. {SAVE}.")


def _unwrapped(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict inside what a training program saved, under the names the module gave."""
    from collections import OrderedDict

    import torch

    for _ in range(3):  # {"state_dict": {"model": ...}} occurs; deeper nesting is not a checkpoint
        if not isinstance(content, dict):
            raise _refused(path, f"a pickled {type(content).__name__}", SAVE)
        if content and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()):
            break
        nest = next((name for name in _NESTS if isinstance(content.get(name), dict) and content[name]), None)
        if nest is None:
            keys = _some([ascii(key[:40]) if isinstance(key, str) else type(key).__name__ for key in content]) or "nothing"
            raise ModelError(f"checkpoint {path}: no state dict in it; it holds {keys}. {SAVE}.")
        content = content[nest]
    else:
        raise ModelError(f"checkpoint {path}: no state dict in it, only tables in tables. {SAVE}.")
    _check_count(path, len(content))
    weights: dict[str, Tensor] = OrderedDict()
    if hasattr(content, "_metadata"):
        weights._metadata = content._metadata  # type: ignore[attr-defined]
    weights.update(content)
    if not all(name.isprintable() and len(name) < 500 for name in weights):
        raise ModelError(f"checkpoint {path}: tensor names with control characters or without end: damaged or made to mislead. {SAVE}.")
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) or name == "n_averaged" for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name != "n_averaged"}
        if not weights:
            raise ModelError(f"checkpoint {path}: no weights in it. {SAVE}.")
    return weights


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _check_plain(path: Path, weights: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors that are not plain or are larger than their file."""
    import torch

    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu" or tensor.is_complex():
            raise ModelError(f"checkpoint {path}: {name} is not a plain float tensor. Export the float weights. {SAVE}.")
        if tensor.numel() * tensor.element_size() > size:  # a view with stride 0 can declare any size
            shape = "x".join(map(str, tensor.shape))
            raise ModelError(f"checkpoint {path}: {name} declares {shape} values, more than the file of {size} bytes holds. {SAVE}.")
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > 2 * size + (1 << 20):
        raise ModelError(f"checkpoint {path}: its tensors declare more than the file of {size} bytes holds. {SAVE}.")


# ---- arrays


def _declared(path: Path, content: IO[bytes]) -> int:
    """How many bytes the archive says it unpacks to.

    Raises:
        DataError: it is no archive, or says more than images can be packed.
    """
    size = os.fstat(content.fileno()).st_size
    start = content.read(6)
    content.seek(0)
    if start == b"\x93NUMPY":
        raise DataError(f"{path}: needs arrays `images` and `labels`; found a single array. Write it with numpy.savez.")
    try:
        with zipfile.ZipFile(content) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, IndexError, OverflowError, UnicodeDecodeError) as fault:
        raise _no_arrays(path, str(fault)) from None
    finally:
        content.seek(0)
    most = max(256 << 20, 100 * size)
    if total > most:
        raise _no_arrays(path, f"{size} bytes declare {total}, more than images can be packed")
    return total


def _no_arrays(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: not a readable .npz file ({_plain(reason, 160)}). Write it with numpy.savez.")


def _arrays(path: Path, content: IO[bytes], out: IO[bytes]) -> dict[str, Any]:
    """Write the arrays `images` and `labels` to `out`, one behind the other; returns dtype, shape and start of each."""
    import numpy as np

    try:
        with np.load(content, allow_pickle=False) as file:
            have = sorted(file.files)
            if not {"images", "labels"} <= set(have):
                found = _some([ascii(name[:40]) for name in have])
                raise DataError(
                    f"{path}: needs arrays `images` and `labels`; found [{found}]. Write it with numpy.savez(path, images=..., labels=...)."
                )
            told: dict[str, Any] = {}
            for name in ("images", "labels"):
                array: np.ndarray = np.ascontiguousarray(file[name])
                if array.dtype.kind not in "biuf":
                    raise _no_arrays(path, f"{name} is {array.dtype}, no numbers")
                told[name] = [array.dtype.str, list(array.shape), out.tell()]
                out.write(array.data)
    except (EdgecnnError, MemoryError):
        raise
    except Exception as fault:  # numpy and zipfile raise many kinds on a broken file
        raise _no_arrays(path, str(fault)) from None
    return told


PARSERS: dict[str, Callable[[Path, IO[bytes], IO[bytes]], dict[str, Any]]] = {"weights": _weights, "arrays": _arrays}

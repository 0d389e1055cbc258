"""Weights from a file, without running anything the file holds.

safetensors is data by design. A `.pt`, `.pth` or `.bin` is a pickle, which is a program: it is read by torch's own reader
with `weights_only=True`, which knows tensors and nothing that could act, and there is no other way in. What a file is, is
read from its first bytes, not from its name.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecnn.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Where training programs keep the weights. The averaged ones (EMA) come first: they are what those programs report and publish.
_NESTS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "weights", "net", "params")
# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")

_HEADER_CAP = 100_000_000  # the safetensors library's own
_SAVE = "In the program that made it: torch.save(model.state_dict(), 'weights.pt')"
_NOT_TORCH = "What is read: torch weights. Take those of the same architecture from timm or torchvision"
_TORCHSCRIPT = "With the file's maker trusted: torch.save(torch.jit.load('{name}').state_dict(), 'weights.pt')"


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a `.safetensors` or a torch file onto the CPU.

    Unwraps what training programs wrap it in (`{"state_dict": ...}`, `module.`, `_orig_mod.`); where there are averaged
    (EMA) weights beside the plain ones, the averaged ones are taken, as timm and torchvision do.

    Raises:
        ModelError: no such file; not weights (a pickled module, TorchScript, Keras, ONNX ...); code in the pickle; damaged;
            more declared than the file holds; NaN or infinite values.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise ModelError(f"checkpoint {path}: {found}. Give the path of a .safetensors, .pt or .pth file of weights.")
    weights = _read_safetensors(path) if _kind(path) == "safetensors" else _read_torch(path)
    _check_values(path, weights)
    return weights


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], skip: Collection[str] = (), what: str = "the model") -> None:
    """Load `weights` into `module`; every name and shape must agree.

    Args:
        skip: names that keep the module's own values: a head that is made anew.
        what: how the module is called in the message.

    Raises:
        ModelError: names are missing or unexpected, or shapes differ.
    """
    found = differences(module, weights, skip)
    if found:
        raise ModelError(f"the checkpoint does not fit {what}: {found}. Name the architecture it was trained as.")
    own = module.state_dict()
    taken = OrderedDict((name, weights[name]) for name in own if name in weights and name not in skip)
    # Some modules convert old layouts by the version that torch's files carry; other files are of the present one.
    taken._metadata = getattr(weights, "_metadata", own._metadata)  # type: ignore[attr-defined]
    module.load_state_dict(taken, strict=False)  # strictness is what `differences` did


@dataclass(frozen=True)
class Differences:
    """How a checkpoint and a module disagree. False where they agree."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        parts = ((self.missing, "missing from the file"), (self.unexpected, "unknown to the model"), (self.shapes, "of another shape"))
        return "; ".join(f"{len(names)} {label} ({_some(names)})" for names, label in parts if names)


def differences(module: nn.Module, weights: Mapping[str, Tensor], skip: Collection[str] = ()) -> Differences:
    """What stands in the way of loading `weights` into `module`, apart from the names in `skip`."""
    own = module.state_dict()
    return Differences(
        # The count of batches is not used in inference, and old files lack it.
        missing=[name for name in own if name not in weights and name not in skip and not name.endswith("num_batches_tracked")],
        unexpected=[name for name in weights if name not in own and name not in skip],
        shapes=[
            f"{name} {_size(weights[name])} in the file, {_size(tensor)} in the model"
            for name, tensor in own.items()
            if name in weights and name not in skip and weights[name].shape != tensor.shape
        ],
    )


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _kind(path: Path) -> str:
    """What the file is, "safetensors" or "torch"; anything else is refused with the way to weights."""
    with path.open("rb") as source:
        start = source.read(16)
    suffix = path.suffix.lower()
    if not start:
        raise ModelError(f"checkpoint {path}: the file is empty. Copy or download it again.")
    if start[:4] == b"PK\x03\x04":
        return _zip_kind(path)
    if start[:8] == b"\x89HDF\r\n\x1a\n" or suffix in (".h5", ".keras"):
        raise _refused(path, "a Keras model", _NOT_TORCH)
    if suffix == ".onnx":
        raise _refused(path, "an ONNX graph", f"Start from the torch model it was exported from. {_SAVE}")
    if start[4:8] == b"TFL3" or suffix == ".tflite":
        raise _refused(path, "a TensorFlow Lite model", f"Start from a torch model. {_SAVE}")
    if suffix in (".engine", ".plan", ".trt") or start[:4] == b"ftrt":
        raise _refused(path, "a TensorRT engine", f"An engine is native code and its weights cannot be taken out. {_SAVE}")
    if start[:4] == b"GGUF":
        raise _refused(path, "a GGUF file", f"What is read: safetensors and torch state dicts. {_SAVE}")
    if start[8:9] == b"{" or suffix == ".safetensors":
        return "safetensors"
    if start[:1] == b"\x80":  # a pickle of protocol 2 or later: torch before 1.6
        return "torch"
    raise _refused(path, "neither a safetensors nor a torch file", f"Check the path, or copy the file again. {_SAVE}")


def _zip_kind(path: Path) -> str:
    """What a zip archive is: torch's weights are in `<folder>/data.pkl`, stored as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as fault:
        raise _damaged(path, fault) from None
    inside = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise _refused(path, "TorchScript, which is a program", _TORCHSCRIPT.format(name=path.name))
    if any(entry.filename in ("config.json", "model.weights.h5") for entry in entries):
        raise _refused(path, "a Keras model", _NOT_TORCH)
    if "archive_format" in inside or path.suffix.lower() == ".pt2":
        raise _refused(path, "an exported torch program", _SAVE)
    if "data.pkl" not in inside:
        raise _refused(path, "a zip archive without torch weights", f"Unpack it and give the file inside. {_SAVE}")
    # torch stores its records uncompressed; compressed or shared ones are how a small file unpacks into all the memory there is.
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise _refused(path, "a torch archive that declares more than the file holds", _SAVE)
    return "torch"


def _refused(path: Path, what: str, instead: str) -> ModelError:
    return ModelError(f"checkpoint {path}: this is {what}, not a file of weights. {instead}.")


def _damaged(path: Path, fault: BaseException) -> ModelError:
    reason = " ".join(str(fault).split())[:160] or type(fault).__name__
    return ModelError(f"checkpoint {path}: damaged or cut short ({reason}). Copy or download it again.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    size = path.stat().st_size
    with path.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if length > min(size - 8, _HEADER_CAP):
            raise _damaged(path, ValueError(f"a header of {length} bytes in a file of {size}"))
        try:
            header = json.loads(source.read(length))
        except (ValueError, RecursionError) as fault:
            raise _damaged(path, fault) from None
    if not isinstance(header, dict):
        raise _damaged(path, ValueError("the header is not a table"))
    try:
        return _unwrapped(path, load_file(path, device="cpu"))  # it checks every shape and offset against the file
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, AttributeError) as fault:
        raise _damaged(path, fault) from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        # Namespace is where training programs keep their settings; it holds values and does nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # it warns of a foreign pickle before it refuses it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        raise _code(path, str(fault)) from None
    except MemoryError:
        raise ModelError(f"checkpoint {path}: it asks for more memory than there is. {_SAVE}.") from None
    except Exception as fault:  # a hostile or damaged pickle can make the reader fail in any way, and all of them mean this
        raise _damaged(path, fault) from None
    return _unwrapped(path, content)


def _code(path: Path, reason: str) -> ModelError:
    """The message for a pickle with more in it than weights, naming what it wanted."""
    wanted = re.search(r"GLOBAL ([\w.<>]+)", reason) or re.search(r"(?:function|class|module|type) '?([\w.]+\.[\w.]+)'?", reason)
    if wanted:
        return ModelError(
            f"checkpoint {path}: the pickle holds code ({wanted[1]}), not only weights; it was refused and nothing in it was run. {_SAVE}."
        )
    return ModelError(
        f"checkpoint {path}: not a readable file of weights ({' '.join(reason.split())[:120]}); nothing in it was run. {_SAVE}."
    )


def _unwrapped(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict inside what a training program saved, under the names the module gave."""
    import torch

    for _ in range(3):  # {"state_dict": {"model": ...}} occurs; deeper nesting is not a checkpoint
        if not isinstance(content, dict):
            raise _refused(path, f"a pickled {type(content).__name__}", _SAVE)
        if content and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()):
            break
        nest = next((name for name in _NESTS if isinstance(content.get(name), dict) and content[name]), None)
        if nest is None:
            keys = _some([repr(key[:40]) if isinstance(key, str) else type(key).__name__ for key in content], 6) or "nothing"
            raise ModelError(f"checkpoint {path}: no state dict in it; it holds {keys}. {_SAVE}.")
        content = content[nest]
    else:
        raise ModelError(f"checkpoint {path}: no state dict in it, only tables in tables. {_SAVE}.")
    weights: dict[str, Tensor] = OrderedDict()
    if hasattr(content, "_metadata"):
        weights._metadata = content._metadata  # type: ignore[attr-defined]
    weights.update(content)
    if not all(name.isprintable() and len(name) < 500 for name in weights):
        raise ModelError(f"checkpoint {path}: tensor names with control characters or without end: damaged or made to mislead. {_SAVE}.")
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) or name == "n_averaged" for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name != "n_averaged"}
        if not weights:
            raise ModelError(f"checkpoint {path}: no weights in it. {_SAVE}.")
    return weights


def _check_values(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not plain, are larger than their file, or hold NaN or infinity."""
    import torch

    size = path.stat().st_size
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu" or tensor.is_complex():
            raise ModelError(f"checkpoint {path}: {name} is not a plain float tensor. Export the float weights. {_SAVE}.")
        if tensor.numel() * tensor.element_size() > size:  # a view with stride 0 can declare any size
            raise ModelError(
                f"checkpoint {path}: {name} declares {_size(tensor)} values, more than the file of {size} bytes holds. {_SAVE}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise ModelError(
                f"checkpoint {path}: {name} holds {bad} NaN or infinite of {tensor.numel()} values: training diverged or it is damaged. "
                "Take an earlier checkpoint."
            )

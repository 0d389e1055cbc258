"""Weights from a file, and whether they fit a network. Reading is done by `untrusted.py`, which runs nothing the file holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecnn.errors import ModelError
from edgecnn.untrusted import read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a `.safetensors` or a torch file onto the CPU.

    Unwraps what training programs wrap it in (`{"state_dict": ...}`, `module.`, `_orig_mod.`); where there are averaged
    (EMA) weights beside the plain ones, the averaged ones are taken, as timm and torchvision do.

    Raises:
        ModelError: no such file; not weights (a pickled module, TorchScript, Keras, ONNX ...); code in the pickle; damaged;
            more declared than the file holds; NaN or infinite values.
    """
    return read_weights(path).tensors


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

"""A pruned network without a pickle: what pruning changed, as plain numbers, and the zoo's network changed in the same way.

The numbers are those of `torch.nn`: the shapes of a layer's tensors, and its own integers such as `out_channels`, `groups`,
`num_features`. They go into `TorchModel.origin["pruned"]`; the weights themselves are in safetensors. Where only some of several
numbers changed, the others are None, so that a pruned network can still get a head for other classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecnn.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

METADATA = "edgecnn.pruned"
Layers = dict[str, dict[str, Any]]
"""Layer name to what changed in it: tensor name to shape, attribute to integer or list of integers."""


def changes(module: nn.Module, whole: nn.Module) -> Layers:
    """What makes `module` narrower than `whole`, the same architecture unpruned."""
    originals = dict(whole.named_modules())
    found: Layers = {}
    for name, layer in module.named_modules():
        before, now = _numbers(originals[name]), _numbers(layer)
        if changed := {key: _changed(before[key], value) for key, value in now.items() if key in before and before[key] != value}:
            found[name] = changed
    return found


def narrow(module: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `module` as narrow as the one that `changes` saw, in place; the weights that remain mean nothing.

    Raises:
        ModelError: the numbers are not of this architecture, or not smaller than its own.
    """
    from torch import Tensor, nn

    there = dict(module.named_modules())
    for name, numbers in layers.items():
        layer = there.get(name)
        own = {} if layer is None else _numbers(layer)
        for key, value in numbers.items():
            if layer is None or key not in own or not _smaller(value, own[key]):
                raise ModelError(
                    f"the pruned network's record: {name}.{key} is {value!r}, this network has {own.get(key, 'no such layer')!r}. "
                    "The file is of another architecture, or damaged."
                )
            old = getattr(layer, key)
            if isinstance(old, Tensor):
                part = old.detach()[tuple(slice(size) for size in value)].clone()  # slice(None) is all of it
                setattr(layer, key, nn.Parameter(part) if isinstance(old, nn.Parameter) else part)
            elif isinstance(value, list):
                setattr(layer, key, tuple(old[i] if part is None else part for i, part in enumerate(value)))
            else:
                setattr(layer, key, value)


def as_metadata(origin: Mapping[str, Any]) -> dict[str, str]:
    """What goes into the header of the weights' safetensors file, so that the file can be a recipe's checkpoint."""
    return {METADATA: json.dumps(origin["pruned"])} if "pruned" in origin else {}


def record_in(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The record in the metadata of the safetensors file `path`, or None where there is none.

    Raises:
        ModelError: there is one, and it is damaged.
    """
    text = metadata.get(METADATA)
    if text is None:
        return None
    try:
        record = json.loads(text)
        sound = isinstance(record["steps"], list) and all(isinstance(numbers, dict) for numbers in record["layers"].values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ModelError(f"checkpoint {path}: its record of what was pruned is damaged. Take the file again from the run that made it.")
    return {"layers": record["layers"], "steps": record["steps"]}


def _numbers(layer: nn.Module) -> dict[str, Any]:
    """A layer's own tensors' shapes and integers, JSON-able."""
    numbers: dict[str, Any] = {}
    for tensors in (layer._parameters, layer._buffers):
        numbers.update({key: list(tensor.shape) for key, tensor in tensors.items() if tensor is not None})
    for key, value in vars(layer).items():
        if isinstance(value, int) and not isinstance(value, bool):
            numbers[key] = value
        elif isinstance(value, tuple) and value and all(isinstance(part, int) for part in value):
            numbers[key] = list(value)
    return numbers


def _changed(before: Any, now: Any) -> Any:
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [None if a == b else b for a, b in zip(before, now, strict=True)]
    return now


def _smaller(value: Any, own: Any) -> bool:
    """Whether `value` is what pruning can make of `own`: positive integers, none of them larger, as many as before."""
    if isinstance(own, list):
        return (
            isinstance(value, list) and len(value) == len(own) and all(a is None or _smaller(a, b) for a, b in zip(value, own, strict=True))
        )
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= own

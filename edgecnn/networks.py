"""Networks without their weights: from an origin, which is a few words and numbers, to the module, so that no pickle is ever needed."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecnn.errors import EdgecnnError, ModelError
from edgecnn.narrow import narrow

if TYPE_CHECKING:
    from torch import nn


def build(origin: Mapping[str, Any]) -> nn.Module:
    """The module that `TorchModel.origin` names, in eval mode, float32, with random weights to be replaced by saved ones.

    Raises:
        ModelError: the source no longer offers this model, or cannot build it like this.
    """
    classes = {} if origin.get("num_classes") is None else {"num_classes": origin["num_classes"]}
    source, name, chans = origin["source"], origin["name"], origin["in_chans"]
    module: nn.Module
    if source == "python":
        module = _call(name, {**classes, "in_chans": chans})
    elif source == "edgecnn":
        if not classes:
            raise ModelError(
                f"model: edgecnn {name} needs a number of outputs, and data.class_index leaves that to the model. Leave class_index out."
            )
        module = _own(name)(**classes, in_chans=chans, **origin["options"])
    elif source == "timm":
        import timm

        module = timm.create_model(name, pretrained=False, in_chans=chans, **classes, **origin["options"])
    else:
        from torchvision.models import get_model

        module = get_model(name, weights=None, **classes, **origin["options"])
        if chans == 1:
            _make_grey(module)
    if "pruned" in origin:
        narrow(module, origin["pruned"]["layers"])
    return module.float().eval()


def _own(name: str) -> type[nn.Module]:
    from edgecnn.resnet8 import ResNet8
    from edgecnn.simple_cnn import SimpleCNN

    own: dict[str, type[nn.Module]] = {"simple_cnn": SimpleCNN, "resnet8": ResNet8}
    return own[name]


def head_names(origin: Mapping[str, Any]) -> frozenset[str]:
    """Names of the tensors whose shape follows the number of classes."""
    shapes = [{name: tensor.shape for name, tensor in skeleton({**origin, "num_classes": n}).state_dict().items()} for n in (5, 7)]
    return frozenset(name for name, shape in shapes[0].items() if shapes[1].get(name) != shape)


def skeleton(origin: Mapping[str, Any]) -> nn.Module:
    """The module without memory for its weights, where its code allows that. Leaves torch's generator as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        if origin["source"] != "python":  # the user's code may do anything, and is called in the ordinary way only
            try:
                with torch.device("meta"):
                    return build(origin)
            except NotImplementedError:  # it computes with its own weights while it is built, as RegNet does
                pass
        return build(origin)


def _make_grey(module: nn.Module) -> None:
    """Let the first convolution take one channel."""
    from torch import nn

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            same: Any = {key: getattr(layer, key) for key in ("out_channels", "kernel_size", "stride", "padding", "dilation")}
            grey = nn.Conv2d(1, bias=layer.bias is not None, **same)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, grey)
            return
    raise ModelError("model.in_chans: found no first convolution of three channels to make grey. Set in_chans: 3.")


def _call(entry: str, offered: dict[str, Any]) -> nn.Module:
    """Import and call the user's `module:function` with those of `offered` that it takes."""
    from torch import nn

    where, _, name = entry.partition(":")
    with here_on_path(), users_code(entry):
        found = importlib.import_module(where)
        function = getattr(found, name, None)
        if not callable(function):
            near = difflib.get_close_matches(name, [key for key, value in vars(found).items() if callable(value)], 3)
            raise ModelError(f"model.entry: {where} has no function {name!r}{'; nearest: ' + ', '.join(near) if near else ''}. Mend entry.")
        takes = inspect.signature(function).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        module = function(**{key: value for key, value in offered.items() if free or key in takes})
    if not isinstance(module, nn.Module):
        raise ModelError(f"model.entry: {entry} returned {type(module).__name__}, not a torch.nn.Module. Return the module.")
    return module


@contextmanager
def here_on_path() -> Iterator[None]:
    """The current folder first on the import path, as `python -m` has it."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextmanager
def users_code(entry: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line that names the place in it."""
    try:
        yield
    except EdgecnnError:
        raise
    except ModuleNotFoundError as fault:
        raise ModelError(
            f"model.entry: {entry}: no module {fault.name!r} in {Path.cwd()} or installed. Run from the folder that holds it."
        ) from None
    except Exception as fault:
        last = traceback.extract_tb(fault.__traceback__)[-1]
        raise ModelError(
            f"model.entry: {entry} failed at {last.filename}:{last.lineno} ({type(fault).__name__}: {first_words(fault)}). Mend it there."
        ) from None


def first_words(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:160] or "no reason given"

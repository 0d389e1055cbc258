"""The models of timm and torchvision by name: search, nearest names, and counts without loading weights."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgecnn.networks import skeleton

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Found:
    """A model of a zoo.

    Attributes:
        parameters: number of weights, with the published head.
        macs: multiply-accumulates of one image of the native input, or None where they cannot be counted.
        input: native C, H, W.
        pretrained: whether weights are published.
    """

    source: str
    name: str
    parameters: int
    macs: int | None
    input: tuple[int, int, int]
    pretrained: bool


def find_models(pattern: str, limit: int = 20) -> list[Found]:
    """The classification models of timm and torchvision whose name matches `pattern`, counted without loading weights.

    Args:
        pattern: part of a name, or with `*`, `?` and `[]` the whole name. Case does not matter.
    """
    pattern = pattern.lower()
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = [(source, name) for source, all_names in zoo_names().items() for name in all_names if fnmatch.fnmatchcase(name.lower(), wanted)]
    names.sort(key=lambda pair: (pair[1].lower() != pattern, not pair[1].lower().startswith(pattern), pair[1], pair[0]))
    return [_found(source, name) for source, name in names[:limit]]


def _found(source: str, name: str) -> Found:
    shape, pretrained = _native(source, name)
    options = {"aux_logits": False} if source == "torchvision" and name in ("googlenet", "inception_v3") else {}
    module = skeleton({"source": source, "name": name, "in_chans": 3, "options": options})
    try:
        macs = count_macs(module, shape)
    except Exception:  # not every network runs without memory, and a table row is no reason to fail
        macs = None
    return Found(source, name, count_parameters(module), macs, shape, pretrained)


def _native(source: str, name: str) -> tuple[tuple[int, int, int], bool]:
    if source == "timm":
        import timm

        config: Any = timm.get_pretrained_cfg(name)
        return tuple(config.input_size), bool(config.has_weights)
    from torchvision.models import get_model_weights

    size = get_model_weights(name)["DEFAULT"].transforms().crop_size[0]
    return (3, size, size), True


def zoo_names() -> dict[str, list[str]]:
    """The names each zoo offers."""
    import timm
    from torchvision import models

    return {"timm": timm.list_models(), "torchvision": models.list_models(module=models)}


def nearest(name: str, names: list[str], count: int) -> list[str]:
    """The names most like `name`, whatever its case and punctuation."""
    plain = {re.sub(r"[^a-z0-9]", "", key.lower()): key for key in reversed(names)}
    wanted = re.sub(r"[^a-z0-9]", "", name.lower())
    longer = [key for short, key in plain.items() if wanted and short.startswith(wanted)]
    alike = [plain[short] for short in difflib.get_close_matches(wanted, plain, count, 0.6)]
    return list(dict.fromkeys([*alike, *sorted(longer, key=len)]))[:count]


def count_parameters(module: nn.Module) -> int:
    """Number of learned weights; batch norm's running statistics are not among them."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image: convolutions, linear layers and attention, as torch counts them.

    Args:
        shape: C, H, W. The image is made where the module's weights are, also on the meta device.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.zeros(1, *shape, device=device))
    finally:
        module.train(training)
    return int(counter.get_total_flops()) // 2

"""Training by several processes, on one machine or many: each takes a part of every batch, and all keep the same weights.

Started by `torchrun` or `accelerate launch`, which set RANK and WORLD_SIZE; Hugging Face Accelerate finds the device and the way to talk
(nccl between GPUs, gloo between CPUs), torch's DistributedDataParallel averages the gradients. Batch norm takes its statistics over the
whole batch, so that several processes compute what one would: torch's own SyncBatchNorm does that on GPUs only.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def rank() -> int:
    """Number of this process, 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@cache
def device() -> torch.device:
    """Where this process trains; where there are several, it meets the others first."""
    import torch

    if ranks() == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    from accelerate import PartialState

    # Process 0 prunes and checks while the others wait for it, and that takes what it takes.
    found: torch.device = PartialState(timeout=timedelta(days=30)).device
    return found


def shared(value: Any) -> Any:
    """What process 0 gives, in every process; anything that pickles."""
    if ranks() == 1:
        return value
    from torch import distributed

    told = [value]
    distributed.broadcast_object_list(told, src=0, device=device())
    return told[0]


def total(value: float) -> float:
    """The sum of what all processes give."""
    if ranks() == 1:
        return value
    import torch

    sum_of_all = torch.tensor(value, device=device())
    torch.distributed.all_reduce(sum_of_all)
    return float(sum_of_all)


def together(module: nn.Module) -> nn.Module:
    """`module` to be called in training, its batch norm synchronised until `apart`."""
    from torch import nn

    if ranks() == 1:
        return module
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.forward = partial(_synchronised, layer)  # type: ignore[method-assign]
    where = [device()] if device().type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=where)


def apart(module: nn.Module) -> None:
    """Undo what `together` did to the module itself."""
    for layer in module.modules():
        vars(layer).pop("forward", None)


def _synchronised(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm with the statistics of the batches of all processes, of equal size."""
    import torch

    if not layer.training:
        return type(layer).forward(layer, x)
    x32 = x.float()
    # Spread about each process's own mean, then of the means: a difference of two sums of squares loses the digits of a small variance.
    variances, means = torch.var_mean(x32, (0, 2, 3), correction=0)
    means, variances = _from_all(torch.stack([means, variances])).unbind(1)
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    if layer.track_running_stats:
        with torch.no_grad():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked += 1
            part = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            count = x.numel() / x.shape[1] * ranks()
            layer.running_mean.lerp_(mean, part)
            layer.running_var.lerp_(variance * (count / max(count - 1, 1)), part)
    scale = torch.rsqrt(variance + layer.eps) * (layer.weight if layer.affine else 1)
    shift = (layer.bias if layer.affine else 0) - mean * scale
    y: Tensor = (x32 * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)
    for after in ("drop", "act"):  # timm's BatchNormAct2d
        if isinstance(inner := getattr(layer, after, None), torch.nn.Module):
            y = inner(y)
    return y


def _from_all(mine: Tensor) -> Tensor:
    """What every process gives, stacked in their order; the gradient goes back to each of them."""
    import torch
    from torch import distributed

    class FromAll(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, mine: Tensor) -> Tensor:
            parts = [torch.empty_like(mine) for _ in range(ranks())]
            distributed.all_gather(parts, mine.contiguous())
            return torch.stack(parts)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            summed = gradients[0].contiguous()
            distributed.all_reduce(summed)
            return summed[rank()]

    given: Tensor = FromAll.apply(mine)
    return given

"""What a run will need of disk and memory, before it needs it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecnn.errors import ResourceError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Room:
    """Bytes, by rough rules on the high side."""

    disk_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        return f"needs about {_text(self.disk_bytes)} of disk and {_text(self.memory_bytes)} of memory"


def estimate(module: nn.Module, shape: tuple[int, int, int], images: int, candidates: int, stages: int, batch: int) -> Room:
    """Count what a run writes and holds.

    Args:
        module: the network, in eval mode.
        shape: C, H, W of its input.
        images: that are prepared and kept (calibration, choice, evaluation).
        candidates: files that are built over all targets.
        stages: that write weights.
        batch: of training, or of evaluation where there is none.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    channels, height, width = shape
    # An exported graph and two copies while it is built; a stage's weights, and its checkpoint with optimizer and average.
    disk = 2 * images * channels * height * width + weights * (4 + 3 * candidates + 6 * stages) + (64 << 20)
    # Weights, gradients, two moments and an average; activations are kept for the gradients. The libraries themselves take most of 1 GB.
    memory = (1 << 30) + 5 * weights + (3 if stages else 1) * batch * activations(module, shape)
    return Room(disk, memory)


def activations(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """Bytes of the outputs of all layers, for one image."""
    import torch

    total = 0

    def count(_: nn.Module, __: object, output: object) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor):
            total += output.numel() * output.element_size()

    hooks = [layer.register_forward_hook(count) for layer in module.modules() if not list(layer.children())]
    try:
        with torch.inference_mode():
            module(torch.zeros(1, *shape, device=next(iter(module.parameters())).device))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def check(room: Room, folder: Path) -> list[str]:
    """Refuse what the disk does not hold; a doubt where memory looks short.

    Raises:
        ResourceError: less is free on the disk of `folder`.
    """
    free = shutil.disk_usage(folder).free
    if free < room.disk_bytes:
        raise ResourceError(f"--out {folder}: {_text(free)} free on its disk, the run needs about {_text(room.disk_bytes)}. Free some.")
    available = available_bytes()
    if available is not None and available < room.memory_bytes:
        return [f"about {_text(room.memory_bytes)} of memory is needed and {_text(available)} available: it may be slow, or be ended"]
    return []


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping, or None where the system does not tell."""
    try:
        lines: Sequence[str] = meminfo.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"

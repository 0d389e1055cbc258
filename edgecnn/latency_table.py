"""Widths chosen by measured latency: how much time each group of channels really costs, at a few widths, on the runtime that counts.

For each group and each of three widths, a network cut there alone is exported and timed against the whole one, the two taking turns,
and its logits are compared with the whole network's on calibration images. So cliffs at vector widths, and depthwise layers that
cost more than their MACs say, are in the table and not in a model of the machine; NetAdapt (Yang et al. 2018, arXiv:1804.03230)
works alike. From the table comes a path of ever narrower networks; how far to go on it is decided by exporting and timing them as a
whole, because savings do not add up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecnn.device.files import write_atomically
from edgecnn.errors import ModelError
from edgecnn.pace import Pace
from edgecnn.pruning import Group
from edgecnn.screen import Screen

if TYPE_CHECKING:
    from torch import Tensor, nn

# Shares of a group's channels that are tried.
LEVELS = (0.75, 0.5, 0.25)
# A saving below this share of the whole latency is noise, and not worth a channel.
NOISE = 0.004


@dataclass(frozen=True)
class Row:
    """One group cut to one width, all others whole.

    Attributes:
        group: its name.
        width: channels that stay.
        saved: share of the whole network's latency.
        harm: mean KL divergence, in nats, of its predictions from the whole network's.
    """

    group: str
    width: int
    saved: float
    harm: float


def table(
    module: nn.Module,
    groups: Sequence[Group],
    cutter: Callable[[Mapping[str, int]], nn.Module],
    pace: Pace,
    images: Tensor,
    *,
    round_to: int,
    kept_in: Path,
    screen: Screen,
) -> list[Row]:
    """Measure every group at every level; `kept_in` keeps what is done, and an interrupted table goes on from there."""
    rows = [Row(**row) for row in json.loads(kept_in.read_text())] if kept_in.is_file() else []
    done = {(row.group, row.width) for row in rows}
    todo = [(group, width) for group in groups for width in dict.fromkeys(group.nearest(group.channels * s, round_to) for s in LEVELS)]
    todo = [(group, width) for group, width in todo if width < group.channels]
    before = _logits(module, images)
    with pace.against(module) as share, screen.bar("measure widths", len(todo)) as bar:
        for i, (group, width) in enumerate(todo):
            if (group.root, width) not in done:
                narrow = cutter({group.root: width})
                harm = _kl(before, _logits(narrow, images))
                rows.append(Row(group.root, width, 1 - share(narrow), harm))
                write_atomically(kept_in, json.dumps([asdict(row) for row in rows]).encode())
            bar(i + 1, group.root)
    return rows


def plans(rows: Sequence[Row]) -> list[dict[str, int]]:
    """Ever narrower networks, as widths: each has one group narrower than the one before, where that saves most for its harm."""
    chosen: dict[str, Row] = {}
    found: list[dict[str, int]] = []
    while True:
        best, best_rate = None, 0.0
        for row in rows:
            now = chosen.get(row.group)
            saves = row.saved - (now.saved if now else 0.0)
            harms = row.harm - (now.harm if now else 0.0)
            rate = saves / max(harms, 1e-6)
            if saves > NOISE and (now is None or row.width < now.width) and rate > best_rate:
                best, best_rate = row, rate
        if best is None:
            return found
        chosen[best.group] = best
        found.append({row.group: row.width for row in chosen.values()})


def widths_for(
    aim: float, rows: Sequence[Row], module: nn.Module, cutter: Callable[[Mapping[str, int]], nn.Module], pace: Pace, screen: Screen
) -> tuple[dict[str, int], float]:
    """The first of the plans whose whole network, exported and timed, takes `aim` of the latency or less, and the share it takes.

    Raises:
        ModelError: the aim cannot be reached; says how far it got.
    """
    path, reached = plans(rows), 1.0
    best: tuple[dict[str, int], float] | None = None
    with pace.against(module) as share_of:
        low, high = 0, len(path) - 1
        while low <= high:
            # The last plan first: whether the aim can be reached at all.
            middle = high if best is None and low == 0 and high == len(path) - 1 else (low + high) // 2
            share = share_of(cutter(path[middle]))
            screen.note(f"prune: step {middle + 1} of {len(path)} takes {share:.3f} of the latency: {path[middle]}")
            reached = min(reached, share)
            if share <= aim:
                best, high = (path[middle], share), middle - 1
            elif best is None:
                break
            else:
                low = middle + 1
    if best is None:
        raise ModelError(
            f"stages: prune: latency: {aim:.2f} of the present one was asked for; the least that was measured is {reached:.2f}, "
            f"on {pace.where}. Ask for more than {reached:.2f}, or take a smaller model."
        )
    return best


def _logits(module: nn.Module, images: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        return torch.cat([module(images[i : i + 64]) for i in range(0, len(images), 64)])


def _kl(reference: Tensor, other: Tensor) -> float:
    import torch

    p, q = torch.log_softmax(reference.double(), 1), torch.log_softmax(other.double(), 1)
    return max(float((p.exp() * (p - q)).sum(1).mean()), 0.0)


def row_facts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table, JSON-able."""
    return [asdict(row) for row in rows]

"""Widths chosen by measured latency: how much time each group of channels really costs, at a few widths, on the runtime that counts.

For each group and each of three widths, a network cut there alone is exported and timed against the whole one, the two taking turns,
and its logits are compared with the whole network's on calibration images. So cliffs at vector widths, and depthwise layers that
cost more than their MACs say, are in the table and not in a model of the machine; NetAdapt (Yang et al. 2018, arXiv:1804.03230)
works alike. From the table comes a path of ever narrower networks; how far to go on it is decided by exporting and timing them as a
whole, because savings do not add up.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecnn.device.bundle import write_bundle
from edgecnn.device.files import write_atomically
from edgecnn.device.runtimes import Runner, open_runner
from edgecnn.device.spec import InputSpec, Manifest, read_manifest
from edgecnn.errors import ModelError
from edgecnn.networks import first_words
from edgecnn.pruning import Group
from edgecnn.screen import Screen, hushed

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


@dataclass(frozen=True)
class Pace:
    """Times networks on one runtime of this machine.

    Attributes:
        runtime: onnxruntime or openvino.
        threads: of the runtime.
        spec: the networks' input.
        folder: for exported files.
        seconds: spent on each comparison, half of it for each of the two.
    """

    runtime: str
    threads: int
    spec: InputSpec
    folder: Path
    seconds: float = 0.5

    def bundle(self, onnx: Path, name: str) -> Path:
        """A bundle of the file, as the runners and the board's bench want it."""
        options = {"INFERENCE_PRECISION_HINT": "f32"} if self.runtime == "openvino" else {}
        manifest = Manifest(
            name=name,
            runtime=self.runtime,
            precision="fp32",
            candidate="fp32",
            files={"model": "model.onnx"},
            digests={},
            input=self.spec,
            labels=(),
            options=options,
        )
        write_bundle(self.folder / name, manifest, {"model.onnx": onnx})
        return self.folder / name

    def open(self, module: nn.Module, name: str) -> Runner:
        """The network in the runtime. Exported the quick way: only its times matter, the final check uses the export that ships."""
        path = self.folder / f"{name}.onnx"
        _quick_export(module, self.spec.shape, path)
        folder = self.bundle(path, name)
        return open_runner(folder, read_manifest(folder / "manifest.json"), threads=self.threads)

    def relative(self, whole: Runner, module: nn.Module, name: str) -> float:
        """Latency of `module` as a share of `whole`'s, the two taking turns; both by their 10th percentile."""
        x = np.zeros((1, *self.spec.shape), np.float32)
        with self.open(module, name) as other:
            samples: tuple[list[float], list[float]] = ([], [])
            end = time.perf_counter() + self.seconds
            while time.perf_counter() < end or len(samples[0]) < 30:
                for runner, into in zip((whole, other), samples, strict=True):
                    runner.infer(x)  # brings its weights back into the cache
                    for _ in range(3):
                        begun = time.perf_counter()
                        runner.infer(x)
                        into.append(time.perf_counter() - begun)
        return float(np.quantile(samples[1], 0.1) / np.quantile(samples[0], 0.1))


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
    with pace.open(module, "whole") as whole, screen.bar("measure widths", len(todo)) as bar:
        for i, (group, width) in enumerate(todo):
            if (group.root, width) not in done:
                narrow = cutter({group.root: width})
                harm = _kl(before, _logits(narrow, images))
                rows.append(Row(group.root, width, 1 - pace.relative(whole, narrow, "probe"), harm))
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
    with pace.open(module, "whole") as whole:
        low, high = 0, len(path) - 1
        while low <= high:
            # The last plan first: whether the aim can be reached at all.
            middle = high if best is None and low == 0 and high == len(path) - 1 else (low + high) // 2
            share = pace.relative(whole, cutter(path[middle]), "planned")
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
            f"stages: prune: latency: {aim:.2f} of the present one was asked for; the least that was measured is {reached:.2f}. "
            f"Ask for more than {reached:.2f}, or take a smaller model."
        )
    return best


def _quick_export(module: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
    import torch

    try:
        with hushed():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the old exporter, which is the quick one, a line for every width
            torch.onnx.export(module, (torch.zeros(1, *shape),), str(path), dynamo=False, opset_version=17)
    except Exception as fault:  # the exporter raises whatever its many layers raise
        raise ModelError(f"stages: prune: latency: this network cannot be exported ({first_words(fault)}). Prune by macs.") from None


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

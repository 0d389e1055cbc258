"""prune: remove whole channels, so that the network is really smaller and faster on any runtime, with no sparse kernels.

Aims, one of: `latency`, `macs` or `parameters`, the share that stays; `ratio`, the share of every layer's channels that goes.
`latency: 0.6` is measured: how much each layer's channels cost on the runtime, at three widths each, and how much they matter to the
predictions (`edgecnn.latency_table`, a table that another aim in the same run folder finds measured); then the planned network is
exported, and timed in fresh processes against the one before. With `device: pi` all of that is timed on that board.
The other aims cut every layer by the same share. Channels within a layer are ranked by `importance`: magnitude (group L2 norm;
Fang et al. 2023), bn_scale (Liu et al. 2017, arXiv:1708.06519), taylor (Molchanov et al. 2019, arXiv:1906.10771) and hessian
(LeCun et al. 1990), which use the calibration images, random (the control).

When: the network is too slow and can be trained again; follow it with distil or train, without which accuracy is poor. For
iterative pruning, list prune and distil more than once. Cost: seconds; with `latency` a second or two for each layer and width, on a
board more, for each width's network goes over as a file; where the connection breaks, the same command goes on.
Limits: convolutional networks of the usual kinds. What torch-pruning cannot cut rightly is refused, with the layer's name
(GhostNet, ShuffleNet, attention): `keep` leaves layers whole. Channel counts become multiples of `round_to`, because kernels
work in vectors. Library: torch-pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from edgecnn.data import pack
from edgecnn.device.machine import NOT_AVAILABLE
from edgecnn.device.preprocess import normalise
from edgecnn.device.spec import InputSpec
from edgecnn.errors import ModelError
from edgecnn.latency_table import Row, row_facts, table, widths_for
from edgecnn.measure import identity_of, versions_of
from edgecnn.narrow import changes
from edgecnn.networks import head_names, skeleton
from edgecnn.pace import Pace
from edgecnn.pruning import Group, Importance, cut, groups_of
from edgecnn.stages.base import Context, Stage, TorchModel
from edgecnn.targets.base import Device
from edgecnn.train import seed_all
from edgecnn.zoo import count_macs, count_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

AIMS = ("latency", "macs", "parameters", "ratio")
# So many calibration images tell how much a layer matters.
IMAGES = 256
# The final timing may miss the aim by this share of the latency: that much two timings of one file differ.
TOLERANCE = 0.02
NARROWEST = 0.95


class Prune(Stage):
    """Remove channels."""

    compresses: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    stage: Literal["prune"]
    latency: float | None = Field(None, gt=0, lt=1, description="Aim: this share of the measured latency stays.")
    macs: float | None = Field(None, gt=0, lt=1, description="Aim: this share of the multiply-accumulates stays.")
    parameters: float | None = Field(None, gt=0, lt=1, description="Aim: this share of the parameters stays.")
    ratio: float | None = Field(None, gt=0, lt=1, description="Aim: this share of every layer's channels goes.")
    importance: Importance = Field("magnitude", description="How a layer's channels are ranked; random is a control.")
    round_to: int = Field(8, ge=1, le=64, description="Channel counts become multiples of this.")
    keep: tuple[str, ...] = Field((), description="Layers that stay whole, by name; `*` stands for anything.")
    runtime: Literal["onnxruntime", "openvino"] = Field("onnxruntime", description="Where latency is measured.")
    threads: int = Field(1, ge=1, le=1024, description="Threads of that runtime.")
    device: Device | None = Field(
        None, description="Board to measure latency on: ssh://user@host[:port][/its/python], or its name in `edgecnn device list`."
    )

    @model_validator(mode="after")
    def _one_aim(self) -> Prune:
        given = [aim for aim in AIMS if getattr(self, aim) is not None]
        if len(given) != 1:
            raise ValueError(f"give one aim of {', '.join(AIMS)}; here {'are ' + ' and '.join(given) if given else 'is none'}")
        if self.device is not None and self.latency is None:
            raise ValueError(f"device is where latency is measured, and the aim is {given[0]}: leave out device, or aim at latency")
        return self

    def inputs(self) -> dict[str, Any]:
        return {"machine": identity_of(self.device)} if self.latency is not None else {}

    def missing(self) -> str | None:
        if self.latency is None or versions_of(self.device)[self.runtime] != NOT_AVAILABLE:
            return None
        return f"{self.device or 'this machine'} has no {self.runtime}, in which latency is to be measured. Install it there"

    def pace(self, spec: InputSpec, seconds: float = 0.5) -> Pace:
        """Times networks where this stage does."""
        return Pace(self.runtime, self.threads, spec, self.device, seconds)

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        seed_all(ctx.seed)
        shape, images, labels = model.input.shape, *_calibration(model, ctx)
        batches = (
            [(images[i : i + 64], labels[i : i + 64]) for i in range(0, len(images), 64)]
            if self.importance in ("taylor", "hessian")
            else []
        )
        groups = groups_of(model.module, shape, head_names(model.origin), self.importance, batches)
        groups = _not_kept(groups, self.keep)

        def cutter(widths: Mapping[str, int]) -> nn.Module:
            return cut(model.module, shape, groups, widths)

        before, pace = _sizes(model.module, shape), self.pace(model.input)
        told: dict[str, Any] = {}
        if self.latency is not None:
            widths, module, told = self._by_latency(model, ctx, groups, cutter, images, pace)
        elif self.ratio is not None:
            widths = _uniform(groups, self.ratio, self.round_to)
            module = cutter(widths)
        else:
            aim, size = ("macs", self.macs) if self.macs is not None else ("parameters", self.parameters)
            assert size is not None
            widths, module = _by_size(groups, cutter, shape, aim, size, self.round_to)
        after = _sizes(module, shape)
        _check_shrunk(before, after, groups, widths)
        step = {
            **self.model_dump(mode="json", exclude_none=True, exclude={"stage", "device"}),  # goes with the weights, which may be published
            "widths": {g.root: [g.channels, widths[g.root]] for g in groups if widths.get(g.root, g.channels) < g.channels},
            **told,
        }
        whole = {key: value for key, value in model.origin.items() if key != "pruned"}
        steps = [*model.origin.get("pruned", {}).get("steps", []), step]
        origin = {**whole, "pruned": {"layers": changes(module, skeleton(whole)), "steps": steps}}
        notes = _notes(before, after, step, pace)
        for note in notes[:-1]:
            ctx.screen.say(f"  {note}")
        return TorchModel(module, model.input, model.labels, origin, tuple(notes))

    def _by_latency(
        self,
        model: TorchModel,
        ctx: Context,
        groups: list[Group],
        cutter: Callable[[Mapping[str, int]], nn.Module],
        images: Tensor,
        pace: Pace,
    ) -> tuple[dict[str, int], nn.Module, dict[str, Any]]:
        assert self.latency is not None

        def measured(work: Path) -> dict[str, Any]:
            ctx.screen.say(f"  measure what {len(groups)} groups of channels cost on {pace.where}")
            kept_in = work / "table.json"
            rows = table(model.module, groups, cutter, pace, images, round_to=self.round_to, kept_in=kept_in, screen=ctx.screen)
            return {"rows": row_facts(rows)}

        settings = self.model_dump(mode="json", include={"importance", "round_to", "keep"})
        rows = [Row(**row) for row in ctx.kept("latency-table", {**settings, **pace.inputs()}, measured)["rows"]]
        aim, least = self.latency, 1.0
        best: tuple[float, dict[str, int], nn.Module, dict[str, float]] | None = None
        for _ in range(3):  # what fresh processes say and what the search says differ by a factor, which is found on the way
            widths, planned = widths_for(aim, rows, model.module, cutter, pace, ctx.screen)
            module = cutter(widths)
            p50 = pace.p50({"before": model, "after": model.with_module(module)}, processes=3, seed=ctx.seed)
            share, seconds = p50["after"] / p50["before"], {f"{name}_s": value for name, value in p50.items()}
            ctx.screen.say(f"  in fresh processes: {share:.3f} of the latency before (in the search {planned:.3f}, aim {self.latency:g})")
            least = min(least, share)
            if share <= self.latency + TOLERANCE and (best is None or share > best[0]):
                best = share, widths, module, seconds
            if abs(share - self.latency) <= TOLERANCE:
                break
            aim *= self.latency / share
        if best is None:
            raise ModelError(
                f"stages: prune: latency: {self.latency:g} of the present one was asked for; in fresh processes {least:.2f} was measured "
                f"on {pace.where}. Ask for less, or measure on a quieter machine."
            )
        share, widths, module, seconds = best
        return widths, module, {"measured": {"latency": share, **seconds}, "table": row_facts(rows)}


@dataclass(frozen=True)
class _Sizes:
    macs: int
    parameters: int


def _sizes(module: nn.Module, shape: tuple[int, int, int]) -> _Sizes:
    return _Sizes(count_macs(module, shape), count_parameters(module))


def _calibration(model: TorchModel, ctx: Context) -> tuple[Tensor, Tensor]:
    """At most `IMAGES` calibration images, N x C x H x W float32, and their labels."""
    import torch

    few = ctx.data.calibration.subset(range(min(IMAGES, len(ctx.data.calibration))))
    packed = pack(few, model.input, ctx.work / "images")
    x = normalise(np.asarray(packed.images), model.input)
    return torch.from_numpy(x), torch.from_numpy(np.asarray(packed.labels, np.int64))


def _not_kept(groups: list[Group], keep: tuple[str, ...]) -> list[Group]:
    for pattern in keep:
        if not any(fnmatchcase(group.root, pattern) for group in groups):
            raise ModelError(
                f"stages: prune: keep: {pattern!r} is none of the layers that can be pruned: {', '.join(g.root for g in groups)}. Mend it."
            )
    left = [group for group in groups if not any(fnmatchcase(group.root, pattern) for pattern in keep)]
    if not left:
        raise ModelError("stages: prune: there is nothing to prune: no layer but the kept ones and the classifier. Leave the stage out.")
    return left


def _uniform(groups: list[Group], ratio: float, round_to: int) -> dict[str, int]:
    return {group.root: group.nearest(group.channels * (1 - ratio), round_to) for group in groups}


def _by_size(
    groups: list[Group],
    cutter: Callable[[Mapping[str, int]], nn.Module],
    shape: tuple[int, int, int],
    aim: str,
    size: float,
    round_to: int,
) -> tuple[dict[str, int], nn.Module]:
    """The same ratio everywhere, the smallest that keeps no more than `size` of the MACs or parameters."""
    before = getattr(_sizes(cutter({}), shape), aim)

    def at(ratio: float) -> tuple[float, dict[str, int], nn.Module]:
        widths = _uniform(groups, ratio, round_to)
        module = cutter(widths)
        return getattr(_sizes(module, shape), aim) / before, widths, module

    left, widths, module = at(NARROWEST)
    if left > size:
        raise ModelError(
            f"stages: prune: {aim}: {size:g} of the present ones was asked for; with every layer at its narrowest {left:.2f} are left. "
            f"Ask for more than {left:.2f}, or lower round_to (now {round_to})."
        )
    low, high = 0.0, NARROWEST
    for _ in range(10):
        middle = (low + high) / 2
        got = at(middle)
        if got[0] <= size:
            high, (left, widths, module) = middle, got
        else:
            low = middle
    return widths, module


def _check_shrunk(before: _Sizes, after: _Sizes, groups: list[Group], widths: Mapping[str, int]) -> None:
    """A second guard, for networks on which the law of `edgecnn.pruning` does not hold: MACs within what the widths allow."""
    least = min((widths.get(group.root, group.channels) / group.channels for group in groups), default=1.0)
    left = after.macs / before.macs
    if not 0.98 * least**2 <= left < 1:
        raise ModelError(
            f"stages: prune: torch-pruning left {left:.2f} of the MACs, the widths asked for allow {least**2:.2f} to 1: it cut the wrong "
            "channels. Choose another model."
        )


def _notes(before: _Sizes, after: _Sizes, step: Mapping[str, Any], pace: Pace) -> list[str]:
    notes = [f"MACs {after.macs / before.macs:.1%}, parameters {after.parameters / before.parameters:.1%} of those before"]
    if "measured" in step:
        took = step["measured"]
        before_ms, after_ms = (took[name] * 1e3 for name in ("before_s", "after_s"))
        notes.append(
            f"latency {took['latency']:.1%} of that before: {before_ms:.3g} to {after_ms:.3g} ms in fp32, one image, on {pace.where}"
        )
    return [*notes, "channels: " + ", ".join(f"{name} {old} to {new}" for name, (old, new) in step["widths"].items())]

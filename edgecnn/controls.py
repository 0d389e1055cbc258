"""Was it worth it? What simpler ways give at the same cost, beside a recipe that prunes: `controls: true`.

no-teacher     the pruned network, trained as it was, by the labels alone
uniform-width  every layer narrower by the same share, at the measured latency of the pruned network, trained as it was
nearest-zoo    the smaller model of the same family whose measured latency is nearest, trained as it was

Latencies are of the fp32 files, taking turns, where the last stage that prunes measures. A control costs the training that it repeats.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgecnn.data import pack
from edgecnn.device.evaluate import accuracy
from edgecnn.errors import BoardError, EdgecnnError
from edgecnn.floats import Float, Run
from edgecnn.models import TimmModel, TorchvisionModel, load_model
from edgecnn.networks import head_names
from edgecnn.pruning import cut, groups_of
from edgecnn.stages.base import Context, TorchModel, Training
from edgecnn.stages.distil import Distil
from edgecnn.stages.prune import Prune
from edgecnn.stages.train import Train
from edgecnn.train import predict, seed_all
from edgecnn.zoo import count_macs, count_parameters, zoo_names

# Shares of channels removed that uniform pruning is tried with, and how many zoo models are timed.
RATIOS = tuple(i / 20 for i in range(1, 19))
ZOO = 6


@dataclass(frozen=True)
class _Plan:
    """The part of a recipe that is repeated: what was pruned, and the training after it."""

    before: Float
    pruned: Float
    final: Float
    later: tuple[Training, ...]
    prune: Prune


def controls(run: Run, models: list[Float]) -> list[dict[str, Any]]:
    """One entry a control, as result.json lists them; the recipe has been checked to prune and to train afterwards."""
    plan = _plan(run, models)
    aim = _latency_share(run, plan)
    labels = run.data.evaluation.labels
    ours = accuracy(plan.final.evaluation, labels).top1
    found = []
    for name, start in (("no-teacher", _same), ("uniform-width", _uniform), ("nearest-zoo", _nearest)):

        def make(work: Path, name: str = name, start: Callable[..., tuple[TorchModel, str]] = start) -> dict[str, Any]:
            begun = time.monotonic()
            run.screen.say(f"control {name}")
            seed_all(run.recipe.seed)
            try:
                model, note = start(run, plan, aim)
            except BoardError:  # says nothing about the control
                raise
            except EdgecnnError as fault:  # there may be no smaller model in the zoo, or no uniform cut
                return {"note": str(fault)}
            for i, stage in enumerate(plan.later):
                folder = work / f"{i}-{stage.stage}"
                folder.mkdir(exist_ok=True)
                again = _without_teacher(stage) if name == "no-teacher" else stage
                model = again.run(model, Context(run.data, run.recipe.seed, folder, run.screen, plan.before.load))
            spec = model.input
            share = _paced(plan, model)
            packed = pack(run.data.evaluation, spec, work / "evaluation")
            return {
                "top1": accuracy(predict(model.module, packed, spec), labels).top1,
                "latency": share,
                "macs": count_macs(model.module, spec.shape),
                "parameters": count_parameters(model.module),
                "seconds": time.monotonic() - begun,
                "note": note,
            }

        inputs = {"control": name, "final": plan.final.key, "before": plan.before.key, "aim": round(aim, 2)}
        facts = run.store.once("control", inputs, make).facts
        if "top1" not in facts:
            verdict = "not made"
        else:
            gain = 100 * (ours - facts["top1"])
            verdict = f"ours is {gain:+.2f} points, at {aim:.2f} against {facts['latency']:.2f} of the latency before"
            if gain <= 0:
                verdict += ": pruning did not beat it"
        run.screen.say(f"  {name}: {verdict}. {facts['note']}")
        found.append({"name": name, **facts, "ours_top1": ours, "ours_latency": aim, "n": len(labels), "verdict": verdict})
    return found


def _plan(run: Run, models: list[Float]) -> _Plan:
    stages = run.recipe.stages
    pruning = {i: stage for i, stage in enumerate(stages) if isinstance(stage, Prune)}
    first, last = min(pruning), max(pruning)
    later = tuple(stage for stage in stages[last + 1 :] if isinstance(stage, Training))
    final = max(i for i, stage in enumerate(stages) if isinstance(stage, Training))
    return _Plan(models[first], models[last + 1], models[final + 1], later, pruning[last])


def _without_teacher(stage: Training) -> Training:
    if not isinstance(stage, Distil):
        return stage
    return Train(stage="train", **{name: getattr(stage, name) for name in Training.model_fields if name != "stage"})


def _latency_share(run: Run, plan: _Plan) -> float:
    def make(_: Path) -> dict[str, Any]:
        return {"share": _paced(plan, plan.pruned.load())}

    entry = run.store.once("control-latency", {"before": plan.before.key, "pruned": plan.pruned.key}, make)
    return float(entry.facts["share"])


def _paced(plan: _Plan, other: TorchModel) -> float:
    """What `other` takes of the latency of the network before pruning."""
    with plan.prune.pace(plan.before.input, seconds=1.0).against(plan.before.load().module) as share:
        return share(other.module)


# ---- what each control starts from


def _same(run: Run, plan: _Plan, aim: float) -> tuple[TorchModel, str]:
    return plan.pruned.load(), "the pruned network, trained by the labels alone"


def _uniform(run: Run, plan: _Plan, aim: float) -> tuple[TorchModel, str]:
    model = plan.before.load()
    groups = groups_of(model.module, model.input.shape, head_names(model.origin), "magnitude")
    tried: list[tuple[float, float, TorchModel]] = []
    low, high = 0, len(RATIOS) - 1
    while low <= high:  # latency falls with the ratio, but for noise
        middle = (low + high) // 2
        widths = {g.root: g.nearest(g.channels * (1 - RATIOS[middle]), plan.prune.round_to) for g in groups}
        narrower = model.with_module(cut(model.module, model.input.shape, groups, widths))
        share = _paced(plan, narrower)
        tried.append((abs(share - aim), RATIOS[middle], narrower))
        low, high = (middle + 1, high) if share > aim else (low, middle - 1)
    _, ratio, found = min(tried, key=lambda one: one[:2])
    return replace(found, origin={**model.origin, "narrower": ratio}), f"every layer narrower by {ratio:.0%}"


def _nearest(run: Run, plan: _Plan, aim: float) -> tuple[TorchModel, str]:
    config, whole = run.recipe.model, plan.before.load()
    if not isinstance(config, TimmModel | TorchvisionModel):
        raise EdgecnnError("the model is of no zoo")
    family = re.split(r"[_\d]", config.name, maxsplit=1)[0]
    names = [name for name in zoo_names()[config.source] if name.startswith(family)]
    timed = []
    for _, name in sorted(_smaller(config, names, plan, whole))[-ZOO:]:
        smaller = config.model_copy(update={"name": name, "checkpoint": None})
        model = load_model(smaller, len(whole.labels), dict(enumerate(whole.labels)), trains=True)
        timed.append((abs(_paced(plan, model) - aim), name, model))
    if not timed:
        raise EdgecnnError(f"{config.source} has no smaller model of the family {family!r}")
    _, name, model = min(timed, key=lambda one: one[:2])
    start = "its published weights" if config.pretrained else "random weights, where ours had trained ones: the comparison flatters ours"
    return replace(model, input=whole.input), f"{name}, from {start}"


def _smaller(config: TimmModel | TorchvisionModel, names: list[str], plan: _Plan, whole: TorchModel) -> list[tuple[int, str]]:
    """MACs and names of the family's models that are smaller than the one before pruning."""
    from edgecnn.networks import skeleton

    found = []
    for name in names:
        try:
            origin = {**whole.origin, "name": name, "num_classes": len(whole.labels)}
            origin.pop("pruned", None)
            macs = count_macs(skeleton(origin), whole.input.shape)
        except Exception:  # not every network of a zoo takes every input
            continue
        if macs < plan.before.facts["macs"]:
            found.append((macs, name))
    return found

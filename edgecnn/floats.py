"""The float models of a run: as loaded and after each stage, each stored, and measured on the same images."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.data import Data, ImageSet, pack
from edgecnn.device.evaluate import accuracy
from edgecnn.device.packed import Packed, open_packed
from edgecnn.device.spec import InputSpec
from edgecnn.device.stats import mcnemar
from edgecnn.models import load_model, model_digest
from edgecnn.narrow import as_metadata
from edgecnn.networks import build
from edgecnn.ranks import rank, shared
from edgecnn.recipe import Recipe
from edgecnn.screen import Screen
from edgecnn.stages.base import Context, Stage, TorchModel
from edgecnn.stages.prune import Prune
from edgecnn.store import Entry, Store
from edgecnn.targets.qdq import Form
from edgecnn.torch_model import Make
from edgecnn.train import predict, seed_all
from edgecnn.zoo import count_macs, count_parameters

RISK = 0.05  # of a doubt too many about a stage


@dataclass(frozen=True)
class Run:
    """What every step of one run needs."""

    recipe: Recipe
    data: Data
    store: Store
    screen: Screen


@dataclass(frozen=True)
class Float:
    """A float model of the run.

    Attributes:
        key: of the stored step that made it.
        load: the torch model; loaded at most once, and only if something must be made from it.
        input: its preprocessing.
        labels: one name an output.
        facts: origin, parameters, MACs.
        choice: its logits on the choice images.
        evaluation: its logits on the evaluation images.
    """

    key: str
    load: Callable[[], TorchModel]
    input: InputSpec
    labels: tuple[str, ...]
    facts: dict[str, Any]
    choice: np.ndarray
    evaluation: np.ndarray


def float_models(run: Run) -> tuple[list[Float], list[dict[str, Any]]]:
    """The model as loaded and after each stage, and the stages as result.json lists them."""
    entry = _once(run, "model", first_inputs(run), functools.partial(_first, run))
    models = [_measured(run, entry)]
    rows = [] if rank() else [_row(run, "load", models[0], entry)]
    unpruned: Callable[[], TorchModel] | None = None
    for position, stage in enumerate(run.recipe.stages):
        before = models[-1]
        if stage.prunes and unpruned is None:
            unpruned = before.load  # a stage that prunes works on a copy

        forms = int8_forms(run.recipe) if stage.quantizes else {}
        logs = run.store.root / "tensorboard" / f"{position}-{stage.stage}"

        def make(
            work: Path, stage: Any = stage, before: Float = before, unpruned: Any = unpruned, logs: Path = logs, forms: Any = forms
        ) -> dict[str, Any]:
            begun = time.monotonic()
            run.screen.say(f"stage {stage.stage}")

            def once(kind: str, inputs: dict[str, Any], make: Make) -> dict[str, Any]:
                inputs = {**inputs, "before": before.key, "data": run.data.digest, "seed": run.recipe.seed}
                return run.store.once(kind, inputs, make).facts

            model = stage.run(before.load(), Context(run.data, run.recipe.seed, work, run.screen, unpruned, logs, forms, once))
            for left in work.glob("checkpoint.pt*"):  # done is done: only an unfinished training goes on from one
                left.unlink()
            return {**_save(model, work), "notes": list(model.notes), "seconds": time.monotonic() - begun}

        run.screen.tell("step", step=1 + position)
        inputs = {
            "before": before.key,
            "position": position,
            "stage": {**stage.model_dump(mode="json", exclude={"tensorboard"}), **({} if rank() else stage.inputs())},
            "data": run.data.digest,
            "seed": run.recipe.seed,
            **({"forms": [asdict(form) for form in forms]} if forms else {}),
        }
        entry = _once(run, "stage", inputs, make, together=stage.trains)
        models.append(_measured(run, entry))
        if rank():
            continue
        rows.append(_row(run, stage.stage, models[-1], entry))
        run.screen.say(
            f"{stage.stage}: float top-1 {rows[-1]['top1']:.2%} on {rows[-1]['n']} images{' (found done)' if entry.resumed else ''}"
        )
        if (doubt := worse(run, stage, before, models[-1])) is not None:
            run.screen.say(f"  doubt: {doubt}")
    return models, rows


def worse(run: Run, stage: Stage, before: Float, after: Float) -> str | None:
    """A doubt where training left the model worse than it was, by more than chance explains: McNemar's exact test on the same images.

    Training for int8 is not judged here: its files are, beside those of the model before.
    """
    if not stage.trains or stage.quantizes:
        return None
    labels = run.data.evaluation.labels
    first, last = (model.evaluation.argmax(1) == labels for model in (before, after))
    lost, won = int((first & ~last).sum()), int((last & ~first).sum())
    if lost <= won or mcnemar(lost, won) > RISK:
        return None
    return (
        f"stage {stage.stage}: top-1 fell from {100 * first.mean():.2f} to {100 * last.mean():.2f} % "
        f"(float, {len(labels)} evaluation images): train longer, or lower lr"
    )


def time_stages(run: Run, models: list[Float], rows: list[dict[str, Any]]) -> None:
    """Give each row `latency_s`, p50 of the fp32 file in fresh processes that take turns, where the last stage that prunes measures.

    Only where a stage prunes: training leaves the graph as it is. A graph that appears twice is measured once.
    """
    pruning = [stage for stage in run.recipe.stages if isinstance(stage, Prune)]
    if not pruning:
        return
    pace = pruning[-1].pace(models[0].input)
    graphs = [json.dumps(model.facts["origin"].get("pruned", {}).get("layers", {}), sort_keys=True) for model in models]
    first = {graph: models[graphs.index(graph)] for graph in graphs}

    def make(_: Path) -> dict[str, Any]:
        run.screen.say(f"time the network before and after pruning on {pace.where}")
        return pace.p50({model.key: model.load() for model in first.values()}, processes=run.recipe.bench.processes, seed=run.recipe.seed)

    facts = run.store.once("stage-latency", {"models": [model.key for model in first.values()], **pace.inputs()}, make).facts
    for row, graph in zip(rows, graphs, strict=True):
        row |= {"latency_s": facts[first[graph].key], "latency_where": pace.where}


def follow(run: Run) -> None:
    """Take part in the training of process 0, which does all the rest; the run folder is on a disk that both see."""
    float_models(run)


def _once(run: Run, kind: str, inputs: dict[str, Any], make: Callable[[Path], dict[str, Any]], *, together: bool = False) -> Entry:
    """`Store.once` by process 0, whose result all get; with `together` all processes make it."""
    if rank() == 0:
        shared(not run.store.found(kind, inputs))
        entry = run.store.once(kind, inputs, make)
    elif shared(None) and together:
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch))
    found: Entry = shared(entry if rank() == 0 else None)
    return found


def int8_forms(recipe: Recipe) -> dict[Form, str]:
    """In which the targets that may ship int8 take a QDQ graph, in their order, and the runtime of each form."""
    return {form: t.runtime for t in recipe.targets if t.precision in ("auto", "int8") and (form := t.form()) is not None}


def finished(recipe: Recipe, models: list[Float]) -> Float:
    """The model that every candidate is made from, but those of a qat stage, which comes last and keeps the one before it."""
    return models[-2] if recipe.stages and recipe.stages[-1].quantizes else models[-1]


def baseline(recipe: Recipe, models: list[Float]) -> Float:
    """The model that accuracy drops are counted from: the last before the first stage that compresses."""
    return models[next((i for i, stage in enumerate(recipe.stages) if stage.compresses), len(recipe.stages))]


def first_inputs(run: Run) -> dict[str, Any]:
    """Everything that decides the model before the first stage."""
    names = {str(index): name for index, name in run.data.names.items()}
    return {**model_digest(run.recipe.model), "outputs": run.data.outputs, "names": names, "seed": run.recipe.seed}


def first_model(run: Run) -> tuple[str, Callable[[], TorchModel]]:
    """The model as the recipe names it, new weights drawn from the recipe's seed: the key of the stored step, and its torch model."""
    entry = run.store.once("model", first_inputs(run), functools.partial(_first, run))
    return entry.key, _loader(entry)


def _first(run: Run, work: Path) -> dict[str, Any]:
    seed_all(run.recipe.seed)
    trains = any(stage.trains for stage in run.recipe.stages)
    return _save(load_model(run.recipe.model, run.data.outputs, run.data.names, trains=trains), work)


def images(run: Run, split: str, spec: InputSpec) -> tuple[Packed, Path]:
    """A split of the data, prepared for `spec`, and its folder."""
    chosen: ImageSet = getattr(run.data, split)

    def make(work: Path) -> None:
        pack(chosen, spec, work)

    entry = run.store.once("images", {"data": run.data.digest, "split": split, "geometry": spec.geometry}, make)
    return open_packed(entry.folder), entry.folder


def link_evaluation(run: Run, spec: InputSpec) -> None:
    """Let `evaluation` in the run folder be the evaluation images prepared for `spec`, where `edgecnn eval` looks for them."""
    folder = images(run, "evaluation", spec)[1]
    new = run.store.root / f".{spec.evaluation_name}.tmp"
    new.unlink(missing_ok=True)
    new.symlink_to(folder.relative_to(run.store.root))
    new.replace(run.store.root / spec.evaluation_name)


def _save(model: TorchModel, work: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in model.module.state_dict().items()}
    save_file(weights, work / "weights.safetensors", as_metadata(model.origin))
    return {
        "origin": model.origin,
        "input": asdict(model.input),
        "labels": list(model.labels),
        "parameters": count_parameters(model.module),
        "macs": count_macs(model.module, model.input.shape),
    }


def _loader(entry: Entry) -> Callable[[], TorchModel]:
    """Loads the torch model of a finished step, once."""

    @functools.cache
    def load() -> TorchModel:
        from safetensors.torch import load_file

        module = build(entry.facts["origin"])
        module.load_state_dict(load_file(entry.folder / "weights.safetensors"))
        return TorchModel(module.eval(), InputSpec.from_json(entry.facts["input"]), tuple(entry.facts["labels"]), entry.facts["origin"])

    return load


def _measured(run: Run, entry: Entry) -> Float:
    """Evaluate the torch model of a finished step on the choice and the evaluation images."""
    spec, labels, load = InputSpec.from_json(entry.facts["input"]), tuple(entry.facts["labels"]), _loader(entry)
    if rank():  # takes part in training only
        return Float(entry.key, load, spec, labels, entry.facts, np.empty((0, 0)), np.empty((0, 0)))
    sets = {name: images(run, name, spec)[0] for name in ("choice", "evaluation")}

    def make(work: Path) -> None:
        for name, packed in sets.items():
            np.save(work / f"{name}.npy", predict(load().module, packed, spec))

    measured = run.store.once("float", {"model": entry.key, "images": {name: packed.sha256 for name, packed in sets.items()}}, make)
    logits = {name: np.load(measured.folder / f"{name}.npy", allow_pickle=False) for name in sets}
    return Float(entry.key, load, spec, labels, entry.facts, logits["choice"], logits["evaluation"])


def _row(run: Run, name: str, model: Float, entry: Entry) -> dict[str, Any]:
    got = accuracy(model.evaluation, run.data.evaluation.labels)
    return {
        "stage": name,
        "top1": got.top1,
        "n": got.n,
        "parameters": model.facts["parameters"],
        "macs": model.facts["macs"],
        "seconds": entry.facts.get("seconds", 0.0),
        "resumed": entry.resumed,
        "notes": entry.facts.get("notes", []),
    }

"""The spine: one recipe, from the model it names to one verified bundle for each target."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn import __version__, choose, floats, room
from edgecnn.calibration_doubts import calibration_doubts
from edgecnn.controls import controls
from edgecnn.data import Data, load_data, pack
from edgecnn.deliver import deliver, exported, source_of
from edgecnn.device.evaluate import accuracy
from edgecnn.device.machine import circumstances
from edgecnn.device.spec import SCHEMA, InputSpec
from edgecnn.errors import DeviceError, exit_code_of
from edgecnn.floats import (
    Float,
    Run,
    baseline,
    finished,
    first_inputs,
    first_model,
    float_models,
    images,
    link_evaluation,
    time_stages,
    worse,
)
from edgecnn.measure import evaluate
from edgecnn.parity import per_class
from edgecnn.recipe import Recipe, recipe_digest
from edgecnn.remote import on
from edgecnn.report import write_report
from edgecnn.sanity import mistakes, no_better_than_guessing
from edgecnn.screen import Screen, noise_kept
from edgecnn.stages.base import TorchModel
from edgecnn.store import LIBRARIES, Store, open_store
from edgecnn.targets.base import Source, installed
from edgecnn.targets.calibration import collect
from edgecnn.targets.sensitivity import logits as file_logits
from edgecnn.trust import warnings

FEW = 4  # images on which it is tried whether every target can be built
LOOKED_AT = 384  # images on which mistakes are looked for
SPLITS = ("train", "calibration", "choice", "evaluation")


def compress(recipe: Recipe, text: str, out: Path, command: str, screen: Screen) -> dict[str, Any]:
    """Run one recipe and write `out`; returns what result.json holds.

    Args:
        recipe: what to do.
        text: the recipe as the user wrote it, for the report.
        out: the run folder.
        command: the command line, for the report.
        screen: where progress is shown.
    """
    begun = time.monotonic()
    screen = replace(screen, log=out / "run.log", progress=out / "progress.jsonl")
    with open_store(out, recipe.name) as store, noise_kept(out / "run.log"), _told(recipe, command, screen):
        run = Run(recipe, load_data(recipe.data, recipe.seed, screen), store, screen)
        looks = preflight(run)
        models, stages = float_models(run)
        time_stages(run, models, stages)
        first = baseline(recipe, models)
        model = finished(recipe, models)
        for spec in {model.input, *(target.file_input(model.input) for target in recipe.targets)}:
            link_evaluation(run, spec)
        source = source_of(run, model)
        trained = models[-1] if models[-1] is not model else None
        targets = []
        for i, target in enumerate(recipe.targets):
            screen.tell("step", step=1 + len(recipe.stages) + i)
            targets.append(deliver(run, target, source, model, first, trained))
        compared = controls(run, models) if recipe.controls else []
        result = {
            "schema": SCHEMA,
            "edgecnn": __version__,
            "command": command,
            "name": recipe.name,
            "verdict": choose.overall([t["verdict"] for t in targets]),
            "reasons": [f"{t['name']}: {reason}" for t in targets for reason in t["reasons"]],
            "recipe": recipe.model_dump(mode="json"),
            "recipe_text": text,
            "recipe_sha256": recipe_digest(recipe),
            "promise": recipe.promise.model_dump(),
            "data": _data_facts(run.data),
            "baseline": _baseline_facts(run, first),
            "stages": stages,
            "controls": compared,
            "targets": targets,
            "environment": {"machine": circumstances(), "versions": {"edgecnn": __version__, **installed(*LIBRARIES)}},
            "doubts": [
                *(line for t in targets for line in warnings(t["name"], t["trust"])),
                *run.data.doubts,
                *_calibrated_on(run, models[-1]),
                *looks,
                *_worse(run, models),
                *_guessing(run, first),
                *_coarse(run),
            ],
            "resumed": not store.made,
            "seconds": time.monotonic() - begun,
        }
        write_report(store.write("result.json", json.dumps(result, indent=1) + "\n"), out / "report.html")
        store.finish()
        screen.tell("end", verdict=result["verdict"])
        return result


@contextmanager
def _told(recipe: Recipe, command: str, screen: Screen) -> Iterator[None]:
    """Begin progress.jsonl anew, with what there is to do, and end it with the fault if there is one."""
    assert screen.progress is not None
    screen.progress.unlink(missing_ok=True)
    steps = ["check", *(stage.stage for stage in recipe.stages), *(target.name for target in recipe.targets)]
    screen.tell("begin", name=recipe.name, command=command, pid=os.getpid(), steps=steps)
    screen.tell("step", step=0)
    try:
        yield
    except BaseException as fault:
        screen.tell("end", error=exit_code_of(fault)[1] or f"a bug: {type(fault).__name__}: {fault}")
        raise


def follow(recipe: Recipe, out: Path) -> None:
    """What every process but the first does in a run of several: train with it."""
    screen = Screen(quiet=True)
    floats.follow(Run(recipe, load_data(recipe.data, recipe.seed, screen), Store(out), screen))


def dry_run(recipe: Recipe, screen: Screen) -> None:
    """Show the plan and do the checks that come before any long work, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "run", recipe.name) as store:
        data = load_data(recipe.data, recipe.seed, screen)
        counts = ", ".join(f"{len(getattr(data, split))} {split}" for split in SPLITS)
        screen.say(f"plan: {' -> '.join(['load', *(stage.stage for stage in recipe.stages)])}, images: {counts}")
        for target in recipe.targets:
            names = [c.name for c in target.tried(recipe.effort)]
            screen.say(f"  {target.name}: {target.runtime}, measures {', '.join(names)}")
        for doubt in data.doubts:
            screen.say(f"  doubt: {doubt}")
        preflight(Run(recipe, data, store, screen))
        screen.say("ready: nothing is missing.")


def preflight(run: Run) -> list[str]:
    """Take the untrained model through every target with a few images, so that what would fail last fails in the first minute.

    Returns:
        What looks wrong with the labels or the input, or with the memory there is.

    Raises:
        EdgecnnError: of the kind of what is missing or refused.
    """
    missing = [f"stages[{i}] ({s.stage}): {lack}" for i, s in enumerate(run.recipe.stages) if (lack := s.missing())]
    missing += [f"targets[{i}] ({t.name}): {lack}" for i, t in enumerate(run.recipe.targets) if (lack := t.missing())]
    if missing:
        raise DeviceError("; ".join(missing))

    key, load = first_model(run)
    for stage in run.recipe.stages:
        stage.check(load)

    def check(work: Path) -> dict[str, Any]:
        run.screen.say("preflight: the untrained model through every target, with a few images")
        model, graph = load(), exported(run, key, load)
        some = run.data.calibration.subset(range(min(FEW, len(run.data.calibration))))
        few = pack(some, model.input, work / "few")
        half = functools.partial(exported, run, key, load, half=True)
        source = Source(graph, half, model.input, model.labels, few, lambda: collect(graph, few, model.input), run.recipe.seed)
        for target in run.recipe.targets:
            candidate = next(c for c in target.candidates() if target.may_ship(c))
            if "calibrations" in candidate.how:  # whether it builds does not depend on the ranges and biases
                quick = {"calibrations": candidate.how["calibrations"][:1], "correct_bias": False}
                candidate = replace(candidate, how={**candidate.how, **quick})
            artifact = target.build(candidate, source, work / target.name)
            given = artifact.manifest.input
            folder = few if given.geometry == model.input.geometry else pack(some, given, work / f"few-{given.image_size}")
            with on(target.device) as board:
                evaluate(
                    artifact.folder, folder.folder, work / "logits.npy", threads=target.threads, runtime=target.measured_as(), board=board
                )
            run.screen.say("; ".join([f"  {target.name}: {target.runtime} {candidate.precision} builds and runs", *artifact.notes]))
        return {"looks": _looks(run, model, graph)}

    targets = [t.model_dump(mode="json", exclude={"promise"}) for t in run.recipe.targets]
    entry = run.store.once("preflight", {"model": first_inputs(run), "targets": targets, "data": run.data.digest}, check)
    looks: list[str] = entry.facts["looks"]
    for look in looks:
        run.screen.say(f"  doubt: {look}")
    return looks


def _looks(run: Run, model: TorchModel, graph: Path) -> list[str]:
    """Room, and, where the weights were trained before, labels and input, by the exported model `graph`."""
    recipe, data = run.recipe, run.data
    kept = len(data.calibration) + len(data.choice) + len(data.evaluation)
    candidates = sum(len(list(target.tried())) for target in recipe.targets)
    batch = max([64, *(getattr(stage, "batch", 0) or 0 for stage in recipe.stages)])
    need = room.estimate(model.module, model.input.shape, kept, candidates, len(recipe.stages), batch)
    run.screen.say(f"  {need}")
    found = room.check(need, run.store.root)
    choice = images(run, "choice", model.input)[0]
    trained = recipe.model.checkpoint is not None or getattr(recipe.model, "pretrained", False)
    if trained and model.origin.get("head") == "kept":
        few = min(len(choice), LOOKED_AT)

        def logits(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
            return file_logits(graph, replace(choice, images=pixels), spec, len(pixels))

        found += mistakes(logits, np.array(choice.images[:few]), choice.labels[:few], model.input, data.names)
    return found


def _guessing(run: Run, model: Float) -> list[str]:
    doubt = no_better_than_guessing(model.evaluation.argmax(1), run.data.evaluation.labels)
    return [doubt] if doubt else []


def _worse(run: Run, models: list[Float]) -> list[str]:
    steps = zip(run.recipe.stages, models[:-1], models[1:], strict=True)
    return [doubt for stage, before, after in steps if (doubt := worse(run, stage, before, after)) is not None]


def _calibrated_on(run: Run, model: Float) -> list[str]:
    """Doubts about the calibration images, where anything is quantized."""
    if all(target.precision not in ("int8", "auto") for target in run.recipe.targets):
        return []
    return calibration_doubts(images(run, "calibration", model.input)[0], images(run, "evaluation", model.input)[0])


def _coarse(run: Run) -> list[str]:
    """A doubt, where one evaluation image weighs more than the drop that is promised."""
    n, drop = len(run.data.evaluation), run.recipe.promise.accuracy_drop
    if not drop or n * drop >= 1:
        return []
    weight = f"{100 / n:.2g} points, more than the {100 * drop:g} promised"
    return [f"only {n} evaluation images: one of them is {weight}, so the verdict on accuracy says little"]


def _data_facts(data: Data) -> dict[str, Any]:
    counts = {split: len(getattr(data, split)) for split in SPLITS}
    return {
        **counts,
        "digest": data.digest,
        "calibration_sha256": data.calibration_sha256,
        "doubts": list(data.doubts),
        "skipped": list(data.skipped),
    }


def _baseline_facts(run: Run, model: Float) -> dict[str, Any]:
    labels = run.data.evaluation.labels
    got = accuracy(model.evaluation, labels)
    return {
        "top1": got.top1,
        "n": got.n,
        "interval": got.interval,
        "per_class": per_class(model.evaluation, labels, model.labels),
        "parameters": model.facts["parameters"],
        "macs": model.facts["macs"],
    }

"""From the finished float model to one target's bundle: build every candidate, measure it, choose, judge, write."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn import choose
from edgecnn.bench import profiles
from edgecnn.board_readme import board_readme
from edgecnn.board_runtime import board_runtime
from edgecnn.bom import BOM, ml_bom
from edgecnn.card import CARD, model_card
from edgecnn.choose import Tried
from edgecnn.device.bundle import SUMS, verify_bundle, write_bundle
from edgecnn.device.evaluate import accuracy
from edgecnn.device.files import sha256_file
from edgecnn.device.golden import ABOUT, VECTORS, synthesise, write_golden
from edgecnn.device.packed import open_packed, write_packed
from edgecnn.device.profile import Profile
from edgecnn.device.spec import Artifact, InputSpec, Manifest, Result, read_manifest
from edgecnn.device.stats import summarise
from edgecnn.errors import BoardError, DeviceError, EdgecnnError, IntegrityError, ResourceError
from edgecnn.floats import Float, Run, images
from edgecnn.measure import evaluate, identity_of, latencies, place
from edgecnn.parity import compare, drop_interval, per_class
from edgecnn.recipe import recipe_digest
from edgecnn.remote import on
from edgecnn.sensitivity import Weighed, seconds_of, weigh
from edgecnn.stages.base import TorchModel
from edgecnn.targets import AnyTarget
from edgecnn.targets.base import Candidate, Promise, Source
from edgecnn.targets.calibration import Histogram, collect, read_histograms, write_histograms
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.onnx import export_onnx
from edgecnn.targets.qdq import left_in_float
from edgecnn.targets.sensitivity import Cost, costs, divergence, nodes_of, parts
from edgecnn.trust import examine

DRAWS = 3


def source_of(run: Run, model: Float) -> Source:
    """The exported graph of the finished model, and what its quantization needs; each made when first asked for."""
    calibration, _ = images(run, "calibration", model.input)
    graph = exported(run, model.key, model.load)

    @functools.cache
    def histograms() -> Mapping[str, Histogram]:
        def make(work: Path) -> None:
            run.screen.say(f"calibrate on {len(calibration.labels)} images")
            write_histograms(work / "histograms.npz", collect(graph, calibration, model.input))

        entry = run.store.once("ranges", {"model": model.key, "images": calibration.sha256}, make)
        return read_histograms(entry.folder / "histograms.npz")

    half = functools.partial(exported, run, model.key, model.load, half=True)
    return Source(graph, half, model.input, model.labels, calibration, histograms, run.recipe.seed)


def exported(run: Run, key: str, load: Callable[[], TorchModel], *, half: bool = False) -> Path:
    """The ONNX graph of the model that the step `key` made."""

    def make(work: Path) -> None:
        run.screen.say(f"export to ONNX{', fp16' if half else ''}")
        export_onnx(load(), work / "model.onnx", half=half)

    return run.store.once("onnx", {"model": key, "half": half}, make).folder / "model.onnx"


def deliver(run: Run, target: AnyTarget, source: Source, model: Float, baseline: Float, trained: Float | None = None) -> dict[str, Any]:
    """Ship one target; returns its entry of result.json. `trained` is what a qat stage made of `model`."""
    promise = promise_of(run.recipe.promise, target)
    run.screen.say(f"target {target.name}: {target.runtime}, {target.precision}")
    run.screen.tell("target", target=target.name)
    tried = _all_tried(run, target, source, model) + _trained(run, target, model, trained)
    layers, mixed = _weighed(run, target, source, model, tried)
    tried = _timed(run, target, tried + mixed)
    float_top1 = accuracy(baseline.choice, run.data.choice.labels).top1
    chosen, why = choose.choose(tried, promise, float_top1)
    if chosen is None:
        raise DeviceError(f"targets: {target.name}: no candidate could be built and run: " + "; ".join(f"{n}: {w}" for n, w in why.items()))
    assert chosen.artifact is not None
    measured = {
        t.candidate.name: _run_split(run, target, t.artifact, "evaluation")
        for t in tried
        if t.artifact and (t is chosen or t.candidate.name == "fp32")
    }
    logits, told = measured[chosen.candidate.name]
    labels = run.data.evaluation.labels
    got, before = accuracy(logits, labels), accuracy(baseline.evaluation, labels)
    latency = _latency(chosen.results)
    verdict, reasons = choose.judge(
        promise,
        top1=got.top1,
        drop=before.top1 - got.top1,
        agreement=compare("", model.evaluation, logits).agreement,
        size_bytes=chosen.artifact.size_bytes,
        p90_s=latency["p90"] if latency else None,
        doubts=[r.void for r in chosen.results if r.void],
    )
    steps = (
        [compare(f"torch -> {target.runtime} fp32 ({measured['fp32'][1]['runtime']})", model.evaluation, measured["fp32"][0])]
        if "fp32" in measured
        else []
    )
    steps.append(compare(f"float torch -> {chosen.candidate.name} ({told['runtime']})", baseline.evaluation, logits))
    where = _where(target, told, measured_here=bool(chosen.results))
    evidence = {
        "top1": got.top1,
        "top1_drop": before.top1 - got.top1,
        "drop_interval": drop_interval(baseline.evaluation, logits, labels),
        "agreement": steps[-1].agreement,
        "n": got.n,
        "interval": got.interval,
        "latency_s": latency,
        "where": where["latency"],
        "accuracy_where": where["accuracy"],
        "parity": [step.to_json() for step in steps],
        "notes": [*choose.slower_than_float(tried, chosen), *_sizes(chosen.artifact.manifest.input), *chosen.artifact.notes],
        "made_from": _made_from(run, source),
    }
    bundle = _bundle(run, target, chosen.artifact, evidence)
    run.screen.say(
        f"  {target.name}: {chosen.candidate.name}, top-1 {got.top1:.2%} (drop {100 * (before.top1 - got.top1):.2f} points)"
        + (", not timed here" if not latency else ", latency void" if latency["void"] else f", p50 {latency['p50'] * 1e3:.3g} ms")
        + f", {chosen.artifact.size_bytes / 1e6:.2f} MB: {verdict}"
    )
    run.screen.tell("shipped", candidate=chosen.candidate.name, verdict=verdict)
    return {
        "name": target.name,
        "runtime": target.runtime,
        "precision": chosen.candidate.precision,
        "candidate": chosen.candidate.name,
        "reason": why[chosen.candidate.name],
        "verdict": verdict,
        "reasons": reasons,
        "bundle": f"bundles/{target.name}",
        "file": chosen.artifact.manifest.model_file,
        "file_sha256": chosen.artifact.manifest.model_sha256,
        "size_bytes": chosen.artifact.size_bytes,
        "bundle_sha256": bundle,
        **evidence,
        "per_class": per_class(logits, labels, model.labels),
        "trust": examine(run, target, chosen.artifact, baseline, logits),
        "promise": promise.model_dump(),
        "candidates": choose.summaries(tried, chosen, why),
        "layers": [asdict(layer) for layer in layers],
        "draws": _draws(run, target, source, model, chosen),
    }


def promise_of(promise: Promise, target: AnyTarget) -> Promise:
    """The recipe's promise with the keys that the target gives replaced."""
    return promise if target.promise is None else promise.model_copy(update=target.promise.model_dump(exclude_unset=True))


def _all_tried(run: Run, target: AnyTarget, source: Source, model: Float) -> list[Tried]:
    """Every candidate within the recipe's effort, and within its minutes once there is one that may ship."""
    begun, minutes = time.monotonic(), run.recipe.choose.minutes
    tried: list[Tried] = []
    for candidate in target.tried(run.recipe.effort):
        late = minutes is not None and time.monotonic() - begun > 60 * minutes / len(run.recipe.targets)
        if late and any(t.eligible and t.artifact for t in tried):
            tried.append(Tried(candidate, target.may_ship(candidate), None, failure=f"choose: the {minutes:g} minutes are used up"))
        else:
            tried.append(_tried(run, target, candidate, source, model))
        _tell(run, tried[-1])
    return tried


def _tell(run: Run, t: Tried) -> None:
    size = t.artifact.size_bytes if t.artifact else None
    run.screen.tell("candidate", name=t.candidate.name, top1=t.top1 if t.artifact else None, size_bytes=size, failure=t.failure)


def _trained(run: Run, target: AnyTarget, model: Float, trained: Float | None) -> list[Tried]:
    """The QDQ candidate of the form that a qat stage simulated once more, from its model and ranges, where there was such a stage."""
    if trained is None:
        return []
    source = replace(source_of(run, trained), learned=trained.facts["origin"]["quantized"])
    twins = [
        replace(c, name=f"{c.name}-qat", how={**c.how, "qat": True})
        for c in target.tried(run.recipe.effort)
        if c.precision == "int8" and "calibrations" in c.how and not (c.how["float_se"] or c.how.get("float_stem"))
    ]
    tried = [_tried(run, target, twin, source, model, trained.key) for twin in twins]
    for each in tried:
        _tell(run, each)
    return tried


def _weighed(run: Run, target: AnyTarget, source: Source, model: Float, tried: list[Tried]) -> tuple[list[Weighed], list[Tried]]:
    """At `effort: thorough`, what int8 costs and buys in each layer, and the candidate that leaves in float where it does not pay.

    There is none where no layer is like that, and none where more than half are: then int8 itself does not pay.
    """
    made = {t.candidate.name: t for t in tried if t.artifact}
    plain = next((t for t in made.values() if t.candidate.name in ("int8", "int8-qdq")), None)
    form = target.form()
    if run.recipe.effort != "thorough" or plain is None or form is None or plain.artifact is None:
        return [], []
    how = plain.candidate.how
    pinned = left_in_float(source.onnx, form, how)

    def measure(work: Path) -> dict[str, Any]:
        run.screen.say(f"  {target.name}: what int8 costs in each layer")
        graph = work / "int8.onnx"
        fit_qdq(source, graph, form, methods=how["calibrations"], correct=True, exclude=pinned)
        return {"costs": [asdict(cost) for cost in costs(source.onnx, graph, form, source.calibration, source.input)]}

    inputs = {"model": model.key, "form": asdict(form), "how": how, "pinned": pinned, "images": source.calibration.sha256}
    lost = [Cost(**each) for each in run.store.once("sensitivity", inputs, measure).facts["costs"]]
    rows = weigh(lost, _layer_times(run, target, source, made.get("fp32"), plain), pinned)
    kept = {row.name for row in rows if row.kept_float}
    if kept <= {cost.name for cost in lost if cost.node in pinned} or 2 * len(kept) > len(rows):
        return rows, []
    twin = replace(plain.candidate, name=f"{plain.candidate.name}-mixed", how={**how, "keep": nodes_of(source.onnx, kept)})
    return rows, [_tried(run, target, twin, source, model)]


def _draws(run: Run, target: AnyTarget, source: Source, model: Float, chosen: Tried) -> list[dict[str, Any]]:
    """At `effort: thorough`, the int8 file that ships made again from three draws of two thirds of the calibration images each: how much
    of its figures on the choice images is the luck of the draw."""
    if run.recipe.effort != "thorough" or chosen.candidate.precision != "int8" or chosen.candidate.how.get("qat"):
        return []
    every, rows = source.calibration, []
    for draw in range(DRAWS):
        picked = np.sort(np.random.default_rng((run.recipe.seed, draw)).permutation(len(every))[: max(1, 2 * len(every) // 3)])

        def make(work: Path, picked: np.ndarray = picked) -> None:
            write_packed(work, [every.ids[i] for i in picked], every.labels[picked], every.images[picked], source.input.geometry)

        some = open_packed(run.store.once("draw", {"images": every.sha256, "picked": picked.tolist()}, make).folder)
        histograms = functools.cache(functools.partial(collect, source.onnx, some, source.input))
        t = _tried(run, target, chosen.candidate, replace(source, calibration=some, histograms=histograms), model)
        rows.append({"n": len(some), "top1": t.top1, "agreement": t.agreement, "divergence": t.divergence, "failure": t.failure})
    return rows


def _layer_times(
    run: Run, target: AnyTarget, source: Source, before: Tried | None, after: Tried
) -> tuple[dict[str, float], dict[str, float]] | None:
    """Seconds of each layer in the fp32 and in the int8 file, or None where they cannot be told."""
    if target.measured_as() or target.runtime == "tensorrt" or before is None or before.artifact is None or after.artifact is None:
        return None
    folders = [before.artifact.folder, after.artifact.folder]

    def make(work: Path) -> dict[str, Any]:
        run.screen.say(f"  {target.name}: time each layer")
        with on(target.device) as board:
            try:
                found = profiles(folders, threads=[target.threads], batch=1, seconds=run.recipe.bench.seconds, options=(), board=board)
            except BoardError:
                raise
            except DeviceError as fault:  # a runtime that gives no profile can still be measured as a whole
                return {"fault": str(fault)}
        return {"profiles": [asdict(profile) for profile in found]}

    files = [[t.artifact.manifest.digests, t.artifact.manifest.options] for t in (before, after) if t.artifact]
    inputs = {"files": files, "threads": target.threads, "machine": identity_of(target.device), "runtime": target.runtime}
    entry = run.store.once("layer-times", inputs, make)
    if "fault" in entry.facts:
        run.screen.say(f"  {target.name}: no time of single layers: {entry.facts['fault']}")
        return None
    first, second = (Profile.from_json(each) for each in entry.facts["profiles"])
    if first.void or second.void:
        run.screen.say(f"  {target.name}: no time of single layers: {first.void or second.void}")
        return None
    of = parts(source.onnx)
    return seconds_of(first, of), seconds_of(second, of)


def _tried(run: Run, target: AnyTarget, candidate: Candidate, source: Source, model: Float, key: str = "") -> Tried:
    """Build one candidate and measure its accuracy on the choice images; a refusal by the runtime is a result too."""
    made_from = {
        "model": key or model.key,
        "target": target.model_dump(mode="json", include=target.building),
        "candidate": asdict(candidate),
        "images": source.calibration.sha256,
    }

    def make(work: Path) -> dict[str, Any]:
        run.screen.say(f"  {target.name}: build {candidate.name}")
        try:
            return {"notes": target.build(candidate, source, work / "bundle").notes}
        except ResourceError:  # says nothing about the candidate
            raise
        except EdgecnnError as fault:
            return {"failure": str(fault)}

    entry = run.store.once("candidate", {**made_from, "runtime": target.runtime, "name": target.name}, make)
    if "failure" in entry.facts:
        return Tried(candidate, target.may_ship(candidate), None, failure=entry.facts["failure"])
    artifact = Artifact(entry.folder / "bundle", read_manifest(entry.folder / "bundle" / "manifest.json"), tuple(entry.facts["notes"]))
    try:
        logits, _ = _run_split(run, target, artifact, "choice")
    except BoardError:  # says nothing about the candidate
        raise
    except DeviceError as fault:
        return Tried(candidate, target.may_ship(candidate), None, failure=str(fault))
    got = accuracy(logits, run.data.choice.labels)
    agreement = compare("", model.choice, logits).agreement
    return Tried(
        candidate,
        target.may_ship(candidate),
        artifact,
        top1=got.top1,
        agreement=agreement,
        divergence=divergence(model.choice, logits),
        n=got.n,
    )


def _run_split(run: Run, target: AnyTarget, artifact: Artifact, split: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of the exported file on a split, and what ran them; cached by the file's digest, the images and this machine."""
    packed, folder = images(run, split, artifact.manifest.input)
    stand_in = target.measured_as()

    def make(work: Path) -> dict[str, Any]:
        with on(target.device) as board:
            return evaluate(artifact.folder, folder, work / "logits.npy", threads=target.threads, runtime=stand_in, board=board)

    inputs = {
        "file": artifact.manifest.digests,
        "options": artifact.manifest.options,
        "images": packed.sha256,
        "runtime": stand_in or target.runtime,
    }
    entry = run.store.once("accuracy", {**inputs, "machine": identity_of(target.device)}, make)
    return np.load(entry.folder / "logits.npy", allow_pickle=False), entry.facts


def _timed(run: Run, target: AnyTarget, tried: list[Tried]) -> list[Tried]:
    """Add latency to what could be built, all candidates taking turns."""
    able = {t.candidate.name: t.artifact for t in tried if t.artifact}
    if target.measured_as() or not able:
        return tried
    bench = run.recipe.bench
    seconds = bench.seconds / 2 if run.recipe.effort == "quick" else bench.seconds

    def make(work: Path) -> None:
        where = target.device or "this machine"
        run.screen.say(f"  {target.name}: time {len(able)} candidates in {bench.processes} fresh processes each, on {where}")
        run.screen.tell("timing")
        with on(target.device) as board:
            results = latencies(
                {name: artifact.folder for name, artifact in able.items()},
                threads=target.threads,
                processes=bench.processes,
                seconds=seconds,
                seed=run.recipe.seed,
                board=board,
            )
        (work / "results.json").write_text(json.dumps({name: [asdict(r) for r in each] for name, each in results.items()}))

    files = {name: [artifact.manifest.digests, artifact.manifest.options] for name, artifact in able.items()}
    entry = run.store.once(
        "latency",
        {
            "files": files,
            "threads": target.threads,
            "bench": {**bench.model_dump(), "seconds": seconds},
            "machine": identity_of(target.device),
            "runtime": target.runtime,
        },
        make,
    )
    results = {name: tuple(map(Result.from_json, each)) for name, each in json.loads((entry.folder / "results.json").read_text()).items()}
    timed = [replace(t, results=results.get(t.candidate.name, ())) for t in tried]
    run.screen.tell("timed", p50_s={t.candidate.name: t.p50_s for t in timed}, void=[t.candidate.name for t in timed if t.void])
    return timed


def _latency(results: tuple[Result, ...]) -> dict[str, Any] | None:
    """Statistics over all processes, with every sample."""
    if not results:
        return None
    return {
        **summarise(*(r.samples_s for r in results)),
        "samples": [sample for r in results for sample in r.samples_s],
        "samples_by_process": [len(r.samples_s) for r in results],
        "processes": len(results),
        "threads": results[0].threads,
        "load_s": float(np.median([r.load_s for r in results])),
        "first_s": float(np.median([r.first_s for r in results])),
        "peak_rss_bytes": max(r.peak_rss_bytes for r in results),
        "timed": results[0].timed,
        "doubts": sorted({doubt for r in results for doubt in r.doubts}),
        "void": next((r.void for r in results if r.void), ""),
    }


def _sizes(spec: InputSpec) -> list[str]:
    """What the figures of a file that resizes by itself are of."""
    if spec.image_size == "prepared":
        return []
    height, width = spec.example_size
    judged = "images as they are" if spec.image_size == "any" else f"images cut to the shape of a frame and resized to {height} x {width}"
    return [f"the file resizes and crops by itself: judged on {judged}, timed with {height} x {width} pixels"]


def _where(target: AnyTarget, told: Mapping[str, Any], *, measured_here: bool) -> dict[str, str]:
    threads = f"{target.threads} thread" + ("s" if target.threads > 1 else "")
    here = f"{place(target.device)}, {told['runtime']} {told['provider']}, {threads}"
    if measured_here:
        return {"latency": here, "accuracy": here}
    return {
        "latency": "not measured: this machine has no NVIDIA GPU",
        "accuracy": f"the same graph in {told['runtime']} {told['provider']} on this machine, not in TensorRT",
    }


def _bundle(run: Run, target: AnyTarget, artifact: Artifact, evidence: dict[str, Any]) -> str:
    """Write the bundle, unless this very bundle is there already; returns the digest of its SHA256SUMS."""
    folder = run.store.root / "bundles" / target.name
    manifest = replace(
        artifact.manifest,
        name=target.name,
        evidence=json.loads(json.dumps(evidence)),
        recipe=run.recipe.name,
        recipe_sha256=recipe_digest(run.recipe),
    )
    # The raw samples stay in result.json: a board has no use for them.
    if manifest.evidence["latency_s"]:
        del manifest.evidence["latency_s"]["samples"]
    golden = _golden(run, target, artifact)
    extra = {name: (golden / name).read_bytes() for name in (VECTORS, ABOUT)} | board_runtime()
    try:
        before = verify_bundle(folder)
        there = replace(before, made="") == manifest and all(
            (folder / name).read_bytes() == content for name, content in (extra | _documents(before)).items()
        )
    except (IntegrityError, FileNotFoundError):
        there = False
    if not there:
        manifest = replace(manifest, made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        files = {name: artifact.folder / name for name in manifest.digests}
        write_bundle(folder, manifest, files, board_readme(manifest), extra | _documents(manifest))
    return sha256_file(folder / SUMS)


def _documents(manifest: Manifest) -> dict[str, bytes]:
    return {CARD: model_card(manifest).encode(), BOM: ml_bom(manifest).encode()}


def _made_from(run: Run, source: Source) -> dict[str, Any]:
    """Names and digests, without the folders of whoever made it."""
    config = run.recipe.data
    name = str(getattr(config, "path", "") or getattr(config, "name", "") or config.source)
    return {
        "model": run.recipe.model.title,
        "stages": [stage.stage for stage in run.recipe.stages],
        "data": Path(name).name if config.source in ("imagefolder", "arrays") or name[0] in "/.~" else name,
        "data_sha256": run.data.digest,
        "calibration_n": len(source.calibration.labels),
        "calibration_sha256": run.data.calibration_sha256,
    }


def _golden(run: Run, target: AnyTarget, artifact: Artifact) -> Path:
    """The folder of the artifact's golden vectors, computed by the file itself."""
    manifest, stand_in = artifact.manifest, target.measured_as()

    def make(work: Path) -> None:
        images = synthesise(manifest.input)
        ids = [str(i) for i in range(len(images))]
        write_packed(work / "images", ids, np.zeros(len(ids), np.int64), images, manifest.input.geometry)
        with on(target.device) as board:
            told = evaluate(artifact.folder, work / "images", work / "logits.npy", threads=target.threads, runtime=stand_in, board=board)
        where = f"{told['runtime']} {told['provider']}, {identity_of(target.device)['cpu']}"
        write_golden(work, manifest, images, np.load(work / "logits.npy", allow_pickle=False), where)

    machine = identity_of(target.device)
    inputs = {"file": manifest.digests, "options": manifest.options, "runtime": stand_in or target.runtime, "machine": machine}
    return run.store.once("golden", inputs, make).folder

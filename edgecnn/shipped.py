"""What a run folder or a bundle says of the files it ships: what `edgecnn compare` holds side by side.

A run knows its recipe, every raw sample and every answer. A bundle knows what its manifest keeps; the rest is None, or not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.device.archive import SUFFIX
from edgecnn.device.bundle import MANIFEST, verify_bundle
from edgecnn.device.stats import percentile
from edgecnn.errors import IntegrityError, UsageError
from edgecnn.report.page import read_result
from edgecnn.trust.predicted import Predicted

# What tells two machines apart that report the same CPU.
MACHINE = ("board", "cpu", "architecture", "instruction_sets", "cores_online", "affinity", "cpu_limit", "memory_bytes", "gpus")


@dataclass(frozen=True, eq=False)
class Shipped:
    """What is shipped for one target.

    Attributes:
        verdict: None in a bundle, which does not hold it.
        latency: `latency_s` of the result; empty where it was not measured, without `samples` in a bundle.
        machine: what must be equal for two latencies to be of one machine.
        classes: those that have evaluation images; in a bundle, all that the model tells apart.
        bundle: its folder, whether or not it is there.
        predictions: where each image's answers lie, if they were kept.
        answers: those to the images of `--data`, instead of the file.
    """

    side: str
    name: str
    runtime: str
    candidate: str
    verdict: str | None
    top1: float
    n: int
    size_bytes: int
    latency: dict[str, Any]
    machine: tuple[Any, ...]
    classes: frozenset[str]
    bundle: Path
    predictions: Path
    answers: Predicted | None = None

    def processes(self) -> list[list[float]] | None:
        """The samples in seconds, a list for each process; None where the run did not keep which is of which."""
        samples: list[float] = self.latency["samples"]
        counts: list[int] = self.latency.get("samples_by_process") or ([len(samples)] if self.latency["processes"] == 1 else [])
        if sum(counts) != len(samples):
            return None
        ends = np.cumsum(counts).tolist()
        return [samples[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def p50(self) -> float | None:
        samples, kept = self.latency.get("samples"), self.latency.get("p50")
        return percentile(samples, 0.5) if samples else None if kept is None else float(kept)


@dataclass(frozen=True, eq=False)
class Side:
    """One run or bundle.

    Attributes:
        verdict: None of a bundle.
        recipe: settings by the names that `--set` gives them; None of a bundle, which does not hold them.
        made_from: what a bundle, too, says of how it was made.
        common: the data's digest and the libraries' versions.
    """

    letter: str
    path: Path
    name: str
    verdict: str | None
    recipe: dict[str, Any] | None
    made_from: dict[str, Any]
    common: dict[str, Any]
    targets: list[Shipped]


def read_side(letter: str, path: Path) -> Side:
    """A bundle's folder, or a run's folder or its result.json.

    Raises:
        UsageError: it is neither.
        IntegrityError: it cannot be read, or the bundle is not as it was made.
    """
    if path.suffix == SUFFIX and path.is_file():
        raise UsageError(f"{path}: an archive. Unpack it first: edgecnn unpack {path}")
    bundle = (path / MANIFEST).is_file()
    if path.is_dir() and not bundle and not (path / "result.json").is_file():
        raise UsageError(f"{path}: neither the folder of a finished run nor a bundle. `edgecnn compress` makes both.")
    try:
        return _bundle(letter, path) if bundle else _run(letter, path)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        what = "manifest of a bundle" if bundle else "result of a run"
        told = f"({type(fault).__name__}: {fault}). Run `edgecnn compress` again to write it anew."
        raise IntegrityError(f"{path}: not a whole {what} {told}") from None


def _run(letter: str, path: Path) -> Side:
    file = path / "result.json" if path.is_dir() else path
    result = read_result(file)
    machine, devices = result["environment"]["machine"], {t["name"]: t.get("device") for t in result["recipe"]["targets"]}
    facts = tuple(str(machine.get(key)) for key in MACHINE)
    targets = []
    for t in result["targets"]:
        name = str(t["name"])
        if Path(name).name != name:
            raise ValueError(f"a target named {name!r}")
        latency = _latency(t.get("latency_s", {}))
        if latency:
            latency["samples"] = [float(s) for s in latency["samples"]]
        targets.append(
            Shipped(
                letter,
                name,
                str(t["runtime"]),
                str(t["candidate"]),
                str(t["verdict"]),
                float(t["top1"]),
                int(t["n"]),
                int(t["size_bytes"]),
                latency,
                # Of a board, its address and CPU; of this machine, what it told about itself.
                (t["where"].rpartition(f", {t['runtime']}")[0], *(() if devices.get(name) else facts)),
                frozenset(str(c["label"]) for c in t["per_class"]),
                file.parent / "bundles" / name,
                file.parent / "predictions" / f"{name}.npz",
            )
        )
    origins = [t.get("made_from", {}) for t in result["targets"]]
    return Side(
        letter,
        path,
        str(result["name"]),
        str(result["verdict"]),
        dict(_flat(result["recipe"])),
        _made_from(str(result["recipe_sha256"]), origins[0]) if origins else {},
        _common(result["data"]["digest"], result["environment"]["versions"]),
        targets,
    )


def _bundle(letter: str, folder: Path) -> Side:
    manifest = verify_bundle(folder)
    told, where = manifest.evidence, folder.resolve()
    shipped = Shipped(
        letter,
        manifest.name,
        manifest.runtime,
        manifest.candidate,
        None,
        float(told["top1"]),
        int(told["n"]),
        sum((folder / name).stat().st_size for name in manifest.files.values()),
        _latency(told["latency_s"] or {}),
        (),
        frozenset(map(str, manifest.labels)),
        folder,
        where.parent.parent / "predictions" / f"{where.name}.npz",  # of one that lies in its run folder, as for `eval`
    )
    common = _common(told["made_from"]["data_sha256"], manifest.versions)
    made_from = _made_from(manifest.recipe_sha256, told["made_from"])
    return Side(letter, folder, manifest.recipe, None, None, made_from, common, [shipped])


def _latency(told: dict[str, Any]) -> dict[str, Any]:
    return {**told, "processes": int(told["processes"])} if told else {}


def _made_from(recipe_sha256: str, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "recipe's digest": recipe_sha256[:16],
        "model": told.get("model"),
        "stages": " ".join(map(str, told.get("stages", []))),
        "data": told.get("data"),
        "calibration images": told.get("calibration_n"),
    }


def _common(digest: Any, versions: dict[str, Any]) -> dict[str, Any]:
    return {"data.digest": str(digest)[:16], **{f"versions.{name}": version for name, version in versions.items()}}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by the names that `--set` gives them; a target by its name, so that order changes nothing."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _flat(v, f"{key}.{k}" if key else str(k))
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        for i, v in enumerate(value):
            yield from _flat(v, f"{key}.{v['name']}" if key == "targets" else f"{key}[{i}]")
    else:
        yield key, value

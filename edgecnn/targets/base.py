"""A target takes the finished torch model and offers candidates: ways to build it for one runtime."""

from __future__ import annotations

import functools
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from edgecnn.config import Config
from edgecnn.device.bundle import write_bundle
from edgecnn.device.packed import Packed
from edgecnn.device.spec import IMAGE_SIZE, Artifact, InputSpec, Manifest
from edgecnn.errors import UsageError
from edgecnn.remote import parse_address
from edgecnn.targets.calibration import Histogram
from edgecnn.targets.preprocess_graph import take_pixels
from edgecnn.targets.qdq import Form

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
Effort = Literal["quick", "normal", "thorough"]
EFFORTS: tuple[Effort, ...] = ("quick", "normal", "thorough")


def _named(board: str) -> str:
    try:
        parse_address(board)
    except UsageError as fault:
        raise ValueError(str(fault)) from None
    return board


Device = Annotated[str, AfterValidator(_named)]
"""A board: its address, or its name in `edgecnn device list`."""


class Promise(Config):
    """What the exported file must keep. Checked on the evaluation images, on the file that ships.

    A key left out (or `null` for a single target) is not promised.
    """

    accuracy_drop: float | None = Field(None, ge=0, le=1, description="Largest top-1 drop against the float model: 0.01 is one point.")
    min_accuracy: float | None = Field(None, ge=0, le=1, description="Smallest top-1 of the exported file.")
    p90_latency_ms: float | None = Field(
        None, gt=0, description="Largest p90 latency of one image, in milliseconds, measured on the target."
    )
    size_mb: float | None = Field(None, gt=0, description="Largest size of the model's files, in megabytes of 1,000,000 bytes.")


@dataclass(frozen=True)
class Candidate:
    """One way to build a model for a runtime. `how` holds all that decides the bytes, `effort` says from where on it is tried."""

    name: str
    precision: str
    how: dict[str, Any]
    effort: Effort = "quick"


@dataclass(frozen=True)
class Source:
    """What every candidate of every target starts from.

    Attributes:
        onnx: the exported float graph, fp32, input `input` N x C x H x W, output `logits`.
        onnx_half: makes, or finds, the same network with fp16 arithmetic; inputs and outputs stay fp32.
        input: preprocessing.
        labels: one name an output.
        calibration: the prepared calibration images.
        histograms: of every float activation of `onnx` over the calibration images; computed at most once.
        seed: of everything random.
        learned: `form` and `ranges` each, where a qat stage made `onnx`; QDQ graphs then take these ranges.
        fitted: what `fit` has made of it already: runtimes that want the same graph share it; empty in a copy by `replace`.
    """

    onnx: Path
    onnx_half: Callable[[], Path]
    input: InputSpec
    labels: tuple[str, ...]
    calibration: Packed
    histograms: Callable[[], Mapping[str, Histogram]]
    seed: int
    learned: Sequence[Mapping[str, Any]] | None = None
    fitted: dict[Any, tuple[bytes, list[str]]] = field(default_factory=dict, init=False)

    def artifact(
        self,
        target: Target,
        candidate: Candidate,
        folder: Path,
        files: Mapping[str, Path],
        *,
        options: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> Artifact:
        """Write `files` (name to source; the first is the model) as a bundle without evidence to `folder`.

        Where the target's input is uint8, an ONNX graph gets its head here; other files must have it.
        """
        spec = target.file_input(self.input)
        with tempfile.TemporaryDirectory() as work:
            if target.input == "uint8":
                files = {
                    name: take_pixels(path, Path(work) / name, spec) if name.endswith(".onnx") else path for name, path in files.items()
                }
            manifest = write_bundle(
                folder,
                Manifest(
                    name=target.name,
                    runtime=target.runtime,
                    precision=candidate.precision,
                    candidate=candidate.name,
                    files=dict(zip(("model", "weights"), files, strict=False)),
                    digests={},
                    input=spec,
                    labels=self.labels,
                    takes="uint8" if target.input == "uint8" else "float32",
                    options=dict(options or {}),
                    versions=installed("edgecnn", "torch", "onnx", "onnxruntime", "openvino", "nncf"),
                ),
                files,
            )
        return Artifact(folder, manifest, tuple(notes))


class Target(Config):
    """Where a model goes. Subclasses add `runtime: Literal["name"]`."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Your name for this target; its bundle's folder is called so."
    )
    building: ClassVar[set[str]] = {
        "input",
        "image_size",
        "keep_float",
        "weights",
    }  # the settings that change what is built, and not only which is chosen

    runtime: str
    precision: Precision = Field("int8", description="`auto` ships the fastest candidate that keeps the promise.")
    input: Literal["uint8", "float"] = Field(
        "uint8", description="`uint8`: the file takes pixels, N x H x W x C, and normalises by itself. `float`: the tensor, N x C x H x W."
    )
    keep_float: tuple[str, ...] = Field(
        (), description="Layers that int8 leaves in float: names, with * and ? as in file names, or operator types such as Sigmoid."
    )
    weights: Literal["per-channel", "per-tensor"] = Field(
        "per-channel",
        description="Scales of int8 weights. One for the whole tensor ruins depthwise networks; what it ruins is built again.",
    )
    image_size: str = Field(
        "prepared",
        pattern=f"^({IMAGE_SIZE.pattern})$",
        description="Which pixels a `uint8` file takes: `prepared`, resized and cropped before; `any`, images of any size; or a camera's "
        "frames, as `480x640` (height x width). The last two the file resizes and crops by itself.",
    )
    threads: int = Field(1, ge=1, le=1024, description="Threads of the runtime when measuring.")
    device: Device | None = Field(
        None, description="Board to measure on: ssh://user@host[:port][/its/python], or its name in `edgecnn device list`."
    )
    promise: Promise | None = Field(None, description="Replaces keys of the recipe's promise for this target.")

    def candidates(self) -> Sequence[Candidate]:
        """All ways to build for this runtime, float before int8. Float ones are built for comparison even where int8 is asked for."""
        raise NotImplementedError

    def tried(self, effort: Effort = "normal") -> list[Candidate]:
        """The candidates that this target builds and measures: those that may ship, and every float one."""
        within = EFFORTS[: EFFORTS.index(effort) + 1]
        return [c for c in self.candidates() if c.effort in within and (c.precision != "int8" or self.may_ship(c))]

    def file_input(self, model: InputSpec) -> InputSpec:
        """The input of this target's files, given that of the model."""
        return replace(model, image_size=self.image_size)

    def may_ship(self, candidate: Candidate) -> bool:
        """Whether the recipe's precision lets it ship."""
        return self.precision in ("auto", candidate.precision)

    def form(self) -> Form | None:
        """In which this runtime takes a QDQ graph, which is what training for int8 must simulate; None where it takes none."""
        return None

    def build(self, candidate: Candidate, source: Source, folder: Path) -> Artifact:
        """Write the candidate to `folder`, which is not there yet."""
        raise NotImplementedError

    def missing(self) -> str | None:
        """What must be installed to build for this target here, as a sentence, or None."""
        raise NotImplementedError

    def measured_as(self) -> str | None:
        """The runtime that stands in for this one on this machine (accuracy only, and said so), or None to use its own."""
        return None


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of `packages` that are installed."""
    return {package: version for package in packages if (version := _version(package)) is not None}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

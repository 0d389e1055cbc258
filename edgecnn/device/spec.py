"""What travels with a model: how its input is made, what it is, and what was measured on it.

Plain frozen dataclasses to and from JSON. Format history of the manifest:
    1   2026-11: first.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from edgecnn.errors import IntegrityError, is_the_machines

SCHEMA = 1

Fit = Literal["crop", "squash"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Takes = Literal["uint8", "float32"]
IMAGE_SIZE = re.compile(r"prepared|any|[1-9][0-9]{0,3}x[1-9][0-9]{0,3}")


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the model's input: the one truth of preprocessing.

    The image is decoded to `channels` (3 RGB, 1 grey), resized by Pillow with `interpolation`, and then is
    `height` x `width` uint8. With fit `crop`, the shorter side is resized to `resize` and the centre is
    cut out; with `squash`, both sides are resized at once and `resize` is not used. The tensor is
    `(pixel / 255 - mean) / std` in float32, N x C x H x W; a file that takes uint8 computes it itself.

    `image_size` says which pixels the file is given: `prepared`, those resized and cropped ones; `any`, an image of any size; or frames of
    HEIGHTxWIDTH, as `480x640`. The last two the file resizes and crops by itself.
    """

    channels: int
    height: int
    width: int
    resize: int
    fit: Fit
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: str = "prepared"

    @staticmethod
    def from_json(data: dict[str, Any]) -> InputSpec:
        if not IMAGE_SIZE.fullmatch(data.get("image_size", "prepared")):
            raise ValueError(f"image_size {data['image_size']!r}")
        return InputSpec(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of the tensor."""
        return self.channels, self.height, self.width

    @property
    def geometry(self) -> dict[str, Any]:
        """The part that decides the uint8 pixels: two specs with the same geometry can share prepared images.

        `height` and `width` are those of the pixels, None where they have any.
        """
        if self.image_size == "prepared":
            return {k: v for k, v in asdict(self).items() if k not in ("mean", "std", "image_size")}
        height, width = self.pixel_size or (None, None)
        return {"channels": self.channels, "image_size": self.image_size, "height": height, "width": width}

    @property
    def pixel_size(self) -> tuple[int, int] | None:
        """Height and width of the pixels that the file is given; None where it takes any."""
        if self.image_size == "prepared":
            return self.height, self.width
        if self.image_size == "any":
            return None
        height, _, width = self.image_size.partition("x")
        return int(height), int(width)

    @property
    def evaluation_name(self) -> str:
        """Of the folder in a run folder that holds the evaluation images of this geometry."""
        return "evaluation" if self.image_size == "prepared" else f"evaluation-{self.image_size}"

    @property
    def example_size(self) -> tuple[int, int]:
        """Height and width of what is timed: a camera's, where the file takes any."""
        return self.pixel_size or (480, 640)


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    Attributes:
        name: the target's name in the recipe.
        runtime: onnxruntime, openvino or tensorrt.
        precision: fp32, fp16, bf16 or int8: what the weights and most of the arithmetic are in.
        candidate: how it was made, in one word; the report lists the others.
        files: role to file name inside the bundle. `model` is what the runtime opens.
        digests: file name to sha256 of each of `files`.
        takes: what the file's input is: uint8 (the pixels, N x H x W x C; it normalises by itself) or float32 (the tensor, N x C x H x W).
        options: what the runtime must be told, such as OpenVINO's INFERENCE_PRECISION_HINT.
        evidence: accuracy, latency and parity of exactly these files, and where they were measured.
        made: when the bundle was, UTC to the second as 2026-11-23T22:10:00Z, or "": what tells an older bundle from a newer.
    """

    name: str
    runtime: str
    precision: str
    candidate: str
    files: dict[str, str]
    digests: dict[str, str]
    input: InputSpec
    labels: tuple[str, ...]
    takes: Takes = "float32"
    options: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    recipe_sha256: str = ""
    made: str = ""
    schema: int = SCHEMA

    @property
    def model_file(self) -> str:
        return self.files["model"]

    @property
    def model_sha256(self) -> str:
        return self.digests[self.model_file]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        IntegrityError: the file is not there, is not a manifest, or is of a newer format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        if is_the_machines(fault):
            raise
        raise IntegrityError(f"{path}: not a readable manifest ({fault}). Is this the folder of a bundle?") from None
    try:
        if data["schema"] > SCHEMA:
            raise IntegrityError(f"{path}: format {data['schema']} is newer than this edgecnn reads ({SCHEMA}). Install a newer edgecnn.")
        known = {f.name for f in fields(Manifest)}
        data = {k: v for k, v in data.items() if k in known}
        data["input"] = InputSpec.from_json(data["input"])
        data["labels"] = tuple(data["labels"])
        return Manifest(**data)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise IntegrityError(f"{path}: not a manifest of edgecnn ({fault!r}). Make the bundle again.") from None


@dataclass(frozen=True)
class Artifact:
    """A file of one runtime, not yet a bundle.

    Attributes:
        folder: where its files are; the folder can be opened by a runner (it has a manifest without evidence).
        manifest: its manifest.
        notes: what is to be said about how it was made, such as "built by tensorrt_rtx 1.7 for sm86".
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Size of the model's own files."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.files.values())


@dataclass(frozen=True)
class Result:
    """One latency measurement: every raw sample, and its circumstances. Statistics are computed when read.

    Attributes:
        file: the model file's name; `file_sha256` its digest: a number without its file is worth nothing.
        samples_s: steady-state seconds per inference call of `batch` images, in order, nothing clipped.
        warmup_s: the calls before steady state, in order.
        load_s: from the file to a session that can infer.
        first_s: the first inference.
        timed: what lies inside the timed region.
        circumstances: CPU, instruction sets, governor, clocks, temperature, load, steal, versions ...
        doubts: why the figure may not be worth much; empty is good.
        void: why it must not be used at all, or "".
        energy: what each meter saw (`meters.Energy`) after the samples were taken; "not available: WHY" without a meter, or "not measured".
    """

    file: str
    file_sha256: str
    runtime: str
    threads: int
    batch: int
    samples_s: tuple[float, ...]
    warmup_s: tuple[float, ...]
    load_s: float
    first_s: float
    timed: str
    circumstances: dict[str, Any]
    peak_rss_bytes: int
    doubts: tuple[str, ...] = ()
    void: str = ""
    energy: tuple[dict[str, Any], ...] | str = "not measured"
    schema: int = SCHEMA

    @staticmethod
    def from_json(data: dict[str, Any]) -> Result:
        known = {f.name for f in fields(Result)}
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return Result(**data)

"""Golden vectors: a few images and the logits that the bundle's file gave for them where it was made.

Whoever runs the bundle elsewhere asks with them whether that board computes the same. The images are generated, so that they carry no
licence and need no decoder. Equal bits are not expected: kernels sum in another order, and int8 kernels round in other places. So the
root mean square of the differences, as a share of the logits' standard deviation, is held against a bound for the precision; beyond it
the board computes something else.

Measured, MobileNetV2 on ImageNet: fp32 between runtimes 1e-6; bf16 for fp32 0.04 to 0.07; the same int8 file with and without
onnxruntime's fused kernels, or in OpenVINO, 0 to 0.20, by how its ranges were chosen. Colours swapped, red for blue: 0.31 to 0.39.

    golden.npz    images uint8 K x H x W x C, logits float32 K x classes
    golden.json   for people: where they were computed, the bound, and the best classes of each
Format history of `golden.json`:
    1   2026-11: first.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecnn.device.evaluate import softmax
from edgecnn.device.files import write_atomically
from edgecnn.device.preprocess import to_input
from edgecnn.device.runtimes import Runner
from edgecnn.device.spec import InputSpec, Manifest
from edgecnn.errors import IntegrityError, is_the_machines

VECTORS = "golden.npz"
ABOUT = "golden.json"
SCHEMA = 1
COUNT = 4
MOST_PIXELS = 400_000

BOUND = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8": 0.25}


@dataclass(frozen=True)
class Comparison:
    """A board's logits against the expected ones.

    Attributes:
        error: root mean square of the differences, as a share of the expected logits' standard deviation.
        largest: difference of a logit, absolute.
        bound: what `error` may be for this precision.
        agreement: fraction of the images with the same best class.
        n: images.
    """

    error: float
    largest: float
    bound: float
    agreement: float
    n: int

    @property
    def same(self) -> bool:
        """Whether it is the same computation; not so where a logit is not a number."""
        return self.error <= self.bound


def synthesise(spec: InputSpec, count: int = COUNT, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Soft blobs of colour under edges and a little noise: uint8, `count` x H x W x C. They excite a network about as photos do.

    Fewer than `count` of a large size: they travel in every bundle.
    """
    random = np.random.default_rng(seed)
    height, width = spec.example_size
    y, x = np.mgrid[:height, :width] / max(height, width)
    images = np.empty((max(1, min(count, MOST_PIXELS // (height * width))), height, width, spec.channels), np.uint8)
    for image in images:
        canvas = np.full(image.shape, random.uniform(60, 200))
        for _ in range(12):
            colour = random.uniform(-120, 120, spec.channels)
            centre_y, centre_x, size = (*random.uniform(0, 1, 2), random.uniform(0.05, 0.35))
            distance = np.hypot(y - centre_y, x - centre_x) / size
            # Half of the blobs fade out and half have an edge: networks look at both.
            shape = np.exp(-(distance**2)) if random.random() < 0.5 else (distance < 1).astype(float)
            canvas += shape[:, :, None] * colour
        image[:] = np.clip(canvas + random.normal(0, 4, image.shape), 0, 255)
    return images


def write_golden(
    folder: Path, manifest: Manifest, images: npt.NDArray[np.uint8], logits: npt.NDArray[np.float32], where: str
) -> dict[str, Path]:
    """Write both files to `folder`; returns name to path.

    Args:
        folder: to write to.
        manifest: of the bundle.
        images: uint8, K x H x W x C.
        logits: of the bundle's own file, K x classes.
        where: runtime, provider and CPU that computed them.
    """
    probabilities = softmax(logits)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    about = {
        "schema": SCHEMA,
        "where": where,
        "bound": BOUND[manifest.precision],
        "images": [
            [{"label": manifest.labels[i], "index": int(i), "logit": float(row[i]), "probability": float(p[i])} for i in order]
            for row, p, order in zip(logits, probabilities, best, strict=True)
        ],
    }
    npz = io.BytesIO()
    np.savez_compressed(npz, images=images, logits=logits.astype(np.float32))
    write_atomically(folder / VECTORS, npz.getvalue())
    write_atomically(folder / ABOUT, (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
    return {name: folder / name for name in (VECTORS, ABOUT)}


def compare_golden(folder: Path, manifest: Manifest, runner: Runner) -> tuple[Comparison, dict[str, Any]]:
    """Run the golden images of the verified bundle `folder`; also returns what `golden.json` holds.

    Raises:
        IntegrityError: the bundle has none, or they are not of its model.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        with np.load(folder / VECTORS, allow_pickle=False) as vectors:
            images, expected = vectors["images"], vectors["logits"]
        bound = float(about["bound"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as fault:
        if is_the_machines(fault):
            raise
        raise IntegrityError(f"{folder}: no golden vectors that can be read ({fault!r}). Make the bundle again.") from None
    spec = manifest.input
    if images.dtype != np.uint8 or images.shape[1:] != (*spec.example_size, spec.channels) or len(images) != len(expected):
        raise IntegrityError(f"{folder}: the golden vectors are {images.dtype} {images.shape}, not of this model. Make the bundle again.")
    got = np.concatenate([runner.infer(to_input(images[i : i + 1], spec, runner.takes)).copy() for i in range(len(images))])
    if got.shape != expected.shape:
        raise IntegrityError(f"{folder}: logits {got.shape} for golden logits {expected.shape}. Make the bundle again.")
    differences = got.astype(np.float64) - expected
    error = float(np.sqrt(np.mean(differences**2)) / max(float(expected.std()), 1e-30))
    agreement = float((got.argmax(1) == expected.argmax(1)).mean())
    return Comparison(error, float(np.abs(differences).max()), bound, agreement, len(images)), about

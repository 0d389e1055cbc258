"""The images worth looking at: those whose answer changed, and some whose answer did not, with where each model looked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise, to_input
from edgecnn.device.spec import Artifact
from edgecnn.errors import ModelError
from edgecnn.floats import Float
from edgecnn.trust import gradcam
from edgecnn.trust.change import Ints, Predictions
from edgecnn.trust.halves import halves

SIDE = 112  # pixels of each of the three panels


def take_pictures(
    work: Path, packed: Packed, artifact: Artifact, baseline: Float, before: Predictions, after: Predictions, most: int
) -> dict[str, Any]:
    """Write a strip of panels for each chosen image: the image, where the float model looks, where the file looks.

    Args:
        work: gets `NN.jpg`.
        packed: the evaluation images as the file takes them.
        artifact: the file.
        baseline: the float model.
        before: its predictions; `after` the file's.
        most: images at most.

    Returns:
        `pictures`: `file`, `kind` (lost, won, differently, typical), `id`, `truth`, `before`, `after` as labels, their confidences, and
        `likeness` of the two maps (cosine) where both answer alike; `panels`: what each shows; `gradcam`: how the maps were made, or
        why there are none.
    """
    names = baseline.labels
    rows = [
        {
            "kind": kind,
            "id": packed.ids[i],
            "truth": names[packed.labels[i]],
            "before": names[before.top1[i]],
            "after": names[after.top1[i]],
            "before_confidence": float(before.confidence[i]),
            "after_confidence": float(after.confidence[i]),
            "index": i,
        }
        for kind, i in chosen(packed.labels, before, after, most)
    ]
    try:
        maps, panels, how = _maps(packed, artifact, baseline, before, after, [row["index"] for row in rows])
    except ModelError as fault:
        maps, panels, how = [()] * len(rows), ["the image"], str(fault)
    for nth, (row, seen) in enumerate(zip(rows, maps, strict=True)):
        i = row.pop("index")
        row["file"] = f"{nth:02d}.jpg"
        row["likeness"] = _finite(gradcam.likeness(seen[-2], seen[-1])) if seen and before.top1[i] == after.top1[i] else None
        image = packed.images[i]
        _save(work / row["file"], [image, *(lit(image, each) for each in seen)])
    return {"pictures": rows, "panels": panels, "gradcam": how}


def _maps(
    packed: Packed, artifact: Artifact, baseline: Float, before: Predictions, after: Predictions, indices: list[int]
) -> tuple[list[tuple[gradcam.Map, ...]], list[str], str]:
    """For each image the maps of its panels, each for the answer that its model gives; what the panels show; how they were made."""
    import torch

    spec, takes = artifact.manifest.input, artifact.manifest.takes
    size = spec.height, spec.width
    file, module = halves(artifact.folder, artifact.manifest, gradcam.LEAST), baseline.load().module
    cut = gradcam.torch_halves(module)
    found = []
    same = 0
    for i in indices:
        pixels = packed.images[i : i + 1]
        x, given = normalise(pixels, baseline.input), to_input(pixels, spec, takes)
        proper = gradcam.grad_cam(module, torch.from_numpy(x), int(before.top1[i]))
        was = gradcam.by_places(cut, x, int(before.top1[i]), size)
        now = gradcam.by_places(file, given, int(after.top1[i]), size)
        same += int(file.tail(file.front(given)).argmax()) == int(after.top1[i])
        found.append((proper, was, now))
    likeness = float(np.nanmean([gradcam.likeness(proper, was) for proper, was, _ in found]))
    runtime = "onnxruntime" if artifact.manifest.runtime == "tensorrt" else artifact.manifest.runtime
    how = (
        f"File: each place of its last feature map of at least {gradcam.LEAST} x {gradcam.LEAST} set to zero in turn, run by {runtime}; "
        f"the two halves that this takes give the whole file's answer on {same} of {len(found)} images. "
        "Float: the same way; its Grad-CAM by gradients is "
    )
    if likeness > 0.99:
        return [(was, now) for _, was, now in found], ["the image", "float", "file"], how + f"the same map (cosine {likeness:.3f})."
    names = ["the image", "float, Grad-CAM by gradients", "float, by places", "file, by places"]
    return list(found), names, how + f"a map of the same kind (cosine {likeness:.2f}), shown beside it."


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def chosen(labels: Ints, before: Predictions, after: Predictions, most: int) -> list[tuple[str, int]]:
    """Kind and index: lost answers first, the surest of the float model ahead, then won and differently wrong ones, then typical ones.

    At least a third are typical, each of another class while there are enough.
    """
    was, now = before.top1 == labels, after.top1 == labels
    moved = before.top1 != after.top1
    surest = np.argsort(-(before.confidence + after.confidence), kind="stable")
    picked: list[tuple[str, int]] = []
    room = most - most // 3
    for kind, mask, share in (("lost", was & ~now, 0.6), ("won", ~was & now, 0.7), ("differently", moved & ~was & ~now, 1.0)):
        found = [int(i) for i in surest if mask[i]]
        picked += [(kind, i) for i in found[: max(1, round((room - len(picked)) * share)) if room > len(picked) else 0]]
    typical: list[tuple[str, int]] = []
    classes: set[int] = set()
    middle = np.argsort(np.abs(before.confidence - np.median(before.confidence)), kind="stable")
    for fresh in (True, False):
        for i in middle:
            done = len(picked) + len(typical) >= most
            if not done and was[i] and now[i] and ("typical", int(i)) not in typical and not (fresh and int(labels[i]) in classes):
                typical.append(("typical", int(i)))
                classes.add(int(labels[i]))
    return picked + typical


def lit(image: npt.NDArray[np.uint8], seen: gradcam.Map) -> npt.NDArray[np.uint8]:
    """The image as a grey shade, warm where `seen` is high."""
    grey = image.mean(2, keepdims=True) * 0.55 + 30
    heat = seen[:, :, None]
    colour = np.concatenate([255 * np.minimum(2 * heat, 1), 235 * np.clip(2 * heat - 0.7, 0, 1), 60 * heat], 2)
    blended: npt.NDArray[np.uint8] = np.clip(grey * (1 - 0.75 * heat) + colour * 0.75 * heat, 0, 255).astype(np.uint8)
    return blended


def _save(path: Path, panels: list[npt.NDArray[np.uint8]]) -> None:
    from PIL import Image

    strip = Image.new("RGB", (SIDE * len(panels) + 4 * (len(panels) - 1), SIDE), (128, 128, 128))
    for nth, panel in enumerate(panels):
        if panel.shape[2] == 1:
            panel = np.repeat(panel, 3, 2)
        elif panel.shape[2] != 3:
            panel = np.repeat(panel.mean(2, keepdims=True).astype(np.uint8), 3, 2)
        # Enlarged with hard edges: what is seen is what the model got.
        how = Image.Resampling.NEAREST if panel.shape[0] < SIDE else Image.Resampling.LANCZOS
        strip.paste(Image.fromarray(panel).resize((SIDE, SIDE), how), (nth * (SIDE + 4), 0))
    strip.save(path, "JPEG", quality=82)

"""The model card inside a bundle: Markdown for people, with the header that the Hugging Face hub reads. Only what the manifest says.

The licence is left out: edgecnn does not know the one of the weights and of the data. Who publishes the bundle adds it.
Source: huggingface.co/docs/hub/model-cards, and huggingface_hub's own ModelCardData, which the test parses it with.
"""

from __future__ import annotations

from typing import Any

from edgecnn.board_readme import taken, timed
from edgecnn.device.spec import Manifest

CARD = "MODEL_CARD.md"

_LIBRARY = {"onnxruntime": "onnx", "openvino": "openvino", "tensorrt": "tensorrt"}


def model_card(manifest: Manifest) -> str:
    """Markdown of the bundle's model card.

    Args:
        manifest: complete: digests, evidence, recipe.
    """
    e = manifest.evidence
    origin = e["made_from"]
    low, high = e["interval"]
    drop_low, drop_high = e["drop_interval"]
    steps = "".join(f"- {step}\n" for step in (origin["model"], *origin["stages"], f"{manifest.runtime}, {manifest.candidate}"))
    notes = "".join(f"- {note}\n" for note in e["notes"])
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    files = "".join(f"| `{name}` | `{digest}` |\n" for name, digest in manifest.digests.items())
    return f"""---
{_header(manifest)}---

# {manifest.name}: {origin["model"]} for {manifest.runtime}, {manifest.precision}

An image classifier of {len(manifest.labels)} classes, by edgecnn from the recipe `{manifest.recipe}` (`{manifest.recipe_sha256[:12]}`).
Input: {taken(manifest)}. Output: logits, one for each line of `labels.txt`.

## How it was made

{steps}
Trained or judged on the data `{origin["data"]}` (sha256 `{origin["data_sha256"]}`). Calibrated on {origin["calibration_n"]} images
(sha256 `{origin["calibration_sha256"]}`) that are not among those it was judged on. Software: {versions}.

## What was measured, on exactly these files

| what | figure | where |
|---|---|---|
| top-1 accuracy, {e["n"]} images | {e["top1"]:.2%}, 95 % interval {low:.2%} to {high:.2%} | {e["accuracy_where"]} |
| drop against the float model | {100 * e["top1_drop"]:+.2f} points, interval {100 * drop_low:+.2f} to {100 * drop_high:+.2f} | same |
| same class as the float model | {e["agreement"]:.2%} | same |
| latency of one image | {timed(e["latency_s"]) or "none"} | {e["where"]} |

{notes}
## Limits

The figures are of that data and that machine. Images of another kind, another camera or light, and classes that are not in `labels.txt`
were not tried: it names one of its classes for any image. A checkpoint's behaviour beyond this data is not vouched for.

## Files

| file | sha256 |
|---|---|
{files}
`SHA256SUMS` covers every file; `edgecnn verify .` or `sha256sum -c SHA256SUMS` checks them.
"""


def _header(manifest: Manifest) -> str:
    """YAML of the fields that the hub knows."""
    import yaml

    e = manifest.evidence
    data = e["made_from"]["data"]
    header: dict[str, Any] = {
        "library_name": _LIBRARY[manifest.runtime],
        "pipeline_tag": "image-classification",
        "tags": ["edgecnn", "image-classification", manifest.runtime, manifest.precision],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": manifest.name,
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image Classification"},
                        "dataset": {"type": data, "name": data, "split": "evaluation"},
                        "metrics": [{"type": "accuracy", "value": e["top1"], "name": "top-1 accuracy"}],
                    }
                ],
            }
        ],
    }
    text: str = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=10_000)
    return text

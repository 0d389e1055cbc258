"""The README inside a bundle: what it is, what it was measured to do, and the commands for the board."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgecnn.device.spec import Manifest

_INSTALL = {
    "onnxruntime": "pip install numpy Pillow onnxruntime",
    "openvino": "pip install numpy Pillow openvino",
    "tensorrt": "pip install numpy Pillow              # tensorrt comes with JetPack; elsewhere: pip install tensorrt_rtx",
}


def board_readme(manifest: Manifest) -> str:
    """Markdown for the manifest's bundle."""
    e = manifest.evidence
    told = timed(e.get("latency_s"))
    latency = f"{told}, {e['where']}" if told else e["where"]
    build = (
        "    python3 -m edgecnn.device build .           # the engine for this GPU, once; kept in a cache\n"
        if manifest.runtime == "tensorrt"
        else ""
    )
    notes = "".join(f"- {note}\n" for note in e.get("notes", []))
    return f"""# {manifest.name}: {manifest.runtime}, {manifest.precision}

Made by edgecnn from the recipe `{manifest.recipe}` ({manifest.recipe_sha256[:12]}).
The model is `{manifest.model_file}`, sha256 `{manifest.model_sha256}`.

- top-1 {e["top1"]:.2%} on {e["n"]} images ({-100 * e["top1_drop"]:+.2f} points against the float model): {e["accuracy_where"]}
- latency: {latency}
{notes}
Input: {taken(manifest)}. What is left to do is in `manifest.json`, and the program in `edgecnn/` does it.
Outputs: logits, one for each line of `labels.txt`.

## On the board

Python 3.10 or newer. The program for the board is in this folder; run it from here, and keep your own files
outside: `verify` refuses a folder with anything else in it.

    {_INSTALL[manifest.runtime]}
    python3 -m edgecnn.device verify .          # is every file as it was made?
{build}    python3 -m edgecnn.device verify . --run    # does this board compute what was measured?
    python3 -m edgecnn.device run . ../photo.jpg    # or a folder, or --watch FOLDER, or --camera 0
    python3 -m edgecnn.device bench .           # how fast is it here?
    python3 -m edgecnn.device eval . --data ../evaluation    # the folder `evaluation` of the run, copied there

`sha256sum -c SHA256SUMS` checks the files too. In a program of your own, which lies elsewhere and is
started with `PYTHONPATH` naming this folder:

    from edgecnn.device.model import Model

    with Model.open("path/to/this/folder") as model:
        print(model.predict("photo.jpg"))       # [(label, probability), ...], the best first
"""


def timed(latency: Mapping[str, Any] | None) -> str:
    """A measured latency in a few words, or "" where there is none."""
    if not latency:
        return ""
    return f"void ({latency['void']})" if latency.get("void") else f"p50 {latency['p50'] * 1e3:.3g} ms, {latency['n']} samples"


def taken(manifest: Manifest) -> str:
    """What the model's file takes, and what it does to it by itself."""
    spec = manifest.input
    if manifest.takes != "uint8":
        return f"float32, N x {spec.channels} x {spec.height} x {spec.width}, `(pixel / 255 - mean) / std` of resized and cropped images"
    height, width = spec.pixel_size or ("any height", "any width")
    text = f"uint8, N x {height} x {width} x {spec.channels}{', RGB' * (spec.channels == 3)}"
    if spec.image_size == "prepared":
        return f"{text}: pixels of resized and cropped images, which the file normalises itself"
    return f"{text}: images, which the file resizes, crops and normalises itself"

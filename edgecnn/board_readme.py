"""The README inside a bundle: what it is, what it was measured to do, and the commands for the board."""

from __future__ import annotations

from edgecnn.device.spec import Manifest

_INSTALL = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}


def board_readme(manifest: Manifest) -> str:
    """Markdown for the manifest's bundle."""
    e = manifest.evidence
    latency = e.get("latency_s")
    timed = f"p50 {latency['p50'] * 1e3:.3g} ms, {latency['n']} samples, {e['where']}" if latency else e["where"]
    spec = manifest.input
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
- latency: {timed}
{notes}
Input: {spec.channels} x {spec.height} x {spec.width}, float32, N x C x H x W, `(pixel / 255 - mean) / std`; `manifest.json` has the rest.
Outputs: logits, one for each line of `labels.txt`.

## On the board

Python 3.10 or newer.

    pip install 'edgecnn[{_INSTALL[manifest.runtime]}]'
    python3 -m edgecnn.device verify .          # is every file as it was made?
{build}    python3 -m edgecnn.device run . photo.jpg
    python3 -m edgecnn.device bench .           # how fast is it here?
    python3 -m edgecnn.device eval . --data evaluation    # the folder `evaluation` of the run, copied here

`sha256sum -c SHA256SUMS` checks the files too.
"""

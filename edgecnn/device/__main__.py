"""`python -m edgecnn.device {verify,build,run,bench,eval} BUNDLE`: everything a board does with a bundle.

Results go to stdout, as text or with --json as one JSON object; messages go to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.device.bundle import verify_bundle
from edgecnn.device.spec import Manifest
from edgecnn.errors import DataError, UsageError, guarded


def main(argv: Sequence[str] | None = None, prog: str = "python -m edgecnn.device") -> int:
    arguments = parser(prog).parse_args(argv)
    return guarded(lambda: arguments.command(arguments))


def parser(prog: str) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=prog, description="Use a bundle on this machine. Needs numpy and the bundle's runtime.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("bundle", type=Path, help="folder of the bundle")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    def add_running(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--threads", type=_positive, default=1, help="threads of the runtime (default 1)")
        sub.add_argument("--provider", help="execution provider (onnxruntime) or device (OpenVINO); refused where it is not there")
        sub.add_argument(
            "--runtime",
            choices=["onnxruntime"],
            help="run the bundle's ONNX graph in onnxruntime instead of its own runtime (TensorRT bundles)",
        )

    add("verify", verify, "Check every file of the bundle against its digest.")
    add("build", build, "Build the TensorRT engine for this machine's GPU and keep it in the cache.")
    sub = add("run", run, "Classify image files.")
    sub.add_argument("images", type=Path, nargs="+", help="image files")
    sub.add_argument("--top", type=_positive, default=5, help="classes to show (default 5)")
    add_running(sub)
    sub = add("bench", bench, "Measure latency in this process: load, first inference, steady state.")
    sub.add_argument("--batch", type=_positive, default=1, help="images per inference (default 1)")
    sub.add_argument("--seconds", type=float, default=2.0, help="steady-state seconds to measure (default 2)")
    add_running(sub)
    sub = add("eval", evaluate, "Measure top-1 accuracy on prepared images.")
    sub.add_argument("--data", type=Path, help="folder of prepared images (default: `evaluation` in the run folder the bundle lies in)")
    sub.add_argument("--logits", type=Path, help="write the logits there, as .npy")
    add_running(sub)
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def verify(arguments: argparse.Namespace) -> int:
    manifest = verify_bundle(arguments.bundle)
    _print(arguments, {"verified": True, **_identity(manifest)}, f"{arguments.bundle}: every file is as it was made ({_line(manifest)}).")
    return 0


def build(arguments: argparse.Namespace) -> int:
    manifest = verify_bundle(arguments.bundle)
    if manifest.runtime != "tensorrt":
        raise UsageError(f"{arguments.bundle}: a bundle for {manifest.runtime} needs no build. Use `run`, `eval` or `bench` as it is.")
    from edgecnn.device.cuda import Gpu
    from edgecnn.device.tensorrt import cached_engine, load_tensorrt

    tensorrt, gpu = load_tensorrt(), Gpu()
    where = f"{gpu.name} {gpu.compute_capability}"
    engine, cached = cached_engine(tensorrt, arguments.bundle / manifest.model_file, manifest.model_sha256, where, batch=1)
    told = "was in the cache" if cached else "built"
    _print(
        arguments,
        {"engine_bytes": len(engine), "cached": cached, "gpu": where, "built_by": tensorrt.name},
        f"engine for {where} {told} ({tensorrt.name}).",
    )
    return 0


def run(arguments: argparse.Namespace) -> int:
    from edgecnn.device.evaluate import softmax
    from edgecnn.device.preprocess import normalise, open_image, to_pixels
    from edgecnn.device.runtimes import open_runner

    manifest = _opened(arguments)
    # Every image is read before the model is loaded: a bad file is told at once.
    pixels = [to_pixels(open_image(path), manifest.input) for path in arguments.images]
    answers: list[dict[str, Any]] = []
    with open_runner(arguments.bundle, manifest, threads=arguments.threads, provider=arguments.provider) as runner:
        for path, image in zip(arguments.images, pixels, strict=True):
            probabilities = softmax(runner.infer(normalise(image[None], manifest.input)))[0]
            best = np.argsort(-probabilities, kind="stable")[: arguments.top]
            answers.append(
                {
                    "image": str(path),
                    "top": [{"label": manifest.labels[i], "index": int(i), "probability": float(probabilities[i])} for i in best],
                }
            )
        told = {"provider": runner.provider, "runtime": runner.version}
    text = "\n".join(
        f"{answer['image']}\n" + "\n".join(f"  {entry['probability']:6.1%}  {entry['label']}" for entry in answer["top"])
        for answer in answers
    )
    _print(arguments, {**_identity(manifest), **told, "images": answers}, text)
    return 0


def bench(arguments: argparse.Namespace) -> int:
    from edgecnn.device.bench import measure, summary
    from edgecnn.device.runtimes import import_runtime, open_runner

    manifest = _opened(arguments)
    import_runtime(manifest.runtime)  # before the clock runs: importing is not loading
    # Latency does not depend on the values, but denormals would: noise of the size of real inputs.
    example = np.random.default_rng(0).standard_normal((arguments.batch, *manifest.input.shape)).astype(np.float32)
    result = measure(
        lambda: open_runner(arguments.bundle, manifest, threads=arguments.threads, provider=arguments.provider, batch=arguments.batch),
        example,
        file=manifest.model_file,
        file_sha256=manifest.model_sha256,
        runtime=manifest.runtime,
        threads=arguments.threads,
        batch=arguments.batch,
        min_seconds=arguments.seconds,
    )
    _print(arguments, asdict(result), f"{_line(manifest)}\n{summary(result)}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from edgecnn.device.evaluate import accuracy, infer_all
    from edgecnn.device.packed import open_packed
    from edgecnn.device.runtimes import open_runner

    manifest = _opened(arguments)
    folder = arguments.data or arguments.bundle.resolve().parent.parent / "evaluation"
    if not folder.is_dir():
        raise DataError(f"{folder}: no prepared images there. Copy the folder `evaluation` of the run here and name it with --data.")
    images = open_packed(folder)
    if images.geometry != manifest.input.geometry:
        raise DataError(
            f"{folder}: prepared for another input than {arguments.bundle} takes. Use the images of the run that made the bundle."
        )
    with open_runner(arguments.bundle, manifest, threads=arguments.threads, provider=arguments.provider) as runner:
        logits = infer_all(runner, images, manifest.input)
        told = {"provider": runner.provider, "runtime": runner.version}
    if arguments.logits:
        np.save(arguments.logits, logits)
    got = accuracy(logits, images.labels)
    low, high = got.interval
    where = f"{told['runtime']}, {told['provider']}"
    text = f"{_line(manifest)}\ntop-1 {got.top1:.2%} of {got.n} images (95 % interval {low:.2%} to {high:.2%}), {where}"
    _print(arguments, {**_identity(manifest), **told, **asdict(got), "data_sha256": images.sha256}, text)
    return 0


def _opened(arguments: argparse.Namespace) -> Manifest:
    """Verified before use, always; with --runtime, the same graph for another runtime."""
    manifest = verify_bundle(arguments.bundle)
    if arguments.runtime and manifest.runtime != arguments.runtime:
        if not manifest.model_file.endswith(".onnx"):
            raise UsageError(
                f"{arguments.bundle}: {manifest.model_file} is no ONNX graph, so {arguments.runtime} cannot run it. Leave out --runtime."
            )
        manifest = replace(manifest, runtime=arguments.runtime)
    return manifest


def _identity(manifest: Manifest) -> dict[str, Any]:
    return {"name": manifest.name, "runtime": manifest.runtime, "precision": manifest.precision, "file_sha256": manifest.model_sha256}


def _line(manifest: Manifest) -> str:
    return f"{manifest.name}: {manifest.runtime}, {manifest.precision}, sha256 {manifest.model_sha256[:12]}"


def _print(arguments: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    print(json.dumps(data, ensure_ascii=False) if arguments.json else text)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m edgecnn.device {verify,build,run,bench,eval} BUNDLE`: everything a board does with a bundle.

Results go to stdout, as text or with --json as one JSON object; messages go to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

try:
    import numpy as np
except ModuleNotFoundError:  # the system's own Python on many a board
    print("edgecnn: numpy is not installed. Install it: pip install numpy", file=sys.stderr)
    raise SystemExit(8) from None

from edgecnn.device.bundle import MANIFEST, refuse_inside_a_bundle, verify_bundle
from edgecnn.device.confine import confine
from edgecnn.device.machine import usable_cores
from edgecnn.device.spec import Manifest, Result, read_manifest
from edgecnn.errors import DataError, DeviceError, ResourceError, UsageError, guarded, printable

# For each core. Those who wait spin, so a call takes the longer the more they are: minutes with hundreds.
THREADS_MOST = 16


def main(argv: Sequence[str] | None = None, prog: str = "python -m edgecnn.device", *, own_process: bool = False) -> int:
    """Run one command; with `own_process`, the process ends with it and may confine itself for good."""
    arguments = parser(prog).parse_args(argv)
    arguments.own_process = own_process
    return guarded(lambda: _done(arguments))


def _done(arguments: argparse.Namespace) -> int:
    threads, cores = getattr(arguments, "threads", 1), usable_cores()
    if threads > THREADS_MOST * cores:
        raise DeviceError(f"--threads {threads}: {cores} cores are here, and more threads only wait for each other. Give {cores} at most.")
    code: int = arguments.command(arguments)
    return code


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one line, as every other fault is told, and takes images and options in any order."""

    plain = False  # as argparse does: images in one place

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"edgecnn: {printable(message)}. See `{self.prog} --help`.\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.plain or "--" in (args or ()):  # which the other way forgets
            return super().parse_known_args(args, namespace)
        self.plain = True  # for the other order comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.plain = False


def parser(prog: str, on_boards: Container[str] = ()) -> Parser:
    """The command line of `prog`, whose commands in `on_boards` can be done elsewhere, with `--on`."""
    top = Parser(prog=prog, description="Use a bundle on this machine. Needs numpy and the bundle's runtime.")
    top.plain = True
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        bare = ", or an .onnx or OpenVINO .xml file" if name == "bench" else ""
        sub.add_argument("bundle", type=Path, help=f"folder of the bundle{bare}")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        if name in on_boards:
            sub.add_argument("--on", metavar="BOARD", help="do it there: ssh://user@board[:port], or a name of `edgecnn device list`")
        return sub

    def add_quiet(sub: Parser) -> None:
        sub.add_argument("-q", "--quiet", action="store_true", help="say nothing where all is well")

    def add_running(sub: Parser) -> None:
        sub.add_argument("--threads", type=_threads, default=1, help="threads of the runtime (default 1)")
        sub.add_argument("--provider", help="execution provider (onnxruntime) or device (OpenVINO); refused where it is not there")
        sub.add_argument(
            "--runtime",
            choices=["onnxruntime", "openvino"],
            help="run the bundle's ONNX graph in this runtime instead of its own",
        )

    sub = add("verify", verify, "Check every file of the bundle, or of an .edgecnn archive, against its digest.")
    sub.add_argument("--signer", type=Path, metavar="FILE", help="require a signature by one of this allowed-signers file (ssh-keygen(1))")
    sub.add_argument("--replaces", type=Path, metavar="BUNDLE", help="require it to be newer than this one; takes --signer too")
    add_quiet(sub)
    sub.add_argument("--run", action="store_true", help="also run the golden images: does this board compute what was measured?")
    add_running(sub)
    sub = add("build", build, "Build the TensorRT engine for this machine's GPU and keep it in the cache.")
    add_quiet(sub)
    sub.add_argument("--dla", type=int, choices=range(16), metavar="CORE", help="build for this DLA core instead of the GPU alone")
    sub = add("run", run, "Classify images.")
    sub.add_argument("images", type=Path, nargs="*", default=[], help="image files, or folders of them")
    sub.add_argument("--watch", type=Path, metavar="FOLDER", help="classify every image that comes into the folder from now on")
    sub.add_argument("--camera", metavar="SOURCE", help="classify frames: number of a camera, or a video file or stream, through OpenCV")
    sub.add_argument("--count", type=_positive, help="stop after that many images")
    sub.add_argument("--top", type=_positive, default=5, help="classes to show (default 5)")
    add_running(sub)
    sub = add("bench", bench, "Measure latency in this process: load, first inference, steady state.")
    sub.add_argument("--batch", type=_positive, default=1, help="images per inference (default 1)")
    sub.add_argument("--seconds", "--min-time", type=_seconds, default=2.0, help="steady-state seconds to measure (default 2)")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--profile", action="store_true", help="measure each layer instead")
    what.add_argument(
        "--against", type=Path, metavar="OTHER", help="time it in turns with this one instead: what it takes of the other's time"
    )
    what.add_argument(
        "--distance", action="store_true", help="also measure what this machine could do at most, and how far the model is from it"
    )
    sub.add_argument("--energy", action="store_true", help="also measure energy per inference, by this machine's meters")
    add_running(sub)
    sub = add("eval", evaluate, "Measure top-1 accuracy on prepared images.")
    sub.add_argument("--data", type=Path, help="folder of prepared images (default: `evaluation` in the run folder the bundle lies in)")
    sub.add_argument("--logits", type=Path, help="write the logits there, as .npy")
    add_running(sub)
    sub = add("pack", pack, "Write the bundle as one file, an .edgecnn archive.")
    add_quiet(sub)
    sub.add_argument("--out", type=Path, help="the archive (default: beside the bundle)")
    text = "Check an .edgecnn archive and write its bundle."
    sub = commands.add_parser("unpack", help=text, description=text)
    sub.set_defaults(command=unpack)
    add_quiet(sub)
    sub.add_argument("archive", type=Path, help="file that `pack` made")
    sub.add_argument("--out", type=Path, help="the bundle's folder, not there yet (default: beside the archive)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub = add("sign", sign, "Sign the bundle with an SSH key.")
    add_quiet(sub)
    sub.add_argument("--key", type=Path, required=True, help="private key, or the public one of a key that ssh-agent holds")
    text = "Tell what this machine is, as a measurement records it."
    sub = commands.add_parser("machine", help=text, description=text)
    sub.set_defaults(command=machine)
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def _positive(text: str, most: int = 100_000) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"asked for {text!r}; give a whole number from 1 to {most}")
    return int(text)


def _threads(text: str) -> int:
    return _positive(text, 1024)  # a runtime starts as many as it is told, until the machine hangs


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"asked for {text!r}; give seconds above 0, at most 3600")
    return value


def verify(arguments: argparse.Namespace) -> int:
    if arguments.bundle.suffix == ".edgecnn" and arguments.bundle.is_file():
        return _verify_packed(arguments)
    manifest = verify_bundle(arguments.bundle)
    signed = _signed(arguments, manifest)
    told = {"verified": True, **_identity(manifest), **signed}
    text = f"{arguments.bundle}: every file is as it was made ({_line(manifest)})."
    text += _about_signature(signed)
    if arguments.run:
        from edgecnn.device.golden import compare_golden
        from edgecnn.device.runtimes import open_runner

        manifest = _opened(arguments.bundle, arguments.runtime)
        _confine(arguments, manifest)
        with open_runner(arguments.bundle, manifest, threads=arguments.threads, provider=arguments.provider) as runner:
            found, about = compare_golden(arguments.bundle, manifest, runner)
            here = f"{runner.version}, {runner.provider}"
        how_far = (
            f"its logits differ by {found.error:.2g} of their standard deviation ({found.largest:.2g} at most), {found.bound:g} is allowed "
            f"for {manifest.precision}; the best class is the same for {found.agreement:.0%} of {found.n} golden images"
        )
        if not found.same:
            raise DeviceError(
                f"{arguments.bundle}: {here} computes something else here than {about['where']}: {how_far}. "
                "Do not use it here: try another version of the runtime, another provider, or the bundle of another target."
            )
        told |= {"golden": {**asdict(found), "same": found.same, "runtime": here, "expected_of": about["where"]}}
        text += f"\n{here} computes what {about['where']} did: {how_far}."
    _print(arguments, told, text)
    return 0


def _signed(arguments: argparse.Namespace, manifest: Manifest) -> dict[str, str]:
    """Who signed, where it is asked for; otherwise whether there is a signature and it is whole."""
    from edgecnn.device.signature import check_newer, signature_state, verify_signature

    if not arguments.signer:
        if arguments.replaces:
            raise UsageError("--replaces without --signer: anybody could have written a newer date. Name the allowed-signers file too.")
        return {"signature": signature_state(arguments.bundle)}
    signer = verify_signature(arguments.bundle, arguments.signer)
    if arguments.replaces:
        check_newer(manifest, verify_bundle(arguments.replaces))
    return {"signature": "whole", "signer": signer.principals, "signer_key": signer.key}


def _about_signature(signed: dict[str, str]) -> str:
    """The line that says what `_signed` found; nothing where there is no signature and none was asked for."""
    if "signer" in signed:
        from edgecnn.device.signature import Signer

        return f"\nSigned by {Signer(signed['signer'], signed['signer_key'])}."
    return {
        "none": "",
        "whole": "\nIt is signed, by whom was not asked: name the file of those you trust with --signer.",
        "unchecked": "\nIts signature was not checked: that is the work of ssh-keygen, which is not here.",
    }[signed["signature"]]


def _verify_packed(arguments: argparse.Namespace) -> int:
    from edgecnn.device.archive import verify_archive

    if arguments.signer or arguments.replaces or arguments.run:
        raise UsageError(f"{arguments.bundle}: an archive. Unpack it first: only a folder is verified with --signer, --replaces or --run.")
    files, state = verify_archive(arguments.bundle)
    text = f"{arguments.bundle}: all {files} files are as they were packed.{_about_signature({'signature': state})}"
    _print(arguments, {"verified": True, "files": files, "signature": state}, text)
    return 0


def pack(arguments: argparse.Namespace) -> int:
    from edgecnn.device.archive import SUFFIX, pack

    folder = Path(os.path.realpath(arguments.bundle))  # of a link that leads to itself, too
    out = arguments.out or folder.with_name(folder.name + SUFFIX)
    refuse_inside_a_bundle(out, "--out")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder. Make it, or name another place.")
    digest = pack(arguments.bundle, out)
    _print(arguments, {"archive": str(out), "sha256": digest, "size_bytes": out.stat().st_size}, f"{out}: packed, sha256 {digest}.")
    return 0


def unpack(arguments: argparse.Namespace) -> int:
    from edgecnn.device.archive import SUFFIX, unpack

    folder = arguments.out or arguments.archive.with_suffix("")
    if not arguments.out and arguments.archive.suffix != SUFFIX:
        raise UsageError(f"{arguments.archive}: does not end in {SUFFIX}. Name the folder to unpack to with --out.")
    refuse_inside_a_bundle(folder, "--out")
    manifest = unpack(arguments.archive, folder)
    text = f"{folder}: unpacked, every file is as it was made ({_line(manifest)})."
    _print(arguments, {"bundle": str(folder), "verified": True, **_identity(manifest)}, text)
    return 0


def sign(arguments: argparse.Namespace) -> int:
    from edgecnn.device.signature import sign_bundle

    path = sign_bundle(arguments.bundle, arguments.key)
    _print(arguments, {"signature": str(path)}, f"{path}: signed.")
    return 0


def build(arguments: argparse.Namespace) -> int:
    manifest = verify_bundle(arguments.bundle)
    if manifest.runtime != "tensorrt":
        raise UsageError(f"{arguments.bundle}: a bundle for {manifest.runtime} needs no build. Use `run`, `eval` or `bench` as it is.")
    from edgecnn.device.cuda import Gpu
    from edgecnn.device.tensorrt import cached_engine, load_tensorrt

    tensorrt, gpu = load_tensorrt(), Gpu()
    where = f"{gpu.name} {gpu.compute_capability}"
    engine = cached_engine(
        tensorrt,
        arguments.bundle / manifest.model_file,
        manifest.model_sha256,
        where,
        batch=1,
        precision=manifest.precision,
        dla=arguments.dla,
    )
    told = "was in the cache" if engine.cached else "built"
    fallen = "" if arguments.dla is None else f"\nOn the GPU and not on DLA {arguments.dla}: {', '.join(engine.on_gpu) or 'no layer'}."
    _print(
        arguments,
        {"engine_bytes": len(engine.plan), "cached": engine.cached, "gpu": where, "built_by": tensorrt.name, "on_gpu": engine.on_gpu},
        f"engine for {where} {told} ({tensorrt.name}).{fallen}",
    )
    return 0


def run(arguments: argparse.Namespace) -> int:
    from itertools import islice

    from edgecnn.device import feed
    from edgecnn.device.evaluate import softmax
    from edgecnn.device.model import Model
    from edgecnn.device.runtimes import open_runner

    if sum(map(bool, (arguments.images, arguments.watch, arguments.camera))) != 1:
        raise UsageError("run takes images, or --watch FOLDER, or --camera SOURCE: give one of the three.")
    manifest = _opened(arguments.bundle, arguments.runtime)
    endless = arguments.watch or arguments.camera
    named = feed.watch(arguments.watch) if arguments.watch else feed.camera(arguments.camera) if endless else feed.files(arguments.images)
    answers: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    if not endless:
        _confine(arguments, manifest)
    with open_runner(arguments.bundle, manifest, threads=arguments.threads, provider=arguments.provider) as runner:
        model = Model(manifest, runner)
        told = {**_identity(manifest), "provider": runner.provider, "runtime": runner.version}
        for name, image in islice(named, arguments.count):
            try:
                probabilities = softmax(model.logits(image))
            except DataError as fault:  # costs the answer for this image, and no other's
                told_of = str(fault) if isinstance(image, Path) else f"{name}: {fault}"
                refused.append({"image": name, "fault": told_of})
                print(f"edgecnn: {printable(told_of)}", file=sys.stderr, flush=True)
                continue
            best = np.argsort(-probabilities, kind="stable")[: arguments.top]
            top = [{"label": manifest.labels[i], "index": int(i), "probability": float(probabilities[i])} for i in best]
            answers.append({"image": name, "top": top})
            if endless or not arguments.json:
                _print(arguments, {**told, "images": [answers.pop()]}, _classes(name, top))
                sys.stdout.flush()
    if arguments.json and not endless:
        _print(arguments, {**told, "images": answers, "refused": refused}, "")
    return DataError.exit_code if refused and not endless else 0


def _classes(name: str, top: list[dict[str, Any]]) -> str:
    return "\n".join([printable(name), *(f"  {entry['probability']:6.1%}  {printable(entry['label'])}" for entry in top)])


def bench(arguments: argparse.Namespace) -> int:
    from edgecnn.device.bench import measure, summary
    from edgecnn.device.meters import meters
    from edgecnn.device.runtimes import import_runtime, open_runner

    folder, manifest, example = _to_measure(arguments.bundle, arguments)
    import_runtime(manifest.runtime)  # before the clock runs: importing is not loading
    if arguments.against:
        return _in_turns(arguments, folder, manifest, example)
    _confine(arguments, manifest, *([Path(tempfile.gettempdir())] if arguments.profile or arguments.distance else []))
    if arguments.profile:
        from edgecnn.device.profile import profile, table

        layers = profile(folder, manifest, example, threads=arguments.threads, provider=arguments.provider, seconds=arguments.seconds)
        _print(arguments, asdict(layers), f"{_line(manifest)}\n{table([layers])}")
        return 0

    def measured(seconds: float) -> Result:
        return measure(
            lambda: open_runner(folder, manifest, threads=arguments.threads, provider=arguments.provider, batch=arguments.batch),
            example,
            file=manifest.model_file,
            file_sha256=manifest.model_sha256,
            runtime=manifest.runtime,
            threads=arguments.threads,
            batch=arguments.batch,
            min_seconds=seconds,
            meters=meters() if arguments.energy else None,
        )

    if arguments.distance:
        from edgecnn.device.limit import distance, text

        if arguments.provider not in (None, "CPUExecutionProvider", "CPU"):
            raise UsageError(f"--distance: known for the CPU only, asked for {arguments.provider!r}. Leave out --distance.")
        far = distance(folder, manifest, example, measured, arguments.seconds, arguments.threads)
        _print(arguments, asdict(far), f"{_line(manifest)}\n{text(far)}")
        return 0
    result = measured(arguments.seconds)
    _print(arguments, asdict(result), f"{_line(manifest)}\n{summary(result)}")
    return 0


def _to_measure(path: Path, arguments: argparse.Namespace) -> tuple[Path, Manifest, np.ndarray]:
    """Of a bundle or a bare model file: its folder, its manifest, and images as it takes them."""
    from edgecnn.device.graph import bare_manifest
    from edgecnn.device.preprocess import to_input

    bare = path.is_file()
    manifest = bare_manifest(path, arguments.runtime) if bare else _opened(path, arguments.runtime)
    # Latency does not depend on the values, but denormals would: noise of the size of real inputs.
    spec = manifest.input
    _check_memory(arguments.batch, spec.example_size[0] * spec.example_size[1] * spec.channels)
    pixels = np.random.default_rng(0).integers(0, 256, (arguments.batch, *spec.example_size, spec.channels), np.uint8)
    return path.parent if bare else path, manifest, to_input(pixels, spec, manifest.takes)


def _in_turns(arguments: argparse.Namespace, folder: Path, manifest: Manifest, example: np.ndarray) -> int:
    """`bench --against`."""
    from edgecnn.device.bench import share, take_turns
    from edgecnn.device.runtimes import open_runner

    other_folder, other, other_example = _to_measure(arguments.against, arguments)
    if manifest.runtime != other.runtime:
        raise UsageError(f"--against {arguments.against}: for {other.runtime}, not {manifest.runtime}. Name one of the same runtime.")
    _confine(arguments, manifest)
    options: dict[str, Any] = {"threads": arguments.threads, "provider": arguments.provider, "batch": arguments.batch}
    with open_runner(folder, manifest, **options) as runner, open_runner(other_folder, other, **options) as other_runner:
        samples, others = take_turns([(runner, example), (other_runner, other_example)], arguments.seconds)
    told = {
        "file_sha256": manifest.model_sha256,
        "against_sha256": other.model_sha256,
        "threads": arguments.threads,
        "batch": arguments.batch,
        "samples_s": samples,
        "against_s": others,
    }
    text = f"{_line(manifest)}\ntakes {share(samples, others):.3f} of the time of {printable(other.name)}, sha256 {other.model_sha256[:12]}"
    _print(arguments, told, f"{text} ({len(samples)} calls of each in turns)")
    return 0


def _check_memory(batch: int, numbers: int) -> None:
    """Refuse a batch whose images alone do not fit: filling memory until the kernel kills somebody would tell nobody why."""
    from edgecnn.device.machine import memory

    needed, free = batch * numbers * (1 + 4), memory().get("MemAvailable")  # bytes as they are made, and as floats
    if free is not None and needed > free:
        raise ResourceError(
            f"--batch {batch}: its images alone take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free. Give a smaller batch."
        )


def machine(arguments: argparse.Namespace) -> int:
    from edgecnn.device.machine import circumstances, identity

    told = {**circumstances(), "identity": identity()}
    lines = [f"{key}: {value}" for key, value in told.items() if key not in ("now", "identity", "versions")]
    _print(arguments, told, "\n".join([*lines, *(f"{name}: {version}" for name, version in told["versions"].items())]))
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from edgecnn.device.evaluate import accuracy, infer_all
    from edgecnn.device.packed import open_packed
    from edgecnn.device.runtimes import open_runner

    manifest = _opened(arguments.bundle, arguments.runtime)
    folder = evaluation_set(arguments)
    if arguments.logits and not arguments.logits.parent.is_dir():
        raise UsageError(f"--logits {arguments.logits}: there is no folder {arguments.logits.parent}. Make it, or name another file.")
    if arguments.logits:
        refuse_inside_a_bundle(arguments.logits, "--logits")
        if folder.resolve() in arguments.logits.resolve().parents:
            raise UsageError(f"--logits {arguments.logits}: lies among the prepared images. Name another place.")
    images = open_packed(folder, check=True)
    if images.geometry != manifest.input.geometry:
        raise DataError(
            f"{folder}: prepared for another input than {arguments.bundle} takes. Use the images of the run that made the bundle."
        )
    _confine(arguments, manifest, *([arguments.logits.parent] if arguments.logits else []))
    with open_runner(arguments.bundle, manifest, threads=arguments.threads, provider=arguments.provider) as runner:
        logits = infer_all(runner, images, manifest.input)
        told = {"provider": runner.provider, "runtime": runner.version}
    if arguments.logits:
        try:
            with arguments.logits.open("wb") as file:  # numpy would add .npy to a bare name
                np.save(file, logits)
        except OSError as error:
            raise ResourceError(f"--logits {arguments.logits}: cannot be written ({error.strerror}). Name another place.") from None
    got = accuracy(logits, images.labels)
    low, high = got.interval
    where = f"{told['runtime']}, {told['provider']}"
    text = f"{_line(manifest)}\ntop-1 {got.top1:.2%} of {got.n} images (95 % interval {low:.2%} to {high:.2%}), {where}"
    text += f"\n{arguments.logits}: logits {logits.shape[0]} x {logits.shape[1]}, float32." if arguments.logits else ""
    _print(arguments, {**_identity(manifest), **told, **asdict(got), "data_sha256": images.sha256}, text)
    return 0


def evaluation_set(arguments: argparse.Namespace) -> Path:
    """The folder of prepared images that is meant."""
    name = "evaluation" if arguments.data else read_manifest(arguments.bundle / MANIFEST).input.evaluation_name
    folder: Path = arguments.data or arguments.bundle.resolve().parent.parent / name
    if not folder.is_dir():
        raise DataError(f"{folder}: no prepared images there. Copy the folder `{name}` of the run here and name it with --data.")
    return folder


def _confine(arguments: argparse.Namespace, manifest: Manifest, *writable: Path) -> None:
    """Before a model file is parsed: from here on this process writes nowhere else. GPUs and their caches need more than that."""
    if arguments.own_process and manifest.runtime != "tensorrt" and not arguments.provider:
        confine(writable=writable)


def _opened(bundle: Path, runtime: str | None) -> Manifest:
    """Verified before use, always; with --runtime, the same graph for another runtime."""
    manifest = verify_bundle(bundle)
    if runtime and manifest.runtime != runtime:
        if not manifest.model_file.endswith(".onnx"):
            raise UsageError(f"{bundle}: {manifest.model_file} is no ONNX graph, so {runtime} cannot run it. Leave out --runtime.")
        # A graph of floats is run in them: OpenVINO's own choice on CPUs that have it is bf16.
        options = {"INFERENCE_PRECISION_HINT": "f32"} if runtime == "openvino" else {}
        manifest = replace(manifest, runtime=runtime, options=options)
    return manifest


def _identity(manifest: Manifest) -> dict[str, Any]:
    return {"name": manifest.name, "runtime": manifest.runtime, "precision": manifest.precision, "file_sha256": manifest.model_sha256}


def _line(manifest: Manifest) -> str:
    return f"{printable(manifest.name)}: {manifest.runtime}, {manifest.precision}, sha256 {manifest.model_sha256[:12]}"


def _print(arguments: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    if getattr(arguments, "quiet", False) and not arguments.json:
        return
    # Names of files need not be text, and labels may be a stranger's: neither may stop the output or reach the terminal's ears.
    print(json.dumps(data) if arguments.json else printable(text, breaks="\n"))


if __name__ == "__main__":
    sys.exit(main(own_process=True))

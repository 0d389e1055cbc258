"""Attempts at a tiny run that end at a chosen instant: a warm process forks one child an attempt, and the child is killed or hindered.

    python attempts.py RECIPE OUT

reads one JSON object a line, `{fault, covered, after_s, at}`, and answers one a line. `fault` is kill, a signal's name or an errno's, or
null. It strikes at the first write, rename, fsync, removal or new folder below OUT whose label is not in `covered`, with `after_s`
after that time, or, with `inject`, where strace is told to: it is what follows `-e inject=`, and the log is `OUT/../strace`.
A label is the operation and the file's name without its random part, with a count where it occurs again.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

# One small target; three epochs, so that there is a checkpoint to go on from.
SETTINGS = [
    "targets=[{name: pi, runtime: onnxruntime, precision: fp32}]",
    "stages=[{stage: train, epochs: 3, batch: 8, lr: 0.02, augment: none}]",
    "promise={accuracy_drop: 1.0}",
]
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "os.link")


class Points:
    """Counts what happens below a folder, and strikes at the first event that is not covered yet."""

    def __init__(self, out: Path, covered: set[str], fault: str | None) -> None:
        self.out, self.covered, self.fault = str(out), covered, fault
        self.seen: dict[str, int] = {}
        self.labels: list[str] = []
        self.struck: str | None = None
        self.busy = False

    def event(self, name: str, path: Any) -> None:
        try:
            text = os.fsdecode(path)
        except TypeError:
            return
        if self.busy or self.struck or not os.path.abspath(text).startswith(self.out):  # noqa: PTH100  Path would be an event
            return
        base = f"{name} {plain(os.path.relpath(text, self.out))}"
        self.seen[base] = self.seen.get(base, 0) + 1
        label = f"{base} #{self.seen[base]}"
        self.labels.append(label)
        if self.fault and label not in self.covered:
            self.struck = label
            self.strike(text)

    def strike(self, path: str) -> None:
        if self.fault == "kill":
            self.tell()
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault in ("SIGINT", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, self.fault))
        elif self.fault:
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number), path)

    def tell(self) -> None:
        self.busy = True
        os.write(3, json.dumps({"struck": self.struck, "labels": self.labels}).encode())

    def watch(self) -> None:
        def hook(name: str, arguments: tuple[Any, ...]) -> None:
            if name == "open":
                path, mode, flags = arguments
                if (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (mode and set(str(mode)) & set("wax+")):
                    self.event("write", path)
            elif name in EVENTS:
                self.event(name.removeprefix("os."), arguments[1] if name in ("os.rename", "os.symlink") else arguments[0])

        sys.addaudithook(hook)
        real = os.fsync

        def fsync(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            self.event("fsync", os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115
            real(file)

        os.fsync = fsync  # type: ignore[assignment]


def plain(name: str) -> str:
    """A path without what is random or long in it: the random part of temporary names, the key of a step."""
    name = re.sub(r"\.[a-z0-9_]{8}\.tmp", ".tmp", name)
    return re.sub(r"-([0-9a-f]{4})[0-9a-f]{20}", r"-\1", name)


def attempt(recipe: Path, out: Path, job: dict[str, Any]) -> NoReturn:
    """One run of the recipe, as `edgecnn compress` does it."""
    from edgecnn import store
    from edgecnn.errors import guarded
    from edgecnn.pipeline import compress
    from edgecnn.recipe import load_recipe
    from edgecnn.screen import Screen

    os.setpgid(0, 0)
    store.MIN_FREE_BYTES = 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    points = Points(out, set(job.get("covered", ())), job.get("fault") if "after_s" not in job else None)
    points.watch()

    def run() -> int:
        compress(
            load_recipe(recipe, [*SETTINGS, *job.get("settings", [])]), recipe.read_text(), out, "edgecnn compress", Screen(quiet=True)
        )
        return 0

    code = guarded(run)
    points.tell()
    sys.stderr.flush()
    os._exit(code)


def warm() -> None:
    """What every attempt would do anew and no file comes from: the imports, torch's table of ONNX operators, the page's template.

    It is most of the time of so small a run. What draws the charts is left to the attempts: it has threads, which no fork survives.
    """
    import timm.scheduler  # noqa: F401
    import tiny
    import torch
    import torchvision  # noqa: F401
    from torch.onnx._internal.exporter import _registration

    import edgecnn.pipeline  # noqa: F401
    from edgecnn.report.page import _template
    from edgecnn.targets.onnx import export_onnx

    torch.set_num_threads(1)
    registry = _registration.ONNXRegistry
    registry.from_torchlib = staticmethod(cache(registry.from_torchlib))  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(tiny.trained(), Path(folder) / "model.onnx")
    _template("page.html.j2")


def main() -> None:
    recipe, out = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(Path(__file__).parent))
    os.chdir(Path(__file__).parent)
    tempfile.tempdir = str(out.parent / "tmp")
    from traced import attached

    warm()
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what an attempt leaves behind comes to us, to be counted
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        held, release = os.pipe()
        errors = os.open(out.parent / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        pid = os.fork()
        if pid == 0:
            os.dup2(errors, 2)
            os.dup2(writer, 3)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.close(release)
            os.read(held, 1)  # until strace has attached, where it does
            try:
                attempt(recipe, out, job)
            finally:
                os._exit(70)
        os.close(writer)
        os.close(held)
        begun = time.monotonic()
        inject = ["-e", f"inject={job['inject']}"] if job.get("inject") else []
        tracer = attached(pid, out.parent / "strace", *inject) if "inject" in job else nullcontext()
        tracer.__enter__()
        os.close(release)
        if "after_s" in job:
            watch = os.pidfd_open(pid)
            if not select.select([watch], [], [], job["after_s"])[0]:  # it has not ended before
                os.kill(pid, signal.SIGKILL if job["fault"] == "kill" else getattr(signal, job["fault"]))
            os.close(watch)
        told = b""
        while block := os.read(reader, 1 << 16):
            told += block
            if told.endswith(b"}"):
                break
        _, status = os.waitpid(pid, 0)
        os.close(reader)
        left = orphans(pid)
        tracer.__exit__(None, None, None)
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begun, "orphans": left}
        answer["stderr"] = (out.parent / "stderr").read_text()
        answer |= json.loads(told) if told else {}
        os.close(errors)
        print(json.dumps(answer), flush=True)


def orphans(group: int) -> int:
    """How many processes of an attempt are still there a second after it; ends them."""
    end = time.monotonic() + 2
    while True:
        try:
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return 0
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    left = 0
    try:
        os.killpg(group, signal.SIGKILL)
        while True:
            os.waitpid(-group, 0)
            left += 1
    except (ChildProcessError, ProcessLookupError):
        return left


if __name__ == "__main__":
    main()

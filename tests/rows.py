"""A process that has imported what our tests need but nothing of ours, and forks a child for each run of pytest that it is asked for.

    python rows.py

reads one JSON object a line, `{folder, arguments, level, most_s}`, runs `pytest ARGUMENTS` in the folder, which comes first in its path,
and answers `{code, said}`; the code is null where the time was up.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
from typing import Any, NoReturn

import onnx
import onnxruntime
import onnxslim
import PIL.Image
import pydantic
import pytest
import rich
import timm.scheduler
import torch
import torch.onnx
import torchvision
import typer
import xdist
import yaml

WARM = (onnx, onnxruntime, onnxslim, PIL, pydantic, rich, timm, torch, torchvision, typer, xdist, yaml)


def row(job: dict[str, Any], said: int) -> NoReturn:
    """One run of pytest, in a session of its own."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(job["folder"])
    sys.path.insert(0, job["folder"])
    os.environ |= {"PYTHONPATH": job["folder"], "FAULTS": job["level"]}
    code = 70
    try:
        code = int(pytest.main(job["arguments"]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryFile() as said:
            pid = os.fork()
            if pid == 0:
                row(job, said.fileno())
            watch = os.pidfd_open(pid)
            ended, _, _ = select.select([watch], [], [], job["most_s"])
            os.close(watch)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            said.seek(0)
            answer = {"code": os.waitstatus_to_exitcode(status) if ended else None, "said": said.read().decode("utf-8", "replace")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""What OpenVINO must not leave behind in the process: here, a signal stack that is freed memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CPU = Path("/proc/cpuinfo")

# Two runners, closed in the order of opening: the plugin's own way of setting back the stack goes wrong then.
SCRIPT = """
import gc, signal, subprocess, sys
from pathlib import Path
import numpy as np
from edgecnn.device.peaks import convolution
from edgecnn.device.runtimes.ov import OpenvinoRunner

Path(sys.argv[1]).write_bytes(convolution("float32", 8, 8, 3)[0])
signal.signal(signal.SIGCHLD, lambda *_: None)
runners = [OpenvinoRunner(Path(sys.argv[1]), threads=1, device="CPU", batch=1, options={}) for _ in range(3)]
for runner in runners:
    with runner:
        runner.infer(np.zeros((1, 8, 8, 8), np.float32))
    del runner
while runners:
    del runners[0]
    gc.collect()
subprocess.run([sys.executable, "-c", ""], check=True)
print("alive")
"""


@pytest.mark.skipif(not CPU.exists() or "amx_tile" not in CPU.read_text(), reason="OpenVINO sets a signal stack on CPUs with AMX only")
def test_a_signal_after_openvino_does_not_end_the_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "m.onnx")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr

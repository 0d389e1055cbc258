"""Logits of one model file on one prepared set, in a process of its own.

python evaluate.py FILE RUNTIME INPUT.json SET LOGITS.npy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from edgecnn.device.evaluate import infer_all
from edgecnn.device.graph import bare_manifest
from edgecnn.device.packed import open_packed
from edgecnn.device.runtimes import open_runner
from edgecnn.device.spec import InputSpec
from edgecnn.errors import guarded


def main() -> int:
    file, runtime, spec, images, logits = sys.argv[1:]
    manifest = bare_manifest(Path(file), runtime)
    with open_runner(Path(file).parent, manifest, threads=1) as runner:
        np.save(logits, infer_all(runner, open_packed(Path(images)), InputSpec.from_json(json.loads(Path(spec).read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Several processes train what one would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from edgecnn.data import load_data
from edgecnn.recipe import load_recipe

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*words: object) -> None:
    paths = os.pathsep.join([str(ROOT), str(tiny.HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=tiny.HERE, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["tiny", pytest.param("mobilenetv3", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_does(kind: str, tmp_path: Path) -> None:
    """After 20 steps of the same global batch, mixup and batch norm included, the weights are the same within 1e-4."""
    recipe = tiny.write_recipe(tmp_path)
    assert len(load_data(load_recipe(recipe).data, 0).train) == 48
    run("two.py", recipe, kind, tmp_path / "one")
    run(*TORCHRUN, "two.py", recipe, kind, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    moved = 0
    for name, tensor in one.items():
        # Statistics of layers are not weights, and can be of any size.
        assert torch.allclose(two[name].float(), tensor.float(), atol=1e-4, rtol=1e-3 if "running" in name else 0), name
        moved += not torch.equal(two[name], tensor)
    assert moved  # the sums are rounded in another order: nothing of one was given to the other


def test_a_whole_run_by_two_processes(tmp_path: Path) -> None:
    """torchrun and the usual command: both train, the first does the rest, prunes alone, and ends with one verdict and one run folder."""
    recipe = tiny.write_recipe(tmp_path)
    stages = "  - {stage: prune, ratio: 0.3}\n  - {stage: distil, epochs: 2, batch: 8}\n"
    recipe.write_text(recipe.read_text().replace("targets:", stages + "targets:", 1).replace("accuracy_drop: 0.25", "accuracy_drop: 1.0"))
    lines = [line for line in recipe.read_text().splitlines() if "openvino" not in line and "tensorrt" not in line]
    recipe.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    run(*TORCHRUN, "-m", "edgecnn", "compress", "--recipe", recipe, "--out", out)
    assert (out / "result.json").is_file()
    assert len(list((out / "store").glob("stage-[0-9a-f]*"))) == 3
    before = (out / "result.json").stat().st_mtime_ns
    run(*TORCHRUN, "-m", "edgecnn", "compress", "--recipe", recipe, "--out", out)
    assert (out / "result.json").stat().st_mtime_ns > before
    assert '"resumed": true' in (out / "result.json").read_text()

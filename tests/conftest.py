"""Shared by all tests: one torch thread, so that parallel test processes do not fight for cores; where the measuring data lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and checkpoints beside the checkout; a test that needs it skips where it is absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs the measuring data at {SHARED}, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every target starts from, made by the tiny network: model.onnx, half.onnx, and the image sets calibration and evaluation."""
    from tiny import prepare

    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny recipe taken through all three targets; not to be changed. Its recipe is `../tiny.yaml`."""
    from tiny import write_recipe

    from edgecnn.pipeline import compress
    from edgecnn.recipe import load_recipe
    from edgecnn.screen import Screen

    recipe = write_recipe(tmp_path_factory.mktemp("finished"))
    out = recipe.parent / "out"
    compress(load_recipe(recipe), recipe.read_text(), out, "edgecnn compress", Screen(quiet=True))
    return out

"""Shared by all tests: one torch thread, so that parallel test processes do not fight for cores; where the measuring data lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of real photos and checkpoints beside the checkout; a test that needs it skips where it is absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs the measuring data at {SHARED}, which is not there")
    return SHARED

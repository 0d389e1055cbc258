"""What every peer's script shares: its command line. Needs numpy only, because each peer runs in an environment of its own.

    PYTHON SCRIPT WAY MODEL.onnx CALIBRATION.npy FOLDER

CALIBRATION.npy is N x C x H x W, float32, as the model takes it. The way writes FOLDER/model.onnx, or FOLDER/model.xml with its .bin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

INPUT = "input"  # edgecnn's exports call it so; `main` checks
Way = Callable[[Path, np.ndarray, Path], None]


def main(ways: dict[str, Way]) -> None:
    way, graph, images, out = sys.argv[1:]
    Path(out).mkdir(parents=True, exist_ok=True)
    ways[way](Path(graph), np.load(images), Path(out))


def feeds(images: np.ndarray, name: str) -> Iterator[dict[str, np.ndarray]]:
    """One image at a time, as onnxruntime is fed."""
    for i in range(len(images)):
        yield {name: images[i : i + 1]}


class Reader:
    """The images as onnxruntime's CalibrationDataReader, whose interface Quark and Neural Compressor use too."""

    def __init__(self, images: np.ndarray, name: str) -> None:
        self.images, self.name = images, name
        self.rewind()

    def rewind(self) -> None:
        self.left = feeds(self.images, self.name)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)

    def __len__(self) -> int:
        return len(self.images)

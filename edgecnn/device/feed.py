"""Where `run` takes its images from: files, folders, a folder that others drop files into, or a camera. It opens them itself."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgecnn.errors import DataError, DeviceError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
Named = Iterator[tuple[str, "Path | Image.Image"]]


def files(paths: Sequence[Path]) -> Named:
    """Each file, and each image file directly in each folder, by name.

    Raises:
        DataError: a folder has no image in it; before anything is yielded.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if os.path.isdir(path) else [path]  # noqa: PTH112  Path.is_dir raises where a name is too long
        if not inside:
            raise DataError(f"{path}: no image file in it ({' '.join(SUFFIXES)}). Name the folder that holds the images themselves.")
        found += inside
    return ((str(path), path) for path in found)


def watch(folder: Path, *, sleep: Callable[[float], None] = time.sleep, every_s: float = 0.25) -> Named:
    """Image files that come into `folder` from now on, without end, each when its size and time stand still for one look."""
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder, so it cannot be watched. Make it first.")
    done = _seen(folder)
    before: dict[str, tuple[int, int]] = {}
    while True:
        sleep(every_s)
        now = _seen(folder)
        for name, state in sorted(now.items()):
            if done.get(name) != state and before.get(name) == state:
                done[name] = state
                yield str(folder / name), folder / name
        before, done = now, {name: state for name, state in done.items() if name in now}


def _seen(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each image file in the folder."""
    try:
        with os.scandir(folder) as entries:
            images = [e for e in entries if Path(e.name).suffix.lower() in SUFFIXES and not e.name.startswith(".")]
    except FileNotFoundError:
        raise DataError(f"{folder}: is gone, so it cannot be watched any more. Make it again, and start again.") from None
    seen = {}
    for entry in images:
        try:
            about = entry.stat()
        except OSError:  # gone since, or a link that leads to itself or to nowhere
            continue
        seen[entry.name] = (about.st_size, about.st_mtime_ns)
    return seen


def camera(source: str) -> Named:
    """Frames of a camera by its number, or of a video file or stream, through OpenCV, until there are no more.

    Raises:
        DeviceError: OpenCV is not installed, or does not open it.
    """
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError:
        raise DeviceError("--camera needs OpenCV, which is not installed. Install it: pip install opencv-python-headless") from None
    from PIL import Image

    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    try:
        if not capture.isOpened():
            raise DeviceError(f"--camera {source}: OpenCV cannot open it. Check the number, and that no other program has the camera.")
        number = 0
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield f"{source}#{number}", Image.fromarray(frame[:, :, ::-1])  # OpenCV's colours are blue, green, red
            number += 1
    finally:
        capture.release()

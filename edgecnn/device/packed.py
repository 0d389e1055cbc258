"""Images prepared for one input geometry: what calibration and evaluation read, on the host and on the board.

A folder of `images.npy` (uint8, N x H x W x C, not normalised), `labels.npy` (int64) and `set.json`, which is written
last: a folder without it is not a set. Format history of `set.json`:
    1   2026-11: first. sha256 is over the images' bytes and then the labels' as little-endian int64.
    2   2026-11: of images of any size, `images.npy` has all their bytes in one row and `sizes` their heights and widths; the sha256 is over
        the sizes too, as little-endian int64, last. Sets of one size stay as they were.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgecnn.device.files import fsync_folder, write_atomically
from edgecnn.errors import IntegrityError, is_the_machines

SCHEMA = 2
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, eq=False)
class Packed:
    """An opened set.

    Attributes:
        images: uint8, N x H x W x C, mapped from the file and read-only; where sizes differ, all bytes in one row: read them by `one`.
        labels: int64, N.
        ids: one an image, unique.
        geometry: the part of the InputSpec that decided the pixels (`InputSpec.geometry`).
        sha256: over images and labels.
        sizes: int64, N x 2, height and width of each; None where `geometry` has them.
    """

    folder: Path
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    ids: tuple[str, ...]
    geometry: dict[str, Any]
    sha256: str
    sizes: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def one(self, i: int) -> npt.NDArray[np.uint8]:
        """Image `i` as a batch, 1 x H x W x C."""
        if self.sizes is None:
            return self.images[i : i + 1]
        start, size = (int(part.prod(1).sum()) * self.geometry["channels"] for part in (self.sizes[:i], self.sizes[i : i + 1]))
        return self.images[start : start + size].reshape(1, *self.sizes[i], self.geometry["channels"])


def write_packed(
    folder: Path, ids: Sequence[str], labels: npt.NDArray[np.int64], pixels: Iterable[npt.NDArray[np.uint8]], geometry: dict[str, Any]
) -> Packed:
    """Stream prepared images into `folder`, replacing a set that is there; memory holds one image at a time.

    At any instant the folder holds the old set, no set or the new one.

    Args:
        folder: is made where it is missing.
        ids: N names, unique.
        labels: N.
        pixels: N arrays, uint8, H x W x C, in the order of `ids`.
        geometry: `InputSpec.geometry`.
    """
    given = (geometry["height"], geometry["width"])
    sizes: list[tuple[int, int]] = []
    if not ids or len(set(ids)) != len(ids) or len(labels) != len(ids):
        raise ValueError(f"{len(ids)} ids ({len(set(ids))} different) with {len(labels)} labels")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "set.json").unlink(missing_ok=True)
    fsync_folder(folder)
    digest = hashlib.sha256()
    partial = folder / "images.npy.tmp"
    with partial.open("wb") as out:
        _write_header(out, (0,) if None in given else (len(ids), *given, geometry["channels"]))
        for image in pixels:
            size = image.shape[:2] if None in given else given
            if image.shape != (*size, geometry["channels"]) or image.dtype != np.uint8:
                raise ValueError(f"image {len(sizes)} is {image.dtype} {image.shape}, not uint8 {size} x {geometry['channels']}")
            data = image.tobytes()
            digest.update(data)
            out.write(data)
            sizes.append(size)
        if len(sizes) != len(ids):
            raise ValueError(f"{len(sizes)} images for {len(ids)} ids")
        if None in given:
            out.seek(0)
            _write_header(out, (sum(height * width for height, width in sizes) * geometry["channels"],))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(folder / "images.npy")
    little = np.asarray(labels, dtype="<i8")
    digest.update(little.tobytes())
    npy = io.BytesIO()
    np.save(npy, little)
    write_atomically(folder / "labels.npy", npy.getvalue())  # and settles the folder, before the file that vouches for both
    about = {"schema": 1, "count": len(ids), "geometry": geometry, "ids": list(ids)}
    if None in given:
        about |= {"schema": 2, "sizes": sizes}
        digest.update(np.asarray(sizes, "<i8").tobytes())
    about["sha256"] = digest.hexdigest()
    text = json.dumps(about, indent=1) + "\n"  # ASCII: a file name need not be valid Unicode
    write_atomically(folder / "set.json", text.encode("ascii"))
    return open_packed(folder)


def open_packed(folder: Path, check: bool = False) -> Packed:
    """Open a set; its images stay in the file.

    Args:
        folder: of `write_packed`.
        check: also read everything and compare the digest.

    Raises:
        IntegrityError: there is no set, or its files are not what `set.json` says.
    """
    try:
        about = json.loads((folder / "set.json").read_text(encoding="ascii"))
        if about["schema"] > SCHEMA:
            raise IntegrityError(
                f"{folder}: image set of format {about['schema']}, newer than this edgecnn reads ({SCHEMA}). Install a newer edgecnn."
            )
        geometry, ids, sha256 = dict(about["geometry"]), tuple(str(i) for i in about["ids"]), str(about["sha256"])
        sizes = np.array(about["sizes"], "<i8") if geometry["height"] is None else None
        expected = (
            (about["count"], geometry["height"], geometry["width"], geometry["channels"])
            if sizes is None
            else (int(sizes.reshape(about["count"], 2).prod(1).sum()) * geometry["channels"],)
        )
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, EOFError) as fault:
        if is_the_machines(fault):
            raise
        reason = f"{fault.strerror}: {Path(fault.filename).name}" if isinstance(fault, OSError) and fault.filename else repr(fault)
        raise IntegrityError(f"{folder}: not a readable image set ({reason}). Make it again.") from None
    found = (images.dtype, images.shape, labels.dtype, labels.shape, len(ids))
    if found != (np.dtype(np.uint8), expected, np.dtype("<i8"), (about["count"],), about["count"]):
        raise IntegrityError(
            f"{folder}: set.json says {about['count']} images, {expected}; found images {images.dtype} {images.shape}, "
            f"labels {labels.dtype} {labels.shape}, {len(ids)} ids. Make it again."
        )
    if check and _digest(images, labels, sizes) != sha256:
        raise IntegrityError(f"{folder}: images or labels are not those of the digest in set.json. Make it again.")
    return Packed(folder, images, labels.astype(np.int64, copy=False), ids, geometry, sha256, sizes)


def _write_header(out: BinaryIO, shape: tuple[int, ...]) -> None:
    """The head of an .npy file; numpy leaves room for the first number to grow, so it can be written again over itself."""
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _digest(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64] | None) -> str:
    digest = hashlib.sha256()
    step = max(1, _CHUNK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), step):
        digest.update(np.ascontiguousarray(images[start : start + step]).tobytes())
    digest.update(labels.tobytes())
    if sizes is not None:
        digest.update(sizes.tobytes())
    return digest.hexdigest()

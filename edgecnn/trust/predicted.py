"""What each model said about each evaluation image, as a file: so that another run can be compared image by image."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecnn.device.files import write_atomically
from edgecnn.errors import IntegrityError
from edgecnn.trust.change import Ints, Predictions

_DIGITS = 32  # of each image's sha256: enough to tell 50,000 images apart


@dataclass(frozen=True, eq=False)
class Predicted:
    """N images and what two models say about each.

    Attributes:
        contents: sha256 of each image as it was found.
        labels: the right output, N.
        before: the float model; `after`: the exported file.
        names: one an output.
    """

    contents: tuple[str, ...]
    labels: Ints
    before: Predictions
    after: Predictions
    names: tuple[str, ...]


def write_predictions(path: Path, told: Predicted) -> None:
    """As an `.npz` without pickles; `path` appears whole or not at all."""
    arrays = {
        "contents": np.array([content[:_DIGITS] for content in told.contents], f"S{_DIGITS}"),
        "labels": told.labels,
        "before": told.before.top1,
        "before_confidence": told.before.confidence.astype(np.float32),
        "after": told.after.top1,
        "after_confidence": told.after.confidence.astype(np.float32),
        "names": np.array([name.encode("utf-8", "surrogatepass") for name in told.names]),
    }
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, data.getvalue())


def read_predictions(path: Path) -> Predicted | None:
    """None where there is no such file.

    Raises:
        IntegrityError: it is there and cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            before, after = (
                Predictions(arrays[which].astype(np.int64), arrays[f"{which}_confidence"].astype(np.float64))
                for which in ("before", "after")
            )
            contents = tuple(content.decode("ascii", "replace") for content in arrays["contents"].tolist())
            names = tuple(name.decode("utf-8", "replace") for name in arrays["names"].tolist())
            told = Predicted(contents, arrays["labels"].astype(np.int64), before, after, names)
    except FileNotFoundError:
        return None
    except Exception as fault:  # a damaged archive raises almost anything
        raise IntegrityError(
            f"{path}: not readable ({type(fault).__name__}: {fault}). Run `edgecnn compress` again to write it anew."
        ) from None
    if len({len(told.contents), len(told.labels), len(before.top1), len(after.top1)}) != 1:
        raise IntegrityError(f"{path}: its columns differ in length. Run `edgecnn compress` again to write it anew.")
    return told

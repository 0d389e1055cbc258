"""A training's state on disk: whole or absent at any instant, and known by its digest when it is read again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgecnn.device.files import fsync_folder, sha256_file, write_atomically
from edgecnn.errors import ModelError
from edgecnn.parser import read_torch


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """At any instant `path` is absent, old or new, never half; the digests of the old and the new are written before it is new."""
    import torch

    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    digests = [sha256_file(temporary), *_digests(path)[:1]]
    write_atomically(_beside(path), "".join(f"{digest}\n" for digest in digests).encode())
    temporary.replace(path)
    fsync_folder(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What was saved, its tensors on the CPU; None where nothing was, or it is not what was saved: then training starts over."""
    if not path.exists() or sha256_file(path) not in _digests(path):
        return None
    try:
        state: dict[str, Any] = read_torch(path)
    except ModelError:  # written by another torch, perhaps
        return None
    return state


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digests(path: Path) -> list[str]:
    try:
        return _beside(path).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []

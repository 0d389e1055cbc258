"""How much of the fault harness runs: a short form with every test run, `make faults` in minutes, `make faults-long` in hours.

FAULTS=     the short form
FAULTS=minutes, FAULTS=hours
"""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent
REGRESSIONS = HERE / "regressions"
LEVEL = os.environ.get("FAULTS", "")


def count(short: int, minutes: int, hours: int) -> int:
    """How many of something are tried at the present level."""
    return {"": short, "minutes": minutes, "hours": hours}[LEVEL]


def keep(kind: str, content: bytes, suffix: str) -> Path:
    """Keep an input that made something fail, under a name of its own: it is tried again with every later run."""
    import hashlib

    folder = REGRESSIONS / kind
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
    path.write_bytes(content)
    return path


def kept(kind: str) -> list[Path]:
    """The inputs of a kind that were kept."""
    return sorted((REGRESSIONS / kind).glob("*"))


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """A witness of what lies in a folder: size, time of the last change and inode of every file."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }

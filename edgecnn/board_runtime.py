"""The board's half of edgecnn as files of a bundle, so that a board with Python, numpy and one runtime needs nothing else installed."""

from __future__ import annotations

from pathlib import Path

import edgecnn


def board_runtime() -> dict[str, bytes]:
    """Name inside the bundle to content.

    With an empty file wherever Python would make a folder `__pycache__`: compiled files would not be those that were made, and `verify`
    would refuse them.
    """
    package = Path(edgecnn.__file__).parent
    sources = [package / "__init__.py", package / "errors.py", *sorted((package / "device").rglob("*.py"))]
    files = {source.relative_to(package.parent).as_posix(): source.read_bytes() for source in sources}
    return files | {f"{folder}/__pycache__": b"" for folder in sorted({name.rpartition("/")[0] for name in files})}

"""Atheris, which looks for inputs that reach new code, on one of our own parsers.

    python fuzz.py KIND CORPUS -atheris_runs=N

ends with 77, and leaves the input in the current folder, where a parser raises anything but an `EdgecnnError`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgecnn"]):
    from edgecnn.device.archive import verify_archive
    from edgecnn.device.bundle import parse_sums
    from edgecnn.device.graph import bare_manifest
    from edgecnn.device.spec import read_manifest
    from edgecnn.yaml_nodes import read_yaml
from edgecnn.errors import EdgecnnError


def on_file(read: Callable[[Path], object], name: str) -> Callable[[bytes], object]:
    """The file is written over each time: it lies in the current folder, a new one of the test's."""
    path = Path(name)

    def each(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return each


PARSERS: dict[str, Callable[[bytes], object]] = {
    "recipe": lambda data: read_yaml(data.decode("utf-8", "replace"), "r.yaml"),
    "sums": lambda data: parse_sums(data, "SHA256SUMS"),
    "manifest": on_file(read_manifest, "manifest.json"),
    "archive": on_file(verify_archive, "a.edgecnn"),
    "onnx": on_file(bare_manifest, "m.onnx"),
    "ir": on_file(bare_manifest, "m.xml"),
}


def main() -> None:
    read = PARSERS[sys.argv[1]]

    def one(data: bytes) -> None:
        with suppress(EdgecnnError):
            read(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=10", "-rss_limit_mb=2048"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    assert os.getcwd() != str(Path(__file__).parent)  # noqa: PTH109
    main()

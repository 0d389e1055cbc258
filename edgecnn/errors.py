"""The faults a user can mend, and the exit code each one ends with.

An `EdgecnnError` is shown as one line and never with a traceback; anything else is a bug and keeps its
traceback. A message has three parts: what was asked (file, line, key), what was found, what to do next.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

DONE = 0
BUG = 1
INTERRUPTED = 130


class EdgecnnError(Exception):
    """A fault the user can mend. `exit_code` is what the process ends with."""

    exit_code = 2


class UsageError(EdgecnnError):
    """A wrong recipe, command line or output folder."""

    exit_code = 2


class ModelError(EdgecnnError):
    """A model or checkpoint that cannot be used."""

    exit_code = 3


class DataError(EdgecnnError):
    """Images or labels that cannot be used."""

    exit_code = 3


class PromiseBroken(EdgecnnError):
    """The run finished and the exported files do not keep the recipe's promise."""

    exit_code = 4


class ResourceError(EdgecnnError):
    """Disk, memory or time ran out."""

    exit_code = 5


class IntegrityError(EdgecnnError):
    """A file is not the file its digest or signature names."""

    exit_code = 7


class DeviceError(EdgecnnError):
    """A runtime, provider, board or connection failed or is not there."""

    exit_code = 8


class BoardError(DeviceError):
    """A board or the way to it failed, which says nothing about the file that it was to run."""


class DeviceBug(DeviceError):
    """The board's half has a bug, or measured what cannot be true."""

    exit_code = BUG


_OUT_OF = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.EIO: "disk I/O error",
    errno.ENOMEM: "out of memory",
}


def is_the_machines(fault: BaseException) -> bool:
    """Whether a file could not be read or written for want of something, which says nothing about the file."""
    return isinstance(fault, OSError) and fault.errno in _OUT_OF


def exit_code_of(fault: BaseException) -> tuple[int, str | None]:
    """The exit code of `fault` and its one line, or None where the traceback must be shown."""
    if isinstance(fault, EdgecnnError):
        return fault.exit_code, str(fault)
    if isinstance(fault, KeyboardInterrupt):
        return INTERRUPTED, str(fault) or "interrupted."
    if isinstance(fault, MemoryError):
        return ResourceError.exit_code, "out of memory. Use a smaller batch or fewer images, or free some memory."
    if isinstance(fault, PermissionError):
        return UsageError.exit_code, f"{fault.filename}: permission denied. Choose a folder you may write, or mend its rights."
    if isinstance(fault, OSError) and fault.errno in _OUT_OF:
        where = f"{fault.filename}: " if fault.filename else ""
        return (
            ResourceError.exit_code,
            f"{where}{_OUT_OF[fault.errno]}. Nothing finished was lost: free some, then run the same command again.",
        )
    return BUG, None


def printable(text: str, breaks: str = "") -> str:
    """`text` with all that a terminal would obey or cannot show written as an escape, such as \\x1b; characters in `breaks` stay."""
    return "".join(c if c.isprintable() or c in breaks else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def guarded(main: Callable[[], int | None]) -> int:
    """Run `main` and turn what it raises into an exit code and at most one line on stderr."""
    try:
        return main() or DONE
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except BaseException as fault:
        if isinstance(fault, SystemExit):
            raise
        code, line = exit_code_of(fault)
        if line is None:
            traceback.print_exc()
            line = "this is a bug in edgecnn: please report the lines above."
        print(f"edgecnn: {printable(line, breaks=chr(10) + chr(9))}", file=sys.stderr)  # names of files could command the terminal
        return code

"""Takes rights away from this process, for good, before it parses what somebody else made.

Two things of the kernel's, both open to any user: resource limits (setrlimit) and Landlock (Linux 5.13 and later), which forbids to
open, make, remove or rename files outside given folders, and from 6.7 on to use TCP. What is open already stays usable. Landlock binds
the calling thread and all it starts from then on; threads that run already keep their rights, so call this first.
https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture that Landlock is on
_NO_NEW_PRIVS = 38  # prctl
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
# All rights over files that each version of Landlock knows.
_KNOWN = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}


def landlock_version() -> int:
    """The version of Landlock's interface that the kernel offers; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc().syscall(_CREATE, None, 0, 1)))


def confine(*, writable: Iterable[Path] = (), readable: Iterable[Path] | None = None) -> int:
    """Forbid this thread, and all it starts, to write outside `writable` and to use TCP.

    Args:
        writable: folders below which everything stays allowed. Device files such as /dev/null can always be written to.
        readable: folders to read from besides; None is everywhere.

    Returns:
        The version of Landlock in force; 0 where the kernel has none and nothing was forbidden.
    """
    version = landlock_version()
    if not version:
        return 0
    files = _KNOWN[min(version, 5)]
    if readable is None:
        files &= ~_READ
    attributes = struct.pack("=Q", files)
    if version >= 4:
        attributes += struct.pack("=Q", 3)  # bind and connect of TCP
    if version >= 6:
        attributes += struct.pack("=Q", 3)  # abstract sockets of, and signals to, processes outside
    rules = _libc().syscall(_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        return 0
    try:
        for path in writable:
            _allow(rules, path, files)
        for path in readable or ():
            _allow(rules, path, _READ)
        _allow(rules, Path("/dev"), files & (_WRITE_FILE | _READ_FILE | _IOCTL_DEV))
        if _libc().prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc().syscall(_RESTRICT, rules, 0):
            return 0
    finally:
        os.close(rules)
    return version


def limit(*, memory_bytes: int | None = None, cpu_s: int | None = None, file_bytes: int | None = None) -> None:
    """Limit what this process may use from now on.

    Args:
        memory_bytes: address space beyond what it has now; more ends in MemoryError.
        cpu_s: beyond what it has used; more ends in SIGXCPU.
        file_bytes: of any file it writes; more ends in OSError.
    """
    _lower(resource.RLIMIT_CORE, 0)
    if memory_bytes is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + memory_bytes)
    if cpu_s is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + cpu_s)
    if file_bytes is not None:
        _lower(resource.RLIMIT_FSIZE, file_bytes)


def _lower(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        where = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not there: nothing to allow
        return
    try:
        if not path.is_dir():
            rights &= _OF_A_FILE
        _libc().syscall(_ADD, rules, 1, struct.pack("=Qi", rights, where), 0)
    finally:
        os.close(where)


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)

"""A forked child under strace, which can end it, or make a system call fail, at a chosen call: below Python, so nothing is missed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Every call that changes a file, a folder, or what is certainly on the disk.
CALLS = (
    *("openat", "creat", "write", "writev", "pwrite64", "pwritev", "sendfile", "copy_file_range", "ftruncate", "truncate", "fallocate"),
    *("fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "fchmod", "chmod", "fchmodat"),
)
READING = re.compile(r"O_RDONLY|O_PATH")


@dataclass(frozen=True)
class Call:
    """A system call of a traced child.

    Attributes:
        name: of the call.
        number: which one of that name it is in its process or thread, from 1, as strace counts.
        text: as strace writes it.
        paths: those in it, of descriptors too.
    """

    name: str
    number: int
    text: str
    paths: tuple[str, ...]

    @property
    def changes(self) -> bool:
        """Whether it is more than the opening of a file to read."""
        return self.name != "openat" or not READING.search(self.text)

    def below(self, *folders: Path) -> bool:
        return any(path.startswith(str(folder)) for path in self.paths for folder in folders)


@cache
def can_trace() -> bool:
    """Whether strace is here and may attach to a child of ours."""
    if not shutil.which("strace"):
        return False
    with subprocess.Popen(["sleep", "60"]) as child:
        done = subprocess.run(
            ["timeout", "1", "strace", "-o", "/dev/null", "-p", str(child.pid)], capture_output=True, text=True, check=False
        )
        child.kill()
    return "attached" in done.stderr


@contextmanager
def attached(pid: int, log: Path, *options: str) -> Iterator[None]:
    """Strace on a process that waits meanwhile, and on the children that it will have, until it has ended."""
    names = re.findall(r"inject=(\w+):", " ".join(options)) or CALLS  # what strikes needs no log of the others
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={','.join(names)}", *options, "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        told = tracer.stderr.readline()
        if "attached" not in told:
            os.kill(pid, signal.SIGKILL)
        yield
    assert "attached" in told, told


def traced(work: Callable[[], int], folder: Path, *options: str) -> tuple[int, str]:
    """Run `work` in a forked child under strace; the log is `folder/strace`.

    Returns:
        The exit code, less than 0 for a signal, and what the child wrote to stderr.
    """
    reader, writer = os.pipe()
    errors = os.open(folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(writer)
            os.dup2(errors, 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.read(reader, 1)  # until strace has attached
            code = work()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(reader)
    with attached(pid, folder / "strace", *options):
        os.write(writer, b"x")
        _, status = os.waitpid(pid, 0)
    os.close(writer)
    os.close(errors)
    return os.waitstatus_to_exitcode(status), (folder / "stderr").read_text()


def calls(log: Path) -> list[Call]:
    """The calls of a traced child and its children, in their order, those that failed too; each process has its own numbers."""
    found, numbers = [], Counter[tuple[str, str]]()
    for line in log.read_text().splitlines():
        match = re.match(r"(\d+)\s+(\w+)\((.*)", line)
        if match is None:
            continue
        pid, name, rest = match[1], match[2], match[3]
        numbers[pid, name] += 1
        cwd, paths = "", []
        for descriptor, quoted in re.findall(r"(?:\b\d+|AT_FDCWD)<([^>]*)>|\"((?:[^\"\\]|\\.)*)\"", rest.rpartition(") = ")[0]):
            if quoted:
                paths.append(quoted if quoted.startswith("/") else f"{cwd}/{quoted}")
            elif descriptor:
                cwd = descriptor
                paths.append(descriptor)
        found.append(Call(name, numbers[pid, name], line, tuple(paths)))
    return found


def unsynced(log: Path, out: Path) -> list[str]:
    """What a power cut could take: renames of files whose content was not on the disk, and renames never made certain themselves."""
    dirty: set[str] = set()  # files written, and folders in which names changed, since their last fsync
    faults = []
    for call in calls(log):
        if " = -1 " in call.text or not call.below(out):
            continue
        last = call.paths[-1]
        if call.name in ("write", "writev", "pwrite64", "pwritev", "ftruncate"):
            dirty.add(call.paths[0])
        elif call.name in ("sendfile", "copy_file_range"):
            dirty.update(call.paths[:2])
        elif call.name in ("fsync", "fdatasync"):
            dirty.discard(last)
        elif call.name in ("openat", "mkdir", "mkdirat") and (call.name != "openat" or "O_CREAT" in call.text):
            dirty.add(str(Path(last).parent))
        elif call.name.startswith("rename"):
            source = next(path for path in call.paths if path != str(Path.cwd()))
            faults += [f"{call.text}: {path} is not synced" for path in sorted(dirty) if path == source or path.startswith(f"{source}/")]
            dirty = {path for path in dirty if not path.startswith(f"{source}/") and path != source}
            dirty.add(str(Path(last).parent))
    return faults + [
        f"{path}: renamed or made, and its folder not synced"
        for path in sorted(dirty)
        if path in (str(out), f"{out}/store", f"{out}/bundles")
    ]

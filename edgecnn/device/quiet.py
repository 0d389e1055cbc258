"""What OpenVINO and NNCF do to the process around them, kept out of it: analytics, and the stack that signals are handled on.

Both report usage through the package `openvino_telemetry`, on import, and both do without where it is not
installed. Their documented opt-out writes a file into the home folder, which is the user's; so for this process the
package is made not to be there.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def silence_openvino() -> None:
    """Call before `import openvino` or `import nncf`."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes the import fail


class _Stack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Around what compiles or runs models in OpenVINO's CPU plugin; also a decorator.

    On a CPU with AMX the plugin sets an alternate signal stack for this thread and, when it is unloaded, sets the one before. Plugins
    unloaded in another order than that of loading leave a stack that is freed memory, and then the next signal that Python handles
    (Ctrl-C; SIGCHLD, which torch's DataLoader handles) ends the process with SIGSEGV: seen with OpenVINO 2026.4. The plugin leaves
    alone a stack that it did not set, so setting ours again at once is enough.
    """
    if sys.platform != "linux":
        yield
        return
    swap, before = ctypes.CDLL(None).sigaltstack, _Stack()
    swap(None, ctypes.byref(before))
    try:
        yield
    finally:
        swap(ctypes.byref(before), None)

"""NVIDIA's management library: power, energy and what slows a GPU down, through the library that comes with the driver.

Functions and bits are those of NVIDIA's NVML API reference; what the driver or the GPU lacks gives None. This project has no NVIDIA GPU:
only a library of the same functions, compiled by the tests, was ever called.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
# nvmlClocksEventReasons: those that mean "slower than it could", not "idle" or "set so by somebody".
_SLOWED = {0x04: "power limit", 0x08: "hardware slowdown", 0x20: "too hot", 0x40: "too hot (hardware)", 0x80: "power brake"}


@dataclass(frozen=True)
class Gpu:
    """One GPU of the machine."""

    name: str
    handle: Any

    def power_w(self) -> float | None:
        """Of the whole board, averaged by the driver over up to a second."""
        return _scaled(self._read("nvmlDeviceGetPowerUsage", ctypes.c_uint), 1e-3)

    def energy_j(self) -> float | None:
        """Since the driver was loaded; Volta and later."""
        return _scaled(self._read("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong), 1e-3)

    def slowed(self) -> list[str] | None:
        """What holds its clocks down at this moment."""
        bits = self._read("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong)
        return None if bits is None else [name for bit, name in _SLOWED.items() if bits & bit]

    def _read(self, function: str, kind: Any) -> int | None:
        value, call = kind(), getattr(_library(), function, None)
        if call is None or call(self.handle, ctypes.byref(value)) != 0:
            return None
        return int(value.value)


def _scaled(value: int | None, scale: float) -> float | None:
    return None if value is None else value * scale


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """Every GPU; none where there is no driver."""
    library = _library()
    count = ctypes.c_uint()
    if library is None or library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return ()
    found = []
    for index in range(count.value):
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
            library.nvmlDeviceGetName(handle, name, len(name))
            found.append(Gpu(f"{name.value.decode('utf-8', 'replace')} {index}", handle))
    return tuple(found)


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None

"""The few CUDA driver calls that running an engine takes, through ctypes: the driver is on every board with an NVIDIA GPU.

Never run by this project's tests: they have no GPU.
Source: CUDA Driver API reference, sections Device, Primary Context, Memory and Stream Management.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edgecnn.errors import DeviceError

_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


class Gpu:
    """The first CUDA device: its identity, and memory on it. Not for use by several threads.

    Attributes:
        name: as the driver gives it, such as "Orin".
        compute_capability: such as "8.7".
        stream: handle of the one stream that everything runs on.
    """

    def __init__(self) -> None:
        try:
            self._cuda: Any = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise DeviceError("no NVIDIA driver here (libcuda.so.1). A TensorRT bundle runs on a machine with an NVIDIA GPU.") from None
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, 256, device)
        self.name = text.value.decode()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
        self.compute_capability = f"{major.value}.{minor.value}"
        context = ctypes.c_void_p()
        # The primary context is the one TensorRT and the CUDA runtime use too.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream = int(stream.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise DeviceError(f"{name} failed with CUDA error {code}: {(text.value or b'unknown').decode()}.")

    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory; the caller frees it."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy C-contiguous `array` to the device, in stream order."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(self.stream),
        )

    def download(self, array: np.ndarray, address: int) -> None:
        """Fill C-contiguous `array` from the device and wait until it is there."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(self.stream),
        )
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

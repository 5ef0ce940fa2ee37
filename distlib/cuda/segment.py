"""Memory that processes of one host map together: segments of a device, and pinned memory that host and device see."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from distlib.cuda import library

BY_HANDLE, BY_DESCRIPTOR = 0, 1  # how another process comes to a segment; see csrc/cuda/segment.h
_HANDLE_BYTES = 64


def index_of(device: torch.device) -> int:
    """The number by which the library knows a device."""
    return device.index or 0


class Segment:
    """A zeroed segment of this process, for others to map: by `handle`, or by `fd` (to be closed by `close_fd`).

    Raises CudaError where the device, or the system, does not offer that way.
    """

    def __init__(self, device: torch.device, way: int, bytes: int) -> None:
        self._device, self._way = index_of(device), way
        size, address = ctypes.c_uint64(bytes), ctypes.c_void_p()
        handle, fd = (ctypes.c_ubyte * _HANDLE_BYTES)(), ctypes.c_int(-1)
        library.call(
            "distlib_cuda_segment_make",
            self._device,
            way,
            ctypes.byref(size),
            ctypes.byref(address),
            handle,
            ctypes.byref(fd),
        )
        self.bytes, self.address = size.value, address.value or 0
        self.handle, self.fd = bytes_of(handle), fd.value

    def free(self) -> None:
        """Gives the memory back. No other process may have it open."""
        if self.address:
            library.call("distlib_cuda_segment_free", self._device, self._way, self.bytes, self.address)
            self.address = 0

    def write(self, offset: int, data: bytes) -> None:
        """Puts `data` there, and waits until it is there."""
        library.call("distlib_cuda_segment_write", self._device, self.address + offset, data, len(data))


class MappedSegment:
    """Another process's segment, where `device` reaches it. Raises CudaError where it cannot be."""

    def __init__(self, device: torch.device, way: int, bytes: int, handle: bytes, fd: int) -> None:
        self._device, self._way, self.bytes = index_of(device), way, bytes
        address = ctypes.c_void_p()
        library.call("distlib_cuda_segment_open", self._device, way, bytes, handle, fd, ctypes.byref(address))
        self.address = address.value or 0

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from there."""
        data = ctypes.create_string_buffer(count)
        library.call("distlib_cuda_segment_read", self._device, data, self.address + offset, count)
        return data.raw

    def close(self) -> None:
        """Unmaps it. Nothing that runs may use it any more."""
        if self.address:
            library.call("distlib_cuda_segment_close", self._device, self._way, self.bytes, self.address)
            self.address = 0


class Pinned:
    """A C structure in memory of the host, `value`, that kernels of `device` reach at `address`."""

    def __init__(self, device: torch.device, structure: type[ctypes.Structure]) -> None:
        host, address = ctypes.c_void_p(), ctypes.c_void_p()
        size = ctypes.sizeof(structure)
        library.call(
            "distlib_cuda_pinned_make", index_of(device), size, ctypes.byref(host), ctypes.byref(address)
        )
        self._host = host.value or 0
        self.address = address.value or 0
        self.value: Any = structure.from_address(self._host)

    def free(self) -> None:
        """Gives the memory back. No kernel may use it any more, nor anybody `value`."""
        if self._host:
            library.call("distlib_cuda_pinned_free", self._host)
            self._host = 0


def bytes_of(array: Any) -> bytes:
    """The contents of a ctypes array."""
    return ctypes.string_at(ctypes.addressof(array), ctypes.sizeof(array))

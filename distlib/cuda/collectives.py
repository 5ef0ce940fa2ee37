"""The C interface of collectives in mapped memory: csrc/cuda/collectives.h, declared for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_uint64, c_void_p

from distlib.cuda import library

RANKS = 16  # of a group, at most
BLOCKS = 64
DEPTH = 4  # pieces of a message on their way in one lane
LANES = 4
LINE = 128  # bytes


class What(ctypes.Structure):
    """What a collective is, as its ranks compare it."""

    _fields_ = [
        ("sequence", c_uint64),
        ("count", c_uint64),
        ("kind", c_int32),
        ("dtype", c_int32),
        ("op", c_int32),
        ("root", c_int32),
    ]


class Status(ctypes.Structure):
    """Why a kernel ended early; and `abort`, by which the host ends kernels."""

    _fields_ = [
        ("abort", c_uint32),
        ("unused", c_uint32 * 31),
        ("code", c_uint32),
        ("src", c_int32),
        ("dst", c_int32),
        ("is_message", c_uint32),
        ("sequence", c_uint64),
        ("missing", c_uint64),
        ("sent", c_uint64),
        ("expected", c_uint64),
        ("sent_tag", c_int64),
        ("expected_tag", c_int64),
        ("seen", What * RANKS),
    ]


class Members(ctypes.Structure):
    """A group as one of its ranks sees it (distlib_group)."""

    _fields_ = [
        ("rank", c_int32),
        ("size", c_int32),
        ("blocks", c_int32),
        ("threads", c_int32),
        ("slot_bytes", c_uint64),
        ("ring_bytes", c_uint64),
        ("segment", c_void_p * RANKS),
        ("status", c_void_p),
    ]


class Call(ctypes.Structure):
    """One collective."""

    _fields_ = [
        ("what", What),
        ("dtype", c_int32),
        ("element", c_int32),
        ("divisor", c_int32),
        ("sliced", c_int32),
        ("timeout_ns", c_uint64),
        ("send", c_void_p * RANKS),
        ("recv", c_void_p * RANKS),
        ("send_bytes", c_uint64 * RANKS),
        ("recv_bytes", c_uint64 * RANKS),
    ]


class Message(ctypes.Structure):
    """One message."""

    _fields_ = [
        ("data", c_void_p),
        ("bytes", c_uint64),
        ("tag", c_int64),
        ("sequence", c_uint64),
        ("timeout_ns", c_uint64),
        ("peer", c_int32),
        ("sending", c_int32),
    ]


def structure_bytes() -> dict[str, int]:
    """Bytes of each structure as the library has it; they must be those of ctypes.sizeof."""
    sizes = (c_uint64 * 5)()
    library.call("distlib_cuda_collective_structures", sizes)
    return dict(zip(("What", "Status", "Members", "Call", "Message"), sizes, strict=True))


def group_bytes(members: Members) -> int:
    """Bytes of a segment of such a group."""
    found = c_uint64()
    library.call("distlib_cuda_group_bytes", ctypes.byref(members), ctypes.byref(found))
    return found.value


def start_at(members: Members, device: int, epoch: int) -> None:
    """Sets the counters of this rank: all ranks must, before the first call, to the same epoch."""
    library.call("distlib_cuda_group_start_at", ctypes.byref(members), device, epoch)


def collective(members: Members, call: Call, stream: int) -> int:
    """Starts a collective on a raw stream. Returns the bytes that this rank reads from others' segments."""
    read = c_uint64()
    library.call(
        "distlib_cuda_collective", ctypes.byref(members), ctypes.byref(call), c_void_p(stream), ctypes.byref(read)
    )
    return read.value


def message(members: Members, message: Message, stream: int) -> None:
    """Starts a message on a raw stream."""
    library.call("distlib_cuda_message", ctypes.byref(members), ctypes.byref(message), c_void_p(stream))

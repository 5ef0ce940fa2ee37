"""Streams and events of any accelerator, by torch's device-neutral interface.

On the CPU, where work is done when a call returns, there are none: `None` stands for both, and waiting is nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import threading
import weakref
from collections.abc import Iterator
from typing import TypeAlias

import torch

log = logging.getLogger("distlib")
_POOL = 32  # streams of one priority that torch makes for a GPU; then it hands out the first again
_PRIORITIES = {True: (-1, -2, -3), False: (0,)}  # of urgent ones and others
_lent: weakref.WeakValueDictionary[tuple[torch.device, int], torch.Stream] = weakref.WeakValueDictionary()
_thread = threading.local()

Stream: TypeAlias = "torch.Stream | None"
Event: TypeAlias = "torch.Event | None"


def accelerator() -> torch.device | None:
    """The device that this process uses beside the CPU, with its index; None where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def exists(device: torch.device) -> bool:
    """Whether `device` is one of the accelerators that this process can use."""
    found = accelerator()
    return found is not None and found.type == device.type


def current(device: torch.device) -> Stream:
    """The stream that the next operation on `device` goes to."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def new(device: torch.device, urgent: bool = False) -> Stream:
    """A stream of its own. urgent: what it holds goes before what others hold, where the device can do that.

    torch's come from a ring, and where two that wait for other ranks are one, ranks can wait for each other without
    end: so those that somebody still holds from here are passed over.
    """
    if device.type == "cpu":
        return None
    for priority in _PRIORITIES[urgent]:
        for _ in range(_POOL):
            stream = torch.Stream(device, priority=priority)
            key = stream.device, stream.stream_id
            if key not in _lent:
                if type(stream).__weakrefoffset__:  # not in every torch: then they come as the ring has them
                    _lent[key] = stream
                return stream
    log.warning("%d streams of %s are held, and torch has no more of this kind: two now share one", len(_lent), device)
    return stream


def attend(device: torch.device) -> None:
    """Lets a thread that computes nothing ask about `device`. That becomes its current one: else the first question
    would make a context on device 0. And its questions do not end the capture of a CUDA graph in another thread."""
    if device.type == "cpu":
        return
    torch.accelerator.set_device_index(device.index or 0)
    if device.type == "cuda" and not getattr(_thread, "is_apart", False):
        _thread.is_apart = True
        _keep_apart_from_captures()


def _keep_apart_from_captures() -> None:
    """By default a capture forbids all threads of the process to ask whether an event has passed."""
    mode = ctypes.c_int(1)  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    try:
        code = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    except OSError as error:
        code = error
    if code:
        log.warning("CUDA graphs cannot be captured while collectives are under way (%s)", code)


@contextlib.contextmanager
def on(stream: Stream) -> Iterator[None]:
    """Within it, operations go to `stream`; None: wherever they would."""
    if stream is None:
        yield
        return
    index = torch.accelerator.current_device_index()
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)  # and its device
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        if index != stream.device_index:
            torch.accelerator.set_device_index(index)


def record(stream: Stream) -> Event:
    """An event that passes when all that `stream` holds now is done."""
    return None if stream is None else stream.record_event()


def wait(stream: Stream, event: Event) -> None:
    """What `stream` is given from now on runs after `event`. Does not block the host."""
    if stream is not None and event is not None:
        stream.wait_event(event)


def follow(stream: Stream, other: Stream) -> None:
    """What `stream` is given from now on runs after all that `other` holds now."""
    if stream is not None and other is not None and stream != other:
        stream.wait_event(other.record_event())


def keep(tensor: torch.Tensor, stream: Stream) -> None:
    """`tensor`'s memory is lent again only after what `stream` holds now is done, whoever drops it earlier."""
    if stream is not None:
        tensor.record_stream(stream)


def pinned(numel: int, dtype: torch.dtype, device: torch.device, lasting: bool = False) -> torch.Tensor:
    """A 1-D tensor in host memory that `device` copies from and to while the host goes on; contents are undefined.

    lasting: it takes no more than it needs, and when it is dropped the host waits for the device. Else it may take
    twice that, from a cache, which lends it again once copies are over.
    """
    if lasting and numel and device.type == "cuda":
        return _registered(numel, dtype, device)
    return torch.empty(numel, dtype=dtype, pin_memory=device.type != "cpu")


def _registered(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Pages of its own, pinned: torch's cache of pinned memory rounds sizes up to powers of two."""
    nbytes = numel * dtype.itemsize
    pages = (ctypes.c_char * nbytes).from_buffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(ctypes.addressof(pages), nbytes, 0))
    weakref.finalize(pages, _unregister, ctypes.addressof(pages), device).atexit = False
    return torch.frombuffer(pages, dtype=dtype)


def _unregister(address: int, device: torch.device) -> None:
    torch.accelerator.synchronize(device)  # copies may still be under way
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def finish(stream: Stream | Event) -> None:
    """Blocks the host until all that `stream` holds is done, or what came before an event."""
    if stream is not None:
        stream.synchronize()


def has_passed(event: Event) -> bool:
    """Whether what came before the event is done. Never blocks."""
    return event is None or event.query()


def is_captured(device: torch.device) -> bool:
    """Whether what the current stream is given goes into a CUDA graph, to be run later and again."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def raw(stream: Stream) -> int:
    """The stream as C interfaces take it: a cudaStream_t where the device is a GPU."""
    if stream is None:
        return 0
    if stream.device.type == "cuda":
        return torch.cuda.Stream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        ).cuda_stream
    return stream.stream_id

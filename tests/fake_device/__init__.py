"""A device for torch that needs no hardware: memory is the host's, streams run at once, and races between them raise.

    device = fake_device.load()            in a process that has run no backward yet: a rank of tests/ranks.py
    model.to(device)                       ... and everything else that works on an accelerator
    fake_device.touch(tensor, write=True)  what a foreign kernel does on the current stream
    fake_device.host_syncs()               where the host waited for the device

Operators have the CPU's bits. What one stream wrote and another uses without an event between them is an error at the
line that made it, though here the result would be right: on a GPU it is right only most of the time. A tensor counts as
all bytes from its first to its last element: two streams that write alternate columns of a matrix are an error too.
"""

from __future__ import annotations

from fake_device.controls import (
    Sync,
    check_host,
    collected,
    host_syncs,
    lag,
    load,
    races,
    reset,
    touch,
    touch_memory,
    why_not,
)
from fake_device.watch import WatchPinned

__all__ = [
    "Sync",
    "WatchPinned",
    "check_host",
    "collected",
    "host_syncs",
    "lag",
    "load",
    "races",
    "reset",
    "touch",
    "touch_memory",
    "why_not",
]

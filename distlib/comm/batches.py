"""Several messages, or calls, that start as one: torch's `batch_isend_irecv`, and its coalescing manager.

Two ranks that send each other more than fits into buffers, each before it receives, wait for each other for ever where
messages of two ranks go one after the other, as NCCL's do. Started together they are one kernel, which does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from distlib.comm.channel import Collective, Message
from distlib.comm.device import DeviceChannel
from distlib.comm.group import Group
from distlib.comm.nccl import NcclChannel
from distlib.comm.tensors import readable
from distlib.comm.work import Work


def exchange(group: Group, messages: Sequence[Message]) -> list[Work]:
    """Starts messages, none of which waits for another. The two ranks of each must call; in a group whose first call it
    is, over NCCL, all ranks. Ledger, timeouts and errors are as of other messages.

    Raises ValueError for tensors on several devices, and for receives on a device that are not contiguous.
    """
    if not messages:
        return []
    nccl = _nccl_of(group, messages)
    if nccl is None:
        return [_alone(group, m) for m in messages]
    for message in messages:
        group._check_rank("batch_isend_irecv", "peer", message.peer)
        if not message.sending and not message.tensor.is_contiguous():
            raise ValueError(f"recv on {message.tensor.device}: the tensor must be contiguous")
    messages = [replace(m, tensor=readable([m.tensor])[0]) if m.sending else m for m in messages]
    operation = nccl.exchange(messages, group.timeout)
    return [_watched(group, nccl, "send", [m.tensor for m in messages if m.sending], messages, operation)]


def _nccl_of(group: Group, messages: Sequence[Message]) -> NcclChannel | None:
    """The channel where the messages go over NCCL."""
    call = Collective("send", [m.tensor for m in messages])
    channel = group._channel_for(call, is_message=True)
    if isinstance(channel, DeviceChannel):
        channel = channel.nccl
    return channel if isinstance(channel, NcclChannel) else None


def _alone(group: Group, message: Message) -> Work:
    start = group.send if message.sending else group.recv
    work = start(message.tensor, message.peer, message.tag, async_op=True)
    assert work is not None
    return work


def _watched(
    group: Group, nccl: NcclChannel, kind: str, sent: list[torch.Tensor], keep: Sequence[Message], operation: Any
) -> Work:
    call = Collective(kind, sent, [m.tensor for m in keep if not m.sending])
    work = group._track(nccl, call, operation, call.recv, None, True)
    assert work is not None
    return work


class Bracket:
    """What is between `_start_coalescing` and `_end_coalescing` of a process group: torch's own calls to NCCL."""

    def __init__(self, group: Group, nccl: NcclChannel) -> None:
        self._group, self._nccl = group, nccl
        self._calls: list[str] = []

    def called(self, name: str) -> None:
        """A call in it."""
        self._calls.append(name)

    def end(self, end: Callable[[], Any]) -> Work:
        """The work of all of it; `end` starts it."""
        operation = self._nccl.ended_bracket(self._calls, None, end, self._group.timeout)
        return _watched(self._group, self._nccl, "bracket", [], [], operation)

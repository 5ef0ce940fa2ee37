"""Memory that all ranks of a group on one host see: the same bytes, mapped once on the host."""

from __future__ import annotations

import torch

from distlib import native
from distlib.comm.group import Group
from distlib.comm.host import HostChannel
from distlib.comm.meeting import Host
from distlib.comm.memory import arena_empty


def can_share(group: Group) -> bool:
    """Whether `shared_zeros` works for this group: its ranks share one host, and its memory through the C++ core."""
    return native.core() is not None and isinstance(group._channel, HostChannel)


def shared_zeros(group: Group, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D tensor of zeros that is the same memory on every rank of `group`.

    Every rank of the group must call, with the same arguments. Nothing orders what the ranks write and read: that is
    the caller's, by barriers. The memory lies in the arena of the group's first rank, and goes back when that rank
    drops its tensor: drop it on all ranks together.

    Raises:
        RuntimeError: the group's ranks do not share a host; MemoryError: on all ranks, where there is no memory.
    """
    if not can_share(group):
        raise RuntimeError(f"group {group.name!r}: its ranks do not share memory")
    nbytes = numel * dtype.itemsize
    if nbytes == 0 or group.size == 1:
        return arena_empty((numel,), dtype)
    place = torch.full((1,), -1, dtype=torch.int64)
    problem: MemoryError | None = None
    if group.rank == 0:
        try:
            block = Host.here().arena.allocate(nbytes, True)
            place[0] = block.offset
        except MemoryError as error:
            problem = error
    group.broadcast(place, 0)
    if problem is not None:
        raise problem
    if place.item() < 0:
        raise MemoryError(f"rank {group.ranks[0]} has no shared memory for {nbytes:,} bytes; see its own error")
    if group.rank != 0:
        channel = group._channel
        assert isinstance(channel, HostChannel)
        block = channel.peer(0).view(place.item(), nbytes)
    return torch.frombuffer(block, dtype=torch.uint8, count=nbytes).view(dtype)

"""Groups whose collectives on a device run here: kernels emulated on the CPU, in real processes; on a GPU where there
is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from cuda_on_cpu import build
from ranks import process_group
from torch.distributed import distributed_c10d

from distlib.comm.device import connect
from distlib.comm.group import Group
from distlib.cuda import library

SMALL = {  # few threads, since each is a fiber; small slots, so that small tensors go in several pieces
    "DISTLIB_DEVICE_THREADS": "32",
    "DISTLIB_DEVICE_BLOCKS": "3",
    "DISTLIB_DEVICE_STAGING_KB": "4",
}


def emulated() -> str:
    """The library that stands in for the GPU's, built before ranks use it; "" where there is a GPU."""
    return "" if torch.cuda.is_available() else str(build.library())


def card() -> torch.device:
    """Where tensors are: on the GPU that all ranks share, or, with the emulated library, on the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def device_group(rank: int, n: int, path: str, timeout: float = 20.0) -> Iterator[Group]:
    """In a rank: a group that takes the device's way with all tensors. `path`: of the emulated library. `timeout`: of
    collectives, not of what connects."""
    with host_group(rank, n, path) as host:
        group = on_card(host, timeout=timeout)
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
        yield group
        group.close()


def on_card(host: Group, name: str = "", timeout: float = 20.0) -> Group:
    """A group of the same ranks, all of which must call, whose tensors on `card()` go a way of their own. With the
    emulated library these are the CPU's."""
    channel = connect(host, card())
    group = Group(name or host.name, host.rank, host.ranks, host.topology, channel, timeout)
    if card().type != "cpu":
        group._on_devices[card().type] = channel
    return group


@contextmanager
def host_group(rank: int, n: int, path: str) -> Iterator[Group]:
    """In a rank: the world, with the library in place. Destroyed at the end, unless the body raises."""
    if path:
        library.use(Path(path))
    with process_group(rank, n):
        yield Group.of()

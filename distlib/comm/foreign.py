"""Groups of process groups that are another backend's: their collectives go through it, or, on "fake", nowhere."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from distlib.comm.c10d import C10dChannel
from distlib.comm.counting import CountingChannel, is_fake
from distlib.comm.group import Group
from distlib.comm.meeting import Host
from distlib.comm.nccl import NcclChannel
from distlib.topology import Topology

_TIMEOUT = 1800.0  # seconds; the backend's own counts


def wrap(pg: dist.ProcessGroup) -> Group:
    """The Group over `pg`; every rank of it must call, unless it is a fake one."""
    if is_fake(pg):
        fake = CountingChannel(pg)
        return Group(fake.name, fake.rank, fake.ranks, fake.topology, fake, _TIMEOUT)
    ranks = dist.get_process_group_ranks(pg)
    gathered: list[Any] = [None] * pg.size()
    dist.all_gather_object(gathered, Host.here().card(pg.rank(), pg.size()), group=pg)
    met = Host.here().meet(dict(enumerate(gathered)), pg.rank(), 60.0)
    dist.all_gather_object(gathered, sorted(met), group=pg)
    topology = Topology.from_colocation(dict(enumerate(gathered)))
    is_nccl = str(dist.get_backend(pg)) == "nccl"
    channel = NcclChannel.over(pg, topology) if is_nccl else C10dChannel(pg)
    return Group(str(getattr(pg, "group_name", "group")), pg.rank(), ranks, topology, channel, _TIMEOUT)

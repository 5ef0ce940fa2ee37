"""Which way tensors on the CPU travel in a new group: by shared memory, over gloo, or both."""

from __future__ import annotations

import torch.distributed as dist

from distlib.comm import interfaces
from distlib.comm.channel import Channel
from distlib.comm.gloo import GlooChannel, Seat
from distlib.comm.host import host_channel
from distlib.comm.membership import Members
from distlib.comm.spanning import SpanningChannel


def make_channel(store: dist.Store, name: str, rank: int, members: Members, limit: float) -> Channel:
    """The way between all ranks of a group, this one being `rank`. All of them must call; they have `limit` seconds."""
    topology, cards = members.topology, members.cards
    local = topology.local_ranks(rank)
    inside = None
    if all(cards[r].door for r in local) and (len(local) > 1 or topology.size == 1):
        inside = host_channel(store, name, rank, local, members, limit)
    if len(topology.nodes) == 1 and inside is not None:
        return inside
    one_network = len({(card.boot, card.network) for card in cards}) == 1
    master = "127.0.0.1" if one_network else interfaces.meeting_point(store)
    way = SpanningChannel if any(card.door for card in cards) else GlooChannel
    channel = way(Seat(store, name, rank, list(members.ranks), limit, master, topology))
    if isinstance(channel, SpanningChannel):
        channel.use_inside(inside)
    return channel

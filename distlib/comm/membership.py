"""Who is in a group, and which of its ranks share a host: told through the store, proved by meeting."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from distlib.comm.meeting import Card, Host
from distlib.topology import Topology


@dataclass(frozen=True)
class Members:
    """A group's ranks, by group rank: their global ranks, their cards, and where they are."""

    ranks: tuple[int, ...]
    cards: tuple[Card, ...]
    topology: Topology

    def subset(self, ranks: tuple[int, ...]) -> Members:
        """The members of a subgroup, `ranks` being ranks of this group."""
        cards = tuple(self.cards[r] for r in ranks)
        return Members(tuple(self.ranks[r] for r in ranks), cards, self.topology.restrict(ranks))


_world: Members | None = None  # of the default group, so that subgroups need no meeting of their own


def collect(store: dist.Store, keys: list[str], who: list[str], what: str, timeout: float) -> list[bytes]:
    """The values of keys that other ranks set. RuntimeError naming, by `who`, the ranks that did not within
    `timeout`."""
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        try:
            missing = [name for key, name in zip(keys, who, strict=True) if not store.check([key])]
        except RuntimeError as gone:
            raise RuntimeError(
                f"{what}: the store is gone, so the rank that holds it (rank 0) has ended: {gone}"
            ) from error
        raise RuntimeError(
            f"{what}: not there within {timeout:.0f} s: {', '.join(missing)}. Did they start? Look at their output"
        ) from error
    try:
        return store.multi_get(keys)
    except (RuntimeError, AttributeError):  # stores without the extended API
        return [store.get(key) for key in keys]


def gather(
    store: dist.Store, rank: int, size: int, global_ranks: tuple[int, ...], is_world: bool, timeout: float
) -> Members:
    """Every rank of the group must call. The world's members are remembered, and serve its subgroups without talk."""
    global _world
    if not is_world and _world is not None and max(global_ranks) < len(_world.ranks):
        return _world.subset(global_ranks)
    until = time.monotonic() + timeout
    what = f"a group of {size} ranks"
    host = Host.here()
    store.set(f"card/{rank}", host.card(global_ranks[rank], max(size, max(global_ranks) + 1)).encode())
    who = [f"rank {r}" for r in global_ranks]
    texts = collect(store, [f"card/{r}" for r in range(size)], who, what, timeout)
    cards = {r: Card.decode(text) for r, text in enumerate(texts)}
    met = host.meet(cards, rank, max(1.0, until - time.monotonic()))
    store.set(f"met/{rank}", json.dumps(sorted(met)))
    left = max(1.0, until - time.monotonic())
    lists = collect(store, [f"met/{r}" for r in range(size)], who, what, left)
    topology = Topology.from_colocation({r: json.loads(text) for r, text in enumerate(lists)})
    members = Members(global_ranks, tuple(cards.values()), topology)
    if is_world:
        _world = members
    return members


def forget_world() -> None:
    """The default group was destroyed: the next one is another world."""
    global _world
    _world = None

"""The grid of ranks: partition groups that hold one copy of the model, replication groups that hold the same pieces."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distlib.comm.group import Group
from distlib.comm.naming import named
from distlib.comm.ties import tie
from distlib.topology import Topology
from distlib.words import ranks_text


@dataclass(frozen=True)
class Grid:
    """Where this rank stands, and the groups it is in. Groups of one rank are None: there is nothing to exchange.

    partition_size, replicas: p and r of p * r = n ranks. part: this rank's place in its partition group, replica: in
    its replication group. gather and reduce have the same ranks: two groups, so that the gathers of a backward need not
    wait for its reductions.
    """

    world: Group
    partition_size: int
    replicas: int
    part: int
    replica: int
    gather: Group | None
    reduce: Group | None
    replication: Group | None
    backend: str  # of the groups

    def abort(self, message: str) -> None:
        """Ends all groups: ranks that wait for this one are told why."""
        for group in (self.gather, self.reduce, self.replication, self.world):
            if group is not None and group.size > 1:
                group.abort(message)


def partition_of(topology: Topology, size: int | str | None) -> list[tuple[int, ...]]:
    """The partition groups, as ranks of the world group: neighbours by host, so that few groups span hosts.

    Args:
        size: ranks per group; "node": the ranks of one host; None: all.

    Raises:
        ValueError: a size that does not divide the number of ranks, or "node" with hosts of different sizes.
    """
    n = topology.size
    if size is None:
        size = n
    if size == "node":
        if not topology.is_uniform:
            raise ValueError(
                f'partition_size="node": the hosts hold {sorted({len(node) for node in topology.nodes})} ranks each, '
                "and partition groups must be equal. Give a number that divides the ranks of every host"
            )
        size = len(topology.nodes[0])
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f'partition_size={size!r}: must be None (all ranks), "node" or a number of ranks')
    if not 1 <= size <= n or n % size:
        fits = [p for p in range(1, n + 1) if n % p == 0]
        raise ValueError(f"partition_size={size} does not divide {n} ranks: choose one of {fits}")
    order = [rank for node in topology.nodes for rank in node]
    return [tuple(sorted(order[i : i + size])) for i in range(0, n, size)]  # new_group sorts, too


_made: weakref.WeakKeyDictionary[Any, dict[int, Grid]] = weakref.WeakKeyDictionary()
_secondary: weakref.WeakKeyDictionary[Group, dict[int, Group]] = weakref.WeakKeyDictionary()


def make_grid(process_group: dist.ProcessGroup | None, partition_size: int | str | None) -> Grid:
    """This rank's groups. Every rank of `process_group` (None: the world) must call, with the same size.

    Groups are made once per process group and size, and shared by all models.
    """
    world = Group.of(process_group)
    pg = process_group if process_group is not None else dist.group.WORLD
    partitions = partition_of(world.topology, partition_size)
    size = len(partitions[0])
    made = _made.setdefault(pg, {})
    if size not in made:
        made[size] = _build(world, partitions, _backend_of(pg))
    return made[size]


def _build(world: Group, partitions: Sequence[tuple[int, ...]], backend: str) -> Grid:
    mine = next(i for i, ranks in enumerate(partitions) if world.rank in ranks)
    part = partitions[mine].index(world.rank)
    across = sorted(ranks[part] for ranks in partitions)
    gather, reduce = (_subgroup(role, world, partitions[mine], backend) for role in ("partition", "reduction"))
    replication = _subgroup("replication", world, across, backend)
    tie(group for group in (gather, reduce, replication) if group is not None)
    return Grid(
        world,
        len(partitions[0]),
        len(partitions),
        part,
        across.index(world.rank),
        gather,
        reduce,
        replication,
        backend,
    )


def _backend_of(pg: dist.ProcessGroup) -> str:
    """The backend of a group as `new_group` takes it: "distlib", or "cpu:distlib,cuda:nccl"."""
    config = dist.get_backend_config(pg)
    names = {part.partition(":")[2] for part in config.split(",")}
    return names.pop() if len(names) == 1 else config


def _subgroup(role: str, world: Group, ranks: Sequence[int], backend: str) -> Group | None:
    if len(ranks) == 1:
        return None
    return _new_group(role, [world.ranks[r] for r in ranks], backend, world.timeout)


def _new_group(role: str, members: Sequence[int], backend: str, timeout: float) -> Group:
    """A group of these global ranks, named by its role and them: "partition of ranks 0-3". Only they call."""
    limit = timedelta(seconds=timeout)  # the world's: torch would take its own default of half an hour
    name = f"{role} of {ranks_text(members)}"
    with named(name):
        made = dist.new_group(list(members), limit, backend, use_local_synchronization=True, group_desc=name)
    return Group.of(made)


def secondary_group(grid: Grid, size: bool | int) -> Group | None:
    """The ranks among which a whole unit is kept after forward: `size` neighbours in the partition group; None where
    `size` is a bool. Every rank must call."""
    if isinstance(size, bool):
        return None
    assert grid.gather is not None
    made = _secondary.setdefault(grid.gather, {})
    if size in made:
        return made[size]
    first = grid.gather.rank // size * size
    members = [grid.gather.ranks[r] for r in range(first, first + size)]
    made[size] = _new_group("secondary partition", members, grid.backend, grid.world.timeout)
    tie([grid.gather, made[size]])
    return made[size]

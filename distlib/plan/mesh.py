"""Which rank does what: the mesh of pipeline stages, replicas and partition groups, as pure arithmetic.

    8 ranks on 2 hosts, pipeline=2, partition_size=2        p = 2 ranks, r = 2 replicas, 2 pipeline ranks

                        partition     partition
    pipeline rank 0   [ 0      1 ]  [ 2      3 ]     host 0     rank = (pipeline rank * r + replica) * p + part
                        |      |      |      |
    pipeline rank 1   [ 4      5 ]  [ 6      7 ]     host 1     pipelines 0-4, 1-5, 2-6, 3-7
                                                                replication groups 0-2, 1-3, 4-6, 5-7
                                                                data-parallel groups 0-3, 4-7

Neighbours share a host, so what sends most lies innermost: a partition group gathers and reduces the whole model in
every micro-step. Replicas sum a p-th of the gradients once per optimizer step. Stages are outermost: a message between
them is the activation of one micro-batch, it has one sender and one receiver, and it travels beside computation.

Partition and replication groups are those that ShardedDataParallel makes of the data-parallel group: by host first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from distlib.topology import Topology
from distlib.words import plural

if TYPE_CHECKING:
    from distlib.plan.plan import Plan


class HasTopology(Protocol):
    """What a `distlib.World` tells of its ranks."""

    @property
    def topology(self) -> Topology: ...


World = HasTopology | Topology | int
Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where one rank stands, and the groups it is in, each with itself, as global ranks.

    pipeline_rank: its place in `pipeline`, which is in the order of stages. part: its place in `partition`, the ranks
    that divide one copy. replica: its place in `replication`, the ranks with the same pieces. data_parallel: all ranks
    with the same stages; replica and part count through it.
    """

    rank: int
    pipeline_rank: int
    replica: int
    part: int
    pipeline: Ranks
    data_parallel: Ranks
    partition: Ranks
    replication: Ranks


@dataclass(frozen=True)
class Mesh:
    """All groups of a plan on a topology. Each list of groups has every rank exactly once.

    partitions: of all pipeline ranks, in order: those of pipeline rank 0 first.
    """

    topology: Topology
    pipelines: tuple[Ranks, ...]
    data_parallel: tuple[Ranks, ...]
    partitions: tuple[Ranks, ...]

    @staticmethod
    def of(plan: Plan, world: World) -> Mesh:
        """The mesh of `plan` on a World, a Topology, or a number of ranks on one host.

        Raises ValueError for ranks that do not divide into pipelines and partition groups, with what would.
        """
        from distlib.sharded.groups import partition_of  # the one place that knows how ranks become partition groups

        topology = topology_of(world)
        n, stages = topology.size, plan.pipeline
        if n % stages:
            fits = [p for p in range(1, n + 1) if n % p == 0]
            raise ValueError(f"pipeline={stages} does not divide {n} ranks: choose one of {fits}")
        each = n // stages
        groups = [tuple(range(s * each, (s + 1) * each)) for s in range(stages)]
        size = plan.partition_size if plan.stage else 1
        partitions: list[Ranks] = []
        for group in groups:
            try:
                found = partition_of(topology.restrict(group), size)
            except ValueError as error:
                where = f"the {each} ranks of each pipeline stage: " if stages > 1 else ""
                raise ValueError(where + str(error)) from None
            partitions += [tuple(group[i] for i in members) for members in found]
        if len(set(map(len, partitions))) > 1:
            raise ValueError(
                f'partition_size="node": pipeline stages have {sorted(set(map(len, partitions)))} ranks on a host, and '
                "partition groups must be equal. Give a number"
            )
        pipelines = tuple(tuple(group[i] for group in groups) for i in range(each))
        return Mesh(topology, pipelines, tuple(groups), tuple(partitions))

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.topology.size

    @property
    def partition_size(self) -> int:
        """Ranks that divide one copy of a stage: p."""
        return len(self.partitions[0])

    @property
    def replicas(self) -> int:
        """Copies of the model: r."""
        return len(self.data_parallel[0]) // self.partition_size

    @cached_property
    def replications(self) -> tuple[Ranks, ...]:
        """The ranks with the same pieces of the same stages."""
        r = self.replicas
        found = []
        for first in range(0, len(self.partitions), r):
            found += [tuple(sorted(ranks)) for ranks in zip(*self.partitions[first : first + r], strict=True)]
        return tuple(found)

    def place(self, rank: int) -> Place:
        """Where `rank` stands. ValueError for a rank that is not in the world."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank={rank} is not in a world of {self.size}")
        pipeline, data, partition, replication = (
            next(group for group in groups if rank in group)
            for groups in (self.pipelines, self.data_parallel, self.partitions, self.replications)
        )
        return Place(
            rank,
            pipeline.index(rank),
            replication.index(rank),
            partition.index(rank),
            pipeline,
            data,
            partition,
            replication,
        )

    def hosts(self, group: Ranks) -> int:
        """Hosts that a group of ranks spans."""
        return len({self.topology.node_of(rank) for rank in group})

    def __str__(self) -> str:
        def line(kind: str, groups: tuple[Ranks, ...]) -> str:
            most = max(map(self.hosts, groups))
            hosts = "1 host" if most == 1 else f"up to {most} hosts"
            return f"  {plural(len(groups), kind):24}  of {plural(len(groups[0]), 'rank')}, on {hosts}"

        kinds = {
            "pipeline": self.pipelines,
            "data-parallel group": self.data_parallel,
            "partition group": self.partitions,
            "replication group": self.replications,
        }
        return "\n".join([plural(self.size, "rank"), *(line(kind, groups) for kind, groups in kinds.items())])


def topology_of(world: World) -> Topology:
    """The topology of a World, itself, or of so many ranks on one host."""
    if isinstance(world, int):
        return Topology((tuple(range(world)),))
    return world if isinstance(world, Topology) else world.topology

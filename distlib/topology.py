"""Which ranks share a host, as pure arithmetic: nodes, local ranks, rails, pretend nodes, subgroups.

            node 0      node 1
    rail 0  rank 0      rank 2
    rail 1  rank 1      rank 3

A rail joins the ranks that have the same place in their nodes. Between nodes all rails carry traffic at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Topology:
    """Ranks 0..size-1, each on one node. Ranks ascend within a node; nodes are ordered by their lowest rank.

    Raises ValueError when `nodes` is not such a division.
    """

    nodes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = sorted(rank for node in self.nodes for rank in node)
        if not ranks or ranks != list(range(len(ranks))):
            raise ValueError(f"nodes={self.nodes} must hold every rank from 0 to size-1 exactly once")
        if not all(self.nodes) or self.nodes != _ordered(self.nodes):
            raise ValueError(f"nodes={self.nodes} must be ascending, ordered by lowest rank, and not empty")

    @classmethod
    def from_colocation(cls, colocated: Mapping[int, Iterable[int]]) -> "Topology":
        """From each rank's proved list of the ranks on its host (with or without itself).

        Raises RuntimeError naming two ranks whose lists contradict each other.
        """
        hosts = {rank: frozenset(others) | {rank} for rank, others in colocated.items()}
        for rank, host in hosts.items():
            for other in sorted(host):
                if hosts.get(other) != host:
                    raise RuntimeError(
                        f"co-location is contradictory: rank {rank} shares a host with ranks "
                        f"{sorted(host)}, but rank {other} with {sorted(hosts.get(other, ()))}. Fix: start "
                        f"all ranks of a host alike, all in one container or none."
                    )
        return cls(_ordered(set(hosts.values())))

    @cached_property
    def size(self) -> int:
        """Ranks in all."""
        return sum(map(len, self.nodes))

    @cached_property
    def _node_of(self) -> dict[int, int]:
        return {rank: index for index, node in enumerate(self.nodes) for rank in node}

    def node_of(self, rank: int) -> int:
        """The index of the node that holds `rank`."""
        if rank not in self._node_of:
            raise ValueError(f"rank={rank} is not in a world of {self.size}")
        return self._node_of[rank]

    def local_ranks(self, rank: int) -> tuple[int, ...]:
        """All ranks on the node of `rank`, itself included, ascending."""
        return self.nodes[self.node_of(rank)]

    def same_host(self, a: int, b: int) -> bool:
        """Whether ranks `a` and `b` are on one node."""
        return self.node_of(a) == self.node_of(b)

    @property
    def is_uniform(self) -> bool:
        """Whether every node holds equally many ranks."""
        return len(set(map(len, self.nodes))) == 1

    @cached_property
    def rails(self) -> tuple[tuple[int, ...], ...]:
        """rails[i]: the i-th local rank of every node, in node order. Raises ValueError unless uniform."""
        if not self.is_uniform:
            raise ValueError(f"rails need equally many ranks on every node, not {list(map(len, self.nodes))}")
        return tuple(zip(*self.nodes, strict=True))

    def split(self, k: int) -> "Topology":
        """The same ranks on `k` pretend nodes: contiguous, as even as possible, the larger ones first.

        Raises ValueError where k is not in 1..size, or a pretend node would join ranks of two real ones.
        """
        if not 1 <= k <= self.size:
            raise ValueError(f"nodes={k} is not possible with {self.size} ranks: choose 1 to {self.size}")
        each, extra = divmod(self.size, k)
        starts = [index * each + min(index, extra) for index in range(k + 1)]
        pretend = tuple(tuple(range(*bounds)) for bounds in zip(starts, starts[1:], strict=False))
        for node in pretend:
            if not all(self.same_host(node[0], rank) for rank in node):
                raise ValueError(
                    f"nodes={k} would make one node of ranks {list(node)}, which are on different hosts: "
                    f"real nodes are {self.nodes}. Fix: leave nodes (DISTLIB_NODES) unset."
                )
        return Topology(pretend)

    def restrict(self, ranks: Sequence[int]) -> "Topology":
        """The topology of a subgroup, in group ranks: group rank i is `ranks[i]` here."""
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"ranks={list(ranks)} names a rank twice")
        members: dict[int, list[int]] = {}
        for group_rank, rank in enumerate(ranks):
            members.setdefault(self.node_of(rank), []).append(group_rank)
        return Topology(_ordered(members.values()))


def _ordered(nodes: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(sorted(tuple(sorted(node)) for node in nodes))

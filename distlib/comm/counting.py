"""A group over torch's "fake" backend: nothing moves, and the ledger counts what would.

One process stands for one rank of a large world: memory, calls and bytes of a strategy can be compared with the
published formulas without a cluster. Collectives are over at once. A rank's own piece is where it belongs afterwards;
what other ranks would have written or added is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distlib.comm import hierarchical, spanning
from distlib.comm.channel import BETWEEN_HOSTS, SAME_HOST, Collective, Traffic
from distlib.comm.gloo_bytes import expected_sent
from distlib.comm.ledger import expected_bytes
from distlib.comm.meeting import pretend_node
from distlib.comm.work import CollectiveError, Operation
from distlib.topology import Topology

_ONESHOT_TO = 512 << 10  # bytes over all ranks up to which a host's ranks each sum everything, as in the core


def is_fake(process_group: dist.ProcessGroup) -> bool:
    """Whether a c10d process group is torch's that moves nothing."""
    return dist.get_backend(process_group) == "fake"


def pretend_topology(ranks: Sequence[int], world: int) -> Topology:
    """Where the global `ranks` of a group would be: DISTLIB_NODES=k divides the world into k hosts, contiguous and as
    even as possible; unset, it is one host. ValueError where k is no number from 1 to `world`."""
    nodes: dict[int, list[int]] = {}
    for group_rank, rank in enumerate(ranks):
        nodes.setdefault(pretend_node(rank, world), []).append(group_rank)
    return Topology(tuple(sorted(tuple(node) for node in nodes.values())))


@dataclass
class _Counted:
    """An operation that is over, and what it would have moved."""

    rows: list[Traffic]
    sequence: int
    source: int = -1
    done: bool = True
    code: int = 0
    text: str = ""
    peer_bytes: int = 0
    waited_ns: int = 0

    def wait(self, seconds: float) -> bool:
        return True

    def notify(self, id: int) -> bool:
        return False


class CountingChannel:
    """Collectives of a fake process group. Bytes are those that the ways of its topology move, by their formulas."""

    by_streams, has_levels = False, True

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        is_world = process_group is dist.group.WORLD
        self.name = "world" if is_world else str(getattr(process_group, "group_name", "group"))
        self.rank = process_group.rank()
        self.ranks = dist.get_process_group_ranks(process_group)  # global, by group rank
        self.size = len(self.ranks)
        self.topology = pretend_topology(self.ranks, dist.get_world_size())
        self._sequence = 0
        self._broken: CollectiveError | None = None

    def start(self, collective: Collective, timeout: float, sync: bool) -> Operation:
        c = collective
        operation = self._over(self._rows(c))
        # A rank's own piece comes home; what is reduced keeps its own values.
        if c.kind in ("all_gather", "gather") and c.recv:
            self._keep(c.recv[self.rank], c.send[0])
        elif c.kind in ("reduce_scatter", "scatter") and c.send:
            self._keep(c.recv[0], c.send[self.rank])
        elif c.kind == "all_to_all":
            self._keep(c.recv[self.rank], c.send[self.rank])
        return operation

    @staticmethod
    def _keep(home: torch.Tensor, piece: torch.Tensor) -> None:
        if home.data_ptr() != piece.data_ptr():
            with torch.no_grad():
                home.view(-1).copy_(piece.view(-1))

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout: float) -> Operation:
        if self.topology.same_host(self.rank, dst):
            return self._over(self._host_row("send", dst, tensor.nbytes, 0))
        return self._over([Traffic(BETWEEN_HOSTS, tensor.nbytes, tensor.nbytes)])

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout: float) -> Operation:
        if src is None:  # from nobody in particular: over no link
            return self._over([])
        near = self.topology.same_host(self.rank, src)
        rows = self._host_row("recv", src, 0, tensor.nbytes) if near else [Traffic(BETWEEN_HOSTS, 0, 0)]
        return self._over(rows, src)

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Operation) -> list[Traffic]:
        assert isinstance(operation, _Counted)
        return operation.rows

    def lateness(self) -> dict[str, tuple[list[float], int]]:
        """Nobody else is there to be late."""
        return {}

    def abort(self, text: str) -> None:
        self._broken = self._broken or CollectiveError(text)

    def aborted(self) -> str | None:
        return None if self._broken is None else str(self._broken)

    def ended(self) -> list[int]:
        """Not known here."""
        return []

    def close(self) -> None:
        """There is nothing to leave."""

    # ------------------------------------------------------------ formulas

    def _over(self, rows: list[Traffic], source: int = -1) -> _Counted:
        if self._broken is not None:
            raise self._broken
        self._sequence += 1
        return _Counted(rows, self._sequence, source)

    def _rows(self, c: Collective) -> list[Traffic]:
        sent, received = sum(t.nbytes for t in c.send), sum(t.nbytes for t in c.recv)
        if len(self.topology.nodes) == 1:
            return self._host_row(c.kind, c.root, sent, received)
        if c.kind == "all_reduce":
            moved = spanning.expected_moved(c.count, c.dtype, self.topology, self.rank)
        elif c.hierarchical:
            piece = sent if c.kind == "all_gather" else received
            moved = hierarchical.expected_moved(c.kind, c.dtype, piece, self.topology)
        else:
            near = set(self.topology.local_ranks(self.rank))
            by_rank = expected_sent(c.kind, self.size, self.rank, c.root, sent, received)
            between = sum(bytes for to, bytes in by_rank.items() if to not in near)
            moved = between, sum(bytes for to, bytes in by_rank.items() if to in near and to != self.rank)
        rows = [Traffic(BETWEEN_HOSTS, moved[0], moved[0])]
        if moved[1]:
            rows.append(Traffic(SAME_HOST, moved[1], moved[1]))
        return rows

    def _host_row(self, kind: str, root: int, sent: int, received: int) -> list[Traffic]:
        sliced = sent * self.size > _ONESHOT_TO
        bytes = expected_bytes(kind, self.size, self.rank, root, sent, received, sliced)
        return [Traffic(SAME_HOST, bytes, bytes)]

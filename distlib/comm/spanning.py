"""A group over several hosts: all-reduce sums inside each host, then between hosts, then spreads inside each host.

    host 0: ranks 0 1        1. inside   rank i of each host sums the i-th share of its host's tensors
    host 1: ranks 2 3        2. between  the ranks that hold the same share (a rail) sum those, all rails at once
                             3. inside   every rank copies the shares that it did not sum

so that each byte crosses the network once per host, not once per rank. Long tensors go in chunks, the network working on
one chunk while memory works on its neighbours. Sums run in rank order inside hosts, and in host order between them; half
types travel between hosts as fp32 and are rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from distlib import native
from distlib.comm.arithmetic import reduce_in_order
from distlib.comm.channel import BETWEEN_HOSTS, SAME_HOST, Collective, Traffic
from distlib.comm.gloo import GlooChannel, flat, process_group
from distlib.comm.host import HostChannel, Span
from distlib.comm.threads import Step
from distlib.comm.work import CollectiveError, Operation
from distlib.topology import Topology

CHUNK_BYTES = 8 << 20


def shares(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` elements in `parts` ranges (begin, end), as even as possible."""
    each = -(-count // parts)
    return [(min(count, i * each), min(count, (i + 1) * each)) for i in range(parts)]


@dataclass
class _Chunk:
    """One chunk of an all-reduce under way."""

    whole: torch.Tensor  # of the user's tensor
    mine: torch.Tensor  # this rank's share, summed inside the host
    op: str
    half: bool
    work: Any = None
    pieces: torch.Tensor | None = None  # the hosts' sums of this rank's part of the share


@dataclass
class _Moved:
    """Bytes of this rank in one all-reduce, counted and by formula."""

    inside: int = 0
    between: int = 0
    inside_expected: int = 0
    between_expected: int = 0


class SpanningChannel(GlooChannel):
    """As a GlooChannel, except for all-reduce."""

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        labels: list[int],
        timeout: float,
        master: str | None,
        topology: Topology,
    ) -> None:
        super().__init__(store, name, rank, labels, timeout, master, topology)
        self._inside: HostChannel | None = None
        local = topology.local_ranks(rank)
        self._local_rank, self._local_size = local.index(rank), len(local)
        self._hosts = len(topology.nodes)
        self._host = topology.node_of(rank)
        self._rails = min(len(node) for node in topology.nodes)
        self._rail: Any = None
        if self._local_rank < self._rails:
            rail_store = dist.PrefixStore(f"rail{self._local_rank}/", store)
            self._rail = process_group(rail_store, self._host, self._hosts, timeout, master)

    def use_inside(self, channel: HostChannel | None) -> None:
        """The channel between the ranks of this host; None where it has one rank of the group."""
        self._inside = channel

    def start(self, collective: Collective, timeout: float, sync: bool) -> Operation:
        if collective.kind == "all_reduce":
            return self.start_step(collective, timeout, self._hierarchical)
        return super().start(collective, timeout, sync)

    def _hierarchical(self, c: Collective, limit: timedelta) -> _Moved:
        whole = flat(c.send[0])
        half = whole.dtype in (torch.float16, torch.bfloat16)
        step = max(1, CHUNK_BYTES // whole.element_size())
        moved = _Moved()
        under_way: list[_Chunk] = []
        stages = (self._sum_inside, self._sum_between, self._spread_inside)
        chunks = list(whole.split(step)) if whole.numel() else []
        for t in range(len(chunks) + 2):  # in each turn, three neighbouring chunks are each in another stage
            for stage in (2, 1, 0):
                i = t - stage
                if not 0 <= i < len(chunks):
                    continue
                if stage == 0:
                    under_way.append(_Chunk(chunks[i], torch.empty(0), c.op, half))
                stages[stage](under_way[i], moved, limit)
        return moved

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Operation) -> list[Traffic]:
        moved = operation.result if isinstance(operation, Step) else None
        if not isinstance(moved, _Moved):
            return super().traffic(kind, root, sent, received, operation)
        rows = [Traffic(BETWEEN_HOSTS, moved.between, moved.between_expected)]
        if self._inside is not None:
            rows.append(Traffic(SAME_HOST, moved.inside, moved.inside_expected))
        return rows

    # 1. inside, and the first half of "between" is started
    def _sum_inside(self, k: _Chunk, moved: _Moved, limit: timedelta) -> None:
        begin, end = self._share(k.whole, self._local_rank)
        whole = k.whole.float() if k.half else k.whole
        op = "sum" if k.op == "avg" else k.op
        if self._inside is None:
            k.mine = whole[begin:end].clone()
        else:
            k.mine = torch.empty(end - begin, dtype=whole.dtype)
            send = [self._span(whole, r) for r in range(self._local_size)]
            recv = [(k.mine.data_ptr(), k.mine.nbytes)] * self._local_size
            like = Collective("all_reduce", [whole], [whole], op)
            moved.inside += self._run_inside("reduce_scatter", send, recv, like, limit)
            moved.inside_expected += k.mine.nbytes * (self._local_size - 1)
        if self._rail is None:
            return
        parts = shares(k.mine.numel(), self._hosts)
        sizes = [(e - b) * k.mine.element_size() for b, e in parts]
        b, e = parts[self._host]
        k.pieces = torch.empty(self._hosts, e - b, dtype=k.mine.dtype)
        options = c10d.AllToAllOptions()
        options.timeout = limit
        out_sizes = [sizes[self._host]] * self._hosts
        pieces, mine = k.pieces.view(-1).view(torch.uint8), k.mine.view(torch.uint8)
        k.work = self._rail.alltoall_base(pieces, mine, out_sizes, sizes, options)
        moved.between += sum(sizes) - sizes[self._host]
        moved.between_expected += k.mine.nbytes * (self._hosts - 1) // self._hosts

    # 2. between: sum in host order, and the second half is started
    def _sum_between(self, k: _Chunk, moved: _Moved, limit: timedelta) -> None:
        if self._rail is None or k.pieces is None:
            return
        k.work.wait()
        total = torch.empty(k.pieces.size(1), dtype=k.pieces.dtype)
        reduce_in_order(total, list(k.pieces.unbind(0)), k.op, self.size)
        total = total.to(k.whole.dtype)
        parts = shares(k.mine.numel(), self._hosts)
        k.mine = torch.empty(k.mine.numel(), dtype=k.whole.dtype)
        widest = max(e - b for b, e in parts)
        padded = torch.zeros(widest, dtype=total.dtype)
        padded[: total.numel()] = total
        k.pieces = torch.empty(self._hosts, widest, dtype=total.dtype)
        options = c10d.AllgatherOptions()
        options.timeout = limit
        rows = list(k.pieces.view(torch.uint8).view(self._hosts, -1).unbind(0))
        k.work = self._rail.allgather([rows], [padded.view(torch.uint8)], options)
        moved.between += padded.nbytes * (self._hosts - 1)
        moved.between_expected += k.mine.nbytes * (self._hosts - 1) // self._hosts

    # 3. inside: the shares come home
    def _spread_inside(self, k: _Chunk, moved: _Moved, limit: timedelta) -> None:
        if self._rail is not None and k.pieces is not None:
            k.work.wait()
            for (b, e), piece in zip(shares(k.mine.numel(), self._hosts), k.pieces, strict=True):
                k.mine[b:e] = piece[: e - b]
        if self._inside is None:
            k.whole.copy_(k.mine)
            return
        begin, end = self._share(k.whole, self._local_rank)
        mine = (k.mine.data_ptr(), (end - begin) * k.whole.element_size())
        recv = [self._span(k.whole, r) for r in range(self._local_size)]
        like = Collective("all_reduce", [k.whole], [k.whole])
        moved.inside += self._run_inside("all_gather", [mine] * self._local_size, recv, like, limit)
        moved.inside_expected += k.whole.nbytes - mine[1]

    def _share(self, whole: torch.Tensor, local_rank: int) -> tuple[int, int]:
        """The elements that a local rank sums: an equal part for each rail, nothing for ranks without one."""
        if local_rank >= self._rails:
            return (0, 0)
        return shares(whole.numel(), self._rails)[local_rank]

    def _span(self, whole: torch.Tensor, local_rank: int) -> Span:
        begin, end = self._share(whole, local_rank)
        return (whole.data_ptr() + begin * whole.element_size(), (end - begin) * whole.element_size())

    def _run_inside(
        self, kind: str, send: list[Span], recv: list[Span], like: Collective, limit: timedelta
    ) -> int:
        assert self._inside is not None
        operation = self._inside.start_reduction(kind, send, recv, like, 1, limit.total_seconds())
        operation.wait(limit.total_seconds() + 60)
        if operation.code:
            raise CollectiveError(operation.text, native.CODES[operation.code])
        return operation.peer_bytes

    def abort(self, text: str) -> None:
        if self._inside is not None:
            self._inside.abort(text)
        super().abort(text)

    def close(self) -> None:
        super().close()
        if self._inside is not None:
            self._inside.close()
        self._rail = None

"""A group over several hosts: all-reduce sums inside each host, then between hosts, then spreads inside each host.

    host 0: ranks 0 1        1. inside   rank i of each host sums the i-th share of its host's tensors
    host 1: ranks 2 3        2. between  the ranks that hold the same share (a rail) sum those, all rails at once
                             3. inside   every rank copies the shares that it did not sum

so that each byte crosses the network once per host, not once per rank. Long tensors go in chunks, the network
working on one chunk while memory works on its neighbours. Sums run in rank order inside hosts, and in host order
between them; half types travel between hosts as fp32 and are rounded once. All-gather and reduce-scatter go in levels
too where that pays (hierarchical.py); a reduce-scatter has the bits of the all-reduce, whichever way it goes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from distlib.comm.channel import BETWEEN_HOSTS, SAME_HOST, Collective, Traffic
from distlib.comm.gloo import GlooChannel, Seat
from distlib.comm.gloo_bytes import Sent
from distlib.comm.gloo_faults import Waiting
from distlib.comm.hierarchical import (
    LAG,
    Levels,
    Moved,
    chunk_bytes,
    reduce_by_host,
    reduce_rows,
    run_inside,
    why_flat,
    wire_dtype,
)
from distlib.comm.host import HostChannel, Span
from distlib.comm.memory import arena_empty
from distlib.comm.tensors import flat
from distlib.comm.threads import Step
from distlib.comm.work import CollectiveError, Operation
from distlib.topology import Topology


@dataclass(frozen=True)
class Shares:
    """How `count` elements are divided: into one share per rail, and each share into one part per host.

    Parts are equal, so the last ones may reach past the end: they are cut where user memory is touched, and travel
    whole.
    """

    count: int
    rails: int
    hosts: int

    @property
    def part(self) -> int:
        """Elements of a part."""
        return -(-self.count // (self.rails * self.hosts))

    @property
    def share(self) -> int:
        """Elements of a share."""
        return self.part * self.hosts

    def of(self, local_rank: int) -> tuple[int, int]:
        """The elements (begin, end) that a local rank sums; none for those without a rail."""
        if local_rank >= self.rails:
            return (0, 0)
        return (min(self.count, local_rank * self.share), min(self.count, (local_rank + 1) * self.share))


@dataclass
class _Scratch:
    """Memory for one chunk on its way; taken again for the chunk that comes 2 * LAG + 1 later."""

    mine: torch.Tensor  # this rank's share, summed inside the host, in the dtype that travels
    pieces: torch.Tensor  # the hosts' sums of this rank's part, one row per host
    total: torch.Tensor  # their sum, in the user's dtype
    gathered: torch.Tensor  # all parts of the share, summed; in the arena: its readers copy from here


@dataclass
class _Chunk:
    """One chunk of an all-reduce on its way."""

    whole: torch.Tensor  # of the user's tensor
    op: str
    shares: Shares
    scratch: _Scratch
    work: Any = None


def expected_moved(count: int, dtype: torch.dtype, topology: Topology, rank: int) -> tuple[int, int]:
    """Bytes (between hosts, inside its host) of a rank in an all-reduce of so many elements, by formula.

    Between hosts M (h-1) / (h k) for each of the two directions, M bytes over k rails between h hosts, in whole parts;
    inside (l-1) shares of the l local ranks to sum, and all but its own share to take home.
    """
    local = topology.local_ranks(rank)
    me, rails, hosts = local.index(rank), min(len(node) for node in topology.nodes), len(topology.nodes)
    wire, between, inside = wire_dtype(dtype).itemsize, 0, 0
    for length in _chunks(count, dtype):
        shares = Shares(length, rails, hosts)
        begin, end = shares.of(me)
        inside += (end - begin) * wire * (len(local) - 1) + (length - (end - begin)) * dtype.itemsize
        between += shares.part * (hosts - 1) * (wire + dtype.itemsize) if me < rails else 0
    return between, inside


def _chunks(count: int, dtype: torch.dtype) -> list[int]:
    """The lengths of the chunks of so many elements."""
    step = max(1, chunk_bytes() // dtype.itemsize)
    return [min(step, count - begin) for begin in range(0, count, step)]


class SpanningChannel(GlooChannel):
    """As a GlooChannel, except for all-reduce, and for gather and scatter where they go in levels."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        topology, rank = seat.topology, seat.rank
        self._inside: HostChannel | None = None
        local = topology.local_ranks(rank)
        self._local_rank, self._local_size = local.index(rank), len(local)
        self._hosts = len(topology.nodes)
        self._host = topology.node_of(rank)
        self._rails = min(len(node) for node in topology.nodes)
        self._scratch: dict[tuple[torch.dtype, int], list[_Scratch]] = {}
        if self._local_rank < self._rails:
            self._connections["rail"] = seat.connect(f"rail{self._local_rank}/", self._host, self._hosts)
        self._levels: Levels | None = None

    @property
    def _rail(self) -> Any:
        """gloo between the ranks with this one's place in their hosts; None for ranks without a rail."""
        return self._connected("rail") if self._local_rank < self._rails else None

    def use_inside(self, channel: HostChannel | None) -> None:
        """The channel between the ranks of this host; None where it has one rank of the group."""
        self._inside = channel
        if channel is not None and not why_flat(self._topology):
            self._levels = Levels(self._topology, self.rank, channel, self._connected)

    def start(self, collective: Collective, timeout: float, sync: bool) -> Operation:
        if collective.kind == "all_reduce":
            return self.start_step(collective, timeout, self._in_levels)
        if collective.hierarchical:
            assert self._levels is not None
            return self.start_step(collective, timeout, getattr(self._levels, collective.kind))
        return super().start(collective, timeout, sync)

    def chunk_bytes(self, c: Collective) -> int:
        return chunk_bytes() if c.hierarchical or c.kind == "all_reduce" else 0

    def _guarded(self, c: Collective, timeout: float, run: Callable[[Collective, timedelta], object]) -> object:
        try:
            return super()._guarded(c, timeout, run)
        except Exception as error:
            if not isinstance(error, CollectiveError) or error.code != "mismatch":  # all ranks see a mismatch
                self._tell(c, error)
            raise

    def _explain(self, c: Collective, error: RuntimeError, seconds: float) -> CollectiveError:
        self._tell(c, error)
        return super()._explain(c, error, seconds)

    def _told(self, waiting: Waiting) -> str:
        inside = None if self._inside is None or waiting.call is None else self._inside.aborted()
        return inside or super()._told(waiting)

    def _in_vain(self, waiting: Waiting, now: float) -> str:
        if waiting.call is not None:
            for rank in self.ended():
                if not self._account.has_left(rank, waiting.sequence, now - waiting.begun):
                    return f"rank {self._labels[rank]} has ended in the middle of it"
        return super()._in_vain(waiting, now)

    def _tell(self, c: Collective, error: Exception) -> None:
        """Says at once that this rank lives and has failed: to those that look for ranks that ended; on its host in
        memory, where nobody sees connections close; and elsewhere by closing them."""
        where = f"{c.describe()} #{self._sequence} of group '{self.name}' failed on rank {self._labels[self.rank]}"
        text = str(error) if isinstance(error, CollectiveError) else f"{where}: {error}"
        with contextlib.suppress(RuntimeError):  # the store went with rank 0: whoever looks for others says so
            self._account.fail(text)
        self._broken = self._broken or CollectiveError(text)
        if self._inside is not None:
            self._inside.abort(text)
        self._part()

    def _reduce_scatter(self, c: Collective, limit: timedelta) -> Sent:
        pieces = [torch.empty_like(t) for t in [c.recv[0]] * self.size]
        sent = self._swap(Collective("all_to_all", c.send, pieces), limit)
        reduce_by_host(c.recv[0], pieces, c.op, self.size, self._topology)
        return sent

    def _in_levels(self, c: Collective, limit: timedelta) -> Moved:
        whole = flat(c.send[0])
        between, inside = expected_moved(whole.numel(), whole.dtype, self._topology, self.rank)
        moved = Moved(between_expected=between, inside_expected=inside)
        lengths = _chunks(whole.numel(), whole.dtype)
        pieces = list(whole.split(lengths)) if lengths else []
        scratch = self._take_scratch(whole.dtype, max(lengths, default=0))
        chunks = [
            _Chunk(piece, c.op, Shares(piece.numel(), self._rails, self._hosts), scratch[i % len(scratch)])
            for i, piece in enumerate(pieces)
        ]
        stages = (self._sum_inside, self._sum_between, self._spread_inside)
        for turn in range(len(chunks) + 2 * LAG if chunks else 0):
            for stage in (2, 1, 0):
                i = turn - stage * LAG
                if 0 <= i < len(chunks):
                    stages[stage](chunks[i], moved, limit)
        return moved

    def _take_scratch(self, dtype: torch.dtype, chunk: int) -> list[_Scratch]:
        """Buffers for chunks of so many elements, kept for the next all-reduce."""
        shares = Shares(chunk, self._rails, self._hosts)
        key = (dtype, shares.part)
        if key not in self._scratch:
            wire = wire_dtype(dtype)
            empty = torch.empty if self._inside is None else arena_empty

            def one() -> _Scratch:
                return _Scratch(
                    torch.zeros(shares.share, dtype=wire),
                    torch.zeros(self._hosts, shares.part, dtype=wire),
                    torch.zeros(shares.part, dtype=dtype),
                    empty((shares.share,), dtype=dtype),
                )

            if len(self._scratch) >= 4:  # a few sizes come again and again; others are not worth keeping
                self._scratch.clear()
            self._scratch[key] = [one() for _ in range(2 * LAG + 1)]
        return self._scratch[key]

    # 1. inside; then each host sends every other its part
    def _sum_inside(self, k: _Chunk, moved: Moved, limit: timedelta) -> None:
        begin, end = k.shares.of(self._local_rank)
        mine = k.scratch.mine[: k.shares.share]
        whole = k.whole.to(mine.dtype)
        if self._inside is None:
            mine[: end - begin] = whole[begin:end]
        else:
            send = [self._span(whole, k.shares, r) for r in range(self._local_size)]
            recv = [(mine.data_ptr(), (end - begin) * mine.element_size())] * self._local_size
            like = Collective("all_reduce", [whole], [whole], "sum" if k.op == "avg" else k.op)
            moved.inside += run_inside(self._inside, "reduce_scatter", send, recv, like, limit)
        if self._rail is None:
            return
        options = c10d.AllToAllOptions()
        options.timeout = limit
        pieces = k.scratch.pieces.view(-1)[: k.shares.share]
        k.work = self._rail.alltoall_base(pieces.view(torch.uint8), mine.view(torch.uint8), [], [], options)
        moved.between += mine.nbytes - mine.nbytes // self._hosts

    # 2. between: sum in host order; then each host sends every other its sum
    def _sum_between(self, k: _Chunk, moved: Moved, limit: timedelta) -> None:
        if self._rail is None:
            return
        k.work.wait()
        pieces = k.scratch.pieces.view(-1)[: k.shares.share].view(self._hosts, k.shares.part)
        total = k.scratch.total[: k.shares.part]
        reduce_rows(total, list(pieces.unbind(0)), k.op, self.size)
        options = c10d.AllgatherOptions()
        options.timeout = limit
        rows = flat(k.scratch.gathered)[: k.shares.share].view(torch.uint8).view(self._hosts, -1)
        k.work = self._rail.allgather([list(rows.unbind(0))], [total.view(torch.uint8)], options)
        moved.between += total.nbytes * (self._hosts - 1)

    # 3. inside: the shares come home
    def _spread_inside(self, k: _Chunk, moved: Moved, limit: timedelta) -> None:
        if self._rail is not None:
            k.work.wait()
        begin, end = k.shares.of(self._local_rank)
        gathered = k.scratch.gathered
        if self._inside is None:
            k.whole.copy_(gathered[: end - begin])
            return
        mine = (gathered.data_ptr(), (end - begin) * gathered.element_size())
        recv = [self._span(k.whole, k.shares, r) for r in range(self._local_size)]
        like = Collective("all_reduce", [k.whole], [k.whole])
        moved.inside += run_inside(self._inside, "all_gather", [mine] * self._local_size, recv, like, limit)

    def _span(self, whole: torch.Tensor, shares: Shares, local_rank: int) -> Span:
        begin, end = shares.of(local_rank)
        return (whole.data_ptr() + begin * whole.element_size(), (end - begin) * whole.element_size())

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Operation) -> list[Traffic]:
        moved = operation.result if isinstance(operation, Step) else None
        if not isinstance(moved, Moved):
            return super().traffic(kind, root, sent, received, operation)
        rows = [Traffic(BETWEEN_HOSTS, moved.between, moved.between_expected)]
        if self._inside is not None:
            rows.append(Traffic(SAME_HOST, moved.inside, moved.inside_expected))
        return rows

    def abort(self, text: str) -> None:
        if self._inside is not None:
            self._inside.abort(text)
        super().abort(text)

    def aborted(self) -> str | None:
        inside = None if self._inside is None else self._inside.aborted()
        return inside or super().aborted()

    def ended(self) -> list[int]:
        local = self._topology.local_ranks(self.rank)
        return [] if self._inside is None else [local[r] for r in self._inside.ended()]

    def close(self) -> None:
        super().close()
        if self._inside is not None:
            self._inside.close()

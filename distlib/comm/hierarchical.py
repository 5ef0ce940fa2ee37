"""Gather and scatter in levels, for groups over several hosts: what one host needs crosses the network once.

All-gather of a piece per rank (MiCS, arXiv 2205.00119, section 3.3), here of 2 hosts with 2 ranks each:

    host 0: ranks 0 1      (a) between  each rail (0 2), (1 3) gathers its ranks' pieces, all rails at once
    host 1: ranks 2 3      (b) order    no pass of its own: (c) copies every row to its place in the output
                           (c) inside   every rank copies the other rails' rows from the memory of its host

Of M bytes over p ranks, k to a host, a host sends (p-k)M/p; a ring over all ranks has it send (p-1)M/p. Reduce-scatter
is the mirror: (c) inside, the j-th rank of a host sums what the host has for the j-th rank of every host, (a) between,
a rail exchanges those sums and adds them up in host order. Half types are widened first, travel as fp32, and are
rounded once. Long pieces go in chunks, so that the network works on the next while memory works on this one.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from distlib import native, settings
from distlib.comm.arithmetic import reduce_in_order
from distlib.comm.channel import Collective
from distlib.comm.host import HostChannel, Span, span
from distlib.comm.memory import arena_empty, is_registered
from distlib.comm.tensors import bytes_of, flat
from distlib.comm.work import CollectiveError
from distlib.topology import Topology

LAG = 2  # chunks whose transfers are under way beside the one that memory works on
PAYS_FROM = 512 << 10  # bytes of the whole: measured on 2 x 2 ranks at 1 and 10 Gbit/s, even at 256 KiB, ahead at 1 MiB
INSIDE_LONGER = 5.0  # seconds beyond the limit for the ranks of a host: who is late there may wait for the network
_TAG = 1  # of all messages on a rail: they arrive in the order in which they were sent


@functools.cache
def chunk_bytes() -> int:
    """Bytes in which a tensor travels between hosts: DISTLIB_CHUNK_KB when it was first asked for."""
    return settings.integer("DISTLIB_CHUNK_KB", 4096, 64, "KiB") << 10


@dataclass
class Moved:
    """Bytes of this rank in one collective that went in levels, counted and by formula."""

    inside: int = 0
    between: int = 0
    inside_expected: int = 0
    between_expected: int = 0


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` travel as: half types as fp32, so that they are rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def why_flat(topology: Topology) -> str:
    """Why a gather between these ranks cannot go in levels; empty where it can."""
    if len(topology.nodes) == 1:
        return "its ranks share one host"
    if not topology.is_uniform:
        return f"its hosts hold different numbers of its ranks: {', '.join(str(len(node)) for node in topology.nodes)}"
    if len(topology.nodes[0]) == 1:
        return "it has one rank on each host"
    return ""


def pays(kind: str, dtype: torch.dtype, bytes: int, topology: Topology) -> bool:
    """Whether the way in levels is faster than the flat one, for so many bytes over all ranks."""
    if bytes < PAYS_FROM:
        return False
    # A scatter's pieces are added up by host, k to one, but sums of half types travel twice as wide.
    wider = wire_dtype(dtype).itemsize // dtype.itemsize if kind == "reduce_scatter" else 1
    return len(topology.nodes[0]) > wider


def expected_moved(kind: str, dtype: torch.dtype, piece: int, topology: Topology) -> tuple[int, int]:
    """Bytes of each rank (between hosts, inside its host), by formula; `piece`: bytes of one rank's input (gather) or
    output (scatter)."""
    hosts, local = len(topology.nodes), len(topology.nodes[0])
    wide = piece // dtype.itemsize * wire_dtype(dtype).itemsize if kind == "reduce_scatter" else piece
    return (hosts - 1) * wide, (local - 1) * hosts * wide


def reduce_by_host(
    out: torch.Tensor, sources: Sequence[torch.Tensor], op: str, divisor: int, topology: Topology
) -> None:
    """out = the reduction of one source per rank, in the order that all ways between hosts have: ranks in order inside
    hosts, then hosts in order; half types in fp32, rounded once. Overwrites the sources."""
    wide = [s.to(wire_dtype(s.dtype)) for s in sources]
    within = "sum" if op == "avg" else op
    for node in topology.nodes:
        reduce_in_order(wide[node[0]], [wide[r] for r in node], within, 1)
    reduce_rows(out, [wide[node[0]] for node in topology.nodes], op, divisor)


def reduce_rows(out: torch.Tensor, rows: Sequence[torch.Tensor], op: str, divisor: int) -> None:
    """out = the reduction of the hosts' results, in host order. Overwrites the first row where dtypes differ."""
    if out.dtype == rows[0].dtype:
        reduce_in_order(out, rows, op, divisor)
    else:
        reduce_in_order(rows[0], rows, op, divisor)
        out.copy_(rows[0])


def run_inside(
    channel: HostChannel, kind: str, send: list[Span], recv: list[Span], like: Collective, limit: timedelta
) -> int:
    """A part of a collective among the ranks of this host. Returns the bytes moved, or raises CollectiveError.

    Where the network fails, those who wait for it are to say so, before others take them for the culprits.
    """
    operation = channel.start_reduction(kind, send, recv, like, 1, limit.total_seconds() + INSIDE_LONGER)
    if operation.code:
        raise CollectiveError(operation.text, native.CODES[operation.code])
    return operation.peer_bytes


@dataclass
class _Transfer:
    """A chunk between hosts: messages to and from the other ranks of the rail."""

    begin: int
    rows: list[torch.Tensor]  # one per host: where it lands, or what this rank gives itself
    works: list[Any] = field(default_factory=list)

    def wait(self, limit: timedelta) -> None:
        while self.works:
            self.works[-1].wait(limit)
            self.works.pop()


def _drop(under_way: deque[_Transfer]) -> None:
    """Lets go of messages that a failure left behind. They would keep their connections open, for the others to wait
    on, as long as somebody holds the error."""
    for transfer in under_way:
        transfer.works.clear()


class Levels:
    """All-gather and reduce-scatter in levels between the ranks of a uniform topology (`why_flat` is empty).

    rank: this one's. inside: the channel between its host's ranks. connected: its owner's connections, by name; "rail"
    is gloo between the ranks that have its place in their hosts, by host. Calls run on one thread, in the same order on
    all ranks.
    """

    def __init__(self, topology: Topology, rank: int, inside: HostChannel, connected: Callable[[str], Any]) -> None:
        self._topology = topology
        self._inside = inside
        self._connected = connected  # not the rail itself: its owner lets it go
        self._hosts, self._local = len(topology.nodes), len(topology.nodes[0])
        self._host = topology.node_of(rank)
        self._place = topology.local_ranks(rank).index(rank)
        # Every rank sends to the next host first, so that no host is everybody's first.
        self._others = [(self._host + i) % self._hosts for i in range(1, self._hosts)]
        self._row_bytes = chunk_bytes() // min(topology.size, 16) // 64 * 64
        self._memory: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------ all-gather

    def all_gather(self, c: Collective, limit: timedelta) -> Moved:
        under_way: deque[_Transfer] = deque()
        try:
            return self._gather(c, limit, under_way)
        finally:
            _drop(under_way)

    def _gather(self, c: Collective, limit: timedelta, under_way: deque[_Transfer]) -> Moved:
        mine, homes = bytes_of(c.send[0]), [bytes_of(t) for t in c.recv]
        between, inside = expected_moved("all_gather", c.dtype, mine.numel(), self._topology)
        moved = Moved(inside_expected=inside, between_expected=between)
        if not mine.numel():
            return moved
        step = min(self._row_bytes, mine.numel())
        rail = [homes[r] for r in self._topology.rails[self._place]]
        # Registered outputs are read by the host's other ranks where the network wrote them.
        scratch = None if all(map(is_registered, rail)) else self._scratch("landing", step, torch.uint8, arena_empty)

        def start(i: int) -> _Transfer:
            begin, end = i * step, min((i + 1) * step, mine.numel())
            rows = [home[begin:end] for home in rail]
            if scratch is not None:
                rows = [row[: end - begin] for row in scratch[i % len(scratch)]]
            return self._exchange(begin, [mine[begin:end]] * self._hosts, rows, moved)

        chunks = -(-mine.numel() // step)
        under_way.extend(start(i) for i in range(min(LAG, chunks)))
        self._copy_inside(self._host, homes, 0, mine, moved, limit)  # needs no network: it goes beside the first chunks
        for i in range(chunks):
            if i + LAG < chunks:
                under_way.append(start(i + LAG))
            transfer = under_way[0]
            transfer.wait(limit)
            # In host order: all ranks of a host must make the same calls.
            for host in sorted(self._others):
                self._copy_inside(host, homes, transfer.begin, transfer.rows[host], moved, limit)
            under_way.popleft()
        return moved

    def _copy_inside(
        self, host: int, homes: list[torch.Tensor], begin: int, row: torch.Tensor, moved: Moved, limit: timedelta
    ) -> None:
        """`row` is part of a piece of a rank of `host`; the ranks of this host tell each other theirs."""
        homes = [homes[r] for r in self._topology.nodes[host]]
        recv = [span(home[begin : begin + row.numel()]) for home in homes]
        like = Collective("all_gather", [row], [row])
        moved.inside += run_inside(self._inside, "all_gather", [span(row)] * self._local, recv, like, limit)

    # ------------------------------------------------------------ reduce-scatter

    def reduce_scatter(self, c: Collective, limit: timedelta) -> Moved:
        under_way: deque[_Transfer] = deque()
        try:
            return self._scatter(c, limit, under_way)
        finally:
            _drop(under_way)

    def _scatter(self, c: Collective, limit: timedelta, under_way: deque[_Transfer]) -> Moved:
        out, given = flat(c.recv[0]), [flat(t) for t in c.send]
        between, inside = expected_moved("reduce_scatter", c.dtype, out.nbytes, self._topology)
        moved = Moved(inside_expected=inside, between_expected=between)
        if not out.numel():
            return moved
        wire = wire_dtype(out.dtype)
        step = min(self._row_bytes // wire.itemsize, out.numel())
        sums, landing = self._scratch("sums", step, wire), self._scratch("landed", step, wire)

        def finish() -> None:
            done = under_way[0]
            done.wait(limit)
            end = done.begin + done.rows[0].numel()
            reduce_rows(out[done.begin : end], done.rows, c.op, self._topology.size)
            under_way.popleft()

        for i, begin in enumerate(range(0, out.numel(), step)):
            length = min(step, out.numel() - begin)
            turn = i % len(sums)
            mine = [row[:length] for row in sums[turn]]
            for host in range(self._hosts):
                pieces = [given[r][begin : begin + length] for r in self._topology.nodes[host]]
                self._sum_inside(pieces, mine[host], c.op, moved, limit)
            rows = [row[:length] for row in landing[turn]]
            rows[self._host] = mine[self._host]
            under_way.append(self._exchange(begin, mine, rows, moved))
            if len(under_way) > LAG:
                finish()
        while under_way:
            finish()
        return moved

    def _sum_inside(
        self, pieces: list[torch.Tensor], out: torch.Tensor, op: str, moved: Moved, limit: timedelta
    ) -> None:
        """out = the sum over this host's ranks of what they have for the rank in this one's place on some host."""
        if pieces[0].dtype != out.dtype:
            wide = self._buffer("wide", self._local * out.numel(), out.dtype, arena_empty).view(self._local, -1)
            for row, piece in zip(wide, pieces, strict=True):
                row.copy_(piece)
            pieces = list(wide.unbind(0))
        like = Collective("reduce_scatter", pieces, [out], "sum" if op == "avg" else op)
        send, recv = [span(piece) for piece in pieces], [span(out)] * self._local
        moved.inside += run_inside(self._inside, "reduce_scatter", send, recv, like, limit)

    # ------------------------------------------------------------ between hosts, and memory

    def _exchange(self, begin: int, give: list[torch.Tensor], land: list[torch.Tensor], moved: Moved) -> _Transfer:
        """Starts sending give[h] to host h of the rail and receiving land[h] from it. Messages, as gloo moves those
        from and to where they lie; its all-gather copies twice more."""
        transfer, rail = _Transfer(begin, land), self._connected("rail")
        for host in reversed(self._others):
            transfer.works.append(rail.recv([bytes_of(land[host])], host, _TAG))
        for host in self._others:
            transfer.works.append(rail.send([bytes_of(give[host])], host, _TAG))
            moved.between += give[host].nbytes
        return transfer

    def _scratch(self, name: str, step: int, dtype: torch.dtype, empty: Any = torch.empty) -> torch.Tensor:
        """Rows of `step` elements, one per host, for each chunk that can be under way: (LAG + 1, hosts, step)."""
        return self._buffer(name, (LAG + 1) * self._hosts * step, dtype, empty).view(LAG + 1, self._hosts, step)

    def _buffer(self, name: str, elements: int, dtype: torch.dtype, empty: Any = torch.empty) -> torch.Tensor:
        """Memory that is kept for the next call, and grows to what was needed most."""
        need = elements * dtype.itemsize
        if name not in self._memory or self._memory[name].numel() < need:
            self._memory.pop(name, None)
            self._memory[name] = empty((need,), dtype=torch.uint8)
        return self._memory[name][:need].view(dtype)

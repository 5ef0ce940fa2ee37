"""Gather and scatter in levels on devices: what hierarchical.py does on the CPU, by communicators and on one stream.

All-gather, here of 2 hosts with 2 ranks each:

    host 0: ranks 0 1      (a) between  each rail (0 2), (1 3) gathers its ranks' pieces into rows, by host
    host 1: ranks 2 3      (c) inside   the ranks of a host gather their rails' rows: [rail][host]
                           (b) order    -> [host][rail], the order of ranks

Reduce-scatter is the mirror: order, sums inside, then the rail exchanges those sums and adds them up in host order.
Half types are widened first and rounded once. Long pieces go in chunks, so that the network works on the next one while
the links inside hosts work on this one. Steps are put on one stream, each after the work before it; no host waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from distlib import settings, streams
from distlib.comm.arithmetic import reduce_by_torch
from distlib.comm.c10d import OPS, method_of
from distlib.comm.channel import Collective
from distlib.comm.hierarchical import wire_dtype
from distlib.comm.tensors import as_bytes, as_one, flat
from distlib.cuda import blocks, library
from distlib.topology import Topology

CHUNK_BYTES = settings.integer("DISTLIB_DEVICE_CHUNK_KB", 65536, 64, "KiB") << 10  # of all ranks' pieces together
Connect = Callable[[str, int, Sequence[int]], Any]  # name, this rank's place, group ranks -> a process group


class DeviceLevels:
    """The rail's and the host's communicators of one rank of a uniform topology, made with the first call."""

    def __init__(self, topology: Topology, rank: int, device: torch.device, connect: Connect) -> None:
        self._topology, self._rank, self._device = topology, rank, device
        self._hosts, self._local = len(topology.nodes), len(topology.nodes[0])
        self._host = topology.node_of(rank)
        self._place = topology.local_ranks(rank).index(rank)
        self._connect = connect
        self._rail_pg: Any = None
        self._inside_pg: Any = None
        self.stream = streams.new(device, urgent=True)
        self._memory: dict[str, torch.Tensor] = {}
        # Whether rank = host * local + place, so that whole outputs can be put in order by one kernel.
        self._in_blocks = [r for node in topology.nodes for r in node] == list(range(topology.size))

    def process_groups(self) -> list[Any]:
        """Those that were made."""
        return [pg for pg in (self._rail_pg, self._inside_pg) if pg is not None]

    def run(self, c: Collective) -> None:
        """Puts all steps on the current stream, which is `stream`."""
        if self._rail_pg is None:
            rail, node = self._topology.rails[self._place], self._topology.nodes[self._host]
            self._rail_pg = self._connect(f"rail{self._place}", self._host, rail)
            self._inside_pg = self._connect(f"host{self._host}", self._place, node)
        if c.count == 0:
            return
        with torch.no_grad():
            if c.kind == "all_gather":
                self._all_gather(c)
            else:
                self._reduce_scatter(c)

    # ------------------------------------------------------------ all-gather

    def _all_gather(self, c: Collective) -> None:
        mine, homes = flat(as_bytes(c.send[0])), [flat(as_bytes(t)) for t in c.recv]
        step = self._step(mine.element_size(), mine.numel())
        begins = list(range(0, mine.numel(), step))

        def between(i: int) -> tuple[Any, torch.Tensor]:
            part = mine[begins[i] : begins[i] + step]
            rows = self._buffer(f"rows{i % 2}", self._hosts * part.numel(), mine.dtype)
            return method_of(self._rail_pg, "_allgather_base", "all_gather_single")(rows, part), rows

        under_way = between(0)
        for i, begin in enumerate(begins):
            work, rows = under_way
            if i + 1 < len(begins):
                under_way = between(i + 1)
            work.wait()
            length = rows.numel() // self._hosts
            whole = self._buffer(f"whole{i % 2}", self._local * rows.numel(), mine.dtype)
            method_of(self._inside_pg, "_allgather_base", "all_gather_single")(whole, rows).wait()
            self._place_rows(homes, whole, begin, length)

    def _place_rows(self, homes: list[torch.Tensor], whole: torch.Tensor, begin: int, length: int) -> None:
        """whole: [rail][host][length], the elements from `begin` of every rank's piece."""
        out = as_one(homes)
        if out is not None and self._in_blocks:
            if length == homes[0].numel():
                return reorder(out, whole, self._hosts, self._local)
            there = out.view(self._hosts, self._local, -1)[:, :, begin : begin + length]
            there.copy_(whole.view(self._local, self._hosts, length).transpose(0, 1))
            return None
        rows = whole.view(self._local * self._hosts, length).unbind(0)
        targets = [homes[r][begin : begin + length] for rail in self._topology.rails for r in rail]
        torch._foreach_copy_(targets, list(rows))
        return None

    # ------------------------------------------------------------ reduce-scatter

    def _reduce_scatter(self, c: Collective) -> None:
        out, given = flat(c.recv[0]), [flat(t) for t in c.send]
        wire = wire_dtype(out.dtype)
        step = self._step(wire.itemsize, out.numel())
        begins = list(range(0, out.numel(), step))
        options = c10d.ReduceScatterOptions()
        options.reduceOp = OPS["sum" if c.op == "avg" else c.op]

        def inside(i: int) -> tuple[Any, torch.Tensor, int]:
            begin = begins[i]
            length = min(step, out.numel() - begin)
            ordered = self._buffer(f"ordered{i % 2}", self._topology.size * length, wire)
            self._take_rows(ordered, given, begin, length)
            sums = self._buffer(f"sums{i % 2}", self._hosts * length, wire)
            call = method_of(self._inside_pg, "_reduce_scatter_base", "reduce_scatter_single")
            return call(sums, ordered, options), sums, length

        under_way = inside(0)
        for i, begin in enumerate(begins):
            work, sums, length = under_way
            work.wait()
            landed = self._buffer(f"landed{i % 2}", sums.numel(), wire)
            exchange = method_of(self._rail_pg, "alltoall_base", "all_to_all_single")
            sent = exchange(landed, sums, [], [], c10d.AllToAllOptions())
            if i + 1 < len(begins):
                under_way = inside(i + 1)
            sent.wait()
            total = reduce_by_torch(list(landed.view(self._hosts, length).unbind(0)), c.op, self._topology.size)
            out[begin : begin + length].copy_(total)

    def _take_rows(self, ordered: torch.Tensor, given: list[torch.Tensor], begin: int, length: int) -> None:
        """ordered: [rail][host][length] of what this rank has for every rank, widened."""
        whole = as_one(given)
        if whole is not None and self._in_blocks:
            if length == given[0].numel() and whole.dtype == ordered.dtype:
                return reorder(ordered, whole, self._local, self._hosts)
            rows = whole.view(self._hosts, self._local, -1)[:, :, begin : begin + length]
            ordered.view(self._local, self._hosts, length).copy_(rows.transpose(0, 1))
            return None
        targets = ordered.view(self._local * self._hosts, length).unbind(0)
        sources = [given[r][begin : begin + length] for rail in self._topology.rails for r in rail]
        torch._foreach_copy_(list(targets), sources)
        return None

    # ------------------------------------------------------------ memory

    def _step(self, element: int, numel: int) -> int:
        """Elements of a rank's piece in one chunk."""
        return max(1, min(numel, CHUNK_BYTES // (element * self._topology.size)))

    def _buffer(self, name: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of this stream, kept for the next call; it grows to what was needed most."""
        need = elements * dtype.itemsize
        if name not in self._memory or self._memory[name].numel() < need:
            self._memory.pop(name, None)
            self._memory[name] = torch.empty(need, dtype=torch.uint8, device=self._device)
        return self._memory[name][:need].view(dtype)


def reorder(out: torch.Tensor, rows: torch.Tensor, nodes: int, rails: int) -> None:
    """out[node][rail] = rows[rail][node], by the kernel where there is one."""
    if library.present() and out.device.type != "cpu":
        blocks.reorder(out, rows, nodes, rails)
    else:
        out.view(nodes, rails, -1).copy_(rows.view(rails, nodes, -1).transpose(0, 1))

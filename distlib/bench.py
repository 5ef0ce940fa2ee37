"""A quick benchmark of collectives on the ranks at hand: `distlib bench collectives`.

It tells within seconds how fast this machine or cluster is. benchmarks/collectives.py in the repository
compares with gloo and with a plain copy, and takes its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from pydantic import BaseModel
from rich.table import Table

import distlib
from distlib import native
from distlib.doctor.local_ranks import Ending, LocalRanks
from distlib.words import digits, plural
from distlib.words import size as size_text

# Newer torch has renamed these two; the old names warn.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

OPS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "send_recv")
SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)


class Line(BaseModel):
    """One operation at one size."""

    op: str
    bytes: int  # of the whole tensor: a reduce_scatter's input, an all_gather's output
    seconds: float  # per call: the slowest rank's, median of rounds

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes over seconds: what a caller gets."""
        return self.bytes / self.seconds

    def bus_bandwidth(self, ranks: int) -> float:
        """Bytes that each rank must at least send, over seconds: comparable between numbers of ranks."""
        share = (ranks - 1) / ranks
        factor = {"all_reduce": 2 * share, "broadcast": 1.0, "send_recv": 1.0}.get(self.op, share)
        return self.algorithm_bandwidth * factor


class Results(BaseModel):
    """A run."""

    ranks: int
    nodes: int
    device: str
    registered: bool
    simd: str  # of rank 0's core; empty: there is none
    lines: list[Line]


class BenchError(RuntimeError):
    """Ranks that this process started did not finish. The message holds their output."""


# ---- on every rank -----------------------------------------------------------------------------------------


def run_here(ops: Sequence[str], sizes: Sequence[int], registered: bool, backend: str, timeout: float) -> Results:
    """Measure on the ranks of this job, each of which must call. Ends the world it started."""
    with distlib.init(backend=backend, timeout=timedelta(seconds=timeout)) as world:
        lines = [
            Line(op=op, bytes=count * 4, seconds=seconds_per_call(call, 0.1))
            for op in ops
            for count, call in (_case(op, size, registered, world.device) for size in sizes)
        ]
        core = native.core()
        return Results(
            ranks=world.size,
            nodes=world.node_count,
            device=world.device.type,
            registered=registered and core is not None and world.device.type == "cpu",
            simd=core.simd_name() if core else "",
            lines=lines,
        )


def seconds_per_call(call: Callable[[], object], budget: float) -> float:
    """Seconds that `call`, a collective, takes: the slowest rank's, median of rounds. Every rank must call.

    budget: seconds to spend, more or less; a call that takes longer is made only twice.
    """
    call()
    once = _slowest(call, 1)
    if once > budget:
        return once
    once = min(once, _slowest(call, 1))  # the second call may still find caches cold
    rounds = max(1, min(7, int(budget / once)))
    repeat = max(1, min(1000, int(budget / rounds / once)))
    return median(_slowest(call, repeat) for _ in range(rounds))


def _slowest(call: Callable[[], object], repeat: int) -> float:
    """Seconds per call on the rank that takes longest; the same number on every rank."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = torch.tensor((time.perf_counter() - begin) / repeat, dtype=torch.float64)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return max(elapsed.item(), 1e-9)


def ring_exchange(incoming: torch.Tensor, outgoing: torch.Tensor) -> None:
    """Every rank sends to the next one and receives from the one before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, outgoing, (rank + 1) % size),
            dist.P2POp(dist.irecv, incoming, (rank - 1) % size),
        ]
    )
    for work in works:
        work.wait()


def _case(op: str, size: int, registered: bool, device: torch.device) -> tuple[int, Callable[[], object]]:
    """Float32 elements of the whole tensor (a multiple of the ranks), and the call to time."""
    ranks = dist.get_world_size()
    each = max(1, size // 4 // ranks)

    def tensor(count: int) -> torch.Tensor:
        if registered and device.type == "cpu":
            return distlib.registered_empty(count).zero_()
        return torch.zeros(count, device=device)

    whole = tensor(each * ranks)
    if op == "all_reduce":
        return whole.numel(), lambda: dist.all_reduce(whole)
    if op == "broadcast":
        return whole.numel(), lambda: dist.broadcast(whole, src=0)
    if op in ("all_to_all", "send_recv"):
        other = tensor(each * ranks)
        if op == "all_to_all":
            return whole.numel(), lambda: dist.all_to_all_single(other, whole)
        return whole.numel(), lambda: ring_exchange(other, whole)
    part = tensor(each)
    if op == "all_gather":
        return whole.numel(), lambda: all_gather_flat(whole, part)
    return whole.numel(), lambda: reduce_scatter_flat(part, whole)


# ---- ranks of our own --------------------------------------------------------------------------------------


def run_local(ranks: int, ops: Sequence[str], sizes: Sequence[int], registered: bool, timeout: float) -> Results:
    """Measure on `ranks` ranks that are started here, on the CPU. Raises BenchError."""
    arguments = (list(ops), list(sizes), registered, timeout)
    with LocalRanks(ranks, "distlib.bench:on_local_rank", *arguments) as started:
        endings = started.wait(timeout)
    if not all(ending.ok for ending in endings):
        raise BenchError("\n".join(_told(ending, timeout) for ending in endings if not ending.ok))
    return Results.model_validate(endings[0].value)


def on_local_rank(ops: list[str], sizes: list[int], registered: bool, timeout: float) -> dict[str, object]:
    """What a rank that run_local started runs."""
    return run_here(ops, sizes, registered, "distlib", timeout).model_dump()


def _told(ending: Ending, timeout: float) -> str:
    how = f"had to be killed ({timeout:g} s)" if ending.code is None else f"ended with code {ending.code}"
    return f"rank {ending.rank} {how}:\n{ending.output.strip() or '(it printed nothing)'}"


# ---- showing -----------------------------------------------------------------------------------------------


def table(results: Results) -> Table:
    """Results for a terminal."""
    memory = "registered" if results.registered else "ordinary"
    what = f"{plural(results.ranks, 'rank')}, {plural(results.nodes, 'node')}, float32, {memory} tensors"
    found = Table(title=f"{what}, {results.simd or results.device}", title_justify="left", caption_justify="left")
    found.caption = "algorithm: size of the whole tensor / time\nbus: bytes that each rank must at least send / time"
    found.add_column("operation")
    for column in ("size", "ms", "algorithm GB/s", "bus GB/s"):
        found.add_column(column, justify="right", no_wrap=True)
    for index, line in enumerate(results.lines):
        is_last = index + 1 == len(results.lines) or results.lines[index + 1].op != line.op
        found.add_row(
            line.op,
            size_text(line.bytes),
            digits(line.seconds * 1e3),
            _gigabytes(line.algorithm_bandwidth),
            _gigabytes(line.bus_bandwidth(results.ranks)),
            end_section=is_last,
        )
    return found


def _gigabytes(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f}" if bytes_per_second >= 5e6 else "< 0.01"

"""A group's own communicators: calls, levels between hosts, accounts. gloo's groups, over tensors on the CPU, stand in
for NCCL's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks
from test_device_collectives import Case, Player

import distlib
from distlib import native
from distlib.comm import gloo, hierarchical, nccl_levels
from distlib.comm.batches import exchange
from distlib.comm.channel import Message
from distlib.comm.group import Group
from distlib.comm.nccl import NcclChannel, connect_nccl
from distlib.sharded.build import device_for

pytestmark = pytest.mark.skipif(native.core() is None, reason=f"no C++ core: {native.why_not()}")
CPU = torch.device("cpu")
TWO_HOSTS = {"DISTLIB_NODES": "2"}


class Unfussy:
    """gloo's work, with what NCCL's does not have left out."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> bool:
        return all([work.wait() for work in self._works])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def exception(self) -> Any:
        return None

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def _source_rank(self) -> int:
        raise RuntimeError("sourceRank() may only be called on work objects that correspond to a recv call.")


class UnfussyGloo:
    """gloo's group, as NCCL's would take the calls: some dtypes only, no tags, messages together in brackets."""

    HAS = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float64}
    HAS |= {torch.float16, torch.bfloat16, torch.float32}

    def __init__(
        self, store: dist.Store, rank: int, size: int, name: str, global_ranks: list[int], timeout: timedelta
    ) -> None:
        assert len(global_ranks) == size
        self._pg = gloo.process_group(store, rank, size, timeout.total_seconds(), "127.0.0.1")
        self._bracket: list[Any] | None = None
        self.brackets, self.timeout = 0, timeout

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeout = timeout

    def _start_coalescing(self) -> None:
        self._bracket = []

    def _end_coalescing(self) -> Any:
        started, self._bracket = self._bracket, None
        self.brackets += 1
        return Unfussy(started) if started else None

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._pg, name)

        def checked(*args: Any) -> Any:
            for leaf in torch.utils._pytree.tree_leaves(args):
                if isinstance(leaf, torch.Tensor) and leaf.dtype not in self.HAS:
                    raise TypeError(f"Input tensor data type is not supported for NCCL process group: {leaf.dtype}")
            assert name not in ("send", "recv") or args[2] == 0, "a tag"
            work = call(*args)
            if self._bracket is None or not isinstance(work, dist.Work):
                return Unfussy([work]) if isinstance(work, dist.Work) else work
            return self._bracket.append(work)

        return checked


@contextmanager
def nccl_group(rank: int, n: int, make: Callable[..., Any] = UnfussyGloo, timeout: float = 20.0) -> Iterator[Group]:
    with process_group(rank, n, timeout=timeout):
        world = Group.of()
        channel = connect_nccl(world, CPU, make)
        yield Group(world.name, rank, world.ranks, world.topology, channel, timeout)
        channel.close()


KINDS = ["all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "gather", "scatter", "ring"]


def same_results(rank: int, n: int, cases: list[Case]) -> None:
    with nccl_group(rank, n) as group:
        for case in cases:
            got, expected = Player(group, CPU).play(case), Player(Group.of(), CPU).play(case)
            assert got == expected, f"{case} on rank {rank}"


@pytest.mark.parametrize("env", [{}, TWO_HOSTS], ids=["one host", "two hosts"])
def test_every_kind_gives_what_the_cpu_gives(env: dict[str, str]) -> None:
    ints = [Case(kind, torch.int64, op, 999, root=1) for kind in KINDS for op in ("sum", "max")]
    strided = [Case(kind, torch.int64, numel=50, strided=True) for kind in KINDS if kind != "ring"]
    moved = ["all_gather", "broadcast", "gather", "scatter", "ring"]
    ints += [Case(kind, dtype, numel=33, root=1) for kind in moved for dtype in (torch.int16, torch.float8_e5m2)]
    averages = [Case(kind, torch.float32, "avg", 0) for kind in ("all_reduce", "reduce", "reduce_scatter")]
    run_ranks(4, same_results, [*ints, *strided, *averages], env=env)


def averages(rank: int, n: int) -> None:
    with nccl_group(rank, n) as group:
        given = [torch.tensor([10 * rank + d]) for d in range(n)]  # gloo's parts must be equal
        got = [torch.zeros(1, dtype=torch.int64) for _ in range(n)]
        group.all_to_all(got, given)
        assert torch.cat(got).tolist() == [10 * r + rank for r in range(n)]
        x = torch.full((5,), float(rank))
        group.all_reduce(x, "avg")
        assert x.tolist() == [1.5] * 5
        y = torch.full((5,), rank)
        group.all_reduce(y, "avg", async_op=True).wait()
        assert y.tolist() == [1] * 5


def test_an_all_to_all_and_averages_of_a_backend_that_has_none() -> None:
    run_ranks(4, averages)


def messages(rank: int, n: int) -> tuple[str, list[tuple[str, int]]]:
    with nccl_group(rank, n) as group:
        distlib.ledger().reset()
        got = torch.zeros(3)
        if rank == 0:
            group.send(torch.arange(3.0), 1)
        else:
            work = group.recv(got, 0, async_op=True)
            assert work is not None and work.wait() and work.source_rank() == 0 and got.tolist() == [0.0, 1.0, 2.0]
        # Each first sends what the other takes later: one by one, long ones would wait for ever.
        back = torch.zeros(5, dtype=torch.int16)
        mine = torch.full((5,), rank, dtype=torch.int16)
        works = exchange(group, [Message(mine, 1 - rank, 0, True), Message(back, 1 - rank, 0, False)])
        assert len(works) == 1 and works[0].wait() and back.tolist() == [1 - rank] * 5
        assert group.cpu_channel.pg.brackets == 1  # type: ignore[attr-defined]
        assert exchange(group, []) == []
        with pytest.raises(ValueError, match="peer=7 is not a rank"):
            exchange(group, [Message(back, 7, 0, False)])
        with pytest.raises(ValueError, match="must be contiguous"):
            exchange(group, [Message(torch.zeros(4, 2)[:, 0], 1 - rank, 0, False)])
        with pytest.raises(ValueError) as caught:
            exchange(group, [Message(back, 1 - rank, 5, False)])
        for start in (group.send, group.recv):
            with pytest.raises(ValueError, match="tag=5, which NCCL would ignore"):
                start(got, 1 - rank, tag=5)
        group.sweep()
        rows = [(r.op, r.bytes) for r in distlib.ledger().rows]
        return str(caught.value), rows


def test_messages_over_nccl_start_together_and_tags_are_refused() -> None:
    found = run_ranks(2, messages)
    assert all("tag=5, which NCCL would ignore" in text for text, _ in found)
    assert dict(found[0][1]) == {"send": 12 + 10} and dict(found[1][1]) == {"recv": 0, "send": 10}


def other_backends(rank: int, n: int) -> None:
    with process_group(rank, n, backend="gloo"):
        group = Group.of()
        assert group.on_device("cpu") and not group.on_device("cuda")
    with nccl_group(rank, n) as group:
        channel = group.cpu_channel
        assert isinstance(channel, NcclChannel)
        channel.device = torch.device("cuda", 0)  # as of one that the user made
        assert group.on_device("cuda") and not group.on_device("cpu")
        with pytest.raises(ValueError, match="backend does not communicate tensors on cpu"):
            device_for(torch.nn.Linear(1, 1), None, group)
        channel.device = CPU


def test_a_group_of_another_backend_says_which_tensors_it_takes() -> None:
    run_ranks(1, other_backends)


def patient(rank: int, n: int) -> list[float]:
    found = []
    with nccl_group(rank, n) as group:
        channel = group.cpu_channel
        assert isinstance(channel, NcclChannel)
        for timeout in (None, 3600.0, 60.0):
            group.all_reduce(torch.ones(1), timeout=timeout)
            found.append(channel.pg.timeout.total_seconds())
        group.all_gather(torch.ones(n * 5), torch.ones(5), hierarchical=True)
        assert channel._levels is not None
        found += [pg.timeout.total_seconds() for pg in channel._levels.process_groups()]
        group.all_reduce(torch.ones(1), timeout=4000.0)
        return found + [pg.timeout.total_seconds() for pg in channel._process_groups()]


def test_torchs_watchdog_is_as_patient_as_the_longest_timeout() -> None:
    """It ends the process; ours ends the group, with a reason, and comes first."""
    later = 300.0
    expected = [20.0, 3600.0 + later, 3600.0 + later, 3600.0, 3600.0, *[4000.0 + later] * 3]
    assert run_ranks(4, patient, env=TWO_HOSTS) == [expected] * 4


# ---------------------------------------------------------------- levels


def whole_numbers(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums of these are exact in any order."""
    return torch.randint(-9, 9, (numel,), generator=torch.Generator().manual_seed(rank)).to(dtype)


def in_levels(rank: int, n: int, dtype: torch.dtype, chunk: int) -> list[tuple[str, str, int, int]]:
    nccl_levels.CHUNK_BYTES = chunk
    with nccl_group(rank, n) as group:
        for numel, as_list in itertools.product((0, 1, 7, 1000), (False, True)):
            all = [whole_numbers(r, numel, dtype) for r in range(n)]
            out = torch.zeros(n * numel, dtype=dtype)
            pieces = [torch.zeros(numel, dtype=dtype) for _ in range(n)]
            group.all_gather(pieces if as_list else out, all[rank], hierarchical=True)
            assert torch.equal(torch.cat(pieces) if as_list else out, torch.cat(all))
        for op, numel, as_list in itertools.product(("sum", "max", "avg"), (0, 1, 7, 1000), (False, True)):
            all = [whole_numbers(r, n * numel, dtype) for r in range(n)]
            mine = torch.zeros(numel, dtype=dtype)
            given = [p.clone() for p in all[rank].view(n, numel)] if as_list else all[rank]
            group.reduce_scatter(mine, given, op, hierarchical=True)
            stack = torch.stack(all).double()
            expected = {"sum": stack.sum(0), "max": stack.amax(0), "avg": stack.sum(0) / n}[op]
            if not dtype.is_floating_point:
                expected = expected.trunc()
            assert torch.equal(mine, expected.view(n, numel)[rank].to(dtype)), (op, numel)
        distlib.ledger().reset()
        group.all_gather(torch.zeros(n * 1000, dtype=dtype), torch.zeros(1000, dtype=dtype), hierarchical=True)
        group.reduce_scatter(torch.zeros(1000, dtype=dtype), torch.zeros(n * 1000, dtype=dtype), hierarchical=True)
        return [(r.op, r.link, r.calls, r.bytes) for r in distlib.ledger().rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("chunk", [1 << 30, 4000])
def test_gathers_and_scatters_in_levels(dtype: torch.dtype, chunk: int) -> None:
    for rows in run_ranks(4, in_levels, dtype, chunk, env=TWO_HOSTS):
        piece = 1000 * dtype.itemsize
        wide = 4000 if dtype is torch.bfloat16 else piece
        found = {(op, link): bytes for op, link, _, bytes in rows}
        assert found["all_gather", "between hosts"] == piece and found["all_gather", "same host"] == 2 * piece
        assert found["reduce_scatter", "between hosts"] == wide and found["reduce_scatter", "same host"] == 2 * wide


def widened(rank: int, n: int) -> None:
    with nccl_group(rank, n) as group:
        given = torch.tensor([256.0 if rank == 0 else 1.0] * n, dtype=torch.bfloat16)
        out = torch.zeros(1, dtype=torch.bfloat16)
        group.reduce_scatter(out, given, hierarchical=True)
        assert out.item() == 260.0  # 259, rounded once; one by one in bfloat16 it stays 256


def test_half_types_are_rounded_once() -> None:
    run_ranks(4, widened, env=TWO_HOSTS)


def flat_where_it_must_be(rank: int, n: int) -> None:
    with nccl_group(rank, n) as group:
        with pytest.raises(ValueError, match="share one host"):
            group.all_gather(torch.zeros(n), torch.zeros(1), hierarchical=True)
        large = hierarchical.PAYS_FROM
        out = torch.zeros(n * large, dtype=torch.uint8)
        group.all_gather(out, torch.full((large,), rank, dtype=torch.uint8))
        assert out.view(n, -1)[:, 5].tolist() == list(range(n))


def test_one_host_has_no_levels() -> None:
    run_ranks(2, flat_where_it_must_be)

"""Gather and scatter in levels between pretend hosts: the same bits, and the bytes of the formula."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks, run_ranks_raw, store
from test_collectives import DTYPES, LAYOUTS, Case, place, values
from test_spanning import sum_by_host

import distlib
from distlib import native
from distlib.comm.arithmetic import reduce_by_torch
from distlib.comm.group import Group
from distlib.comm.hierarchical import PAYS_FROM, chunk_bytes, expected_moved, pays, why_flat
from distlib.comm.work import CollectiveError
from distlib.topology import Topology

pytestmark = pytest.mark.skipif(native.core() is None, reason=f"no C++ core: {native.why_not()}")
SMALL_CHUNKS = {"DISTLIB_CHUNK_KB": "64"}  # rows of 16 KiB at 4 ranks, 10.6 KiB at 6
SIZES = [0, 1, 1001, 4096, 50_003]


def hosts(k: int) -> dict[str, str]:
    return {"DISTLIB_NODES": str(k), **SMALL_CHUNKS}


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def run_gather(group: Group, case: Case, pieces: bool) -> None:
    n, me = group.size, group.rank
    given = [values(case, r, case.numel) for r in range(n)]
    out = place(group, case, torch.zeros(case.numel * n, dtype=case.dtype))
    target: Any = [place(group, case, torch.zeros(case.numel, dtype=case.dtype)) for _ in given] if pieces else out
    group.all_gather(target, place(group, case, given[me]), hierarchical=True)
    got = torch.cat(list(target)) if pieces else target.clone(memory_format=torch.contiguous_format)
    assert same_bits(got, torch.cat(given)), case


def run_scatter(group: Group, case: Case, hierarchical: bool) -> None:
    n, me, numel = group.size, group.rank, case.numel
    given = [values(case, r, numel * n) for r in range(n)]
    out = place(group, case, torch.zeros(numel, dtype=case.dtype))
    group.reduce_scatter(out, place(group, case, given[me]), case.op, hierarchical=hierarchical)
    mine = [g[me * numel : (me + 1) * numel] for g in given]
    float_sum = case.dtype.is_floating_point and case.op in ("sum", "avg")
    expected = sum_by_host(group, mine, case.op) if float_sum else by_host(group, mine, case.op)
    assert same_bits(out.clone(memory_format=torch.contiguous_format), expected), (case, hierarchical)


def by_host(group: Group, tensors: list[torch.Tensor], op: str) -> torch.Tensor:
    """The same order for any operation, from single-host oracles; halves wide until the end."""
    wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
    within = "sum" if op == "avg" else op
    rows = [reduce_by_torch([wide[r] for r in node], within, 1) for node in group.topology.nodes]
    return reduce_by_torch(rows, op, len(tensors)).to(tensors[0].dtype)


# ---------------------------------------------------------------- results


def every_size_and_layout(rank: int, n: int) -> None:
    assert chunk_bytes() == 64 << 10, "so that the sizes here are many chunks"
    with process_group(rank, n):
        group = Group.of()
        for numel in SIZES:
            for layout in LAYOUTS:
                case = Case("", torch.float32, "sum", numel, layout, 0, numel, False)
                run_gather(group, case, pieces=False)
                run_gather(group, case, pieces=True)
                run_scatter(group, case, hierarchical=True)
                run_scatter(group, case, hierarchical=False)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (6, 2), (6, 3)])
def test_every_size_and_layout_equals_the_oracle_bit_for_bit(n: int, k: int) -> None:
    run_ranks(n, every_size_and_layout, env=hosts(k), timeout=100)


def whole_chunks(rank: int, n: int) -> None:
    """Chunks large enough to be read where they lie: memory must not be written again before all have read it."""
    with process_group(rank, n):
        group = Group.of()
        for turn, layout in enumerate(("registered", "ordinary", "mixed", "registered")):
            case = Case("", torch.float32, "sum", 1_100_001, layout, 0, turn, False)
            run_gather(group, case, pieces=turn % 2 == 0)
            run_scatter(group, case, hierarchical=True)
            run_scatter(group, replace(case, dtype=torch.bfloat16), hierarchical=True)


def test_chunks_that_neighbours_read_in_place() -> None:
    run_ranks(4, whole_chunks, env={"DISTLIB_NODES": "2"}, timeout=100)


def every_dtype_and_op(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        for dtype in DTYPES:
            case = Case("", dtype, "sum", 20_011, "ordinary", 0, 3, False)
            run_gather(group, case, pieces=False)
            for op in native.OPS:
                if native.reducible(dtype, op):
                    for layout in ("ordinary", "registered"):
                        run_scatter(group, Case("", dtype, op, 9001, layout, 0, 5, False), hierarchical=True)
        moved_only = torch.complex(torch.ones(5000) * rank, torch.ones(5000))
        out = torch.zeros(n * 5000, dtype=moved_only.dtype)
        group.all_gather(out, moved_only, hierarchical=True)
        assert torch.equal(out.real, torch.arange(n).repeat_interleave(5000).float())


def test_every_dtype_and_operation() -> None:
    run_ranks(4, every_dtype_and_op, env=hosts(2), timeout=100)


def scatter_equals_all_reduce(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        for dtype in (torch.float32, torch.bfloat16):
            whole = values(Case("", dtype, "sum", 0, "", 0, 9, False), rank, 12 * 2503).clone()
            shares = [torch.empty(12 * 2503 // n, dtype=dtype) for _ in range(2)]
            for share, levels in zip(
                shares, (True, False) if not why_flat(group.topology) else (None, False), strict=True
            ):
                group.reduce_scatter(share, whole, "avg", hierarchical=levels)
            group.all_reduce(whole, "avg")
            for share in shares:
                assert same_bits(share, whole.view(n, -1)[rank].contiguous())


@pytest.mark.parametrize(("n", "k"), [(4, 2), (3, 2), (6, 3)])
def test_a_scatter_has_the_bits_of_the_all_reduce_whichever_way_it_goes(n: int, k: int) -> None:
    run_ranks(n, scatter_equals_all_reduce, env=hosts(k))


def any_order(rank: int, n: int, members: list[list[int]]) -> None:
    with process_group(rank, n):
        for ranks in members:
            if rank in ranks:
                name = f"of {ranks}"
                at = dist.PrefixStore(name, store())
                group = Group.create(at, ranks.index(rank), len(ranks), timedelta(seconds=30), name, ranks)
                assert not why_flat(group.topology)
                for numel in (1, 20_011):
                    run_gather(group, Case("", torch.float32, "sum", numel, "mixed", 0, 1, False), pieces=False)
                    run_scatter(group, Case("", torch.float32, "sum", numel, "mixed", 0, 2, False), hierarchical=True)
                group.close()


def test_groups_of_ranks_in_any_order() -> None:
    run_ranks(6, any_order, [[0, 2, 3, 5], [1, 2, 4, 5], [5, 0, 4, 1], [3, 4, 2, 0]], env=hosts(2), timeout=100)


def several_in_flight(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        cases = [Case("", torch.float32, "sum", numel, "", 0, numel, False) for numel in (40_001, 3, 0, 17_000)]
        given = [values(c, rank, c.numel) for c in cases]
        wide = [values(c, rank, c.numel * n) for c in cases]
        gathered = [torch.zeros(c.numel * n) for c in cases]
        scattered = [torch.zeros(c.numel) for c in cases]
        works = []
        for i in range(len(cases)):
            works.append(group.all_gather(gathered[i], given[i], async_op=True, hierarchical=True))
            works.append(group.reduce_scatter(scattered[i], wide[i], async_op=True, hierarchical=i % 2 == 0))
        for work in reversed(works):
            work.wait()
        for i, c in enumerate(cases):
            assert torch.equal(gathered[i], torch.cat([values(c, r, c.numel) for r in range(n)]))
            mine = [values(c, r, c.numel * n)[rank * c.numel : (rank + 1) * c.numel] for r in range(n)]
            assert same_bits(scattered[i], sum_by_host(group, mine, "sum"))


def test_several_may_be_in_flight() -> None:
    run_ranks(4, several_in_flight, env=hosts(2))


def chosen(rank: int, n: int) -> dict[str, int]:
    with process_group(rank, n):
        group, found = Group.of(), {}
        for name, piece, asked in (
            ("small", 100, None),
            ("large", 100_000, None),
            ("large flat", 100_000, False),
        ):
            distlib.ledger().reset()
            group.all_gather(torch.zeros(n * piece), torch.ones(piece), hierarchical=asked)
            found[name] = distlib.ledger().total_bytes("between hosts")
        return found


def test_none_chooses_by_size() -> None:
    of_ranks = run_ranks(4, chosen, env=hosts(2))
    assert [r["large"] for r in of_ranks] == [400_000] * 4, "one piece to the other host's rank on the rail"
    assert [r["large flat"] for r in of_ranks] == [0, 1_200_000, 0, 1_200_000], "the ring crosses at two ranks"
    assert [r["small"] for r in of_ranks] == [0, 1200, 0, 1200]


def test_whether_it_pays_is_arithmetic() -> None:
    two_by_two, two_by_three = Topology(((0, 1), (2, 3))), Topology(((0, 1, 2), (3, 4, 5)))
    assert pays("all_gather", torch.bfloat16, PAYS_FROM, two_by_two)
    assert not pays("all_gather", torch.bfloat16, PAYS_FROM - 1, two_by_two)
    assert pays("reduce_scatter", torch.float32, PAYS_FROM, two_by_two)
    assert not pays("reduce_scatter", torch.bfloat16, 1 << 30, two_by_two), "sums in fp32 would be as many bytes"
    assert pays("reduce_scatter", torch.bfloat16, PAYS_FROM, two_by_three)


# ---------------------------------------------------------------- bytes


def counted(rank: int, n: int, kind: str, dtype: torch.dtype, piece: int) -> dict[str, tuple[int, int]]:
    with process_group(rank, n):
        group = Group.of()
        distlib.ledger().reset()
        small, large = torch.ones(piece, dtype=dtype), torch.ones(piece * n, dtype=dtype)
        if kind == "all_gather":
            group.all_gather(large, small, hierarchical=True)
        else:
            group.reduce_scatter(small, large, hierarchical=True)
        ledger = distlib.ledger()
        pairs = zip(ledger.rows, ledger.expected(), strict=True)
        return {row.link: (row.bytes, formula.bytes) for row, formula in pairs if row.op == kind}


@pytest.mark.parametrize(("n", "h"), [(4, 2), (6, 2), (6, 3)])
@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ledger_counts_the_bytes_of_the_paper(kind: str, n: int, h: int, dtype: torch.dtype) -> None:
    piece, k = 30_007, n // h
    wide = 4 if kind == "reduce_scatter" else dtype.itemsize  # sums travel as fp32
    whole = piece * n * wide
    of_ranks = run_ranks(n, counted, kind, dtype, piece, env=hosts(h))
    for row in of_ranks:
        assert row["between hosts"] == ((h - 1) * piece * wide,) * 2
        assert row["same host"] == ((k - 1) * h * piece * wide,) * 2
    of_a_host = sum(row["between hosts"][0] for row in of_ranks[:k])
    assert of_a_host == (n - k) * whole // n, "(p - k) M / p"
    topology = Topology(tuple(tuple(range(i * k, i * k + k)) for i in range(h)))
    assert expected_moved(kind, dtype, piece * dtype.itemsize, topology) == (
        of_ranks[0]["between hosts"][0],
        of_ranks[0]["same host"][0],
    )


# ---------------------------------------------------------------- refusals and faults


def refused(rank: int, n: int, reason: str) -> None:
    with process_group(rank, n):
        group = Group.of()
        large, small = torch.zeros(n * 100_000), torch.ones(100_000)
        for call in (
            lambda: group.all_gather(large, small, hierarchical=True),
            lambda: group.reduce_scatter(small, large, hierarchical=True),
        ):
            with pytest.raises(ValueError, match=f"hierarchical=True is not possible.*{reason}"):
                call()
        group.all_gather(large, small)  # by itself it goes flat
        assert bool((large == 1).all())
        group.reduce_scatter(small, large)
        assert bool((small == n).all())


@pytest.mark.parametrize(
    ("n", "env", "reason"),
    [
        (3, {"DISTLIB_NODES": "2"}, "different numbers of its ranks: 2, 1"),
        (2, {"DISTLIB_NODES": "2"}, "one rank on each host"),
        (2, {}, "share one host"),
        (2, {"DISTLIB_CORE": "0"}, "one rank on each host"),
    ],
    ids=str,
)
def test_where_it_cannot_be_it_is_refused_with_the_reason(n: int, env: dict[str, str], reason: str) -> None:
    run_ranks(n, refused, reason, env=env)


def differ(rank: int, n: int, what: str) -> str:
    with process_group(rank, n, timeout=20):
        group = Group.of()
        piece = 50_000 + (what == "size" and rank == 3)
        if what == "chunk" and rank == 3:
            os.environ["DISTLIB_CHUNK_KB"] = "128"
            chunk_bytes.cache_clear()  # as if it had been set there from the start
        begin = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            group.all_gather(torch.zeros(n * piece), torch.zeros(piece), hierarchical=what != "way" or rank != 3)
        assert time.monotonic() - begin < 10
        return str(caught.value)


@pytest.mark.parametrize("what", ["size", "way", "chunk"])
def test_ranks_that_differ_all_raise_and_say_how(what: str) -> None:
    for text in run_ranks(4, differ, what, env=hosts(2)):
        assert "ranks disagree" in text and "rank 3 called all_gather(" in text
        assert ("in two levels" in text or "flat" in text) == (what != "size"), text
    if what == "chunk":
        assert "rank 3 called all_gather(50000 elements, sum, root 0, in two levels by 128 KiB)" in text


def killed(rank: int, n: int, kind: str) -> str:
    with process_group(rank, n, timeout=40):
        group = Group.of()
        small, large = torch.zeros(2_000_000), torch.zeros(n * 2_000_000)
        group.barrier()
        begin = time.monotonic()
        try:
            for i in range(1000):
                if rank == 3 and i == 2:
                    work = group.all_gather(large, small, async_op=True, hierarchical=True)
                    time.sleep(0.005)
                    os.kill(os.getpid(), signal.SIGKILL)
                    work.wait()
                if kind == "all_gather" or i == 2:
                    group.all_gather(large, small, hierarchical=True)
                else:
                    group.reduce_scatter(small, large, hierarchical=True)
        except CollectiveError as error:
            assert time.monotonic() - begin < 20
            os._exit(0 if str(error) else 1)
        os._exit(2)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_a_killed_rank_ends_it_on_all_ranks_in_time(kind: str) -> None:
    outcomes = run_ranks_raw(4, killed, kind, env=hosts(2), timeout=50)
    assert [(o.kind, o.code) for o in outcomes[:3]] == [("exit", 0)] * 3, "\n".join(map(str, outcomes))


def one_fails(rank: int, n: int, kind: str) -> tuple[str, float]:
    """Rank 1 cannot get the memory that it needs in the middle of a collective."""
    with process_group(rank, n, timeout=40):
        group = Group.of()
        small, large = torch.zeros(50_000), torch.zeros(n * 50_000)
        group.all_gather(large, small, hierarchical=True)
        if rank == 1:
            levels = group._channel._levels  # type: ignore[attr-defined]

            def refuse(*_: object, **__: object) -> None:
                raise MemoryError("no memory is left for this test")

            levels._exchange = refuse
        begin = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            if kind == "all_gather":
                group.all_gather(large, small, hierarchical=True)
            else:
                group.reduce_scatter(small, large, hierarchical=True)
        seconds = time.monotonic() - begin
        with pytest.raises(CollectiveError):
            group.barrier()
        return str(caught.value), seconds


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_an_error_on_one_rank_reaches_all(kind: str) -> None:
    ends = run_ranks(4, one_fails, kind, env=hosts(2), timeout=60)
    assert "no memory is left for this test" in ends[1][0]
    assert "no memory is left for this test" in ends[0][0], "told in memory, with the reason"
    assert all(seconds < 10 for _, seconds in ends), ends


def aborts(rank: int, n: int) -> tuple[str, float]:
    with process_group(rank, n, timeout=40):
        group = Group.of()
        small, large = torch.zeros(50_000), torch.zeros(n * 50_000)
        group.all_gather(large, small, hierarchical=True)
        begin = time.monotonic()
        if rank == 2:
            time.sleep(0.3)
            group.abort("rank 2 had enough")
        with pytest.raises(CollectiveError) as caught:
            group.all_gather(large, small, hierarchical=True)
        return str(caught.value), time.monotonic() - begin


def test_an_abort_ends_waiting_ranks_in_time() -> None:
    ends = run_ranks(4, aborts, env=hosts(2), timeout=60)
    assert "rank 2 had enough" in ends[2][0]
    assert all(seconds < 10 for _, seconds in ends), ends

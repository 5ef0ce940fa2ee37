"""Collectives against a single-process oracle: every operation, dtype, layout and group, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import RankError, process_group, run_ranks, run_ranks_raw

from distlib import native
from distlib.comm.arithmetic import reduce_by_torch
from distlib.comm.group import Group

pytestmark = pytest.mark.skipif(native.core() is None, reason=f"no C++ core: {native.why_not()}")

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
]  # fmt: skip
KINDS = [
    "all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "gather", "scatter", "all_to_all", "message",
]  # fmt: skip
LAYOUTS = ["ordinary", "registered", "mixed", "strided"]


@dataclass(frozen=True)
class Case:
    """One collective of a random program."""

    kind: str
    dtype: torch.dtype
    op: str
    numel: int
    layout: str
    root: int
    seed: int
    async_op: bool


def values(case: Case, rank: int, numel: int) -> torch.Tensor:
    """What `rank` brings: any rank can make any other's. To be read only: it is kept for the next that asks."""
    return drawn(case.dtype, case.seed * 1009 + rank, numel)


@lru_cache(maxsize=12)
def drawn(dtype: torch.dtype, seed: int, numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    if dtype.is_floating_point:
        return (torch.randn(numel, generator=generator) * 3).to(dtype)
    low = 0 if dtype is torch.uint8 else -50
    return torch.randint(low, 50, (numel,), generator=generator).to(dtype)


def place(group: Group, case: Case, data: torch.Tensor) -> torch.Tensor:
    """The same values in the memory that the case asks for."""
    registered = case.layout == "registered" or (case.layout == "mixed" and group.rank % 2 == 0)
    if registered:
        return group.registered_empty(data.numel(), dtype=data.dtype).copy_(data)
    if case.layout == "strided":
        return torch.stack([data, data], dim=1)[:, 0]
    return data.clone()


def check(group: Group, case: Case) -> None:
    """Runs one case on this rank and compares with the oracle, bit for bit."""
    n, me, numel = group.size, group.rank, case.numel
    root = case.root % n
    parts = n if case.kind in ("reduce_scatter", "scatter", "all_to_all") else 1  # which have a part per rank
    whole = [values(case, r, numel * parts) for r in range(n)]
    part = [w[:numel] for w in whole]
    sums = lambda tensors: reduce_by_torch(tensors, case.op, n)  # noqa: E731

    def same(got: torch.Tensor, expected: torch.Tensor) -> None:
        assert got.dtype == expected.dtype
        bits = [t.clone(memory_format=torch.contiguous_format).as_strided((t.numel(),), (1,)) for t in (got, expected)]
        ok = torch.equal(*[b.view(torch.uint8) for b in bits])
        assert ok, f"{case} on rank {me} of {n}: {got[:5].tolist()} is not {expected[:5].tolist()}"

    def wait(work: Any) -> None:
        if case.async_op:
            work.wait()

    late = case.async_op
    if case.kind == "all_reduce":
        x = place(group, case, part[me])
        wait(group.all_reduce(x, case.op, async_op=late))
        same(x, sums(part))
    elif case.kind == "reduce":
        x = place(group, case, part[me])
        wait(group.reduce(x, root, case.op, async_op=late))
        if me == root:
            same(x, sums(part))
    elif case.kind == "reduce_scatter":
        x, out = place(group, case, whole[me]), place(group, case, torch.zeros_like(part[0]))
        wait(group.reduce_scatter(out, x, case.op, async_op=late))
        same(out, sums(whole)[me * numel : (me + 1) * numel])
    elif case.kind == "all_gather":
        x, out = place(group, case, part[me]), place(group, case, torch.zeros(numel * n, dtype=case.dtype))
        wait(group.all_gather(out, x, async_op=late))
        same(out, torch.cat(part))
    elif case.kind == "broadcast":
        x = place(group, case, part[me])
        wait(group.broadcast(x, root, async_op=late))
        same(x, part[root])
    elif case.kind == "gather":
        outs = [torch.zeros_like(part[0]) for _ in range(n)] if me == root else None
        wait(group.gather(outs, place(group, case, part[me]), root, async_op=late))
        for got, expected in zip(outs or [], part, strict=False):
            same(got, expected)
    elif case.kind == "scatter":
        out = place(group, case, torch.zeros_like(part[0]))
        given = place(group, case, whole[root]) if me == root else None
        wait(group.scatter(out, given, root, async_op=late))
        same(out, whole[root][me * numel : (me + 1) * numel])
    elif case.kind == "all_to_all":
        sizes = [[(r * 7 + d * 3 + case.seed) % (numel + 1) for d in range(n)] for r in range(n)]  # any size per pair
        outs = [torch.zeros(sizes[r][me], dtype=case.dtype) for r in range(n)]
        send = place(group, case, whole[me])
        wait(group.all_to_all(outs, [send[d * numel :][: sizes[me][d]] for d in range(n)], async_op=late))
        for r, got in enumerate(outs):
            same(got, whole[r][me * numel :][: sizes[r][me]])
    else:  # messages round the ring, received in another order than sent, the second from any rank
        x, y = place(group, case, part[me]), place(group, case, torch.zeros_like(part[0]))
        first = group.send(x, (me + 1) % n, tag=1, async_op=True)
        second = group.send(x, (me + 1) % n, tag=2, async_op=True)
        group.recv(y, (me - 1) % n, tag=2)
        same(y, part[me - 1])
        work = group.recv(y, None, tag=1, async_op=True)
        work.wait()
        assert work.source_rank() == (me - 1) % n
        same(y, part[me - 1])
        first.wait()
        second.wait()


def run_program(rank: int, n: int, cases: list[Case], members: list[int]) -> None:
    with process_group(rank, n):
        world = Group.of()
        sub = dist.new_group(members) if len(members) < n else None
        for case in cases:
            check(world, case)
            if sub is not None and rank in members:
                check(Group.of(sub), case)


@st.composite
def programs(draw: Any) -> tuple[int, list[Case], list[int]]:
    n = draw(st.integers(1, 8))
    cases = []
    for seed in range(draw(st.integers(4, 10))):
        dtype = draw(st.sampled_from(DTYPES))
        op = draw(st.sampled_from([op for op in native.OPS if native.reducible(dtype, op)]))
        numel = draw(st.sampled_from([0, 1, 2, 63, 64, 65, 1000, 4097, 40_000, 300_001]))
        layout, root = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, n - 1))
        cases.append(Case(draw(st.sampled_from(KINDS)), dtype, op, numel, layout, root, seed, draw(st.booleans())))
    members = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1)))
    return n, cases, members


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs())
def test_any_program_of_collectives_equals_the_oracle(program: tuple[int, list[Case], list[int]]) -> None:
    n, cases, members = program
    run_ranks(n, run_program, cases, members)


def kernels_in_use(rank: int, n: int) -> str:
    return native.core().simd_name()


@pytest.mark.parametrize("simd", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter"])
def test_every_dtype_and_operation(kind: str, simd: str) -> None:
    try:
        assert run_ranks(1, kernels_in_use, env={"DISTLIB_SIMD": simd}) == [simd]
    except RankError as error:
        assert "DISTLIB_SIMD" in str(error)
        pytest.skip(f"this processor has no {simd}")
    cases = [
        Case(kind, dtype, op, numel, layout, 0, 5, False)
        for dtype in DTYPES
        for op in native.OPS
        if native.reducible(dtype, op)
        for numel, layout in [(17, "ordinary"), (200_003, "registered")]
    ]
    run_ranks(3, run_program, cases, [0, 1, 2], env={"DISTLIB_SIMD": simd})


def all_kinds(rank: int, n: int, numels: list[int]) -> None:
    cases = [
        Case(kind, torch.float32, "sum", numel, layout, 1, 3, late)
        for kind in KINDS
        for numel in numels
        for layout in LAYOUTS
        for late in (False, True)
    ]
    run_program(rank, n, cases, list(range(n)))


@pytest.mark.parametrize("n", [2, 5])
def test_every_kind_and_layout_at_sizes_around_the_staging_slots(n: int) -> None:
    run_ranks(n, all_kinds, [262_144 // n, 262_145], timeout=110)


def many_in_flight(rank: int, n: int) -> list[float]:
    with process_group(rank, n):
        groups = [Group.of()] + [Group.of(dist.new_group()) for _ in range(3)]
        tensors = [[torch.full((10_000 + i,), float(rank + i)) for i in range(12)] for _ in groups]
        works = []
        for i in range(12):
            for g, group in enumerate(groups):  # several groups, many operations, waited for backwards
                works.append(group.all_reduce(tensors[g][i], async_op=True))
        for work in reversed(works):
            work.wait()
        return [t[-1].item() for row in tensors for t in row]


def test_many_operations_of_several_groups_in_flight() -> None:
    for result in run_ranks(3, many_in_flight):
        assert result == [3.0 * i + 3.0 for i in range(12)] * 4


def repeated_sum(rank: int, n: int) -> bytes:
    with process_group(rank, n):
        results = []
        for layout in ("ordinary", "registered"):
            case = Case("all_reduce", torch.float32, "sum", 100_000, layout, 0, 1, False)
            x = place(Group.of(), case, values(case, rank, 100_000))
            Group.of().all_reduce(x)
            results.append(x.numpy().tobytes())
        assert results[0] == results[1]
        return results[0]


def test_bits_are_the_same_on_all_ranks_in_every_run_and_by_every_path() -> None:
    assert len({bits for _ in range(2) for bits in run_ranks(4, repeated_sum)}) == 1


def unusual_tensors(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        scalar = torch.tensor(float(rank))
        group.all_reduce(scalar)
        assert scalar.item() == 1.0
        transposed = torch.arange(12.0).view(3, 4).t()
        group.all_reduce(transposed)
        assert torch.equal(transposed, 2 * torch.arange(12.0).view(3, 4).t())
        z = torch.tensor([1 + 2j, 3 - 1j]).conj() if rank else torch.zeros(2, dtype=torch.complex64)
        out = torch.empty(2 * n, dtype=torch.complex64)
        group.all_gather(out, z)
        assert torch.equal(out[2:], torch.tensor([1 - 2j, 3 + 1j]))
        f8 = torch.ones(5).to(torch.float8_e5m2)
        group.broadcast(f8, 0)


def test_scalars_strides_conjugates_and_rare_dtypes() -> None:
    run_ranks(2, unusual_tensors)


def wrong_arguments(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        for call, words in [
            (lambda: group.all_reduce(torch.ones(2), "median"), "median"),
            (lambda: group.all_reduce(torch.ones(2), "bor"), "'bor' is not defined on float32"),
            (lambda: group.all_reduce(torch.ones(2, dtype=torch.bool), "avg"), "'avg' is not defined on bool"),
            (lambda: group.all_reduce(torch.ones(2, dtype=torch.complex64)), "complex64 cannot be reduced"),
            (lambda: group.broadcast(torch.ones(2), 7), "src=7 is not a rank"),
            (lambda: group.all_gather(torch.ones(3), torch.ones(2)), "output has 3 elements"),
            (lambda: group.scatter(torch.ones(2), None, rank), "input is needed"),
            (lambda: group.all_to_all([torch.ones(1)] * 5, [torch.ones(1)] * 5), "5 outputs given"),
            (lambda: group.send(torch.ones(1), 9), "dst=9"),
        ]:
            with pytest.raises(ValueError, match=words):
                call()
        x = torch.ones(3)
        group.all_reduce(x)  # nothing was started by the wrong calls
        assert x.tolist() == [2.0, 2.0, 2.0]


def test_wrong_arguments_raise_before_anything_starts() -> None:
    run_ranks(2, wrong_arguments)


def other_dtypes(rank: int, n: int) -> None:
    """Tensors of two dtypes in one call, by the group's calls and by torch's."""
    with process_group(rank, n):
        group, one, all = Group.of(), torch.ones(4), torch.ones(4 * n)
        two, many = torch.zeros(4, dtype=torch.float64), torch.zeros(4 * n, dtype=torch.float64)
        lists = [torch.zeros(4, dtype=torch.float64) for _ in range(n)]
        whole = group.registered_empty(1 << 18)
        calls: list[tuple[str, Callable[[], object]]] = [
            ("all_gather", lambda: dist.all_gather_into_tensor(many, one)),
            ("all_gather", lambda: group.all_gather(lists, one)),
            ("all_gather", lambda: group.all_gather(torch.zeros(n << 18, dtype=torch.float64), whole)),
            ("reduce_scatter", lambda: dist.reduce_scatter_tensor(two, all)),
            ("all_to_all", lambda: group.all_to_all(list(many.chunk(n)), list(all.chunk(n)))),
        ]
        if rank == 0:
            calls.append(("gather", lambda: group.gather(lists, one, 0)))
            calls.append(("scatter", lambda: group.scatter(two, all, 0)))
        for kind, call in calls:
            with pytest.raises(ValueError, match=f"{kind}: tensors of float32 and float64 were given to one call"):
                call()
        dist.all_reduce(one)
        assert one.tolist() == [n] * 4, "nothing was started"


@pytest.mark.parametrize("env", [{}, {"DISTLIB_NODES": "2"}, {"DISTLIB_CORE": "0"}])
def test_tensors_of_two_dtypes_are_refused_before_anything_starts(env: dict[str, str]) -> None:
    run_ranks(2, other_dtypes, env=env)


def beyond_two_gib(rank: int, n: int) -> None:
    with process_group(rank, n, timeout=100):
        group, size = Group.of(), (1 << 31) + 4096
        x = group.registered_empty(size, dtype=torch.uint8)
        x[0], x[1 << 30], x[-1] = 1, rank, 2 + rank
        group.all_reduce(x)
        assert [x[0].item(), x[1 << 30].item(), x[-1].item(), x[12345].item()] == [2, 1, 5, 0]
        y = torch.empty(size, dtype=torch.uint8)
        if rank == 0:
            y[-3:] = torch.tensor([7, 8, 9], dtype=torch.uint8)
        group.broadcast(y, 0)
        assert y[-3:].tolist() == [7, 8, 9]


@pytest.mark.alone  # needs much memory
def test_sizes_past_two_gib() -> None:
    available = int(open("/proc/meminfo").read().split("MemAvailable:")[1].split()[0]) >> 20
    if available < 14:
        pytest.skip(f"needs 14 GiB of free memory, {available} are there")
    run_ranks(2, beyond_two_gib, timeout=110)


def setting_is_refused(rank: int, n: int) -> str:
    with pytest.raises(ValueError) as caught, process_group(rank, n):
        pass
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["DISTLIB_SIMD", "DISTLIB_STAGING_KB", "DISTLIB_ARENA_MB", "DISTLIB_CORE", "DISTLIB_NODES"]
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name: str) -> None:
    outcome = run_ranks_raw(1, setting_is_refused, env={name: "plenty"})[0]  # some are refused at import, others later
    assert name in (outcome.value if outcome.ok else outcome.text.splitlines()[-1])

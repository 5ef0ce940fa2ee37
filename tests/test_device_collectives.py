"""Collectives on a device, by kernels in mapped memory: every operation, dtype and size has the bits of the CPU."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cuda_on_cpu import build
from device_groups import SMALL, card, device_group, emulated, host_group, on_card
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks, shared_files
from test_collectives import DTYPES, drawn

import distlib
from distlib import native
from distlib.comm import ipc
from distlib.comm.group import Group
from distlib.comm.nccl import NcclChannel
from distlib.cuda import collectives

pytestmark = [
    pytest.mark.card,
    pytest.mark.skipif(native.core() is None, reason=f"no C++ core: {native.why_not()}"),
]

KINDS = ["all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "gather", "scatter", "all_to_all", "ring"]
# Ranks that share a GPU take turns on it, which takes milliseconds for every step: there, every third case is played.
STRIDE = 3 if torch.cuda.is_available() else 1
PIECE = 4096  # bytes of a slot, see SMALL; three blocks of them are one round


@dataclass(frozen=True)
class Case:
    """One collective of a program."""

    kind: str
    dtype: torch.dtype = torch.float32
    op: str = "sum"
    numel: int = 100
    root: int = 0
    seed: int = 1
    offset: int = 0  # elements by which tensors are off their alignment
    strided: bool = False
    async_op: bool = False


def bytes_of(tensors: list[torch.Tensor]) -> list[bytes]:
    """Bit patterns; a tensor of few elements may have any strides and yet count as contiguous."""
    copies = [t.detach().cpu().clone(memory_format=torch.contiguous_format) for t in tensors]
    return [c.as_strided((c.numel(),), (1,)).view(torch.uint8).numpy().tobytes() for c in copies]


class Player:
    """Plays cases on a group, with tensors of one device."""

    def __init__(self, group: Group, where: torch.device) -> None:
        self.group, self.where = group, where

    def place(self, case: Case, data: torch.Tensor) -> torch.Tensor:
        """The same values, where the case wants them."""
        if case.strided:
            return torch.stack([data, data], dim=1).to(self.where)[:, 0]
        home = torch.empty(data.numel() + case.offset, dtype=data.dtype, device=self.where)
        return home[case.offset :].copy_(data)

    def play(self, case: Case) -> list[bytes]:
        """What this rank holds afterwards."""
        group, n, me, numel = self.group, self.group.size, self.group.rank, case.numel
        root, late = case.root % n, case.async_op
        parts = n if case.kind in ("reduce_scatter", "scatter", "all_to_all") else 1
        given = self.place(case, drawn(case.dtype, case.seed * 1009 + me, numel * parts))
        blank = lambda count: self.place(case, torch.zeros(count, dtype=case.dtype))  # noqa: E731
        out: list[torch.Tensor] = []
        work: Any = None
        if case.kind == "all_reduce":
            work, out = group.all_reduce(given, case.op, async_op=late), [given]
        elif case.kind == "reduce":
            work = group.reduce(given, root, case.op, async_op=late)
            out = [given] if me == root else []
        elif case.kind == "reduce_scatter":
            out = [blank(numel)]
            work = group.reduce_scatter(out[0], given, case.op, async_op=late)
        elif case.kind == "all_gather":
            out = [blank(numel * n)]
            work = group.all_gather(out[0], given, async_op=late)
        elif case.kind == "broadcast":
            work, out = group.broadcast(given, root, async_op=late), [given]
        elif case.kind == "gather":
            out = [blank(numel) for _ in range(n)] if me == root else []
            work = group.gather(out or None, given, root, async_op=late)
        elif case.kind == "scatter":
            out = [blank(numel)]
            work = group.scatter(out[0], given if me == root else None, root, async_op=late)
        elif case.kind == "all_to_all":
            size = lambda src, dst: (src * 7 + dst * 3 + case.seed) % (numel + 1)  # noqa: E731
            out = [blank(size(r, me)) for r in range(n)]
            work = group.all_to_all(out, [given[d * numel :][: size(me, d)] for d in range(n)], async_op=late)
        else:
            out = self.ring(case, given)
        if work is not None:
            work.wait()
        return bytes_of(out)

    def ring(self, case: Case, given: torch.Tensor) -> list[torch.Tensor]:
        """Messages round the ring; even ranks send first, so that long ones find their receiver."""
        group, n, me = self.group, self.group.size, self.group.rank
        got = torch.zeros(case.numel, dtype=case.dtype, device=self.where)
        if n == 1:
            return [given]
        after, before = (me + 1) % n, (me - 1) % n
        tag = 0 if isinstance(group.cpu_channel, NcclChannel) else 3
        steps = [lambda: group.send(given, after, tag), lambda: group.recv(got, before, tag)]
        for step in steps if me % 2 == 0 and (me + 1 < n or n % 2 == 0) else reversed(steps):
            step()
        return [got]


def same_bits(rank: int, n: int, path: str, cases: list[Case], sliced: bool | None = None) -> int:
    """Plays every case on the device and on the CPU, and compares. Returns how many were not trivial."""
    if sliced is not None:
        ipc.sums_slices = lambda nbytes, ranks: sliced  # type: ignore[assignment]
    told = 0
    with device_group(rank, n, path) as group:
        there, here = Player(group, card()), Player(Group.of(), torch.device("cpu"))
        for case in cases:
            got, expected = there.play(case), here.play(case)
            assert got == expected, f"{case} on rank {rank} of {n}"
            told += any(any(b) for b in got)
    return told


ALL_OPS = [(dtype, op) for dtype in DTYPES for op in native.OPS if native.reducible(dtype, op)]


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_every_dtype_and_reduction_has_the_bits_of_the_cpu(n: int, sliced: bool) -> None:
    sizes = [17, 3 * PIECE // 4 + 5]
    cases = [Case("all_reduce", d, op, sizes[i % 2], seed=i) for i, (d, op) in enumerate(ALL_OPS)]
    if not sliced:
        cases += [Case("reduce_scatter", d, op, sizes[i % 2], seed=i) for i, (d, op) in enumerate(ALL_OPS)]
        cases += [Case("reduce", d, op, 33, root=i, seed=i) for i, (d, op) in enumerate(ALL_OPS)]
    assert all(run_ranks(n, same_bits, emulated(), cases[::STRIDE], sliced, env=SMALL))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_kind_and_size_has_the_bits_of_the_cpu(n: int) -> None:
    cases = [
        Case(kind, dtype, numel=numel, root=1, seed=numel + 1, offset=offset)
        for kind in KINDS
        for dtype in (torch.float32, torch.bfloat16, torch.uint8)
        for numel in (0, 1, 37, PIECE, 4 * PIECE + 3)
        for offset in (0, 1)
    ][::STRIDE]
    told = run_ranks(n, same_bits, emulated(), cases, env=SMALL, timeout=90)
    assert max(told) > len(cases) // 2


@pytest.mark.parametrize("n", [8, 16])
def test_many_ranks_have_the_bits_of_the_cpu(n: int) -> None:
    sizes = (1, 5000 if n == 8 else 99)
    cases = [Case(kind, torch.bfloat16, "avg", numel, root=5) for kind in KINDS for numel in sizes][::STRIDE]
    assert all(run_ranks(n, same_bits, emulated(), cases, False, env=SMALL))
    assert all(run_ranks(n, same_bits, emulated(), [c for c in cases if c.kind == "all_reduce"], True, env=SMALL))


@st.composite
def programs(draw: Any) -> tuple[int, list[Case], bool]:
    n = draw(st.integers(1, 4))
    cases = []
    for seed in range(draw(st.integers(3, 10))):
        dtype, op = draw(st.sampled_from(ALL_OPS))
        numel = draw(st.sampled_from([0, 1, 63, 64, 65, 1000, 4097, 20_001]))
        cases.append(
            Case(
                draw(st.sampled_from(KINDS)), dtype, op, numel, draw(st.integers(0, 3)), seed,
                draw(st.integers(0, 3)), draw(st.booleans()), draw(st.booleans()),
            )  # fmt: skip
        )
    return n, [c for c in cases if c.kind != "ring" or not c.strided], draw(st.booleans())


@settings(max_examples=12 // STRIDE, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs())
def test_any_program_of_collectives_has_the_bits_of_the_cpu(program: tuple[int, list[Case], bool]) -> None:
    n, cases, sliced = program
    run_ranks(n, same_bits, emulated(), cases, sliced, env=SMALL)


def special_values(rank: int, n: int, path: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, 6e-8, 65504.0, 3e38, -1.0])
    with device_group(rank, n, path) as group:
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for op in ("sum", "avg", "min", "max", "product"):
                mine = values.roll(rank * 3).repeat(9).to(dtype)
                there, here = mine.to(card()), mine.clone()
                group.all_reduce(there, op)
                Group.of().all_reduce(here, op)
                assert bytes_of([there]) == bytes_of([here]), (dtype, op)


def test_nan_infinity_and_subnormals_have_the_bits_of_the_cpu() -> None:
    run_ranks(3, special_values, emulated(), env=SMALL)


def rare_dtypes(rank: int, n: int, path: str) -> None:
    with device_group(rank, n, path) as group:
        z = torch.tensor([1 + 2j, 3 - 1j], device=card()).conj() * (rank + 1)
        out = torch.empty(2 * n, dtype=torch.complex64, device=card())
        group.all_gather(out, z)
        assert out[2:4].tolist() == [2 - 4j, 6 + 2j]
        f8 = torch.full((5,), float(rank), device=card()).to(torch.float8_e5m2)
        group.broadcast(f8, 1)
        assert f8.float().tolist() == [1.0] * 5
        group.barrier()


def test_complex_and_float8_are_moved() -> None:
    run_ranks(2, rare_dtypes, emulated(), env=SMALL)


def starts_near_the_end_of_the_counters(rank: int, n: int, path: str, cases: list[Case]) -> None:
    from distlib.comm import ipc_memory

    begin = ipc_memory.SharedMemory.__init__.__defaults__
    assert begin == (0,)
    ipc_memory.SharedMemory.__init__.__defaults__ = (2**32 - 7,)
    same_bits(rank, n, path, cases)


def test_counters_wrap_around() -> None:
    cases = [Case(kind, numel=4000, seed=i) for i in range(3) for kind in ("all_reduce", "all_gather", "ring")]
    run_ranks(3, starts_near_the_end_of_the_counters, emulated(), cases, env=SMALL)


WAYS = {"handles": {}, "descriptors": {"DISTLIB_DEVICE_DESCRIPTORS": "1"}, "without the core": {"DISTLIB_CORE": "0"}}


@pytest.mark.parametrize("path_env", WAYS.values(), ids=WAYS)
def test_memory_is_shared_by_handles_or_by_descriptors(path_env: dict[str, str]) -> None:
    before = shared_files()
    run_ranks(3, same_bits, emulated(), [Case(kind, numel=5000) for kind in KINDS], env={**SMALL, **path_env})
    assert shared_files() <= before  # a test beside this one may take its own away


def many_groups(rank: int, n: int, path: str) -> list[float]:
    with host_group(rank, n, path) as world:
        groups = [Group.of(dist.new_group(list(range(n)))) for _ in range(3)]
        devices = [on_card(g) for g in groups]
        tensors = [[torch.full((500 + i,), float(rank + i), device=card()) for i in range(6)] for _ in devices]
        works = [g.all_reduce(row[i], async_op=True) for i in range(6) for g, row in zip(devices, tensors, strict=True)]
        for work in reversed(works):
            assert work is not None
            work.wait()
        result = [t[-1].item() for row in tensors for t in row]
        for group in devices:
            group.close()
        world.barrier()
        return result


def test_operations_of_several_groups_are_in_flight_together() -> None:
    for result in run_ranks(2, many_groups, emulated(), env=SMALL):
        assert result == [2.0 * i + 1.0 for i in range(6)] * 3


def futures(rank: int, n: int, path: str) -> None:
    with device_group(rank, n, path) as group:
        x = torch.full((50,), rank + 1.0, device=card())
        work = group.all_reduce(x, async_op=True)
        assert work is not None
        assert torch.equal(work.get_future().wait()[0].cpu(), torch.full((50,), 3.0))
        assert work.wait() and work.is_completed() and work.is_success() and work.exception() is None
        assert work.result()[0] is x


def test_works_and_futures() -> None:
    run_ranks(2, futures, emulated(), env=SMALL)


def accounts(rank: int, n: int, path: str) -> list[tuple[str, int, int, int]]:
    with device_group(rank, n, path) as group:
        host = Group.of()
        host.barrier()
        distlib.ledger().reset()
        for case in [Case(kind, numel=3000, root=0) for kind in KINDS if kind != "all_to_all"]:
            Player(group, card()).play(case)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rows, expected = distlib.ledger().rows, distlib.ledger().expected()
        return [(r.op, r.calls, r.bytes, e.bytes) for r, e in zip(rows, expected, strict=True)]


def test_the_ledger_counts_what_kernels_read() -> None:
    whole = 3000 * 4
    for rank, rows in enumerate(run_ranks(3, accounts, emulated(), env=SMALL)):
        found = {op: (calls, counted, expected) for op, calls, counted, expected in rows}
        assert found["all_gather"] == (1, 2 * whole, 2 * whole)
        assert found["all_reduce"] == (1, 2 * whole, 2 * whole)
        assert found["reduce_scatter"] == (1, 2 * whole, 2 * whole)
        assert found["broadcast"] == (1, 0 if rank == 0 else whole, 0 if rank == 0 else whole)
        assert found["gather"][1] == found["gather"][2] == (2 * whole if rank == 0 else 0)
        assert found["send"][1:] == (0, 0) and found["recv"][1:] == (whole, whole)


def sliced_counts(rank: int, n: int, path: str) -> tuple[int, int]:
    ipc.sums_slices = lambda nbytes, ranks: True  # type: ignore[assignment]
    with device_group(rank, n, path) as group:
        distlib.ledger().reset()
        group.all_reduce(torch.ones(6 * PIECE, device=card()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return distlib.ledger().rows[0].bytes, distlib.ledger().expected()[0].bytes


def test_a_sliced_all_reduce_reads_two_thirds_twice_of_three_ranks() -> None:
    for counted, expected in run_ranks(3, sliced_counts, emulated(), env=SMALL):
        assert abs(counted - expected) <= expected // 20  # slices are whole lines


def wrong_arguments(rank: int, n: int, path: str) -> None:
    with device_group(rank, n, path) as group:
        x = torch.ones(2, device=card())
        with pytest.raises(ValueError, match="cpu and meta were given"):
            group.all_gather(torch.ones(2 * n, device="meta"), torch.ones(2))
        with pytest.raises(ValueError, match="name the rank that sends"):
            group.recv(x, None)
        with pytest.raises(ValueError, match="is this rank itself"):
            group.send(x, rank)
        group.all_reduce(x)
        assert x.tolist() == [2.0, 2.0]


def test_wrong_arguments_raise_before_anything_starts() -> None:
    run_ranks(2, wrong_arguments, emulated(), env=SMALL)


def structures(rank: int, n: int, path: str) -> None:
    with host_group(rank, n, path):
        for name, size in collectives.structure_bytes().items():
            assert ctypes.sizeof(getattr(collectives, name)) == size, name


def test_structures_are_those_of_the_library() -> None:
    run_ranks(1, structures, emulated())


@pytest.mark.skipif(torch.cuda.is_available(), reason="emulates the card: `make test` where there is no GPU")
def test_no_byte_beside_a_tensor_is_touched() -> None:
    """The same kernels in a C++ program under AddressSanitizer and UBSan."""
    source = Path(__file__).parent / "cuda_on_cpu" / "collectives_check.cpp"
    done = subprocess.run([build.program(source, "collectives")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-5000:]

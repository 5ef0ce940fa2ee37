"""The optimizer kernels: tails, tables, threads and instruction sets; bits that depend on nothing but the numbers."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankError, run_ranks
from test_optim import parameters
from torch import nn

from distlib import native
from distlib.optim import AdamW, kernels
from distlib.optim.kernels import Hyper, Kind, Row, Segment

CORE = pytest.mark.skipif(native.core() is None, reason=native.why_not())


def hypers() -> list[Hyper]:
    return [
        Hyper("ADAMW", -0.7, 1e-2, 0.99, 0.0, 0.9, 0.999, 1e-8, 3.0),
        Hyper("ADAMW", 2.0, 1e-2, 1.0, 0.1, 0.3, 0.4, 1e-8, 1.0),  # L2 instead of decoupled decay; weights above 1/2
        Hyper("SGD", 0.5, 1e-2, l2=0.1, momentum=0.9, dampening=0.2),
        Hyper("SGD", 0.5, 1e-2, momentum=0.9, nesterov=True, first=True),
        Hyper("SGD", 1.0, 1e-2),
        Hyper("LION", 1.0, 1e-3, l2=0.1, beta1=0.9, beta2=0.99),
    ]


def segment(count: int, shift: int, grad: torch.dtype, copied: torch.dtype | None, seed: int = 0) -> Segment:
    """Tensors that start `shift` elements into their storage."""
    generator = torch.Generator().manual_seed(seed)

    def piece(dtype: torch.dtype, square: bool = False) -> torch.Tensor:
        values = torch.randn(count + shift, generator=generator)
        return (values.square() if square else values).to(dtype)[shift:]

    copy_ = None if copied is None else torch.zeros(count + shift, dtype=copied)[shift:]
    return Segment(piece(torch.float32), piece(grad), piece(torch.float32), piece(torch.float32, True), copy_)


def fitting(hyper: Hyper, given: Segment) -> Segment:
    """Without the state that the rule has not."""
    keeps_m = hyper.rule != "SGD" or hyper.momentum != 0
    return given._replace(m=given.m if keeps_m else None, v=given.v if hyper.rule == "ADAMW" else None)


@CORE
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copied", [None, torch.bfloat16, torch.float16])
def test_every_tail_and_misalignment_equals_torchs_operators(grad: torch.dtype, copied: torch.dtype | None) -> None:
    for hyper in hypers():
        for count in range(131):
            shift = count % 17
            mine = fitting(hyper, segment(count, shift, grad, copied))
            plain = Segment(*(None if t is None else t.clone() for t in mine))
            kernels.step_segments([(hyper, mine)])
            kernels.step_plainly(hyper, plain)
            for name, a, b in zip(Segment._fields, mine, plain, strict=True):
                if a is not None and name != "copy":
                    assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6), (hyper, name, count)
            if copied is not None:
                assert torch.equal(mine.copy, mine.param.to(copied)), (hyper, count)


@CORE
def test_nothing_beside_a_segment_is_touched() -> None:
    for count in (1, 15, 16, 17, 100):
        around = [torch.full((count + 64,), 7.0) for _ in range(4)]
        short = torch.full((count + 64,), 7.0, dtype=torch.bfloat16)
        inside = Segment(*(t[32 : 32 + count] for t in (*around, short)))
        kernels.step_segments([(hypers()[0], inside)])
        for t in (*around, short):
            assert bool((t[:32] == 7).all() and (t[32 + count :] == 7).all())
        assert not bool((around[0][32 : 32 + count] == 7).any())


def bits(rank: int, n: int, isa: str) -> list[bytes]:
    """What all rules make of awkward numbers, on this rank's instruction set."""
    assert native.core().simd_name() == isa
    awkward = torch.tensor([0.0, -0.0, 1e-45, 1e38, -1e38, math.inf, -math.inf, math.nan, 65504.0, 1 + 2**-8])
    found = []
    for grad in (torch.float32, torch.bfloat16, torch.float16):
        for copied in (None, torch.bfloat16, torch.float16):
            for hyper in hypers():
                whole = fitting(hyper, segment(1003, 3, grad, copied, seed=7))
                whole.param[:10] = awkward
                whole.grad[20:30] = awkward.to(grad)
                whole.param[40:50], whole.grad[40:50] = awkward.flip(0), awkward.to(grad)
                kernels.step_segments([(hyper, whole)])
                found += [t.view(torch.uint8).numpy().tobytes() for t in whole if t is not None]
        values = segment(100_003, 1, grad, None).grad
        found.append(repr(kernels.sum_of_squares([values])).encode())
    return found


@CORE
def test_the_bits_are_the_same_on_every_instruction_set() -> None:
    results = {}
    for isa in ("scalar", "avx2", "avx512", "neon"):
        try:
            results[isa] = run_ranks(1, bits, isa, env={"DISTLIB_SIMD": isa})[0]
        except RankError as error:  # this CPU has no such thing
            assert "DISTLIB_SIMD" in str(error)
    assert "scalar" in results and len(results) > 1
    for isa, found in results.items():
        for index, (a, b) in enumerate(zip(found, results["scalar"], strict=True)):
            assert a == b, (isa, index)


@CORE
def test_the_bits_do_not_depend_on_threads_or_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 300_007
    for hyper in hypers()[:1] + hypers()[2:3] + hypers()[5:]:
        found = []
        for threads in (1, 2, 3):
            for cuts in ([], [1, 5000, 5001, 200_000]):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                whole = fitting(hyper, segment(count, 0, torch.bfloat16, torch.bfloat16))
                edges = [0, *cuts, count]
                kernels.step_segments(
                    (hyper, Segment(*(None if t is None else t[a:b] for t in whole)))
                    for a, b in zip(edges, edges[1:], strict=False)
                )
                norm = kernels.sum_of_squares([whole.grad[a:b] for a, b in zip(edges, edges[1:], strict=False)])
                found.append((whole, norm))
        for whole, norm in found[1:]:
            assert norm == found[0][1]
            assert all(torch.equal(a, b) for a, b in zip(whole, found[0][0], strict=True) if a is not None)


@CORE
def test_sums_of_squares_are_exact_to_fp64() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for count in (0, 1, 31, 32, 33, 16_390):
            values = segment(count, 1, torch.float32, None, seed=count).grad.to(dtype)
            exact = math.fsum(float(v) ** 2 for v in values.double())
            assert kernels.sum_of_squares([values]) == pytest.approx(exact, rel=1e-13)
    assert kernels.sum_of_squares([torch.full((100,), 3e38)]) == pytest.approx(100 * 9e76)
    for bad in (math.inf, -math.inf, math.nan):
        values = torch.ones(1000)
        values[777] = bad
        assert not math.isfinite(kernels.sum_of_squares([torch.ones(40_000), values]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=12))
def test_neighbours_are_merged_and_only_they(pieces: list[tuple[int, bool]]) -> None:
    rows, at = [], 1 << 20
    for count, gap in pieces:
        at += 4 if gap else 0  # of the gradient's memory alone
        start = sum(row.elements for row in rows) * 4
        rows.append(Row(4096 + start, at, 8192 + start, 0, 0, count))
        at += 4 * count
    found = kernels.merged(Kind(torch.float32, torch.float32, 0), rows)
    assert sum(row.elements for row in found) == sum(row.elements for row in rows)
    covered = [(r.grad + 4 * i, r.param + 4 * i, r.m + 4 * i) for r in rows for i in range(r.elements)]
    assert covered == [(r.grad + 4 * i, r.param + 4 * i, r.m + 4 * i) for r in found for i in range(r.elements)]
    gaps = sum(gap for count, gap in pieces[1:])
    assert len(found) <= gaps + 1


@CORE
def test_a_flat_model_is_one_row_and_unchanged_memory_keeps_its_table() -> None:
    memory, grads = torch.randn(100), torch.randn(100)
    params = [nn.Parameter(memory[a:b]) for a, b in ((0, 30), (30, 31), (31, 31), (31, 100))]
    for p, a in zip(params, (0, 30, 31, 31), strict=True):
        p.grad = grads[a : a + p.numel()]
    optimizer = AdamW(params)
    optimizer.step()
    tables = optimizer._tables[0][1]
    assert [len(table.words) for _, table in tables] == [1]
    optimizer.step()
    assert optimizer._tables[0][1] is tables
    params[0].grad = grads[:30].clone()
    optimizer.step()
    assert [len(table.words) for _, table in optimizer._tables[0][1]] == [2]


def steps_in_a_forked_child(rank: int, n: int) -> bool:
    """A parent whose threads exist forks; the child, which has none of them, steps too."""
    torch.get_num_threads = lambda: 2  # torch's own threads, unlike the core's, do not outlive a fork
    params, again = parameters([(200_000,)], 0), parameters([(200_000,)], 0)
    for p in (*params, *again):
        p.grad = torch.ones_like(p)
    AdamW(params).step()
    child = os.fork()
    if child == 0:
        AdamW(again).step()
        os._exit(0 if torch.equal(params[0], again[0]) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@CORE
def test_a_forked_child_has_threads_of_its_own() -> None:
    assert run_ranks(1, steps_in_a_forked_child, timeout=30) == [True]

"""Optimizer steps on a device: bits of the CPU core, any tail and alignment, masters in halves, scalars made there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cuda_cards import CARDS, a_card, some
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optim_kernels import fitting, hypers

from distlib import native
from distlib.cuda import step as gpu
from distlib.cuda.squares import SquareTable, sum_plainly
from distlib.cuda.step import DeviceTable, Recipe, Scalars
from distlib.optim import AdamW, kernels
from distlib.optim.kernels import Hyper, Segment

CORE = pytest.mark.skipif(native.core() is None, reason=native.why_not())
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
AWKWARD = [0.0, -0.0, 1e-45, 1e38, -1e38, math.inf, -math.inf, math.nan, 65504.0, 1 + 2**-8]


@pytest.fixture(params=CARDS, scope="module")
def card(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with a_card(request.param) as device:
        yield device


def segment(
    count: int, shifts: tuple[int, ...], grad: torch.dtype, copied: torch.dtype | None, param: torch.dtype = F32
) -> Segment:
    """Parameter, gradient, m, v, copy: each so many elements into its storage; on the CPU."""
    generator = torch.Generator().manual_seed(count)

    def piece(which: int, dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn(count + shifts[which], generator=generator)
        return (values.square() if which == 3 else values).to(dtype)[shifts[which] :]

    copy_ = None if copied is None else torch.zeros(count + shifts[4], dtype=copied)[shifts[4] :]
    return Segment(piece(0, param), piece(1, grad), piece(2, param), piece(3, param), copy_)


def moved(given: Segment, device: torch.device) -> Segment:
    """A copy on `device`, of the same alignments."""

    def one(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        shift = tensor.storage_offset()
        return torch.empty(shift + tensor.numel(), dtype=tensor.dtype, device=device)[shift:].copy_(tensor)

    return Segment(*map(one, given))


def table_of(segments: list[Segment], device: torch.device, chunk: int = 64) -> DeviceTable:
    first = segments[0]
    copied = None if first.copy is None else first.copy.dtype
    rows = [kernels.row_of(s) for s in segments]
    return DeviceTable(rows, device, first.param.dtype, first.grad.dtype, copied, chunk)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


@CORE
@settings(max_examples=some(150), deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
    st.booleans(),
    st.sampled_from([(F32, None), (F32, BF16), (BF16, None), (BF16, BF16), (F16, F16), (F64, None)]),
    st.integers(0, len(hypers()) - 1),
)
def test_bits_are_those_of_the_cpu_core(
    card: torch.device,
    counts: list[int],
    shifts: list[int],
    alike: bool,
    kind: tuple[torch.dtype, torch.dtype | None],
    which: int,
) -> None:
    """alike: arrays that a common shift aligns."""
    grad, copied = kind
    hyper = hypers()[which]
    several = tuple(shifts[:1] * 5 if alike else shifts)
    mine = [fitting(hyper, segment(n, several, grad, copied, F64 if grad is F64 else F32)) for n in counts]
    theirs = [moved(s, card) for s in mine]
    plain = [moved(s, torch.device("cpu")) for s in mine]
    gpu.step_tables([(hyper, table_of(theirs, card))])
    kernels.step_segments([(hyper, s) for s in mine])
    for s in plain:
        gpu.step_plainly(hyper, *s)
    for a, b, c in zip(mine, theirs, plain, strict=True):
        for name, x, y, z in zip(Segment._fields, a, b, c, strict=True):
            assert same_bits(x, y), (name, hyper)
            exact = grad is not F64 or name != "param" or hyper.rule != "ADAMW"  # torch's fp64 roots are not IEEE's
            assert same_bits(x, z) or (not exact and torch.allclose(x, z, rtol=1e-14)), (name, "plainly", hyper)


@CORE
@pytest.mark.parametrize("grad", [F32, BF16, F16])
@pytest.mark.parametrize("copied", [None, BF16, F16])
def test_awkward_numbers_have_the_cores_bits_too(
    card: torch.device, grad: torch.dtype, copied: torch.dtype | None
) -> None:
    awkward = torch.tensor(AWKWARD)
    for hyper in hypers():
        mine = fitting(hyper, segment(1003, (3, 3, 3, 3, 3), grad, copied))
        mine.param[:10] = awkward
        mine.grad[20:30] = awkward.to(grad)
        mine.param[40:50], mine.grad[40:50] = awkward.flip(0), awkward.to(grad)
        theirs = moved(mine, card)
        gpu.step_tables([(hyper, table_of([theirs], card))])
        kernels.step_segments([(hyper, mine)])
        for name, x, y in zip(Segment._fields, mine, theirs, strict=True):
            assert same_bits(x, y), (name, hyper)


def test_nothing_beside_a_segment_is_touched(card: torch.device) -> None:
    for count in (1, 3, 15, 16, 17, 100):
        around = [torch.full((count + 64,), 7.0, device=card) for _ in range(4)]
        short = torch.full((count + 64,), 7.0, dtype=BF16, device=card)
        inside = Segment(*(t[32 : 32 + count] for t in (*around, short)))
        gpu.step_tables([(hypers()[0], table_of([inside], card))])
        for t in (*around, short):
            assert bool((t[:32] == 7).all() and (t[32 + count :] == 7).all())
            assert t is around[1] or not bool((t[32 : 32 + count] == 7).any())


# ---------------------------------------------------------------- masters of two halves


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_halves_are_the_master_bit_for_bit(bits: list[int]) -> None:
    master = torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32).view(F32)
    param, remainder = gpu.split_master(master)
    assert same_bits(gpu.join_master(param, remainder), master)
    for value, rounded in zip(master.tolist(), param.tolist(), strict=True):
        if math.isfinite(value) and math.isfinite(rounded):
            near = float(torch.tensor(value, dtype=F64).to(F32).to(BF16))  # ties to even
            assert abs(rounded - value) == abs(near - value)


@CORE
@pytest.mark.parametrize("grad", [F32, BF16, F16])
def test_a_master_in_two_halves_steps_as_one_in_fp32(card: torch.device, grad: torch.dtype) -> None:
    hyper = hypers()[0]
    for count in (*range(20), 500):
        for shift in (0, 1, 5):
            whole = segment(count, (shift,) * 5, grad, None)
            param, remainder = gpu.split_master(whole.param)
            halves = segment(count, (shift,) * 5, grad, torch.int16)
            halves = halves._replace(param=torch.zeros(count + shift, dtype=BF16)[shift:].copy_(param))
            halves.copy.copy_(remainder)
            theirs, plain = moved(halves, card), moved(halves, torch.device("cpu"))
            for turn in range(3):
                now = replace(hyper, rate=hyper.rate / (1 + turn))
                kernels.step_segments([(now, whole)])
                gpu.step_tables([(now, table_of([theirs], card))])
                gpu.step_plainly(now, *plain)
                assert same_bits(gpu.join_master(theirs.param.cpu(), theirs.copy.cpu()), whole.param)
                assert all(same_bits(a, b) for a, b in zip(theirs, plain, strict=True))
                assert same_bits(theirs.m, whole.m) and same_bits(theirs.v, whole.v)


# ---------------------------------------------------------------- scalars made on the device


def recipes() -> list[Recipe]:
    return [
        Recipe("ADAMW", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, max_norm=1.0, scale=0.5),
        Recipe("ADAMW", lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, maximize=True, step=7),
        Recipe("SGD", lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, max_norm=1e6),
        Recipe("SGD", lr=0.1, momentum=0.9, nesterov=True),
        Recipe("LION", lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.1, max_norm=0.1),
    ]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: r.rule)
@pytest.mark.parametrize("squares", [None, 0.0, 4.0, math.inf, math.nan])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_scalars_made_on_the_device_are_those_made_on_the_host(
    card: torch.device, recipe: Recipe, squares: float | None, found: float
) -> None:
    if squares is None:
        recipe = replace(recipe, max_norm=0.0)

    def single(value: float, dtype: torch.dtype = F32) -> torch.Tensor:
        return torch.tensor(value, dtype=dtype, device=card)

    for steps in (None, 0.0, 9.0):
        given = {
            "lr": single(0.01),
            "squares": None if squares is None else single(squares, F64),
            "loss_scale": single(1024.0),
            "found_inf": single(found),
            "steps": None if steps is None else single(steps),
            "norm": None if squares is None else single(-1.0, F64),
        }
        scalars = Scalars(card)
        scalars.prepare(recipe, **given)
        made = scalars.read()
        expected = gpu.prepare_plainly(
            recipe, lr=float(given["lr"]), squares=squares, loss_scale=1024.0, found_inf=found, steps=steps
        )
        for name in ("steps", "norm"):
            if given[name] is not None:
                made[name] = float(given[name])
        assert made.keys() == expected.keys()
        for name in made:
            # A GPU's power may be off by 2 units in the last place, of which 1 - beta2 ** step leaves a thousandth.
            assert made[name] == pytest.approx(expected[name], rel=1e-12, nan_ok=True), name


def test_a_step_of_the_devices_scalars_is_one_of_the_optimizers(card: torch.device) -> None:
    """Clipping, loss scale and counting, as distlib.optim.AdamW has them."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000))
    optimizer = AdamW([weight], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, max_norm=0.5)
    mine = Segment(weight.detach().to(card, copy=True), *(torch.zeros(1000, device=card) for _ in range(3)))
    table, scalars = table_of([mine], card), Scalars(card)
    recipe = Recipe("ADAMW", lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-8, weight_decay=0.1, max_norm=0.5)
    steps, norm = torch.zeros(1, device=card), torch.zeros(1, dtype=F64, device=card)
    squares, found = torch.zeros(1, dtype=F64, device=card), torch.zeros(1, device=card)
    loss_scale = torch.full((1,), 8.0, device=card)
    for turn in range(4):
        weight.grad = torch.randn(1000)
        mine.grad.copy_(weight.grad * 8)
        if turn == 2:  # skipped: no bit changes, no step is counted
            mine.grad[5] = math.inf
        SquareTable([mine.grad], card).sum(squares, found)
        scalars.prepare(recipe, squares=squares, loss_scale=loss_scale, found_inf=found, steps=steps, norm=norm)
        before = mine.param.clone()
        table.step("ADAMW", scalars)
        if turn == 2:
            assert float(found) == 1 and same_bits(mine.param, before) and float(steps) == 2
            found.zero_()
            continue
        optimizer.step()
        assert same_bits(mine.param, weight.detach()) and float(norm) == float(optimizer.grad_norm)
    assert float(steps) == 3


# ---------------------------------------------------------------- sums of squares


@CORE
@settings(max_examples=some(60), deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 100), st.integers(0, 40_000)),
            st.integers(0, 9),
            st.sampled_from([F32, F16, BF16, F64]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_sums_of_squares_have_the_cores_bits(card: torch.device, pieces: list[tuple[int, int, torch.dtype]]) -> None:
    generator = torch.Generator().manual_seed(len(pieces))
    host = [torch.randn(n + shift, generator=generator).to(dtype)[shift:] for n, shift, dtype in pieces]
    there = [
        torch.empty(n + shift, dtype=dtype, device=card)[shift:].copy_(values)
        for values, (n, shift, dtype) in zip(host, pieces, strict=True)
    ]
    out, found = torch.full((1,), 9.0, dtype=F64, device=card), torch.zeros(1, device=card)
    table = SquareTable(there, card)
    for _ in range(2):  # scratch is as it was
        table.sum(out, found)
        assert float(out) == kernels.sum_of_squares(host)
    assert float(out) == pytest.approx(sum_plainly(host), rel=1e-12) and float(found) == 0


def test_a_sum_of_squares_tells_infinities(card: torch.device) -> None:
    out, found = torch.zeros(1, dtype=F64, device=card), torch.zeros(1, device=card)
    for bad in (math.inf, -math.inf, math.nan):
        values = torch.full((40_000,), 3e38, device=card)
        table = SquareTable([values], card)
        table.sum(out, found)
        assert float(out) == pytest.approx(40_000 * 9e76) and float(found) == 0
        values[39_999] = bad
        table.sum(out, found)
        assert not math.isfinite(float(out)) and float(found) == 1
        found.zero_()


# ---------------------------------------------------------------- refusals, graphs


def test_tables_that_cannot_be_stepped_are_refused(card: torch.device) -> None:
    row = kernels.row_of(moved(segment(10, (0,) * 5, F32, None), card))
    with pytest.raises(ValueError, match="parameters of torch.float16"):
        DeviceTable([row], card, F16, F16)
    with pytest.raises(ValueError, match="row 1 has no v"):
        DeviceTable([row, row._replace(v=0)], card, F32, F32)
    with pytest.raises(ValueError, match="copies are of torch.bfloat16, but rows have none"):
        DeviceTable([row], card, F32, F32, BF16)
    table = DeviceTable([row._replace(v=0)], card, F32, F32)
    with pytest.raises(ValueError, match="ADAMW on rows"):
        gpu.step_tables([(Hyper("ADAMW"), table)])
    with pytest.raises(ValueError, match="momentum=0.0, but rows have"):
        gpu.step_tables([(Hyper("SGD"), table)])
    with pytest.raises(ValueError, match="needs squares"):
        Scalars(card).prepare(recipes()[0])
    with pytest.raises(ValueError, match="only fp32, fp64, fp16 and bf16"):
        SquareTable([torch.zeros(3, dtype=torch.int64, device=card)], card)
    gpu.step_tables([(Hyper("ADAMW"), DeviceTable([], card, F32, F32))])  # nothing to step


@pytest.mark.gpu
def test_a_captured_step_counts_clips_and_skips() -> None:
    with a_card("gpu") as device:
        mine = [moved(segment(5000, (0,) * 5, BF16, BF16), device) for _ in range(2)]
        steps = [torch.zeros(1, device=device) for _ in range(2)]
        squares, found = torch.zeros(1, dtype=F64, device=device), torch.zeros(1, device=device)
        sums = [SquareTable([s.grad], device) for s in mine]
        tables, scalars = [table_of([s], device) for s in mine], Scalars(device)

        def one(i: int) -> None:
            sums[i].sum(squares, found)
            scalars.prepare(recipes()[0], squares=squares, found_inf=found, steps=steps[i])
            tables[i].step("ADAMW", scalars)

        found.fill_(1)
        for i in range(2):  # kernels are loaded when they are first launched, which is not to be captured
            one(i)
        assert float(steps[0]) == float(steps[1]) == 0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one(0)
        for turn in range(3):
            for s in mine:
                s.grad.fill_(math.inf if turn == 1 else 0.1 * (turn + 1))
            found.zero_()
            graph.replay()
            found.zero_()
            one(1)
        assert all(same_bits(a, b) for a, b in zip(*mine, strict=True))
        assert float(steps[0]) == float(steps[1]) == 2

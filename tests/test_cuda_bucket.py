"""Pack and unpack: every dtype, alignment and tail, many tensors; sums, infinities and scales."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from cuda_cards import CARDS, a_card, some
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib.cuda.bucket import PackTable, pack_plainly, unpack_plainly

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
PAIRS = [(F32, F32), (F32, BF16), (F32, F16), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F64, F64)]
AWKWARD = [0.0, -0.0, 1e-45, 6e-8, 3e-5, 65504.0, 65519.9, 65520.0, 1e38, 3.3895e38, math.inf, -math.inf, 1 + 2**-8]


@pytest.fixture(params=CARDS, scope="module")
def card(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with a_card(request.param) as device:
        yield device


def tensors(
    sizes: list[int], shifts: list[int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[torch.Tensor]:
    """Of such sizes, each so many elements into its storage."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n + shift, generator=generator).to(device, dtype)[shift:]
        for n, shift in zip(sizes, shifts, strict=True)
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """Sizes, shifts of the tensors, gaps before each in the buffer, chunk."""
    sizes = draw(st.lists(st.one_of(st.integers(0, 70), st.integers(0, 700)), min_size=1, max_size=8))
    shifts = draw(st.lists(st.integers(0, 17), min_size=len(sizes), max_size=len(sizes)))
    gaps = draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    return sizes, shifts, gaps, draw(st.sampled_from([16, 64, 16384]))


@settings(max_examples=some(150), deadline=None)
@given(layouts(), st.sampled_from(PAIRS), st.sampled_from([None, 1.0, 0.125, -1 / 3]))
def test_any_layout_packs_and_unpacks_as_torch_does(
    card: torch.device,
    layout: tuple[list[int], list[int], list[int], int],
    pair: tuple[torch.dtype, torch.dtype],
    scale: float | None,
) -> None:
    """scale None: plainly."""
    sizes, shifts, gaps, chunk = layout
    given = tensors(sizes, shifts, pair[0], card)
    offsets, at = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        offsets.append(at + gap)
        at += gap + size
    flat, expected = (torch.full((at + 5,), 7.0, dtype=pair[1], device=card) for _ in range(2))
    squares, found = torch.full((1,), 99.0, dtype=F64, device=card), torch.zeros(1, device=card)
    table = PackTable(given, flat, offsets, chunk)
    factor = {} if scale is None else {"scale": scale, "device_scale": torch.tensor([3.0], device=card)}
    wanted = pack_plainly(given, expected, offsets, **factor)
    table.pack(**factor, **({} if scale is None else {"squares": squares, "found_inf": found}))
    assert same_bits(flat, expected)  # gaps, too, are as they were
    if scale is not None:
        assert float(squares) == pytest.approx(float(wanted[0]), rel=1e-13, abs=0)
        assert float(found) == float(wanted[1]) == 0
    # Back into other memory.
    back, plain = (
        tensors(sizes, shifts[::-1], pair[0], card, seed=1),
        tensors(sizes, shifts[::-1], pair[0], card, seed=1),
    )
    PackTable(back, flat, offsets, chunk).unpack(**factor)
    unpack_plainly(plain, flat, offsets, **factor)
    assert all(same_bits(a, b) for a, b in zip(back, plain, strict=True))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
def test_rows_of_several_chunks_are_moved_from_any_alignment_to_any(
    card: torch.device, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    """Long enough for several words under way at once, and for what remains of them."""
    sizes, shifts = [16384 + 4099, 9001, 5000, 4096 + 17], [0, 1, 2, 3]
    for gap in range(9):
        given = tensors(sizes, shifts, pair[0], card)
        offsets = [gap + i * (2 * 16384 + gap) for i in range(len(sizes))]
        flat, expected = (torch.full((4 * 2 * 16384 + 99,), 7.0, dtype=pair[1], device=card) for _ in range(2))
        table = PackTable(given, flat, offsets)
        table.pack()
        pack_plainly(given, expected, offsets)
        assert same_bits(flat, expected), gap
        back = [torch.zeros_like(t) for t in given]
        plain = [torch.zeros_like(t) for t in given]
        PackTable(back, flat, offsets).unpack(0.5)
        unpack_plainly(plain, flat, offsets, 0.5)
        assert all(same_bits(a, b) for a, b in zip(back, plain, strict=True)), gap


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
def test_awkward_numbers_are_rounded_as_torch_rounds_them(
    card: torch.device, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    values = torch.tensor(AWKWARD * 7, dtype=F64).to(pair[0]).to(card)
    bits = torch.randint(-(2**31), 2**31, (40_000,), dtype=torch.int64).to(torch.int32).view(F32)
    random = bits[bits.isfinite()].to(pair[0]).to(card)
    for scale in (1.0, 0.37):
        for numbers in (values, random):
            flat, expected = torch.empty(len(numbers), dtype=pair[1], device=card), numbers.clone().to(pair[1])
            PackTable([numbers], flat).pack(scale)
            pack_plainly([numbers], expected, scale=scale)
            assert same_bits(flat, expected), scale


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_infinity_or_nan_is_found_wherever_it_is(
    card: torch.device, pair: tuple[torch.dtype, torch.dtype], bad: float
) -> None:
    found, squares = torch.zeros(1, device=card), torch.zeros(1, dtype=F64, device=card)
    given = tensors([100, 70, 33], [3, 0, 1], pair[0], card)
    flat = torch.empty(203, dtype=pair[1], device=card)
    table = PackTable(given, flat, chunk=64)
    for tensor, index in ((0, 0), (0, 99), (1, 40), (2, 32)):
        kept = given[tensor][index].clone()
        given[tensor][index] = bad
        found.zero_()
        table.pack(squares=squares, found_inf=found)
        assert float(found) == 1 and not math.isfinite(float(squares))
        given[tensor][index] = kept
    found.fill_(0)
    table.pack(squares=squares, found_inf=found)
    assert float(found) == 0 and math.isfinite(float(squares))
    found.fill_(1)  # of another table: stays
    table.pack(found_inf=found)
    assert float(found) == 1


def test_what_becomes_infinite_when_it_is_stored_is_found(card: torch.device) -> None:
    found, flat = torch.zeros(1, device=card), torch.empty(40, dtype=F16, device=card)
    given = [torch.full((40,), 60_000.0, device=card)]
    PackTable(given, flat).pack(1.09, found_inf=found)
    assert float(found) == 0
    PackTable(given, flat).pack(1.2, found_inf=found)
    assert float(found) == 1
    big = torch.full((1000,), 3e38, device=card)  # their squares overflow fp32
    squares = torch.zeros(1, dtype=F64, device=card)
    found.zero_()
    copied = torch.empty_like(big)
    PackTable([big], copied).pack(squares=squares, found_inf=found)
    assert float(found) == 0 and float(squares) == pytest.approx(1000 * 9e76)


def test_a_nan_is_stored_as_the_same_nan_and_moved_bit_for_bit(card: torch.device) -> None:
    given = torch.tensor([0x7FC12345, -0x3EDCBB], dtype=torch.int32).view(F32).to(card)
    flat = torch.empty(2, device=card)
    table = PackTable([given], flat)
    table.pack()
    assert same_bits(flat, given)
    table.pack(0.5)
    assert flat.view(torch.int32).tolist() == [0x7FC00000] * 2
    halves = torch.empty(2, dtype=BF16, device=card)
    PackTable([given], halves).pack()
    assert halves.view(torch.int16).tolist() == [0x7FC0, 0x7FC0 - 0x8000]  # keeps its sign, as the core's conversion


def test_hundreds_of_tensors_are_one_launch_that_repeats_bit_for_bit(card: torch.device) -> None:
    sizes = [(7 * i) % 101 + (i % 3 == 0) * 500 for i in range(400)]
    given = tensors(sizes, [0] * 400, F32, card)
    flat = torch.empty(sum(sizes), dtype=BF16, device=card)
    squares, found = torch.zeros(1, dtype=F64, device=card), torch.zeros(1, device=card)
    table = PackTable(given, flat)
    table.pack(0.25, squares=squares, found_inf=found)
    first = float(squares)
    for _ in range(3):  # the table is used again; its scratch is as it was
        table.pack(0.25, squares=squares)
        assert float(squares) == first
    assert first == pytest.approx(float(flat.double().square().sum()), rel=1e-13)
    assert table.matches(given, flat)
    given[3] = given[3].clone()
    assert not table.matches(given, flat)


def test_other_dtypes_are_moved(card: torch.device) -> None:
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        given = [torch.arange(n, device=card).to(dtype)[shift:] for n, shift in ((90, 1), (33, 0), (5, 4), (0, 0))]
        flat = torch.zeros(127, dtype=dtype, device=card)
        table = PackTable(given, flat, chunk=16)
        table.pack()
        assert torch.equal(flat[:123], torch.cat(given))
        other = [torch.zeros_like(t) for t in given]
        PackTable(other, flat, chunk=16).unpack()
        assert all(torch.equal(a, b) for a, b in zip(other, given, strict=True))
        with pytest.raises(ValueError, match="others are moved"):
            table.pack(0.5)


def test_no_tensors_is_a_sum_of_zero(card: torch.device) -> None:
    squares = torch.full((1,), 9.0, dtype=F64, device=card)
    PackTable([], torch.empty(0, device=card)).pack(squares=squares)
    assert float(squares) == 0


def test_tensors_that_do_not_fit_are_refused_by_name(card: torch.device) -> None:
    flat, one = torch.empty(10, device=card), torch.empty(6, device=card)
    with pytest.raises(ValueError, match="tensor 1 would lie at 6 to 12 of a buffer of 10"):
        PackTable([one, one], flat)
    with pytest.raises(ValueError, match="tensor 1 would lie at 3 to 9"):
        PackTable([one, one], flat, [0, 3])
    with pytest.raises(ValueError, match="tensor 0 .* contiguous"):
        PackTable([torch.empty(4, 4, device=card)[:, :2]], flat)
    with pytest.raises(ValueError, match="tensor 1 is torch.float64"):
        PackTable([one[:2], one[:2].double()], flat)
    with pytest.raises(ValueError, match="fp32 with fp16 or bf16"):
        PackTable([one.to(F16)], flat.to(BF16))
    with pytest.raises(ValueError, match="squares has 1 elements of torch.float32"):
        PackTable([one], flat).pack(squares=torch.zeros(1, device=card))


@pytest.mark.gpu
def test_more_elements_than_32_bits_can_count() -> None:
    with a_card("gpu") as device:
        count = (1 << 32) + 17
        if torch.cuda.mem_get_info(device)[0] < 5 * count:
            pytest.skip(f"needs {5 * count >> 30} GiB of free memory")
        given = torch.zeros(count, dtype=torch.uint8, device=device)
        given[:: 1 << 20] = 3
        given[-1] = 5
        flat = torch.empty_like(given)
        PackTable([given], flat).pack()
        assert torch.equal(flat, given)
        halves = given.view(torch.uint8)[: count // 2 * 2].view(F16)
        out = torch.empty_like(halves)
        squares, found = torch.zeros(1, dtype=F64, device=device), torch.zeros(1, device=device)
        PackTable([halves], out).pack(2.0, squares=squares, found_inf=found)
        assert float(found) == 0
        for part in range(0, len(halves), 1 << 28):  # torch's operators take several times the memory
            assert torch.equal(out[part : part + (1 << 28)], halves[part : part + (1 << 28)] * 2)


@pytest.mark.gpu
def test_a_captured_pack_is_replayed_with_new_numbers() -> None:
    with a_card("gpu") as device:
        given = tensors([1000, 37], [0, 1], F32, device)
        flat = torch.empty(1037, dtype=BF16, device=device)
        squares, scale = torch.zeros(1, dtype=F64, device=device), torch.ones(1, device=device)
        table = PackTable(given, flat)
        table.pack(device_scale=scale, squares=squares)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            table.pack(device_scale=scale, squares=squares)
        for factor in (0.5, 3.0):
            scale.fill_(factor)
            given[0].normal_()
            graph.replay()
            expected = torch.empty_like(flat)
            wanted, _ = pack_plainly(given, expected, device_scale=scale)
            assert same_bits(flat, expected) and float(squares) == pytest.approx(float(wanted), rel=1e-13)

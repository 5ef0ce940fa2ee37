"""int8 blocks and the re-order of rows: the bits of the plain versions, for any size and alignment."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from cuda_cards import CARDS, a_card, some
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib.cuda import blocks
from distlib.sharded import quantize

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SIZES = st.one_of(st.integers(0, 600), st.sampled_from([255, 256, 257, 2047, 2048, 2049, 5000]))


@pytest.fixture(params=CARDS, scope="module")
def card(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with a_card(request.param) as device:
        yield device


def numbers(count: int, shift: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Of all magnitudes, `shift` elements into their storage."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count + shift, generator=generator)
    values *= 10.0 ** torch.randint(-30, 5, (count + shift,), generator=generator)
    return values.to(dtype).to(device)[shift:]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


@settings(max_examples=some(150), deadline=None)
@given(SIZES, st.integers(0, 9), st.integers(0, 17), st.sampled_from([F32, F16, BF16]))
def test_quantized_bits_are_those_of_qwz(
    card: torch.device, count: int, shift: int, off: int, dtype: torch.dtype
) -> None:
    values = numbers(count, shift, dtype, card, seed=count)
    packed = blocks.quantize(values)
    assert packed.numel() == blocks.packed_bytes(count) == quantize.packed_bytes(count)
    assert same_bits(packed, blocks.quantize_plainly(values))
    assert same_bits(packed, quantize.pack(values.cpu()))
    # From any address, into any address, in any dtype.
    moved = torch.empty(off + packed.numel(), dtype=torch.uint8, device=card)[off:].copy_(packed)
    around = torch.full((count + 20,), 7.0, dtype=dtype, device=card)
    out, plain, theirs = around[shift : shift + count], torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
    blocks.dequantize(moved, out)
    blocks.dequantize_plainly(packed.cpu(), plain)
    quantize.unpack(packed.cpu(), theirs)
    assert same_bits(out, plain) and same_bits(out, theirs)
    assert bool((around[:shift] == 7).all() and (around[shift + count :] == 7).all())


def test_scales_are_exact_to_fp64(card: torch.device) -> None:
    """An element is off by at most half a step, 1/254 of its block's largest magnitude."""
    values = numbers(4096, 0, F32, card)
    out = torch.empty_like(values)
    blocks.dequantize(blocks.quantize(values), out)
    largest = values.double().abs().view(-1, 256).amax(dim=1, keepdim=True)
    error = (out.double() - values.double()).view(-1, 256).abs()
    assert bool((error <= largest / 254 * (1 + 1e-5) + 1e-44).all())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
def test_infinities_and_nans_spoil_their_block_alone(card: torch.device, bad: float) -> None:
    for dtype in (F32, BF16, F16):
        values = numbers(700, 0, dtype, card)
        values[300] = bad
        packed = blocks.quantize(values)
        reference = quantize.pack(values.cpu())
        spoilt = slice(256, 512)
        if not math.isnan(bad):  # what integer a NaN becomes is nobody's promise: its block's scale is one
            assert same_bits(packed[: 3 * 256], reference[: 3 * 256])
        scales = packed[3 * 256 :].cpu().clone().view(F32)
        assert torch.equal(scales.nan_to_num(-1.0), reference[3 * 256 :].clone().view(F32).nan_to_num(-1.0))
        out, theirs = torch.empty_like(values), torch.empty(700, dtype=dtype)
        blocks.dequantize(packed, out)
        quantize.unpack(reference, theirs)
        kept = torch.ones(700, dtype=torch.bool)
        kept[spoilt] = False
        assert same_bits(out.cpu()[kept], theirs[kept])
        assert not out[spoilt].isfinite().any() and torch.equal(out.cpu().isnan(), theirs.isnan())


def test_many_packed_rows_are_one_launch(card: torch.device) -> None:
    for count in (1, 255, 300, 1024):
        rows = [numbers(count, 0, BF16, card, seed=row) for row in range(5)]
        packed = torch.stack([blocks.quantize(row) for row in rows])
        longer = torch.cat([packed, torch.zeros(5, 3, dtype=torch.uint8, device=card)], dim=1)
        for taken in (packed, longer):
            out, plain = torch.empty(5, count, device=card), torch.empty(5, count, device=card)
            blocks.dequantize(taken, out)
            blocks.dequantize_plainly(taken, plain)
            assert same_bits(out, plain)


@settings(max_examples=some(100), deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 200), st.integers(0, 17), st.integers(0, 17), st.booleans())
def test_rows_come_in_the_order_of_ranks(
    card: torch.device, nodes: int, rails: int, row: int, shift: int, other: int, wide: bool
) -> None:
    dtype = F32 if wide else torch.uint8
    size = nodes * rails * row
    rows = torch.arange(size + shift, device=card).to(dtype)[shift:]
    around = torch.full((size + 40,), 77, device=card).to(dtype)
    out, plain = around[other : other + size], torch.empty(size, dtype=dtype, device=card)
    blocks.reorder(out, rows, nodes, rails)
    blocks.reorder_plainly(plain, rows, nodes, rails)
    assert torch.equal(out, plain)
    assert bool((around[:other] == 77).all() and (around[other + size :] == 77).all())


def test_rows_longer_than_a_block_of_threads_copies(card: torch.device) -> None:
    for row in ((64 << 10) - 1, 64 << 10, (128 << 10) + 5):
        rows = torch.randint(0, 255, (6 * row + 3,), dtype=torch.uint8, device=card)[3:]
        out, plain = torch.empty_like(rows), torch.empty_like(rows)
        blocks.reorder(out, rows, 2, 3)
        blocks.reorder_plainly(plain, rows, 2, 3)
        assert torch.equal(out, plain)


def test_what_does_not_fit_is_refused(card: torch.device) -> None:
    values = torch.zeros(300, device=card)
    packed = blocks.quantize(values)
    with pytest.raises(ValueError, match="torch.float64: fp32, fp16 and bf16"):
        blocks.quantize(values.double())
    with pytest.raises(ValueError, match="contiguous"):
        blocks.quantize(torch.zeros(10, 10, device=card).t()[1:])
    with pytest.raises(ValueError, match="520 bytes a row"):
        blocks.dequantize(packed[:-1], values)
    with pytest.raises(ValueError, match="as many rows"):
        blocks.dequantize(packed.repeat(3, 1), values)
    with pytest.raises(ValueError, match="300 elements are not 7 nodes times 1 rails"):
        blocks.reorder(torch.empty_like(values), values, 7, 1)
    with pytest.raises(ValueError, match="both must be alike"):
        blocks.reorder(torch.empty(300, dtype=F16, device=card), values, 3, 1)

"""Operators that are looked into: their kernels get the room for memory. Others that are seen do as ever."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_landing import convolve, in_rooms
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from distlib import native
from distlib.comm.slots import SlotPool
from distlib.pipeline.landing import INSIDE, LOOKS, Landing
from distlib.pipeline.program import Spec

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())

GONE = SimpleNamespace(alive=False)  # a receiver


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    """For operators of the user's own, `landing::...`."""
    made = torch.library.Library("landing", "FRAGMENT")
    yield made
    made._destroy()


def define(library: torch.library.Library, name: str, schema: str, kernel: Any) -> Any:
    library.define(name + schema)
    library.impl(name, kernel, "CPU")
    return getattr(torch.ops.landing, name)


def test_memory_that_a_module_asks_for_itself_is_the_rooms() -> None:
    """As what fills it with code of its own does."""

    def run(x: Tensor, _: bool) -> Tensor:
        made = torch.empty(4, 8)
        made.numpy()[:] = x.numpy() * 2
        return made

    assert in_rooms(run, [False] * 3) == [False, True, True]


def test_operators_of_the_users_own_are_not_looked_into(library: torch.library.Library) -> None:
    """Python cannot repeat all calls that a kernel makes: numbers that stand for tensors, sparse tensors, vmap."""

    def kernel(x: Tensor) -> Tensor:
        index = torch.arange(4).expand(2, 4)
        return torch.sparse_coo_tensor(index, torch.ones(4), (4, 4)) @ x.fmod_(2)

    operator = define(library, "sparse", "(Tensor x) -> Tensor", kernel)
    with torch.no_grad():
        assert in_rooms(lambda x, _: operator(x.clone()), [False] * 5) == [False] * 5
        torch.library.custom_op("landing::own", kernel, mutates_args=("x",))
        assert in_rooms(lambda x, _: torch.ops.landing.own(x.clone()), [False] * 5) == [False] * 5


RAISE_IF_LOOKED_INTO = {
    "numbers for tensors": lambda x: torch.linalg.det(x.repeat(1, 4)[:, :16].view(4, 4, 4)),
    "a number first": lambda x: 2 << x.to(torch.int64).abs(),
    "what is given is resized": lambda x: functional.huber_loss(x, x * 2, reduction="mean"),
}


@pytest.mark.parametrize("name", RAISE_IF_LOOKED_INTO)
def test_operators_that_cannot_be_told_to_write_elsewhere_are_called_as_ever(name: str) -> None:
    assert in_rooms(lambda x, _: RAISE_IF_LOOKED_INTO[name](x), [False] * 5) == [False] * 5


def test_what_autograd_sees_of_a_kernel_it_sees_under_a_mode(library: torch.library.Library) -> None:
    """It has no formula for this operator, but for what the kernel calls."""

    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight).mul_(2).tanh()

    operator = define(library, "unknown", "(Tensor x, Tensor weight) -> Tensor", kernel)
    landing, pool, weight = Landing(lambda: None, 0), SlotPool(), torch.randn(8, 8, requires_grad=True)
    for run in range(4):
        x, values = torch.randn(4, 8), [None]
        slot = pool.reserve([Spec.of(x)])

        def step(x: Tensor = x, values: list[Any] = values) -> None:
            values[0] = operator(x, weight) + 1

        landing.run(step, values, {0: slot.rooms[0]})
        expected = operator(x, weight) + 1
        assert torch.equal(values[0], expected) and not slot.rooms[0].used, run
        gradients = [torch.autograd.grad(result.square().sum(), weight)[0] for result in (values[0], expected)]
        assert torch.equal(*gradients)
    pool.close()


def test_a_kernel_that_goes_another_way_is_right() -> None:
    """A convolution by oneDNN, and by torch itself."""

    def run(x: Tensor, by_torch: bool) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=not by_torch):
            return convolve(x)

    made = in_rooms(run, [False, False, False, True, True, False, False])
    assert made[:3] == [False, False, True]
    assert not made[3] or not torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("fails", [(0, 2), (1,), (2,)])  # watched, looked into, made in its room
def test_a_kernel_that_raises_leaves_no_mode_on(fails: tuple[int, ...]) -> None:
    landing, pool, values = Landing(lambda: None, 0), SlotPool(), [None]
    for run in range(4):
        row = 4 if run in fails else 1  # there are 4

        def step(row: int = row) -> None:
            values[0] = functional.embedding(torch.full((4,), row), torch.ones(4, 8))

        slot = pool.reserve([Spec.of(torch.ones(4, 8))])
        if run in fails:
            with pytest.raises(IndexError):
                landing.run(step, values, {0: slot.rooms[0]})
        else:
            landing.run(step, values, {0: slot.rooms[0]})
            assert torch.equal(values[0], torch.ones(4, 8))
        assert not _get_current_dispatch_mode_stack()
        values[0] = None
    assert slot.rooms[0].used == (fails != (0, 2)), "found again, while there are tries"
    pool.close()


def test_several_results_of_one_kernel_are_made_in_their_rooms() -> None:
    """A layer norm's result and its means."""
    landing, pool = Landing(lambda: None, 0), SlotPool()
    for run in range(4):
        x, values = torch.randn(4, 8), [None, None]
        expected = torch.native_layer_norm(x, (8,), None, None, 1e-5)[:2]
        slot = pool.reserve([Spec.of(t) for t in expected])

        def step(x: Tensor = x, values: list[Any] = values) -> None:
            values[:] = torch.native_layer_norm(x, (8,), None, None, 1e-5)[:2]

        landing.run(step, values, dict(enumerate(slot.rooms)))
        assert all(map(torch.equal, values, expected))
        assert [room.holds(v) for room, v in zip(slot.rooms, values, strict=True)] == [run > 1] * 2
    pool.close()


def test_what_is_kept_of_a_kernels_result_is_copied() -> None:
    landing, pool, kept = Landing(lambda: None, 0), SlotPool(), []
    for run in range(4):
        values: list[Any] = [None]

        def step(values: list[Any] = values) -> None:
            values[0] = functional.layer_norm(torch.arange(32.0).view(4, 8), (8,))
            kept[:] = [values[0][0]]

        slot = pool.reserve([Spec.of(torch.ones(4, 8))])
        landing.run(step, values, {0: slot.rooms[0]})
        expected = values[0].clone()
        assert slot.rooms[0].used == (run == 2), "not again after that"
        lent = pool.fill([values.pop()], GONE, slot)
        kept[0].zero_()
        assert torch.equal(torch.frombuffer(lent.block, dtype=torch.float32, count=32, offset=64).view(4, 8), expected)
    kept.clear()
    pool.close()


def test_memory_has_what_deterministic_algorithms_want_there() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for dtype, fill in ((torch.float32, torch.nan), (torch.int16, 2**15 - 1), (torch.bool, True)):
            expected = torch.full((4, 8), fill, dtype=dtype)
            assert torch.equal(torch.empty(4, 8, dtype=dtype).nan_to_num(), expected.nan_to_num()), "what torch does"
            pool, landing = SlotPool(), Landing(lambda: None, 0)
            for run in range(3):
                values: list[Any] = [None]

                def step(values: list[Any] = values, dtype: torch.dtype = dtype) -> None:
                    values[0] = torch.empty(4, 8, dtype=dtype)

                slot = pool.reserve([Spec.of(expected)])
                landing.run(step, values, {0: slot.rooms[0]})
                assert slot.rooms[0].used == (run > 0)
                assert torch.equal(values[0].nan_to_num(), expected.nan_to_num()) and not (values[0] == 0).any()
                values[0].zero_()
                pool.fill([values.pop()], GONE, slot)._state[0] = 0
            pool.close()
    finally:
        torch.use_deterministic_algorithms(False)


def test_strides_of_dimensions_of_one_element_stay() -> None:
    in_rooms(lambda x, _: torch.empty_strided((4, 1, 8), (8, 1, 1)).copy_(x.view(4, 1, 8)) + 1, [False] * 4)


def test_a_result_of_another_size_than_the_maker_made_is_copied() -> None:
    """The module divides more rows into pieces, each of the size that all had before."""
    landing, pool = Landing(lambda: None, 0), SlotPool()
    for rows in (4, 4, 8, 8, 4):
        values: list[Any] = [None]

        def step(values: list[Any] = values, rows: int = rows) -> None:
            pieces = [piece + 1 for piece in torch.ones(rows, 8).split(4)]
            values[0] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        slot = pool.reserve([Spec.of(torch.ones(rows, 8))])
        landing.run(step, values, {0: slot.rooms[0]})
        assert torch.equal(values[0], torch.full((rows, 8), 2.0))
    pool.close()


def test_in_inference_mode_all_is_copied() -> None:
    """There torch 2.13 computes hfft otherwise, and wrong, if any mode sees it."""
    with torch.inference_mode():
        in_rooms(lambda x, _: torch.fft.hfft(torch.complex(x, x)), [False] * 4)
        assert in_rooms(lambda x, _: x + 1, [False] * 4) == [False] * 4


def test_memory_in_another_order_or_dtype_is_not_taken_for_the_rooms() -> None:
    def run(x: Tensor, other: bool) -> Tensor:
        order = torch.channels_last if other else torch.contiguous_format
        made = torch.empty((1, 2, 4, 4), memory_format=order)
        made.copy_(x.view(1, 2, 4, 4))
        return made.contiguous()

    assert in_rooms(run, [False, False, True, False])[:3] == [False, True, False]

    def by_default(x: Tensor, other: bool) -> Tensor:
        torch.set_default_dtype(torch.float64 if other else torch.float32)
        try:
            return torch.empty(4, 8).copy_(x).to(torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)

    assert in_rooms(by_default, [False, False, True, False])[:3] == [False, True, False]


@pytest.mark.parametrize("bytes_more, made", [(0, True), (1, False)])
def test_what_is_seen_inside_of_another_counts_more(bytes_more: int, made: bool) -> None:
    module = nn.LayerNorm(8)
    seen = 1 + 5 * INSIDE  # the layer norm; memory three times, and two views
    least = LOOKS * (4 * 8 * 4 // seen + bytes_more)
    assert in_rooms(lambda x, _: module(x), [False] * 5, module, least) == [False] * 3 + [made] * 2


def test_gradients_under_checkpointing_and_autocast_have_the_same_bits() -> None:
    """Both call the operators again, or others."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).float()

    def gradients(result: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(functional.mse_loss(result, torch.ones_like(result)), layer.parameters()))

    landing, pool, values = Landing(lambda: layer, 0), SlotPool(), [None]
    for _ in range(5):
        x = torch.randn(2, 4, 8)
        expected = run(x)
        slot = pool.reserve([Spec.of(expected)])

        def step(x: Tensor = x) -> None:
            values[0] = run(x)

        landing.run(step, values, {0: slot.rooms[0]})
        assert torch.equal(values[0], expected)
        assert all(map(torch.equal, gradients(values[0]), gradients(expected)))
    assert slot.rooms[0].holds(values[0])
    values[0] = None
    pool.close()

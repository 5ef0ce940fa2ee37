"""Operators that are looked into: their kernels get the room for memory, and whatever they do otherwise, they may."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_landing import in_rooms
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


def test_a_kernel_of_the_users_own_gets_its_memory(library: torch.library.Library) -> None:
    def doubled(x: Tensor) -> Tensor:
        made = torch.empty_like(x)
        made.numpy()[:] = x.numpy() * 2
        return made

    operator = define(library, "doubled", "(Tensor x) -> Tensor", doubled)
    assert in_rooms(lambda x, _: operator(x), [False] * 4) == [False, False, True, True]


def test_memory_that_a_module_asks_for_itself_is_the_rooms() -> None:
    """As what fills it with code of its own does."""

    def run(x: Tensor, _: bool) -> Tensor:
        made = torch.empty(4, 8)
        made.numpy()[:] = x.numpy() * 2
        return made

    assert in_rooms(run, [False] * 3) == [False, True, True]


def test_a_kernel_that_goes_another_way_is_right_and_found_again(library: torch.library.Library) -> None:
    ways: list[Any] = []

    def kernel(x: Tensor) -> Tensor:
        way = ways.pop(0)
        if way == "another before":
            torch.empty_like(x).fill_(7)
        made = torch.empty_like(x, dtype=torch.float64 if way == "another dtype" else x.dtype)
        if way == "in vain":
            made = torch.full_like(x, 3.0)
        return made.copy_(x) if way != "in vain" else made

    operator = define(library, "wanders", "(Tensor x) -> Tensor", kernel)
    several = ["", "", "", "another before", "another dtype", "in vain", "", "", ""]
    ways[:] = [way for way in several for _ in range(2)]  # in_rooms runs each twice
    made = in_rooms(lambda x, _: operator(x), [False] * len(several))
    assert made[:4] == [False, False, True, False]


def test_a_kernel_that_raises_leaves_no_mode_on(library: torch.library.Library) -> None:
    fails: list[bool] = []

    def kernel(x: Tensor) -> Tensor:
        made = torch.empty_like(x)
        if fails:
            raise ValueError("in the kernel")
        return made.copy_(x)

    operator = define(library, "raises", "(Tensor x) -> Tensor", kernel)
    landing, pool, values = Landing(lambda: None, 0), SlotPool(), [None]

    def step() -> None:
        values[0] = operator(torch.ones(4, 8))

    for run in range(6):
        fails[:] = [True] * (run in (0, 2, 4))
        slot = pool.reserve([Spec.of(torch.ones(4, 8))])
        if fails:
            with pytest.raises(ValueError, match="in the kernel"):
                landing.run(step, values, {0: slot.rooms[0]})
        else:
            landing.run(step, values, {0: slot.rooms[0]})
            assert torch.equal(values[0], torch.ones(4, 8))
        assert not _get_current_dispatch_mode_stack()
        values[0] = None
    pool.close()


def test_numbers_that_stand_for_tensors_are_no_error() -> None:
    """In inference mode the dispatcher shows true_divide itself, with what the caller gave."""
    with torch.inference_mode():
        in_rooms(lambda x, _: x.true_divide(3), [False] * 4)


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


def test_what_a_kernel_keeps_is_copied(library: torch.library.Library) -> None:
    kept: list[Tensor] = []

    def kernel(x: Tensor) -> Tensor:
        kept[:] = [torch.empty_like(x).copy_(x)]
        return kept[0].view(4, 8)

    operator = define(library, "keeps", "(Tensor x) -> Tensor", kernel)
    landing, pool, values = Landing(lambda: None, 0), SlotPool(), [None]

    def step() -> None:
        values[0] = operator(torch.ones(4, 8))

    for _ in range(4):
        slot = pool.reserve([Spec.of(torch.ones(4, 8))])
        landing.run(step, values, {0: slot.rooms[0]})
        lent = pool.fill([values.pop()], GONE, slot)
        values.append(None)
        kept[0].zero_()
        sent = torch.frombuffer(lent.block, dtype=torch.float32, count=32, offset=64)
        assert torch.equal(sent, torch.ones(32))
    pool.close()


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


@pytest.mark.parametrize("bytes_less, made", [(0, True), (1, False)])
def test_what_is_seen_inside_of_another_counts_more(bytes_less: int, made: bool) -> None:
    module = nn.LayerNorm(8)
    seen = 1 + 5 * INSIDE  # the layer norm; memory three times, and two views
    look = (4 * 8 * 4 + seen) // seen - 1 + bytes_less
    found = in_rooms(lambda x, _: module(x), [False] * 4, module, LOOKS * look)
    assert found == [False, False, made, made]


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
    for _ in range(4):
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

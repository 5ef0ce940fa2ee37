"""One step of a player whose result is made in the slot it is sent from: when, of what, and whose the memory is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distlib import native
from distlib.comm.slots import SlotPool
from distlib.pipeline.landing import Landing
from distlib.pipeline.program import Spec

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())

GONE = SimpleNamespace(alive=False)  # a receiver


class Ends(nn.Module):
    """Something, and then a last operator of choice."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.end = nn.Linear(8, 8), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.first(x))


class SavesWhatItReturns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result = self.first(x).tanh()  # tanh saves its result, the product below saves it as an argument
        self.penalty = (result * result).sum()
        return result


class Adds(nn.Module):
    """The end of a block: the stream plus what a branch makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(self.norm(x))
        return x + self.branch(self.norm(x))


MADE = {
    "linear": lambda: nn.Linear(8, 8),
    "without bias": lambda: nn.Linear(8, 8, bias=False),
    "residual": Adds,
    "product": lambda: Ends(lambda x: x * 3),
    "cat": lambda: Ends(lambda x: torch.cat([x, x], 1)),
    "tanh": lambda: Ends(torch.tanh),
    "written to afterwards": lambda: Ends(lambda x: (x + 1).relu_()),
    "saves what it returns": SavesWhatItReturns,
    "compiled": lambda: nn.Sequential(torch.compile(nn.Linear(8, 8), backend="aot_eager"), nn.Linear(8, 8)),
}
LOOKED_INTO = {  # they have no form for a given result
    "layer norm": lambda: nn.LayerNorm(8),
    "norm over groups": lambda: Ends(lambda x: functional.group_norm(x.view(1, 4, -1), 2)),
    "relu": lambda: Ends(torch.relu),
    "embedding": lambda: Ends(lambda x: functional.embedding(torch.arange(4), x)),
    "cast": lambda: Ends(lambda x: x.to(torch.float16)),
    "norm over a batch": lambda: nn.BatchNorm1d(8),
    "repeated": lambda: Ends(lambda x: x.repeat(2, 1)),
    "flipped": lambda: Ends(lambda x: x.flip(0)),
    "rolled": lambda: Ends(lambda x: x.roll(1, 0)),
    "dilated": lambda: Ends(lambda x: functional.conv1d(x.view(1, 1, -1), x.view(-1)[:3].view(1, 1, 3), dilation=2)),
    "other strides": lambda: Ends(lambda x: x.transpose(0, 1).contiguous()),
    "padded": lambda: Ends(lambda x: functional.pad(x, (1, 1))),
    "a post-norm layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0),
}
NOT_MADE = {
    "by index": lambda: Ends(lambda x: x[torch.tensor([1, 0])]),  # had it been a mask, its values were the shape
    "its input": lambda: nn.Identity(),
    "some rows": lambda: Ends(lambda x: (x + 1)[1:]),
    "some columns": lambda: Ends(lambda x: (x + 1)[:, 1:]),
    "transposed": lambda: Ends(lambda x: (x + 1).transpose(0, 1)),
}


def run_in_rooms(make: Callable[[], nn.Module], dtype: torch.dtype, dims: int = 2) -> tuple[list[bool], list[Tensor]]:
    """Four runs of a module as the step of a player. Per run, whether its result was made in the room; gradients."""
    torch.manual_seed(0)
    module, pool = make().to(dtype), SlotPool()
    landing = Landing(lambda: module, 0)
    made = []
    for run in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(run), dtype=dtype)
        x = x.expand(2, 4, 8).clone() if dims == 3 else x
        x.requires_grad_()
        values: list[Any] = [x, None]

        def step(values: list[Any] = values) -> None:
            values[1] = module(values[0])

        expected = module(x).detach()
        slot = pool.reserve([Spec.of(expected)])
        landing.run(step, values, {1: slot.rooms[0]})
        assert torch.equal(values[1], expected)
        made.append(slot.rooms[0].holds(values[1]))
        assert made[-1] or not slot.rooms[0].used
        (values[1] * values[1]).sum().backward()
    pool.close()
    return made, [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MADE)
def test_a_result_is_made_in_its_room_from_the_third_run_on(name: str, dtype: torch.dtype) -> None:
    made, _ = run_in_rooms(MADE[name], dtype)
    assert made == [False, False, True, True]


@pytest.mark.parametrize("name", ["linear", "without bias"])
def test_a_product_of_three_dimensions_is_a_view_of_what_was_made(name: str) -> None:
    assert run_in_rooms(MADE[name], torch.float32, dims=3)[0] == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LOOKED_INTO)
def test_what_an_operator_makes_inside_is_made_in_its_room_from_the_fourth_run(name: str, dtype: torch.dtype) -> None:
    made, _ = run_in_rooms(LOOKED_INTO[name], dtype)
    assert made == [False, False, False, True]


def convolve(x: Tensor) -> Tensor:
    x = x.repeat(24, 2)
    return functional.conv2d(x.view(2, 3, 16, 16), x.view(-1)[:216].view(8, 3, 3, 3))


@pytest.mark.parametrize("dtype, library", [(torch.float32, True), (torch.float64, False)])
def test_a_convolution_is_made_in_its_room_by_oneDNN_and_by_torch(dtype: torch.dtype, library: bool) -> None:
    if library and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    made, _ = run_in_rooms(lambda: Ends(convolve), dtype)
    assert made == [False, False, False, True]


@pytest.mark.parametrize("name", NOT_MADE)
def test_what_no_operator_can_make_elsewhere_stays_where_it_is(name: str) -> None:
    made, _ = run_in_rooms(NOT_MADE[name], torch.float32)
    assert made == [False, False, False, False]


@pytest.mark.parametrize("name", [*MADE, *LOOKED_INTO, *NOT_MADE])
def test_gradients_have_the_same_bits(name: str) -> None:
    make = (MADE | LOOKED_INTO | NOT_MADE)[name]
    _, found = run_in_rooms(make, torch.float32)
    torch.manual_seed(0)
    module = make()
    for run in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(run)).requires_grad_()
        result = module(x)
        (result * result).sum().backward()
    expected = [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


class Changes(nn.Module):
    """Another last operator in each run, though its inputs are alike."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y = x + 1
        return y if self.runs % 4 < 2 else (x * 2 if self.runs % 4 == 2 else y + y)


def test_a_module_that_makes_it_elsewhere_each_time_is_right_and_left_alone() -> None:
    module, pool = Changes(), SlotPool()
    landing = Landing(lambda: module, 0)
    for run in range(16):
        x, values = torch.full((4, 8), float(run)), [None]
        slot = pool.reserve([Spec.of(x)])

        def step(x: Tensor = x, values: list[Any] = values) -> None:
            values[0] = module(x)

        landing.run(step, values, {0: slot.rooms[0]})
        y, place = x + 1, module.runs % 4
        expected = y if place < 2 else (x * 2 if place == 2 else y + y)
        assert torch.equal(values[0], expected)
        lent = pool.fill([values[0]], GONE, slot)
        assert torch.equal(values[0], expected)
        sent = torch.frombuffer(lent.block, dtype=torch.float32, count=32, offset=64).view(4, 8)
        assert torch.equal(sent, expected)
    pool.close()


def test_a_slot_is_lent_as_it_is_if_the_sender_has_nothing_of_it() -> None:
    pool, spec = SlotPool(), [Spec.of(torch.empty(8, 8))]
    slot = pool.reserve(spec)
    message = [slot.rooms[0].tensor(torch.float32, (8, 8)).fill_(3)]
    assert pool.fill(message, GONE, slot) is slot and not message and not slot.free
    slot._state[0] = 0  # the receiver has let go of it
    assert slot.free and pool.reserve(spec) is slot
    pool.close()


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x[1:], lambda x: x.detach().t(), lambda x: x.numpy()])
def test_what_the_sender_keeps_stays_its_own_and_is_copied(keep: Callable[[Tensor], Any]) -> None:
    pool, spec = SlotPool(), [Spec.of(torch.empty(8, 8)), Spec.of(torch.empty(2))]
    slot = pool.reserve(spec)
    room = slot.rooms[0]
    message = [room.tensor(torch.float32, (8, 8)).fill_(3), torch.full((2,), 4.0)]
    kept = keep(message[0])
    lent = pool.fill(message, GONE, slot)
    assert lent is not slot and room.kept and not message and slot.returned and not slot.free
    sent = torch.frombuffer(lent.block, dtype=torch.float32, count=64 + 2, offset=64)
    assert torch.equal(sent, torch.tensor([3.0] * 64 + [4.0] * 2))
    kept[:] = 5
    assert float(sent.sum()) == 3 * 64 + 4 * 2, "memory of its own"
    assert pool.reserve(spec) is not slot
    del kept
    assert slot.free and pool.reserve(spec) is slot
    pool.close()


# ---------------------------------------------------------------- what changes from run to run, and other tensors


def in_rooms(
    run: Callable[[Tensor, bool], Tensor], changes: list[bool], module: nn.Module | None = None, least: int = 0
) -> list[bool]:
    """Runs of a step whose operators may change. Of each: whether its result was made in the room."""
    pool, landing, made = SlotPool(), Landing(lambda: module, least), []
    for change in changes:
        x, values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), [None]
        expected = run(x, change)
        slot = pool.reserve([Spec.of(expected)])

        def step(x: Tensor = x, change: bool = change, values: list[Any] = values) -> None:
            values[0] = run(x, change)

        landing.run(step, values, {0: slot.rooms[0]})
        assert values[0].dtype == expected.dtype and torch.equal(values[0], expected), change
        assert values[0].stride() == expected.stride(), change
        made.append(slot.rooms[0].holds(values[0]))
    pool.close()
    return made


def test_an_operator_of_the_same_shapes_in_another_dtype_is_not_taken_for_the_maker() -> None:
    """A layer more, as LayerDrop has it: the sum in float64 is then where the one in float32 was."""

    def run(x: Tensor, more: bool) -> Tensor:
        x = x + x if not more else x
        precise = x.double() + 1.001 * x.double()
        assert precise.dtype == torch.float64, "the inside of a module changed its dtype"
        return (precise * precise).mean(-1, keepdim=True).float() + x + (x * 0 if not more else x + 0)

    in_rooms(run, [False, False, True, True, False])


def test_an_operator_of_the_same_shapes_with_a_larger_result_is_not_taken_for_the_maker() -> None:
    in_rooms(lambda x, more: (x + x.sum(0) if more else x).sum(1), [False, False, True, False, True])


def test_nested_tensors_inside_of_a_module_are_let_be() -> None:
    """As nn.TransformerEncoder has them in evaluation with a mask."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.tensor([[False, False, True, True]])
    with torch.no_grad():
        in_rooms(lambda x, _: encoder(x.unsqueeze(0), src_key_padding_mask=mask) + 1, [False] * 3)


class OtherFormat(torch.Tensor):
    """A weight that knows two operators, as quantised ones do."""

    @staticmethod
    def __new__(cls, plain: Tensor) -> OtherFormat:
        return torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.plain if isinstance(arg, OtherFormat) else arg for arg in args]
        if func is torch.ops.aten.t.default:
            return OtherFormat(func(*plain))
        assert func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default), func
        return func(*plain)


def test_operators_of_tensors_of_other_classes_are_let_be() -> None:
    weight, bias = OtherFormat(torch.randn(8, 8)), torch.randn(8)
    with torch.no_grad():
        in_rooms(lambda x, _: functional.linear(x, weight, bias), [False] * 3)


def test_operators_of_higher_order_are_let_be() -> None:
    with torch.no_grad():
        in_rooms(lambda x, _: torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,)) + x, [False] * 3)


def test_memory_that_no_operator_was_seen_to_make_is_not_taken_for_another_that_ended() -> None:
    """torch.from_numpy, and what inductor compiles, get memory where results were that have ended."""

    def run(x: Tensor, _: bool) -> Tensor:
        larger = x.repeat(1, 4)
        several = [larger * 2 for _ in range(8)]
        before = {result.untyped_storage()._cdata for result in several}
        del several
        unseen = [torch.from_numpy(x.numpy() * 2) for _ in range(16)]
        return next((result for result in unseen if result.untyped_storage()._cdata in before), unseen[0])

    assert in_rooms(run, [False] * 4) == [False] * 4


VARIED = {
    "a mask's rows": (lambda x: x[torch.tensor([True] * 4)], lambda x: x[torch.tensor([True, True, False, False])]),
    "a list's end": (lambda x: x.expand(2, 4, 8).sum([0], True), lambda x: x.expand(2, 4, 8).sum([0, 1])),
    "strides": (lambda x: x * 3, lambda x: (x.view(8, 4).t() * 3).t().view(4, 8)),
}


@pytest.mark.parametrize("name", VARIED)
def test_calls_that_only_look_alike_are_not_taken_for_the_maker(name: str) -> None:
    other, last = VARIED[name]

    def run(x: Tensor, more: bool) -> Tensor:
        if more:
            other(x)
        return last(x)

    in_rooms(run, [False, False, True, False, True])
    in_rooms(lambda x, more: (last if more else other)(x), [False, False, True, False, True])


def test_in_inference_mode_what_is_composed_of_others_has_the_same_bits() -> None:
    """There the dispatcher shows linear itself, whose form for a given result rounds the product before it adds."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    with torch.inference_mode():
        in_rooms(lambda x, _: module(x.bfloat16().expand(2, 4, 8)), [False] * 4, module)

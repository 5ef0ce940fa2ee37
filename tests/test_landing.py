"""Results of a stage that are made in the slot they are sent from: same bits, no copy, and nobody's memory changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipeline_models import CASES
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

import distlib
from distlib import native
from distlib.comm.slots import SlotPool
from distlib.pipeline import channels
from distlib.pipeline.landing import Landing
from distlib.pipeline.program import Spec
from distlib.pipeline.runtime import StageError

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())

GONE = SimpleNamespace(alive=False)  # a receiver

# ---------------------------------------------------------------- one step of a player


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
NOT_MADE = {
    "layer norm": lambda: nn.LayerNorm(8),
    "relu": lambda: Ends(torch.relu),
    "its input": lambda: nn.Identity(),
    "some rows": lambda: Ends(lambda x: (x + 1)[1:]),
    "some columns": lambda: Ends(lambda x: (x + 1)[:, 1:]),
    "transposed": lambda: Ends(lambda x: (x + 1).transpose(0, 1)),
}


def run_in_rooms(make: Callable[[], nn.Module], dtype: torch.dtype, dims: int = 2) -> tuple[list[bool], list[Tensor]]:
    """Three runs of a module as the step of a player. Per run, whether its result was made in the room; gradients."""
    torch.manual_seed(0)
    module, pool, landing = make().to(dtype), SlotPool(), Landing()
    made = []
    for run in range(3):
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
        made.append(slot.rooms[0].used and slot.rooms[0].holds(values[1]))
        assert made[-1] or not slot.rooms[0].used
        (values[1] * values[1]).sum().backward()
    pool.close()
    return made, [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MADE)
def test_a_result_is_made_in_its_room_from_the_second_run_on(name: str, dtype: torch.dtype) -> None:
    made, _ = run_in_rooms(MADE[name], dtype)
    assert made == [False, True, True]


@pytest.mark.parametrize("name", ["linear", "without bias"])
def test_a_product_of_three_dimensions_is_a_view_of_what_was_made(name: str) -> None:
    assert run_in_rooms(MADE[name], torch.float32, dims=3)[0] == [False, True, True]


@pytest.mark.parametrize("name", NOT_MADE)
def test_what_no_operator_can_make_elsewhere_stays_where_it_is(name: str) -> None:
    made, _ = run_in_rooms(NOT_MADE[name], torch.float32)
    assert made == [False, False, False]


@pytest.mark.parametrize("name", [*MADE, *NOT_MADE])
def test_gradients_have_the_same_bits(name: str) -> None:
    make = (MADE | NOT_MADE)[name]
    _, found = run_in_rooms(make, torch.float32)
    torch.manual_seed(0)
    module = make()
    for run in range(3):
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
    module, pool, landing = Changes(), SlotPool(), Landing()
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


# ---------------------------------------------------------------- pipelines


@contextmanager
def counted(least: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Messages from `least` bytes on get rooms. Of each that gets some: how many tensors were made there, of all."""
    before, plain, found = channels.LEAST_IN_ROOMS, SlotPool.fill, []

    def fill(self: SlotPool, tensors: Any, borrower: Any, reserved: Any = None) -> Any:
        made = sum(room.used and room.holds(tensors[k]) for k, room in enumerate(reserved.rooms)) if reserved else 0
        count = len(tensors)
        lent = plain(self, tensors, borrower, reserved)
        if reserved is not None:
            found.append((made if lent is reserved else 0, count))
        return lent

    channels.LEAST_IN_ROOMS, SlotPool.fill = least, fill  # type: ignore[method-assign]
    try:
        yield found
    finally:
        channels.LEAST_IN_ROOMS, SlotPool.fill = before, plain  # type: ignore[method-assign]


def trained(name: str, schedule: str, least: int) -> tuple[dict[str, Tensor], list[float], list[tuple[int, int]]]:
    """Weights of this rank after 4 steps, losses, and messages that got rooms."""
    case = CASES[name]
    model = distlib.PipelineParallel(
        case.made(), None, schedule, 4, case.loss, "auto", case.batch(8, 0)[0], costs="estimated"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    with counted(least) as messages:
        for step in range(4):
            torch.manual_seed(step)
            losses.append(float(model.train_step(*case.batch(8, step))))
            losses.append(float(model.eval_step(*case.batch(8, step))))
            optimizer.step()
            optimizer.zero_grad()
    transport: Any = model._runtime._transport
    assert len(transport._pool) <= 5 * len(transport._senders), "one a micro-batch, and one to spare"
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, losses, messages


def same_bits(rank: int, n: int, names: list[str], schedule: str) -> dict[str, list[tuple[int, int]]]:
    made = {}
    with distlib.init():
        for name in names:
            weights, losses, none = trained(name, schedule, 1 << 40)
            again, losses_again, made[name] = trained(name, schedule, 0)
            assert not none and losses == losses_again, (name, losses, losses_again)
            assert all(torch.equal(weights[key], again[key]) for key in weights), name
    return made


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
def test_pipelines_have_the_same_bits_and_make_in_rooms_what_they_send(schedule: str) -> None:
    sending = run_ranks(2, same_bits, list(CASES), schedule, timeout=110)[0]
    for name in CASES:
        made = [k for k, _ in sending[name]]
        if name == "skips":  # what skips a stage is made on one and goes to two, or the stage itself goes on with it
            assert schedule == "zb-v" or sum(map(bool, made)) > 0.4 * len(made), (name, sending[name])
        elif name == "lengths":  # a recording for each length
            assert sum(map(bool, made)) > 0.4 * len(made), (name, sending[name])
        else:
            assert sum(made) >= 0.8 * len(made), (name, sending[name])


class Writes(nn.Module):
    """Writes in place to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.mul_(0.5))


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target)


def writes(rank: int, n: int) -> None:
    """The sender's tanh saved what it sent; the receiver writes to what it got."""
    torch.manual_seed(0)
    model = nn.Sequential(Ends(torch.tanh), Writes())
    plain = [p.detach().clone().requires_grad_() for p in model.parameters()]
    with distlib.init(), counted() as messages:
        x, y = torch.randn(8, 8), torch.randn(8, 8)
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, mean_square, ["1"], x[:4])
        for _ in range(3):
            pipeline.train_step(x, y)
    assert rank == 1 or [made for made, _ in messages] == [0] * 6, "the sender's autograd has it"
    for _ in range(3):
        z = functional.linear(functional.linear(x, *plain[:2]).tanh() * 0.5, *plain[2:])
        functional.mse_loss(z, y).backward()
    for mine, expected in zip(pipeline.parameters(), plain[2 * rank :], strict=False):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_a_receiver_that_writes_in_place_does_not_change_what_the_sender_saved() -> None:
    run_ranks(2, writes)


class Shift(nn.Module):
    """Saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class PassesOn(nn.Module):
    """The model's output is what its first stage made, and what its last one makes of that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Ends(torch.tanh), Shift()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.one(x)
        return x, self.two(x)


def greedy_loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    early, late = output
    result = functional.mse_loss(early + late, target)
    with torch.no_grad():
        early.zero_()  # the output is the caller's
    return result


def passes_on(rank: int, n: int) -> None:
    torch.manual_seed(0)
    model = PassesOn()
    plain = [p.detach().clone().requires_grad_() for p in model.parameters()]
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    with distlib.init(), counted():
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, greedy_loss, ["two"], x[:4])
        for _ in range(3):
            pipeline.train_step(x, y)
    for _ in range(3):
        early = functional.linear(x, *plain[:2]).tanh()
        functional.mse_loss(early + early + plain[2], y).backward()
    for mine, expected in zip(pipeline.parameters(), plain[2 * rank :], strict=False):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_what_is_passed_on_as_the_models_output_is_the_callers_to_write_to() -> None:
    run_ranks(2, passes_on)


def large_and_small(rank: int, n: int) -> None:
    """Without any setting: large messages are made in rooms, small ones copied."""
    with distlib.init(), counted(channels.LEAST_IN_ROOMS) as messages:
        for width, expected in ((1 << 14, 4), (1 << 10, 0)):
            messages.clear()
            model = nn.Sequential(nn.Linear(8, width, bias=False), nn.Linear(width, 8, bias=False))
            x = torch.randn(256, 8)
            pipeline = distlib.PipelineParallel(model, None, "1f1b", 2, mean_square, ["1"], x[:128])
            for _ in range(2):
                pipeline.train_step(x, x)
            assert rank == 1 or len(messages) == expected, messages
            assert sum(made for made, _ in messages) == max(0, len(messages) - 1), messages


def test_large_messages_are_made_in_rooms_and_small_ones_copied() -> None:
    run_ranks(2, large_and_small)


# ---------------------------------------------------------------- what changes from run to run, and other tensors


def in_rooms(run: Callable[[Tensor, bool], Tensor], changes: list[bool]) -> list[bool]:
    """Runs of a step whose operators may change. Of each: whether its result was made in the room."""
    pool, landing, made = SlotPool(), Landing(), []
    for change in changes:
        x, values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), [None]
        expected = run(x, change)
        slot = pool.reserve([Spec.of(expected)])

        def step(x: Tensor = x, change: bool = change, values: list[Any] = values) -> None:
            values[0] = run(x, change)

        landing.run(step, values, {0: slot.rooms[0]})
        assert values[0].dtype == expected.dtype and torch.equal(values[0], expected), change
        made.append(slot.rooms[0].used and slot.rooms[0].holds(values[0]))
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


# ---------------------------------------------------------------- writes, strides and modes of pipelines


class Columns(nn.Module):
    """Its result lies column by column: what is sent of it comes row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).t()


class WritesToItsOwn(nn.Module):
    """Writes to contiguous(), which is a copy of what it is given, or that itself."""

    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(wide))

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous().mul_(0.5) + self.shift


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.t()


def small(outputs: Tensor, target: Tensor) -> Tensor:
    return outputs.square().mean()


def by_columns(rank: int, n: int) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(Columns(), WritesToItsOwn(4), Rows())
    x = torch.randn(8, 8)
    with torch.no_grad():
        expected = sum(float(small(model(part), x)) for part in x.chunk(2)) / 2
    with distlib.init(timeout=timedelta(seconds=20)), counted():
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, small, ["1"], x)
        return [expected, *(float(pipeline.train_step(x, x)) for _ in range(2))]


def test_a_stage_may_write_to_what_is_a_copy_where_the_model_runs_whole() -> None:
    for expected, *losses in run_ranks(2, by_columns):
        assert losses == pytest.approx([expected, expected])


def inputs_by_rows(rank: int, n: int) -> bool:
    """The example lies column by column, the batches row by row."""
    torch.manual_seed(0)
    model, x = nn.Sequential(WritesToItsOwn(), nn.Linear(8, 8)), torch.randn(8, 8)
    before = x.clone()
    with distlib.init(timeout=timedelta(seconds=20)):
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, mean_square, ["1"], torch.randn(8, 8).t())
        pipeline.train_step(x, x)
    return torch.equal(x, before)


def test_inputs_of_other_strides_than_the_examples_are_not_written_to() -> None:
    assert all(run_ranks(2, inputs_by_rows))


class AddsTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, more: Tensor, less: Tensor) -> Tensor:
        return self.two(self.one(x) + more - less)


def one_tensor_twice(rank: int, n: int) -> list[float]:
    """The example has one tensor in two places, the batches have two."""
    torch.manual_seed(0)
    model, x, more, less = AddsTwo(), torch.randn(8, 8), torch.randn(1, 8), torch.randn(1, 8)
    with torch.no_grad():
        expected = float(mean_square(model(x, more, less), x))
    with distlib.init(timeout=timedelta(seconds=20)):
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, mean_square, ["two"], (x, more, more))
        return [expected, float(pipeline.train_step((x, more, less), x))]


def test_an_example_with_one_tensor_in_two_places_does_not_decide_for_two() -> None:
    for expected, loss in run_ranks(2, one_tensor_twice):
        assert loss == pytest.approx(expected)


def in_inference_mode(rank: int, n: int) -> list[float]:
    torch.manual_seed(0)
    x, model = torch.randn(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with distlib.init(timeout=timedelta(seconds=20)), counted():
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, mean_square, ["1"], x)
        losses = [float(pipeline.eval_step(x, x))]
        with torch.inference_mode():
            losses += [float(pipeline.eval_step(x, x)) for _ in range(2)]
    return losses


def test_evaluation_in_inference_mode() -> None:
    for losses in run_ranks(2, in_inference_mode):
        assert len(set(losses)) == 1


class Trace(nn.Module):
    """Keeps what it returned, and lets it fade, in place, in its next forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kept = nn.Linear(8, 8), None

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:  # while it is recorded
            return self.first(x) + 0
        faded = 0 if self.kept is None else self.kept.mul_(0.5)
        result = self.first(x) + faded
        self.kept = result.detach()
        return result


class Waits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.0 if type(x) is not Tensor else 0.1)
        return x * 1.0


class Reuses(torch.autograd.Function):
    """x * x, whose backward puts the gradient where x was, as some fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.mul_(gradient).mul_(2)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Reuses.apply(x))


class WritesBehindAutograd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            x.data.mul_(0.5)
        return self.last(x)


class WritesWhenItLikes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.mul_(0.5) if type(x) is Tensor else x)


LATE_WRITES = {
    "the receiver, by .data": lambda: nn.Sequential(Ends(torch.tanh), WritesBehindAutograd()),
    "the receiver, not when it was recorded": lambda: nn.Sequential(Ends(torch.tanh), WritesWhenItLikes()),
    "the sender, to what it keeps": lambda: nn.Sequential(Trace(), Waits()),
    "the receiver, in its backward": lambda: nn.Sequential(Ends(torch.tanh), Squares()),
}


def writes_late(rank: int, n: int, name: str) -> list[Any]:
    found = []
    with distlib.init(timeout=timedelta(seconds=20)):
        for least in (1 << 40, 0):
            torch.manual_seed(0)
            x, model = torch.randn(8, 8), LATE_WRITES[name]()
            with counted(least):
                pipeline = distlib.PipelineParallel(model, None, "gpipe", 4, mean_square, ["1"], x)
                losses = [float(pipeline.eval_step(x, x)) for _ in range(2)]
                pipeline.train_step(x, x)
                pipeline.train_step(x, x)
            found.append([losses, [p.grad.tolist() for p in pipeline.parameters()]])
    return found


@pytest.mark.parametrize("name", LATE_WRITES)
def test_writes_that_no_recording_shows_are_harmless(name: str) -> None:
    for copied, made in run_ranks(2, writes_late, name):
        assert copied == made


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).to_sparse() if type(x) is Tensor else self.first(x)


def sends_sparse(rank: int, n: int) -> str:
    with distlib.init(timeout=timedelta(seconds=20)), counted():
        model, x = nn.Sequential(Sparse(), nn.Linear(8, 8)), torch.randn(8, 8)
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, mean_square, ["1"], x)
        with pytest.raises((StageError, RuntimeError)) as caught:
            pipeline.eval_step(x, x)
        return str(caught.value)


def test_a_sparse_tensor_is_refused_in_words() -> None:
    for text in run_ranks(2, sends_sparse):
        assert "make it dense" in text, text


def sparing(counts: list[int]) -> Callable[..., Any]:
    """A backend of torch.compile that counts the calls of what it made."""

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            counts[0] += 1
            return graph(*args)

        return run

    return backend


def compiled_before(rank: int, n: int) -> int:
    counts = [0]
    with distlib.init():
        x = torch.randn(8, 8)
        model = nn.Sequential(torch.compile(Adds(), backend=sparing(counts)), nn.Linear(8, 8))
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, mean_square, ["1"], x)
        pipeline.train_step(x, x)
    return counts[0]


def test_a_block_that_was_compiled_before_runs_compiled() -> None:
    assert run_ranks(2, compiled_before)[0] == 2

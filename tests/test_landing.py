"""Results of a stage that are made in the slot they are sent from: same bits, no copy, and nobody's memory changes."""

from __future__ import annotations

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


def test_a_product_of_three_dimensions_is_a_view_of_what_was_made() -> None:
    assert run_in_rooms(MADE["linear"], torch.float32, dims=3)[0] == [False, True, True]


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


def test_a_slot_is_free_when_nobody_has_a_storage_on_it() -> None:
    pool = SlotPool()
    slot = pool.reserve([Spec.of(torch.empty(8, 8))])
    x = slot.rooms[0].tensor(torch.float32, (8, 8)).fill_(3)
    view = x.view(-1)
    assert pool.fill([x], GONE, slot) is slot and not slot.returned
    slot._state[0] = 0  # the receiver has let go of it
    assert slot.returned and not slot.free
    del x
    assert not slot.free, "a view holds the storage"
    assert pool.reserve([Spec.of(torch.empty(8, 8))]) is not slot and float(view.sum()) == 3 * 64
    del view
    assert slot.free and pool.reserve([Spec.of(torch.empty(8, 8))]) is slot
    pool.close()


# ---------------------------------------------------------------- pipelines


@contextmanager
def counted(least: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Messages from `least` bytes on get rooms. Of each that gets some: how many tensors were made there, of all."""
    before, plain, found = channels.LEAST_IN_ROOMS, SlotPool.fill, []

    def fill(self: SlotPool, tensors: Any, borrower: Any, reserved: Any = None) -> Any:
        if reserved is not None:
            made = [room.used and room.holds(t) for t, room in zip(tensors, reserved.rooms, strict=True)]
            found.append((sum(made), len(made)))
        return plain(self, tensors, borrower, reserved)

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
        if name in ("lengths", "skips"):  # a recording for each length; what a stage passes on was made elsewhere
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
    assert rank == 1 or [made for made, _ in messages] == [0, 1, 1, 1, 1, 1]
    for _ in range(3):
        z = functional.linear(functional.linear(x, *plain[:2]).tanh() * 0.5, *plain[2:])
        functional.mse_loss(z, y).backward()
    for mine, expected in zip(pipeline.parameters(), plain[2 * rank :], strict=False):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_a_receiver_that_writes_in_place_does_not_change_what_the_sender_saved() -> None:
    run_ranks(2, writes)


class WritesLater(nn.Module):
    """Writes to what it is given from the second run on, which no recording shows."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            x.mul_(0.5)
        return self.last(x)


def writes_unseen(rank: int, n: int) -> str:
    with distlib.init(timeout=timedelta(seconds=20)):
        model = nn.Sequential(nn.Linear(8, 8), WritesLater())
        pipeline = distlib.PipelineParallel(model, None, "gpipe", 2, mean_square, ["1"], torch.randn(4, 8))
        with pytest.raises((StageError, RuntimeError)) as caught:
            pipeline.train_step(torch.randn(8, 8), torch.randn(8, 8))
        return str(caught.value)


def test_a_write_that_no_recording_showed_is_an_error_on_all_ranks() -> None:
    for text in run_ranks(2, writes_unseen):
        assert "stage 1 wrote in place to float32 [4, 8], which it got from stage 0" in text, text


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

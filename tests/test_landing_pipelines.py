"""Pipelines whose activations are made in the slot they are sent from: same bits, no copy, nobody's memory changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from pipeline_models import CASES
from ranks import run_ranks
from test_landing import Ends
from torch import Tensor, nn
from torch.nn import functional

import distlib
from distlib import native
from distlib.comm.slots import SlotPool
from distlib.pipeline.runtime import StageError

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())

NONE = str(1 << 30)  # KiB


@contextmanager
def counted(least: str | None = "0") -> Iterator[list[tuple[int, int]]]:
    """Messages of pipelines made inside get rooms from `least` KiB on. Of each that gets some: how many tensors were
    made there, of all."""
    plain, found = SlotPool.fill, []

    def fill(self: SlotPool, tensors: Any, borrower: Any, reserved: Any = None) -> Any:
        made = sum(room.holds(tensors[k]) for k, room in enumerate(reserved.rooms)) if reserved else 0
        count = len(tensors)
        lent = plain(self, tensors, borrower, reserved)
        if reserved is not None:
            found.append((made if lent is reserved else 0, count))
        return lent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotPool, "fill", fill)
        if least is not None:
            patch.setenv("DISTLIB_ROOMS_KB", least)
        yield found


def trained(name: str, schedule: str, least: str) -> tuple[dict[str, Tensor], list[float], list[tuple[int, int]]]:
    """Weights of this rank after 4 steps, losses, and messages that got rooms."""
    case = CASES[name]
    losses: list[float] = []
    with counted(least) as messages:
        model = distlib.PipelineParallel(
            case.made(), None, schedule, 4, case.loss, "auto", case.batch(8, 0)[0], costs="estimated"
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
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
            weights, losses, none = trained(name, schedule, NONE)
            again, losses_again, made[name] = trained(name, schedule, "0")
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


def post_norm(rank: int, n: int) -> list[tuple[int, int]]:
    """A model as BERT is: blocks that end in a layer norm."""
    found = []
    with distlib.init():
        for least in (NONE, "0"):
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(4)))
            x, y = torch.randn(8, 4, 8), torch.randn(8, 4, 8)
            with counted(least) as messages:
                pipeline = distlib.PipelineParallel(model, None, "zb-h1", 4, mean_square, ["2"], x)
                losses = [float(pipeline.train_step(x, y)) for _ in range(3)]
            found.append((losses, [p.grad.tolist() for p in pipeline.parameters()]))
    assert found[0] == found[1]
    return messages


def test_what_a_layer_norm_made_is_not_copied() -> None:
    sent = run_ranks(2, post_norm)[0]
    assert sent == [(0, 1)] * 3 + [(1, 1)] * 9


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
    with distlib.init(), counted(None) as messages:
        for width, expected in ((1 << 14, 4), (1 << 10, 0)):
            messages.clear()
            model = nn.Sequential(nn.Linear(8, width, bias=False), nn.Linear(width, 8, bias=False))
            x = torch.randn(256, 8)
            pipeline = distlib.PipelineParallel(model, None, "1f1b", 2, mean_square, ["1"], x[:128])
            for _ in range(2):
                pipeline.train_step(x, x)
            assert rank == 1 or len(messages) == expected, messages
            assert sum(made for made, _ in messages) == max(0, len(messages) - 2), messages


def test_large_messages_are_made_in_rooms_and_small_ones_copied() -> None:
    run_ranks(2, large_and_small)


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
        for least in (NONE, "0"):
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

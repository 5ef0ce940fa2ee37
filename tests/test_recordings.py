"""What a recorded run may be used for: inputs of other strides, of other identity, in other modes; compiled blocks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_landing import Adds
from test_landing_pipelines import counted, mean_square
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distlib
from distlib.pipeline.recent import Recent
from distlib.pipeline.record import record, signature
from distlib.pipeline.stages import ghost, leaves_of


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


# ---------------------------------------------------------------- what Python and other compilers do in between


@torch.jit.script
def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Glued(nn.Module):
    """Linear layers, and between them what a function says."""

    def __init__(self, glue: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.glue = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), glue

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.glue(block(x))
        return x


def layer_drop(x: Tensor) -> Tensor:
    return x if random.random() < 0.5 else x * 2


def numpy_drop(x: Tensor) -> Tensor:
    return x * float(np.random.rand())


def guarded(x: Tensor) -> Tensor:
    try:
        return x * int(x.sum() > 0)
    except Exception:  # noqa: BLE001 - as a model may write it
        return x * 2


@pytest.mark.parametrize(
    ("glue", "words"),
    [
        (gate, "is called past torch functions, by code of torch.jit"),
        (layer_drop, r"before the call of blocks.1, the model draws from Python's random"),
        (numpy_drop, "draws from numpy.random"),
        (guarded, "asks for the value of a tensor"),
    ],
)
def test_glue_that_a_list_of_calls_cannot_say_is_refused(glue: Callable[[Tensor], Tensor], words: str) -> None:
    model = Glued(glue)
    with pytest.raises(ValueError, match=words):
        record(model, (torch.empty(2, 8),), {}, leaves_of(model))


class Drops(nn.Linear):
    """Draws in the module itself, which runs whole in one stage."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random() * float(np.random.rand())


def test_leaves_may_draw_from_python_and_recording_them_draws_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Drops(8, 8), nn.Linear(8, 8))
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    record(model, (torch.empty(2, 8),), {}, leaves_of(model))
    assert (random.random(), np.random.rand()) == expected


class Settings:
    """An input that is no tensor, told by identity."""

    def __init__(self) -> None:
        self.scale = 1.0


def test_an_objects_numbers_are_part_of_the_signature() -> None:
    model, settings = nn.Linear(8, 8), Settings()
    x = torch.empty(2, 8)
    first = signature((x, settings), {}, model)
    assert signature((x, settings), {}, model) == first
    settings.scale = 0.5
    assert signature((x, settings), {}, model) != first


class Counts(nn.Linear):
    """Returns a number of Python that changes."""

    calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        self.calls += 1
        return super().forward(x), 1 / self.calls


class Weighs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counts(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y, weight = block(x)
            x = x + y * weight
        return x


def test_a_number_that_a_module_returns_otherwise_than_recorded_is_told_once() -> None:
    x = torch.ones(4, 8)
    with distlib.init():
        pipeline = distlib.PipelineParallel(Weighs(), 1, "1f1b", 2, small, "auto", x, costs="estimated")
        with pytest.warns(UserWarning, match=r"blocks.0 .*returned 1.0 when it was recorded, and now 0.5") as told:
            for _ in range(3):
                pipeline.train_step(x, x)
        assert len([w for w in told if "when it was recorded" in str(w.message)]) == 2  # one for each of the modules


def test_only_the_programs_used_last_are_kept() -> None:
    made: list[int] = []
    recent: Recent[int] = Recent(most=2)
    for key in (1, 2, 1, 3, 1, 2):
        recent.get(key, lambda key=key: made.append(key) or key)
    assert made == [1, 2, 3, 2] and len(recent) == 2


def test_a_stage_that_was_idle_in_the_example_is_used_later() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.aux, self.last = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, aux: bool) -> Tensor:
            x = self.first(x)
            return self.last(self.aux(x) if aux else x)

    x = torch.ones(4, 8)
    torch.manual_seed(0)
    model = Optional()
    expected = float(small(model(x, True), x).detach())
    with distlib.init():
        pipeline = distlib.PipelineParallel(model, 2, "interleaved", 2, small, ["last"], (x, False), costs="estimated")
        pipeline.train_step((x, False), x)
        assert float(pipeline.train_step((x, True), x)) == pytest.approx(expected, rel=1e-6)


class Scripted(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_modules_that_cannot_be_copied_are_named() -> None:
    with pytest.raises(ValueError, match=r"inner is a RecursiveScriptModule of torch.jit"):
        ghost(Scripted(torch.jit.script(nn.Linear(8, 8))))
    with pytest.raises(ValueError, match=r"attribute inner of the model \(Scripted\) cannot be copied .*_thread.lock"):
        ghost(Scripted(threading.Lock()))


class Reentrant(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)


@pytest.mark.parametrize("costs", ["estimated", "measured"])
def test_reentrant_checkpoints_are_divided_by_their_forwards(costs: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(Reentrant(8, 8) for _ in range(3)))
    x = torch.randn(4, 8)
    expected = float(small(model(x), x).detach())
    with distlib.init():
        pipeline = distlib.PipelineParallel(model, 2, "interleaved", 2, small, "auto", x, costs=costs)
        assert [cost.backward > 0 for cost in pipeline.division.costs[1:]] == [True] * 3
        assert float(pipeline.train_step(x, x)) == pytest.approx(expected, rel=1e-6)

"""What a recorded run may be used for: inputs of other strides, of other identity, in other modes; compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_landing import Adds
from test_landing_pipelines import counted, mean_square
from torch import Tensor, nn

import distlib


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

"""Uneven inputs: ranks that run out of inputs shadow the others, and end with their weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from test_data_parallel import SMALL, loss_of, tiny, wrapped
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer

import distlib
from distlib.data_parallel import DataParallel


def alone(inputs: list[int], divide_by_all: bool, micro_steps: int = 1) -> dict[str, torch.Tensor]:
    """The oracle: one process that adds the gradients of the ranks that still have inputs."""
    module = tiny()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(max(inputs)):
        active = [rank for rank, count in enumerate(inputs) if step < count]
        optimizer.zero_grad()
        for rank in active:
            divisor = len(inputs) if divide_by_all else len(active)
            for micro in range(micro_steps):
                (loss_of(module, rank, 10 * step + micro) / divisor).backward()
        optimizer.step()
    return copy.deepcopy(module.state_dict())


def _uneven(
    rank: int, n: int, inputs: list[int], divide_by_all: bool, micro_steps: int, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    with wrapped(rank, n, **options) as model:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with model.join(divide_by_initial_world_size=divide_by_all):
            for step in range(inputs[rank]):
                optimizer.zero_grad()
                with model.no_sync():
                    for micro in range(micro_steps - 1):
                        loss_of(model, rank, 10 * step + micro).backward()
                loss_of(model, rank, 10 * step + micro_steps - 1).backward()
                optimizer.step()
        trained = copy.deepcopy(model.module.state_dict())
        model.zero_grad()
        loss_of(model, rank).backward()  # outside the context all ranks take part again
        return trained


@pytest.mark.parametrize("divide_by_all", [True, False])
@pytest.mark.parametrize("inputs", [[3], [4, 2], [2, 4], [3, 3], [0, 3], [1, 4, 2], [5, 1, 5, 0]])
def test_uneven_inputs(inputs: list[int], divide_by_all: bool) -> None:
    want = alone(inputs, divide_by_all)
    for state in run_ranks(len(inputs), _uneven, inputs, divide_by_all, 1, {}):
        for name, value in want.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, k=name: f"{k}: {m}")


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ([1, 3, 2], {"find_unused_parameters": True}),
        ([1, 3, 2], {"static_graph": True}),
        ([0, 2, 1], {"static_graph": True}),  # one learns the graph from the others
        ([1, 3, 2], {"gradient_dtype": torch.float16}),
    ],
)
def test_uneven_inputs_with_options_and_micro_steps(inputs: list[int], options: dict[str, Any]) -> None:
    want = alone(inputs, False, micro_steps=2)
    tolerance = 1e-2 if "gradient_dtype" in options else 1e-5
    for state in run_ranks(3, _uneven, inputs, False, 2, options):
        for name, value in want.items():
            torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance / 100)


def _buffers_follow_a_rank_with_inputs(rank: int, n: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    with wrapped(rank, n, module) as model:
        with model.join():
            for step in range(1 if rank == 0 else 4):
                x = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))
                model(x).sum().backward()
        assert model.module[1].num_batches_tracked == 4
        return model.module[1].running_mean.clone()


def test_buffers_come_from_the_first_rank_with_inputs() -> None:
    means = run_ranks(3, _buffers_follow_a_rank_with_inputs)
    assert torch.equal(means[0], means[1]) and torch.equal(means[0], means[2])


def _stops_early(rank: int, n: int) -> int:
    steps = 0
    with wrapped(rank, n) as model:
        with pytest.raises(RuntimeError, match="exhausted"):
            with model.join(throw_on_early_termination=True):
                for step in range(2 if rank == 1 else 5):
                    loss_of(model, rank, step).backward()
                    steps += 1
        loss_of(model, rank).backward()  # the context is left all the same
    return steps


def test_all_stop_when_one_runs_out_if_asked() -> None:
    assert run_ranks(3, _stops_early) == [2, 2, 2]


def _with_zero(rank: int, n: int) -> dict[str, torch.Tensor]:
    """With torch's sharded optimizer as a second Joinable."""
    with process_group(rank, n):
        model = DataParallel(tiny(), bucket_mb=SMALL)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = ZeroRedundancyOptimizer(trained, torch.optim.SGD, lr=0.1)
        with Join([model, optimizer]):
            for step in range(4 if rank == 0 else 2):
                model.zero_grad()
                loss_of(model, rank, 10 * step).backward()
                optimizer.step()
        return copy.deepcopy(model.module.state_dict())


def test_other_joinables_take_part() -> None:
    want = alone([4, 2], True)
    for state in run_ranks(2, _with_zero):
        for name, value in want.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)


def _forgets_backward(rank: int, n: int) -> None:
    with wrapped(rank, n) as model:
        with pytest.raises(RuntimeError, match="not followed by its backward"):
            with model.join():
                for step in range(1 if rank == 1 else 3):
                    loss = loss_of(model, rank, step)
                    if step == 0:
                        loss.backward()


def test_a_forward_without_backward_is_told_to_all() -> None:
    run_ranks(2, _forgets_backward)


def _evaluates_within(rank: int, n: int, evaluates: bool) -> list[torch.Tensor]:
    with wrapped(rank, n) as model:
        with model.join():
            for step in range(1 if rank == 1 else 3):
                loss_of(model, rank, step).backward()
                if evaluates:
                    with torch.no_grad():
                        loss_of(model, rank, step)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_forwards_without_gradients_within_join_change_nothing() -> None:
    without, within = (run_ranks(2, _evaluates_within, evaluates) for evaluates in (False, True))
    assert without[0] and all(torch.equal(*pair) for pair in zip(without[0], within[0], strict=True))


def _disabled(rank: int, n: int) -> None:
    with wrapped(rank, n) as model:
        loss_of(model, rank).backward()
        counts = []
        for context in (nullcontext(), model.join(enable=False)):
            before = sum(row.calls for row in distlib.ledger().rows)
            with context:
                loss_of(model, rank).backward()
            counts.append(sum(row.calls for row in distlib.ledger().rows) - before)
        assert counts[0] == counts[1]


def test_disabled_it_costs_nothing() -> None:
    run_ranks(2, _disabled)


def _unknown(rank: int, n: int) -> None:
    with wrapped(rank, n) as model:
        with pytest.raises(ValueError, match="'divide'"):
            Join([model], divide=True)


def test_unknown_options_are_refused() -> None:
    run_ranks(1, _unknown)

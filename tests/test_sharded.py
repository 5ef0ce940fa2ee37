"""ShardedDataParallel against its oracle: one process that sees the whole batch. Every stage, every partition size.

Ranks that share memory, and ranks on pretend hosts (DISTLIB_NODES), whose parameters are gathered.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from sharded_models import adamw, alone, loss_of, part_of, summed, tiny

import distlib
from distlib import native

NO_CORE = pytest.mark.skipif(native.core() is None, reason=native.why_not())


def train(rank: int, n: int, stage: int, p: int, steps: int, **options: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of the whole batch, and the weights at the end."""
    model = distlib.ShardedDataParallel(tiny(), stage=stage, partition_size=p, **options)
    optimizer = adamw(model.parameters())
    losses = []
    for step in range(steps):
        loss = loss_of(model, *part_of(step, rank, n))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() / n)
    return summed(losses), model.full_state_dict()


def curves(rank: int, n: int, stages: list[int], partitions: list[int], steps: int, options: dict[str, Any]) -> Any:
    with process_group(rank, n):
        return {(s, p): train(rank, n, s, p, steps, **options) for s in stages for p in partitions}


def assert_curves(outcome: Any, n: int, steps: int) -> None:
    expected, _, weights = alone(n, steps)
    for (stage, p), (losses, final) in outcome.items():
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0, msg=lambda m, k=(stage, p): f"{k}: {m}")
        for name, weight in weights.items():
            torch.testing.assert_close(final[name], weight, rtol=2e-4, atol=2e-5)


def divisors(n: int) -> list[int]:
    return [p for p in range(1, n + 1) if n % p == 0]


@pytest.mark.parametrize(("n", "steps"), [(1, 50), (2, 50), (3, 50), (4, 50), (6, 10), (8, 10)])
def test_loss_curve_equals_one_process(n: int, steps: int) -> None:
    outcome = run_ranks(n, curves, [1, 2, 3], divisors(n), steps, {}, timeout=150)
    assert_curves(outcome[0], n, steps)


@NO_CORE
@pytest.mark.parametrize(
    ("n", "nodes", "stages", "partitions", "steps"),
    [
        (2, 2, [1, 2, 3], [2], 30),
        (3, 3, [2, 3], [3], 20),
        (3, 2, [1, 3], [3], 10),  # hosts of one and two ranks
        (4, 2, [1, 2, 3], [4], 15),
        (4, 4, [3], [2, 4], 10),
        (6, 3, [3], [3, 6], 10),  # p=3 on hosts of two ranks: partition groups that span hosts unevenly
        (6, 2, [2, 3], [2, 3], 10),  # p=2 on hosts of three: one group spans hosts, the others share memory
    ],
)
def test_loss_curve_over_hosts(n: int, nodes: int, stages: list[int], partitions: list[int], steps: int) -> None:
    env = {"DISTLIB_NODES": str(nodes)}
    outcome = run_ranks(n, curves, stages, partitions, steps, {}, timeout=150, env=env)
    assert_curves(outcome[0], n, steps)


@NO_CORE
def test_loss_curve_without_the_core() -> None:
    """Without the C++ core nothing is shared: all gathers go over gloo."""
    outcome = run_ranks(2, curves, [1, 3], [2], 10, {}, timeout=150, env={"DISTLIB_CORE": "0"})
    assert_curves(outcome[0], 2, 10)


# ------------------------------------------------------------ settings that must not change a bit


def variants(rank: int, n: int, p: int, settings: list[dict[str, Any]], steps: int) -> Any:
    with process_group(rank, n):
        return [train(rank, n, 3, p, steps, **options) for options in settings]


def assert_bitwise_equal(outcome: Any) -> None:
    losses, weights = outcome[0]
    for other_losses, other in outcome[1:]:
        assert other_losses == losses
        assert all(torch.equal(other[name], value) for name, value in weights.items())


@NO_CORE
def test_prefetch_resharding_and_hierarchy_change_no_bit() -> None:
    settings = [
        {"prefetch": 0},
        {"prefetch": 1},
        {"prefetch": 2},
        {"prefetch": 5, "hierarchical": True},
        {"prefetch": 2, "hierarchical": False},
        {"reshard_after_forward": False},
        {"reshard_after_forward": False, "prefetch": 0},
        {"reshard_after_forward": 2},  # a secondary partition
        {"reshard_after_forward": 2, "prefetch": 5},
    ]
    outcome = run_ranks(4, variants, 4, settings, 5, timeout=120, env={"DISTLIB_NODES": "2"})
    assert_bitwise_equal(outcome[0])
    assert_bitwise_equal(outcome[3])
    expected, _, _ = alone(4, 5)
    torch.testing.assert_close(outcome[0][0][0], expected, rtol=1e-5, atol=0)


def test_prefetch_and_resharding_change_no_bit_in_shared_memory() -> None:
    settings = [{"prefetch": 0}, {"prefetch": 5}, {"reshard_after_forward": False}, {}]
    assert_bitwise_equal(run_ranks(2, variants, 2, settings, 5)[0])


@pytest.mark.parametrize("nodes", [1, 2])
def test_optimizer_state_over_all_ranks(nodes: int) -> None:
    options = {"shard_optimizer": "world"}
    env = {"DISTLIB_NODES": str(nodes)}
    outcome = run_ranks(4, curves, [1, 3], [1, 2], 6, options, timeout=120, env=env)
    assert_curves(outcome[0], 4, 6)

"""ShardedDataParallel against its oracle: one process that sees the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks
from sharded_models import adamw, alone, loss_of, part_of, tiny

import distlib


def train(rank: int, n: int, stage: int, p: int, steps: int, **options: object):
    """Losses of the whole batch, and the weights at the end."""
    model = distlib.ShardedDataParallel(tiny(), stage=stage, partition_size=p, **options)
    optimizer = adamw(model.parameters())
    losses = []
    for step in range(steps):
        loss = loss_of(model, *part_of(step, rank, n))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / n
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, model.full_state_dict()


def curves(rank: int, n: int, stages: list[int], partitions: list[int], steps: int, options: dict[str, object]):
    with process_group(rank, n):
        return {(s, p): train(rank, n, s, p, steps, **options) for s in stages for p in partitions}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_loss_curve_equals_one_process(n: int) -> None:
    expected, _, weights = alone(n, 50)
    partitions = [p for p in range(1, n + 1) if n % p == 0]
    outcome = run_ranks(n, curves, [1, 2, 3], partitions, 50, {}, timeout=120)
    for losses, final in outcome[0].values():
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(final[name], weight, rtol=2e-4, atol=2e-5)

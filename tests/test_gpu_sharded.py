"""Sharded models on a real GPU: the curve of one process that sees the whole batch, whoever shares a card.

On the fake device the same test runs anywhere; tests/test_sharded_device.py looks closer there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_places import PLACES, device_of, ready
from ranks import process_group, run_ranks
from sharded_models import adamw, alone, loss_of, part_of, summed, tiny

import distlib
from distlib import native

STEPS = 20
# Stages, prefetch, optimizers: what differs in how tensors travel.
OPTIONS: list[dict[str, Any]] = [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 3, "prefetch": 0}]

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())


def trainings(rank: int, n: int, place: str) -> list[Any]:
    """Losses and weights of each of OPTIONS."""
    device = device_of(place, rank)
    with process_group(rank, n):
        return [train(rank, n, device, **options) for options in OPTIONS]


def train(rank: int, n: int, device: torch.device, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = distlib.ShardedDataParallel(tiny(), device=device, **options)
    optimizer = adamw(model.parameters())
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, *(t.to(device) for t in part_of(step, rank, n)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() / n)
    return summed([loss.cpu() for loss in losses]), model.full_state_dict()


@pytest.mark.parametrize(("place", "n"), PLACES)
def test_the_curve_is_that_of_one_process(place: str, n: int, request: pytest.FixtureRequest) -> None:
    ready(place, request)
    expected, _, weights = alone(n, STEPS)
    tolerance = 1e-5 if place == "fake" else 1e-4  # a GPU's matrix products round otherwise than the CPU's
    for options, (losses, final) in zip(OPTIONS, run_ranks(n, trainings, place, timeout=100)[0], strict=True):
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0, msg=lambda m, o=options: f"{o}: {m}")
        for name, weight in weights.items():
            torch.testing.assert_close(final[name].cpu(), weight, rtol=2e-3, atol=2e-4)

"""Sharded models on a real GPU: the curve of one process that sees the whole batch, whoever shares a card.

On the fake device the same test runs anywhere; tests/test_sharded_device.py looks closer there.
"""

from __future__ import annotations

from typing import Any

import fake_device
import pytest
import torch
from ranks import process_group, run_ranks
from sharded_models import adamw, alone, loss_of, part_of, summed, tiny

import distlib
from distlib import native

STEPS = 20
CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
EACH_ITS_CARD = [pytest.mark.gpu, pytest.mark.skipif(CARDS < 2, reason=f"{CARDS} cards: needs 2 at least")]
PLACES = [
    pytest.param("fake", 1),
    pytest.param("fake", 2),
    pytest.param("one card", 1, marks=pytest.mark.gpu),
    pytest.param("one card", 2, marks=pytest.mark.gpu),
    pytest.param("one card", 3, marks=pytest.mark.gpu),
    pytest.param("a card each", max(2, CARDS), marks=EACH_ITS_CARD),
]
# Stages, prefetch, optimizers: what differs in how tensors travel.
OPTIONS: list[dict[str, Any]] = [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 3, "prefetch": 0}]

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())


def device_of(place: str, rank: int) -> torch.device:
    if place == "fake":
        from devices import device_here

        return device_here("fake")
    device = torch.device("cuda", rank if place == "a card each" else 0)
    torch.cuda.set_device(device)
    return device


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
def test_the_curve_is_that_of_one_process(place: str, n: int) -> None:
    if place == "fake" and (reason := fake_device.why_not()):
        pytest.skip(reason)
    expected, _, weights = alone(n, STEPS)
    tolerance = 1e-5 if place == "fake" else 1e-4  # a GPU's matrix products round otherwise than the CPU's
    for options, (losses, final) in zip(OPTIONS, run_ranks(n, trainings, place, timeout=100)[0], strict=True):
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0, msg=lambda m, o=options: f"{o}: {m}")
        for name, weight in weights.items():
            torch.testing.assert_close(final[name].cpu(), weight, rtol=2e-3, atol=2e-4)

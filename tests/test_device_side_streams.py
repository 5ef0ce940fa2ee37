"""Training steps that go through more than one stream: autograd runs a backward on the streams of its forward.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import fake_device
import pytest
import torch
from device_groups import SMALL
from devices import device_here, needs_fake_device
from ranks import process_group, run_ranks
from sharded_models import loss_of, part_of, tiny

import distlib
from distlib import streams

pytestmark = needs_fake_device


@contextlib.contextmanager
def aside(yes: bool, side: streams.Stream, device: torch.device) -> Iterator[None]:
    """On `side`, ordered with the current stream as a user would."""
    current = streams.current(device)
    streams.follow(side if yes else current, current)
    with streams.on(side if yes else current):
        yield
    streams.follow(current, side if yes else current)


def trained(rank: int, n: int, wrapper: str, which: str) -> list[float]:
    device = device_here("fake")
    fake_device.lag(1000)
    with process_group(rank, n):
        side = streams.new(device)
        model = tiny().to(device)
        if wrapper == "sharded":
            model = distlib.ShardedDataParallel(model, device=device)
        elif wrapper == "data parallel":
            model = distlib.DataParallel(model, bucket_mb=0.002)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for step in range(4):
            batch = tuple(t.to(device) for t in part_of(step, rank, n))
            with aside(which == "forward", side, device):
                loss = loss_of(model, *batch)
            with aside(which == "backward", side, device):
                loss.backward()
            with aside(which == "optimizer", side, device):
                optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("wrapper", ["sharded", "data parallel"])
def test_a_forward_a_backward_or_a_step_on_a_stream_of_its_own_changes_nothing(wrapper: str) -> None:
    plain = run_ranks(2, trained, wrapper, "", env=SMALL)
    for which in ("forward", "backward", "optimizer"):
        assert run_ranks(2, trained, wrapper, which, env=SMALL) == plain, which

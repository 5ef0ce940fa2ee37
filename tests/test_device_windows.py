"""Gradients of a sharded model on a device between micro-steps: zeroed by the user, seen by one wait of the host.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

import fake_device
import pytest
import torch
from devices import device_here, needs_fake_device
from ranks import process_group, run_ranks
from sharded_models import loss_of, part_of, tiny

import distlib

pytestmark = needs_fake_device


def zeroed(rank: int, n: int) -> None:
    device = device_here("fake")
    with process_group(rank, n):
        model = distlib.ShardedDataParallel(tiny(), device=device)
        batches = [tuple(t.to(device) for t in part_of(i, rank, n)) for i in range(2)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        expected = None
        for dropped in (False, True):
            with model.no_sync():
                for i in [0, 1, 0] if dropped else [0]:
                    if i == 0:  # what was before counts no more
                        optimizer.zero_grad(set_to_none=not dropped)
                    fake_device.reset()
                    loss_of(model, *batches[i]).backward()
                    assert len(fake_device.host_syncs()) <= 1, [*map(str, fake_device.host_syncs())]
            loss_of(model, *batches[1]).backward()
            found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            if expected is not None:
                assert len(found) > 4 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            expected = found
            optimizer.zero_grad()
        with model.no_sync():
            loss_of(model, *batches[0]).backward()
        name, changed = next((n, p) for n, p in model.named_parameters() if p.grad is not None and p.numel())
        changed.grad.view(-1)[0] = 7.0  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=f"grad of '{name}' was changed between micro-steps"):
            loss_of(model, *batches[1]).backward()


def test_zeros_between_micro_steps_cost_one_wait() -> None:
    run_ranks(1, zeroed)

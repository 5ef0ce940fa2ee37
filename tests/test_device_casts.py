"""Masters cast to the dtype that a sharded model computes in: what was written, in as few launches as there can be.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import device_here, needs_fake_device
from ranks import process_group, run_ranks
from sharded_models import loss_of, part_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import distlib
from distlib.optim import AdamW

pytestmark = needs_fake_device


class Copies(TorchDispatchMode):
    """How many copies were made."""

    calls = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += op is torch.ops.aten.copy_.default
        return op(*args, **(kwargs or {}))


def casts(rank: int, n: int, place: str, who: str) -> tuple[int, int, int]:
    device = device_here(place)
    with process_group(rank, n):
        module = tiny()
        module.scale = module.scale.bfloat16()
        half = distlib.sharded.MixedPrecision(param=torch.bfloat16)
        model = distlib.ShardedDataParallel(module, device=device, mixed_precision=half)
        flats = [flat for unit in model._units for flat in unit.flats]
        pieces = [p for flat in flats for p in flat.pieces if p.numel()]
        optimizer = (AdamW if who == "distlib" else torch.optim.AdamW)(pieces, lr=0.01)
        loss_of(model, *(t.to(device) for t in part_of(0, rank, n))).backward()
        optimizer.step()
        if who == "both":
            AdamW(pieces[:1], lr=0.01).step()
        with Copies() as copies:
            for flat in flats:
                flat.write_compute()
        for flat in flats:
            assert torch.equal(flat.own, flat.master.to(flat.compute))
        assert len(pieces) > 2 * len(flats)
        return copies.calls, len(flats), sum(not flat.trained for flat in flats)


@pytest.mark.parametrize("place", ["cpu", "fake"])
@pytest.mark.parametrize("who", ["torch", "distlib", "both"])
def test_masters_of_an_optimizer_that_casts_nothing_are_cast_at_once(place: str, who: str) -> None:
    """A kernel each, not one for each parameter. What distlib's optimizers cast in their pass is not cast again."""
    for copies, flats, frozen in run_ranks(2, casts, place, who):
        if who == "both":  # the flat of the piece that was cast: one by one
            assert copies >= flats
        else:
            assert copies == (flats if who == "torch" else frozen)

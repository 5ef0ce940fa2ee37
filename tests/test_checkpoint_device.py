"""Checkpoints of models on a device: the CPU's bits, to and from any place, also while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from devices import device_here, needs_fake_device
from ranks import process_group, run_ranks
from sharded_models import loss_of, part_of, tiny

import distlib
from distlib import native

pytestmark = [needs_fake_device, pytest.mark.skipif(native.core() is None, reason=native.why_not())]

BEFORE, AFTER = 3, 3


def made(device: torch.device, **options: Any) -> tuple[Any, Any, Any]:
    model = distlib.ShardedDataParallel(tiny(), device=device, **options)
    optimizer = distlib.optim.AdamW(model.parameters(), lr=3e-3, max_norm=0.05)
    return model, optimizer, distlib.optim.GradScaler(init_scale=16.0)


def run(parts: tuple[Any, Any, Any], steps: range, rank: int, n: int, device: torch.device) -> list[float]:
    model, optimizer, scaler = parts
    losses = []
    for step in steps:
        loss = loss_of(model, *(t.to(device) for t in part_of(step, rank, n)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _saves(rank: int, n: int, place: str, folder: str, options: dict[str, Any]) -> list[float]:
    """Trains and saves, in the background too, and trains on. Returns the later losses."""
    device = device_here(place)
    with process_group(rank, n):
        parts = made(device, **options)
        run(parts, range(BEFORE), rank, n, device)
        model, optimizer, scaler = parts
        distlib.save(f"{folder}/now", model=model, optimizer=optimizer, scaler=scaler, step=BEFORE)
        handle = distlib.save(
            f"{folder}/behind", model=model, optimizer=optimizer, scaler=scaler, step=BEFORE, asynchronous=True
        )
        losses = run(parts, range(BEFORE, BEFORE + AFTER), rank, n, device)
        handle.wait()
        return losses


def _resumes(rank: int, n: int, place: str, folder: str, options: dict[str, Any]) -> list[float]:
    device = device_here(place)
    with process_group(rank, n):
        parts = made(device, **options)
        model, optimizer, scaler = parts
        state = distlib.load(folder, model=model, optimizer=optimizer, scaler=scaler)
        assert state.step == BEFORE
        return run(parts, range(BEFORE, BEFORE + AFTER), rank, n, device)


def test_what_a_device_saved_goes_on_anywhere_to_the_bit(tmp_path: Path) -> None:
    """From a device with stage 3 to the CPU with stage 2, back to a device whose optimizer is in host memory."""
    n = 2
    expected = run_ranks(n, _saves, "fake", str(tmp_path), {"stage": 3}, timeout=100)
    on_hosts = {"DISTLIB_NODES": "2"}  # where sums are in the order of a device's ranks, too
    for name in ("now", "behind"):
        folder = str(tmp_path / name)
        assert run_ranks(n, _resumes, "cpu", folder, {"stage": 2}, timeout=100, env=on_hosts) == expected
        assert run_ranks(n, _resumes, "fake", folder, {"stage": 3}, timeout=100) == expected
    offloaded = run_ranks(n, _resumes, "fake", folder, {"stage": 3, "offload": "cpu"}, timeout=100)
    assert offloaded == expected

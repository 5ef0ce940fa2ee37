"""Checkpoints of models on a device: the CPU's bits, to and from any place, also while training goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import device_here, needs_fake_device
from fake_device import WatchPinned
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


def _evaluates_and_loads(rank: int, n: int, place: str, folder: str, options: dict[str, Any]) -> list[float]:
    """Loads right after an evaluation, whose copies to the device are under way; frozen parameters change, too."""
    device = device_here(place)

    def evaluated() -> torch.Tensor:
        with torch.no_grad():
            return loss_of(model, *(t.to(device) for t in part_of(9, rank, n)))

    with process_group(rank, n), WatchPinned() if place == "fake" else contextlib.nullcontext():
        parts = made(device, **options)
        model, optimizer, _ = parts
        run(parts, range(1), rank, n, device)
        distlib.save(folder, model=model, optimizer=optimizer)
        found = [evaluated()]
        run(parts, range(1, 3), rank, n, device)
        with model.summon_full_params():
            model.module.fixed.weight.add_(1.0)
        found.append(evaluated())
        distlib.load(folder, model=model, optimizer=optimizer)
        found += [evaluated(), evaluated()]
        return [loss.item() for loss in found]


@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=["on the device", "on the host"])
def test_a_checkpoint_is_loaded_after_an_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    found = run_ranks(1, _evaluates_and_loads, "fake", str(tmp_path / "fake"), options, timeout=100)[0]
    assert found == run_ranks(1, _evaluates_and_loads, "cpu", str(tmp_path / "cpu"), {}, timeout=100)[0]
    assert found[0] == found[2] == found[3] != found[1]

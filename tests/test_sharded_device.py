"""Sharded models on a device that is not the CPU: the CPU's bits, streams in order, a host that never waits.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import fake_device
import pytest
import torch
from devices import device_here, needs_fake_device
from ranks import process_group, run_ranks
from sharded_models import adamw, loss_of, part_of, summed, tiny

import distlib
from distlib import native

pytestmark = needs_fake_device

STEPS, STEADY = 5, 3  # from step STEADY on nothing is new


def train(rank: int, n: int, device: torch.device, micro_steps: int = 1, clip: bool = False, **options: Any) -> Any:
    """Losses, weights, and where the host waited for the device in steady steps."""
    module = tiny()
    if "mixed_precision" in options:
        module.scale = module.scale.to(options["mixed_precision"].param)
    model = distlib.ShardedDataParallel(module, device=device, **options)
    optimizer = adamw(model.parameters())
    losses: list[torch.Tensor] = []
    waits: list[str] = []
    for step in range(STEPS):
        batches = [part_of(step * micro_steps + i, rank, n) for i in range(micro_steps)]
        batches = [tuple(t.to(device, non_blocking=True) for t in batch) for batch in batches]
        if step == STEADY and device.type == "fake":
            fake_device.reset()
        for i, (inputs, targets) in enumerate(batches):
            with model.no_sync() if i < micro_steps - 1 else contextlib.nullcontext():
                loss = loss_of(model, inputs, targets) / micro_steps
                loss.backward()
            losses.append(loss.detach())
        if clip:
            model.clip_grad_norm_(0.05)
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "fake":
        waits = [str(wait) for wait in fake_device.host_syncs()]
    return summed([loss.cpu() for loss in losses]), model.full_state_dict(), waits


def trainings(rank: int, n: int, place: str, records: list[dict[str, Any]]) -> Any:
    device = device_here(place)
    with process_group(rank, n):
        return [train(rank, n, device, **record) for record in records]


def assert_alike(n: int, records: list[dict[str, Any]], waits: int = 0, **extra: Any) -> None:
    """The device gives the CPU's bits, and the host waits so often in the steady steps together."""
    on_cpu = run_ranks(n, trainings, "cpu", records, timeout=100, env={"DISTLIB_NODES": str(n)})[0]
    on_device = run_ranks(n, trainings, "fake", [r | extra for r in records], timeout=100)
    for record, (losses, weights, _), found in zip(records, on_cpu, zip(*on_device, strict=True), strict=True):
        for other_losses, other_weights, where in found:
            assert other_losses == losses, record
            assert all(torch.equal(other_weights[name], value) for name, value in weights.items()), record
            assert len(where) == waits, (record, where)


RECORDS: list[dict[str, Any]] = [
    {"stage": stage, "micro_steps": micro_steps, "clip": clip}
    for stage, micro_steps, clip in [(1, 1, True), (1, 2, False), (2, 2, True), (3, 1, False), (3, 2, True)]
]
HALF: list[dict[str, Any]] = [
    {"stage": 2, "mixed_precision": distlib.MixedPrecision(param=torch.bfloat16)},
    {"stage": 3, "micro_steps": 2, "mixed_precision": distlib.MixedPrecision(torch.bfloat16, torch.float32)},
]


def test_one_rank_has_the_cpus_bits_and_never_waits() -> None:
    assert_alike(1, RECORDS + HALF)


def test_the_optimizer_in_host_memory_waits_once_a_step() -> None:
    assert_alike(1, RECORDS[::2] + HALF, STEPS - STEADY, offload="cpu")


ACROSS: list[dict[str, Any]] = [
    *RECORDS,
    *HALF,
    {"stage": 3, "prefetch": 0},
    {"stage": 3, "prefetch": 5, "micro_steps": 2},
    {"stage": 3, "reshard_after_forward": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_ranks_that_share_a_device_have_the_cpus_bits_and_never_wait(n: int) -> None:
    """Gathers and reductions by kernels in mapped memory, beside those of CPU ranks on hosts of their own."""
    assert_alike(n, ACROSS)


@pytest.mark.slow
def test_mics_on_a_device() -> None:
    """Two partition groups of two: hop 2, state over all ranks, a secondary partition, quantized gathers."""
    records = [
        {"stage": stage, "partition_size": 2, "micro_steps": micro_steps, **options}
        for stage, micro_steps, options in [
            (1, 2, {}),
            (2, 1, {"shard_optimizer": "world"}),
            (3, 2, {"clip": True}),
            (3, 1, {"gather_dtype": torch.int8}),
        ]
    ]
    records.append({"stage": 3, "partition_size": 4, "reshard_after_forward": 2})
    assert_alike(4, records)


@pytest.mark.skipif(native.core() is None, reason=native.why_not())
def test_files_take_the_optimizers_state_from_a_device(tmp_path: Any) -> None:
    expected, found = (
        run_ranks(1, _offloaded, place, str(tmp_path / place), timeout=100)[0] for place in ("cpu", "fake")
    )
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


def _offloaded(rank: int, n: int, place: str, folder: str) -> Any:
    device = device_here(place)
    with process_group(rank, n):
        module = tiny()
        module.scale = module.scale.bfloat16()
        precision = distlib.MixedPrecision(param=torch.bfloat16)
        model = distlib.ShardedDataParallel(module, device=device, mixed_precision=precision, offload=folder)
        optimizer = distlib.optim.AdamW(model.parameters(), lr=3e-3, max_norm=0.05)
        losses = []
        for step in range(STEPS):
            loss = loss_of(model, *(t.to(device) for t in part_of(step, rank, n)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert all(p.is_cpu for p in model.parameters())
        return losses, model.full_state_dict()

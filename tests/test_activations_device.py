"""Activation memory on a device: the bits of a plain model, copies ordered with what computes, a host that never waits.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

from typing import Any

import fake_device
import pytest
import torch
from activation_models import MODELS, make, same, step
from devices import device_here, needs_fake_device
from ranks import run_ranks
from torch import nn

import distlib
from distlib.activations.live import LiveBytes
from distlib.activations.stores import PinnedStore

pytestmark = needs_fake_device

STEPS = 3
NAMES = [name for name in MODELS if name != "convolution"]  # which the fake device cannot compute


def pair(name: str, device: torch.device) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Two equal models on the device, and their input."""
    return make(name).to(device), make(name).to(device), MODELS[name][1].to(device)


def _policies(rank: int, n: int, policy: str) -> None:
    device = device_here("fake")
    for name in NAMES:
        plain, model, x = pair(name, device)
        report = distlib.checkpoint_activations(model, policy)
        for seed in range(STEPS):
            expected = step(plain, x, seed)
            fake_device.reset()
            found = step(model, x, seed)
            waits = fake_device.host_syncs()
            assert same(expected, found), name
            assert not waits or seed < STEPS - 1, (name, *map(str, waits))
        if (name, policy) == ("dropout", "offload"):
            assert report.moved_bytes > 0.5 * report.baseline_bytes


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_a_policy_changes_no_bit_and_never_waits(policy: str) -> None:
    run_ranks(1, _policies, policy, timeout=100)


def _windows(rank: int, n: int) -> None:
    """Whatever may be on its way at once; also where memory of activations is lent again at once."""
    device = device_here("fake")
    for options in ({"window": 1}, {"window": "1GiB"}, {"resident": 0}, {"resident": 0, "window": 1}):
        plain, model, x = pair("dropout", device)
        distlib.checkpoint_activations(model, "offload", **options)
        for forwards in (1, 3, 2, 1):
            assert same(step(plain, x, 3, forwards), step(model, x, 3, forwards)), options
        store = next(iter(model)).forward.setting.offloader._stores[device]
        assert isinstance(store, PinnedStore) and store.slab.used == 0


def test_any_window_and_order_of_offloading_on_a_device() -> None:
    run_ranks(1, _windows, timeout=100)


def _ahead(rank: int, n: int, slow: str) -> tuple[int, int]:
    """Bytes that a step reserves whose forward or backward is slow, with and without offloading."""
    device = device_here("fake")
    reserved = []
    for policy in ("keep", "offload"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(16))).to(device)
        if policy == "offload":
            distlib.checkpoint_activations(model, policy, resident=0, window="1MiB")
        x = torch.ones(512, 256, device=device)
        model(x).sum().backward()  # gradients have their memory, and the order of need is known
        torch.accelerator.synchronize()
        for phase in ("forward", "backward"):
            fake_device.lag(1_000_000 if phase == slow else 0)
            if phase == "forward":
                torch.accelerator.empty_cache()
                torch.accelerator.reset_peak_memory_stats()
                before = torch.accelerator.memory_reserved()
                output = model(x)
            else:
                output.sum().backward()
        reserved.append(torch.accelerator.max_memory_reserved() - before)
        fake_device.lag(0)
        del output, model
    return reserved[0], reserved[1]


@pytest.mark.parametrize("slow", ["forward", "backward"])
def test_memory_is_saved_also_where_the_host_is_far_ahead(slow: str) -> None:
    plain, moved = run_ranks(1, _ahead, slow)[0]
    assert moved < 0.4 * plain, (plain, moved)


def _peaks(rank: int, n: int, window: int, resident: int) -> list[list[float]]:
    """Peaks of forward and backward, in activations: where blocks that stay lend, and where they do not."""
    device = device_here("fake")
    found = []
    for lends in (True, False):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(32))).to(device)
        x = torch.ones(512, 256, device=device)
        distlib.checkpoint_activations(model, "offload", resident=resident, window=window * x.nbytes)
        model[0].forward.setting.offloader.lends = lends
        for _ in range(3):
            model(x).sum().backward()
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        before, peaks = torch.accelerator.memory_allocated(), []
        torch.accelerator.reset_peak_memory_stats()
        loss = model(x).sum()
        peaks.append((torch.accelerator.max_memory_allocated() - before) / x.nbytes)
        torch.accelerator.reset_peak_memory_stats()
        loss.backward()
        peaks.append((torch.accelerator.max_memory_allocated() - before) / x.nbytes)
        found.append(peaks)
        del model, loss
    return found


@pytest.mark.parametrize(("window", "resident"), [(2, 8), (8, 8), (16, 8), (8, 1), (4, 16)])
def test_lent_memory_raises_no_peak_on_a_device(window: int, resident: int) -> None:
    (lent, own) = run_ranks(1, _peaks, window, resident)[0]
    assert all(peak <= without + 0.6 for peak, without in zip(lent, own, strict=True)), (lent, own)


def _budget(rank: int, n: int) -> None:
    device = device_here("fake")
    plain, model, x = pair("dropout", device)
    with LiveBytes() as live:
        step(plain, x)
    report = distlib.checkpoint_activations(model, budget=live.peak // 2, example_inputs=x)
    assert same(step(plain, x), step(model, x))
    assert set(report.choices.values()) != {"keep"}
    assert "ms" in str(report)


def test_a_budget_is_measured_on_the_device() -> None:
    run_ranks(1, _budget, timeout=100)


def _planted(rank: int, n: int, which: str) -> str:
    """The detector sees what a missing event would do."""
    device = device_here("fake")
    _, model, x = pair("dropout", device)
    if which == "written":
        PinnedStore.write = _without(PinnedStore.write)  # type: ignore[method-assign]
    elif which == "lent again":
        PinnedStore.read = _without(PinnedStore.read)  # type: ignore[method-assign]
    else:
        distlib.activations.stores._Read.wait = lambda self: None  # type: ignore[method-assign]
    distlib.checkpoint_activations(model, "offload", resident=0, window=1)
    try:
        for seed in range(STEPS):
            step(model, x, seed)
    except RuntimeError as error:
        return str(error)
    return ""


def _without(copy: Any) -> Any:
    """A copy that does not wait for what computes its source, or with the memory that it goes to."""

    def unordered(self: PinnedStore, *args: Any) -> Any:
        follow, distlib.streams.follow = distlib.streams.follow, lambda *_: None
        try:
            return copy(self, *args)
        finally:
            distlib.streams.follow = follow

    return unordered


@pytest.mark.parametrize("which", ["written", "lent again", "read"])
def test_a_missing_event_is_found(which: str) -> None:
    assert "race: " in run_ranks(1, _planted, which)[0]

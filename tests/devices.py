"""The device of tests that are about devices: the fake one, its detector of races, and the kernels of csrc/cuda."""

from __future__ import annotations

from collections.abc import Sequence

import fake_device
import pytest
import torch
from cuda_on_cpu import build

from distlib import native
from distlib.cuda import library

needs_fake_device = pytest.mark.usefixtures("built_fake_device")  # of conftest.py: compiled when the first test runs
needs_device_collectives = [
    needs_fake_device,
    pytest.mark.usefixtures("built_kernels"),
    pytest.mark.skipif(native.core() is None, reason=f"no C++ core: {native.why_not()}"),
]


def device_here(place: str, kernels: bool = True) -> torch.device:
    """In a rank, before its first backward: "cpu", or "fake", where unordered accesses raise, those of kernels too."""
    if place == "cpu":
        return torch.device("cpu")
    device = fake_device.load()
    fake_device.races("raise")
    if kernels:
        library.use(build.library())
        library.observe(_touch)
    return device


def _touch(name: str, reads: Sequence[library.Extent], writes: Sequence[library.Extent]) -> None:
    for extents, write in ((reads, False), (writes, True)):
        for address, size in extents:
            fake_device.touch_memory(address, size, write, name)

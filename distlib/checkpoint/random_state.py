"""The states of this rank's random number generators: Python's, numpy's, torch's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from distlib import streams


def capture() -> dict[str, Any]:
    """All generators' states, as numbers and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_keys = torch.from_numpy(np.asarray(keys, dtype=np.int64).copy())
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(name), numpy_keys, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    device = streams.accelerator()
    if device is not None and _is_in_use(device):
        found[device.type] = torch.get_device_module(device).get_rng_state()
    return found


def _is_in_use(device: torch.device) -> bool:
    """Asking a GPU that nobody uses for its state would take memory there."""
    return device.type != "cuda" or torch.cuda.is_initialized()


def restore(state: dict[str, Any]) -> None:
    """Sets all generators to what `capture` found. The state of a GPU is set where this rank has one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    device = streams.accelerator()
    if device is not None and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])

"""Which card a rank of a benchmark uses, and what its processes find around them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who starts ranks need not import torch
    import torch

ROOT = Path(__file__).resolve().parent.parent


def device_of(name: str) -> torch.device:
    """This rank's device: a card, which ranks share where there are fewer; or the fake one, its kernels on the CPU."""
    if name == "fake":
        sys.path.insert(0, str(ROOT / "tests"))
        from devices import device_here

        return device_here("fake")
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU here: use --device fake, or a machine with one")
    device = torch.device(name, int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def cards() -> int:
    """How many there are."""
    import torch

    return torch.cuda.device_count()


def one_card() -> dict[str, str]:
    """Variables with which all ranks see the first card only."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def use_checkout() -> None:
    """Processes started from now on import distlib from this checkout: it need not be installed."""
    found = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, found))

"""A run on disk, as one file: what it continues from, on this or any other number of ranks."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from lm.settings import Settings

FORMAT = "distlib examples/train_lm 1"
SHAPE = (
    "context",
    "layers",
    "width",
    "heads",
    "tied",
)  # settings that weights and positions fit only if equal


def save(path: Path, settings: Settings, **state: Any) -> None:
    """Write tensors, numbers, lists and dicts. One rank calls it. Renamed into place: whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    shape = {name: getattr(settings, name) for name in SHAPE}
    torch.save({"format": FORMAT, "shape": shape, **state}, aside)
    os.replace(aside, path)


def load(path: Path, settings: Settings, device: torch.device) -> dict[str, Any]:
    """What `save` wrote. Every rank reads it. Raises OSError; ValueError for a file that does not fit."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"--resume {path}: not a checkpoint of this script, or damaged") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"--resume {path}: not a checkpoint of this script ({FORMAT})")
    for name in SHAPE:
        if state["shape"][name] != getattr(settings, name):
            raise ValueError(
                f"--resume {path} was trained with --{name} {state['shape'][name]}, and this run has "
                f"{getattr(settings, name)}: give it the same"
            )
    if state["step"] >= settings.steps:
        raise ValueError(
            f"--resume {path} has {state['step']} steps behind it: ask for more than --steps {settings.steps}"
        )
    return state

"""Optimizers of torch keep their state in memory: where a model asks for files, their first step is refused."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


def require_offload(owner: object, pieces: Iterable[torch.Tensor]) -> None:
    """While `owner` lives, a step on any of `pieces` by an optimizer that cannot offload raises RuntimeError."""
    watched = {id(piece) for piece in pieces}  # they live as long as their owner

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if hasattr(optimizer, "offload"):
            return
        if any(id(p) in watched for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"the model was wrapped with offload=, but {type(optimizer).__name__} of {type(optimizer).__module__} "
                "keeps its state in memory: use an optimizer of distlib.optim, or wrap without offload="
            )

    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(owner, handle.remove).atexit = False

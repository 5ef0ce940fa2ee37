"""What is to happen before any optimizer steps a model's pieces: some are refused, some have to wait.

Optimizers of torch keep their state in memory: where a model asks for files, their first step is refused. Pieces in the
host's memory are not written while a copy to the device still reads them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


def require_offload(owner: object, pieces: Iterable[torch.Tensor]) -> None:
    """While `owner` lives, a step on any of `pieces` by an optimizer that cannot offload raises RuntimeError."""

    def refuse(optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(optimizer, "offload"):
            raise RuntimeError(
                f"the model was wrapped with offload=, but {type(optimizer).__name__} of {type(optimizer).__module__} "
                "keeps its state in memory: use an optimizer of distlib.optim, or wrap without offload="
            )

    before_steps(owner, pieces, refuse)


def before_steps(owner: object, pieces: Iterable[torch.Tensor], call: Callable[[torch.optim.Optimizer], None]) -> None:
    """While `owner` lives, `call` is called before each step of an optimizer that has any of `pieces`. It must not
    keep `owner` alive."""
    watched = {id(piece) for piece in pieces}  # they live as long as their owner

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(p) in watched for group in optimizer.param_groups for p in group["params"]):
            call(optimizer)

    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(owner, handle.remove).atexit = False

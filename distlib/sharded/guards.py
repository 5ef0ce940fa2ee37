"""What is to happen before any optimizer steps a model's pieces: some are refused, some have to wait. And what would
train something else than one process does, without a word, is refused.

Optimizers of torch keep their state in memory: where a model asks for files, their first step is refused. Pieces in the
host's memory are not written while a copy to the device still reads them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from distlib.shards import shard_of


def require_offload(owner: object, pieces: Iterable[torch.Tensor]) -> None:
    """While `owner` lives, a step on any of `pieces` by an optimizer that cannot offload raises RuntimeError."""

    def refuse(optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(optimizer, "offload"):
            raise RuntimeError(
                f"the model was wrapped with offload=, but {type(optimizer).__name__} of {type(optimizer).__module__} "
                "keeps its state in memory: use an optimizer of distlib.optim, or wrap without offload="
            )

    before_steps(owner, pieces, refuse)


def refuse_former(owner: object, former: Iterable[torch.Tensor]) -> None:
    """While `owner` lives, a step of an optimizer that has any of `former` raises RuntimeError: parameters whose place
    pieces took. They get no gradients any more. Keeps none of them alive."""
    replaced = WeakTensorKeyDictionary(dict.fromkeys(former, True))

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if len(replaced) and any(p in replaced for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"this {type(optimizer).__name__} has the parameters that the module had before ShardedDataParallel "
                "divided them: its steps would train nothing. Wrap first, then make the optimizer of model.parameters()"
            )

    _hook(owner, before_step)


def before_steps(owner: object, pieces: Iterable[torch.Tensor], call: Callable[[torch.optim.Optimizer], None]) -> None:
    """While `owner` lives, `call` is called before each step of an optimizer that has any of `pieces`. It must not
    keep `owner` alive."""
    watched = {id(piece) for piece in pieces}  # they live as long as their owner

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(p) in watched for group in optimizer.param_groups for p in group["params"]):
            call(optimizer)

    _hook(owner, before_step)


def _hook(owner: object, before_step: Callable[..., None]) -> None:
    """Calls it before each step of any optimizer while `owner` lives."""
    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(owner, handle.remove).atexit = False


def refuse_clipping_by_parts() -> None:
    """From now on torch.nn.utils.clip_grad_norm_ on pieces raises RuntimeError, however its name was imported: it would
    scale them by the norm of one rank's gradients, another one on each rank. Other parameters are clipped as ever."""
    scale = getattr(clip_grad, "_clip_grads_with_norm_", None)
    if scale is None or hasattr(scale, "_distlib_refuses"):
        return

    @functools.wraps(scale)
    def refusing(parameters: torch.Tensor | Iterable[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for parameter in given:
            shard = shard_of(parameter)
            if shard is not None and shard.group is not None and shard.group.size > 1:
                raise RuntimeError(
                    f"torch.nn.utils.clip_grad_norm_ was given this rank's piece of {shard.name!r}: it takes the norm "
                    "of one rank's gradients. Call model.clip_grad_norm_(max_norm) on all ranks, or give an optimizer "
                    "of distlib.optim max_norm="
                )
        return scale(given, *args, **kwargs)

    refusing._distlib_refuses = True  # type: ignore[attr-defined]
    clip_grad._clip_grads_with_norm_ = refusing

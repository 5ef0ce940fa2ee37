"""What parameters an optimizer here can step, what they are called in errors, and their compute copies."""

from __future__ import annotations

from typing import Any

import torch

from distlib.optim.kernels import COPIES
from distlib.optim.memory import layout_of
from distlib.shards import shard_of

_GRADS = (torch.float32, torch.bfloat16, torch.float16)


def name_of(groups: list[dict[str, Any]], group: int, index: int) -> str:
    """A parameter of an optimizer, for errors: by name where it has one."""
    p = groups[group]["params"][index]
    shard = shard_of(p)
    if shard is not None:
        return f"parameter '{shard.name}'"
    names = groups[group].get("param_names")
    if names:
        return f"parameter '{names[index]}'"
    return f"parameter {index} of group {group}, shape {tuple(p.shape)},"


def check_parameter(p: torch.Tensor, who: str, halves: bool = False) -> None:
    """Raises ValueError for one that cannot be stepped. On the meta device it may change yet. halves: bf16 can."""
    if p.layout is not torch.strided:
        raise ValueError(f"{who} has layout {p.layout}: only strided tensors can be stepped")
    if p.dtype not in (torch.float32, torch.float64) and not (halves and p.dtype is torch.bfloat16):
        also = "; or AdamW(remainders=True)" if p.dtype is torch.bfloat16 else ""
        raise ValueError(
            f"{who} is {p.dtype}: parameters are optimized in torch.float32 (or float64); keep fp32 masters, and "
            f"compute in {p.dtype} under autocast or MixedPrecision{also}"
        )


def check_step(p: torch.Tensor, layout: Any, who: str, halves: bool = False) -> None:
    """Raises for another layout than when the parameter's state was made, or a gradient that cannot be used."""
    grad = p.grad
    assert grad is not None
    check_parameter(p, who, halves)
    if p.is_meta:
        raise ValueError(f"{who} is on {p.device}: give it memory (to_empty) before the first step")
    if grad.layout is not torch.strided:
        raise ValueError(f"{who} has a gradient of layout {grad.layout}: only dense ones can be stepped (sparse=False)")
    if grad.dtype not in _GRADS and not (p.dtype == grad.dtype == torch.float64):
        raise ValueError(f"{who} is {p.dtype} with a gradient of {grad.dtype}: fp32, bf16 and fp16 can be stepped")
    if layout_of(p) != layout:
        now, before = (f"{d} of shape {tuple(size)}, strides {stride}" for d, size, stride in (layout_of(p), layout))
        raise ValueError(f"{who} is {now}, but was {before} when its state was made: then make a new optimizer")
    copy = compute_copy(p)
    if copy is not None and copy.numel() != p.numel():
        raise ValueError(f"{who} has {p.numel():,} elements, its compute copy {copy.numel():,}")


def compute_copy(p: torch.Tensor) -> torch.Tensor | None:
    """The elements that the model computes with, where they are not the parameter's own."""
    shard = shard_of(p)
    return None if shard is None else shard.compute


def copy_in_pass(p: torch.Tensor) -> torch.Tensor | None:
    """The compute copy, where the step's own pass can write it."""
    copy = compute_copy(p)
    if copy is None or p.dtype is not torch.float32 or copy.dtype not in COPIES:
        return None
    return copy if p.is_contiguous() and copy.is_contiguous() else None


def written(params: list[torch.Tensor]) -> None:
    """Versions count up, as after any in-place change; compute copies are made, and marked as such."""
    if not params:
        return
    torch.autograd.graph.increment_version(params)
    for p in params:
        shard = shard_of(p)
        if shard is not None and shard.compute is not None:
            if copy_in_pass(p) is None:
                shard.compute.copy_(p.reshape(shard.compute.shape))
            shard.wrote(p)

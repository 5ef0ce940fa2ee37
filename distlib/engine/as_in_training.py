"""Blocks are measured as they will train: under autocast, or in the dtype that sharding computes in."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from distlib.plan import Plan, options


def autocast(plan: Plan, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of forward, loss and backward."""
    dtype = options.autocast(plan)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def compute_dtype(plan: Plan) -> torch.dtype | None:
    """Of parameters and inputs in forward and backward, where that is not their own."""
    return options.DTYPES[plan.precision.dtype] if plan.stage > 0 and plan.precision.dtype != "fp32" else None


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors in `dtype`, as sharding's wrapper casts inputs."""
    if dtype is None:
        return tree
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


@contextlib.contextmanager
def where_it_computes(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Modules on the CPU are on `device` inside, as far as its memory allows: sharding takes them from the CPU later.
    Where they are too large whole, they stay, with a warning."""
    there = [m for m in modules if device.type != "cpu" and _on_cpu(m)]
    moved: list[nn.Module] = []
    try:
        _require_room(there, device)
        for module in there:
            moved.append(module)
            module.to(device)
    except torch.OutOfMemoryError:
        _back(moved)
        moved = []
        warnings.warn(
            f"the model does not fit whole on {device}, so blocks are measured on the CPU: choices follow the CPU's "
            "times, and peaks its operations",
            stacklevel=3,
        )
    try:
        yield
    finally:
        _back(moved)


def _on_cpu(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    return bool(tensors) and all(t.device.type == "cpu" for t in tensors)


def _require_room(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Before something else fails for want of memory: parameters, their gradients, and as much again to work in."""
    if (
        device.type == "cuda"
        and 3 * sum(p.nbytes for m in modules for p in m.parameters()) > (torch.cuda.mem_get_info(device)[0])
    ):
        raise torch.OutOfMemoryError("parameters, gradients and activations have no room")


def _back(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.to("cpu")


@contextlib.contextmanager
def in_dtype(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """The module's parameters are in another dtype inside, as copies."""
    floats = [] if dtype is None else [p for p in module.parameters() if p.is_floating_point() and not p.is_meta]
    before = [p.data for p in floats]
    try:
        for p in floats:
            p.data = p.data.to(dtype)
        yield
    finally:
        for p, data in zip(floats, before, strict=True):
            p.data = data

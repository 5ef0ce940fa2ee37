"""What a recorded program belongs to: equal signatures, equal programs. Cheap: looked up for every micro-batch."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distlib.pipeline.program import Context

_walks: weakref.WeakKeyDictionary[nn.Module, tuple[list[nn.Module], list[Tensor]]] = weakref.WeakKeyDictionary()


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module) -> Hashable:
    """What a recorded program depends on: equal signatures, equal programs.

    Structure of the inputs; shape, strides, dtype and requires_grad of tensors, and which are one; type and value of
    all else; `training` of every module and requires_grad of every parameter; grad mode and autocast. Not in it: other
    attributes of modules, such as a dropout's p, which are taken to stay, and the tree of modules itself.

    Raises ValueError for an input that is neither a tensor nor hashable.
    """
    walk = _walks.get(module)
    if walk is None:
        # Without the module itself: a value that holds its key would never go.
        walk = _walks[module] = (list(module.modules())[1:], list(module.parameters()))
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    first: dict[int, int] = {}  # by id: a tensor that is given twice is one value of the program
    inputs = tuple(
        (leaf.shape, _strides(leaf), leaf.dtype, leaf.requires_grad, first.setdefault(id(leaf), k))
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf, _inside(leaf))
        for k, leaf in enumerate(leaves)
    )
    modes = bytes([module.training, *[part.training for part in walk[0]]])
    flags = modes, bytes([p.requires_grad for p in walk[1]])
    device = device_of(leaves).type
    found = (spec, inputs, *flags, Context.now(device), torch.get_default_dtype())
    try:
        hash(found)
    except TypeError:
        bad = next(leaf for leaf in leaves if not isinstance(leaf, Tensor) and not isinstance(leaf, Hashable))
        raise ValueError(
            f"pipeline: an input of type {type(bad).__name__} is neither a tensor nor hashable, so it cannot be told "
            "whether the next one is the same. Pass tensors, numbers, strings or containers known to "
            "torch.utils._pytree"
        ) from None
    return found


def _inside(leaf: Any) -> tuple[Any, ...]:
    """The numbers and words in the attributes of an object that is hashed by identity: they may change."""
    if type(leaf).__hash__ is not object.__hash__ or isinstance(leaf, type) or not hasattr(leaf, "__dict__"):
        return ()
    return tuple((k, type(v), v) for k, v in vars(leaf).items() if isinstance(v, int | float | complex | str | None))


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout is torch.strided else None


def device_of(leaves: Sequence[Any]) -> torch.device:
    """Where the model believes to be: the accelerator that holds an input, else the CPU."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.device.type not in ("cpu", "meta"):
            return leaf.device
    return torch.device("cpu")

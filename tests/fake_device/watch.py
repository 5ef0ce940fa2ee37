"""Operators of the CPU on pinned memory, checked against the copies that are under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fake_device.controls import check_host


class WatchPinned(TorchDispatchMode):
    """With it, each operator of the CPU that reads or writes a pinned tensor calls `check_host` on it first.

    What goes around operators (numpy, a C function that was given the pointer) is not seen: call `check_host` there.
    """

    def __torch_dispatch__(
        self, op: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        views = any(result.alias_info is not None and not result.alias_info.is_write for result in op._schema.returns)
        if not views and all(tensor.device.type == "cpu" for tensor in tensors):  # else it is a copy, on a stream
            for position, argument in enumerate(op._schema.arguments):
                given = args[position] if position < len(args) else kwargs.get(argument.name)
                write = argument.alias_info is not None and argument.alias_info.is_write
                for leaf in tree_leaves(given):
                    if isinstance(leaf, torch.Tensor) and leaf.is_pinned():
                        check_host(leaf, write)
        return op(*args, **kwargs)

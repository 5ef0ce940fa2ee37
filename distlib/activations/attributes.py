"""Attributes of a block's modules, and objects among its arguments: the recomputation finds what the forward found.

    self.count += 1                  counts once
    self.state = tanh(... state)     is computed from the state before
    self.loss = h.square().mean()    is the forward's loss afterwards

What is put back are numbers, texts, None, tensors, and tuples. Other objects (lists, caches) stay as they are.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_any, tree_leaves, tree_map

PLAIN = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device})
OF_TORCH = frozenset(nn.Module().__dict__)  # a module's own: its hooks, whether it trains
OF_DEEPSPEED = ("ds_", "applied_pre_backward_ref_cnt")  # it counts there how often modules have run, recomputed or not
Other: Any = object()  # what is not put back
Missing: Any = object()


class Attributes:
    """Those that a forward of a block finds: make it before. `as_before()` is for around the recomputation.

    parts: the block's modules by name, itself as "". name: of the block, for errors.
    """

    def __init__(self, parts: dict[str, nn.Module], name: str) -> None:
        self._block = name
        self._modes = [(name, part, part.training) for name, part in parts.items()]
        self._found = [(part.__dict__, _found_in(part.__dict__)) for part in parts.values()]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Behind it, attributes are what they were at its begin: those of the recomputation hold a graph, and with it
        memory.

        Raises:
            RuntimeError: train() or eval() was called since the forward.
        """
        self._require_same_modes()
        now = [(attributes, dict(attributes)) for attributes, _ in self._found]
        for attributes, found in self._found:
            if any(attributes.get(key, Missing) is not held for key, held in found.items()):
                _hang(attributes, found)
            elif len(attributes) != len(found) + len(OF_TORCH):
                _take_off(attributes, found)
        try:
            yield
        finally:
            for attributes, before in now:
                if len(attributes) != len(before) or not all(map(is_, attributes.values(), before.values())):
                    _hang(attributes, before)

    def _require_same_modes(self) -> None:
        """The recomputation must be of what ran in forward."""
        for name, part, training in self._modes:
            if part.training != training:
                was, now = ("train()", "eval()") if training else ("eval()", "train()")
                inner = f" of its part {name!r}" if name else ""
                raise RuntimeError(
                    f"block {self._block!r} ran its forward under {was} and would be recomputed under {now}{inner}: "
                    f"call .backward() before .{now}"
                )


class _Weak:
    """A tensor with a history, which is not kept alive for this: to write one in each forward is common, to read the
    one before is not. Whoever does so, and lets it go, finds no attribute in the recomputation."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.get = weakref.ref(tensor)


def _found_in(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value if type(value) in PLAIN else _held(value) for key, value in attributes.items() if key not in OF_TORCH
    }


def _held(value: Any) -> Any:
    if not isinstance(value, torch.Tensor | tuple):
        return Other
    if not tree_any(_has_history, value):
        return value
    return tree_map(lambda leaf: _Weak(leaf) if _has_history(leaf) else leaf, value)


def _has_history(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


def _got(held: Any) -> Any:
    """What `_held` was given; Missing, where some of it is gone."""
    weak = [leaf for leaf in tree_leaves(held) if isinstance(leaf, _Weak)]
    if any(leaf.get() is None for leaf in weak):
        return Missing
    return tree_map(lambda leaf: leaf.get() if isinstance(leaf, _Weak) else leaf, held) if weak else held


def _is_put_back(key: str, value: Any) -> bool:
    if key in OF_TORCH or key.startswith(OF_DEEPSPEED):
        return False
    return type(value) in PLAIN or isinstance(value, torch.Tensor | tuple | _Weak)


def _hang(attributes: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Of what is put back, this hangs there, and nothing else."""
    _take_off(attributes, wanted)
    for key, held in wanted.items():
        now = attributes.get(key, Missing)
        if held is now or held is Other or not (_is_put_back(key, held) or _is_put_back(key, now)):
            continue
        value = _got(held)
        if value is not Missing:
            attributes[key] = value
        else:
            attributes.pop(key, None)


def _take_off(attributes: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, now in list(attributes.items()):
        if key not in wanted and _is_put_back(key, now):
            del attributes[key]


def as_now(leaf: Any) -> Any:
    """An argument for the recomputation, as it is now: of an object that later blocks or the caller may change, a copy,
    with copies of the lists and dicts in it. leaf: of a pytree, so no list or dict itself, but for their subclasses.
    """
    if not _may_change(leaf):
        return leaf
    copied = copy.copy(leaf)
    for key, value in list(getattr(copied, "__dict__", {}).items()):
        if type(value) in (list, dict, OrderedDict):
            copied.__dict__[key] = tree_map(lambda inner: inner, value)
    return copied


def _may_change(leaf: Any) -> bool:
    """Whether it is an object of a class in plain Python, as a dataclass is, or of a subclass of list or dict."""
    if type(leaf) in PLAIN or isinstance(leaf, torch.Tensor | nn.Module):
        return False
    if isinstance(leaf, list | dict):
        return True
    kind = type(leaf)
    return hasattr(leaf, "__dict__") and kind.__new__ is object.__new__ and not kind.__module__.startswith("torch.")

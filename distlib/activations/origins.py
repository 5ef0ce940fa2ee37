"""How a tensor came to be, as a number: the same in a forward of a block and in its recomputation, where both compute
alike. So it tells whether the n-th call of an operation in the one is the n-th in the other.

    w  parameter "up.weight"       x  argument 4711       mm(x, w)  (mm, origin of x, origin of w)

It is noted by memory, which views share: what an operation makes comes of its arguments, and so does what it writes to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from distlib.activations.live import has_storage, storage_key

Operation = Any  # torch._ops.OpOverload
PLAIN = (int, float, bool, str, complex, torch.dtype, torch.device, type(None))


class Origins:
    """Of one run of a block. Memory that neither the run made nor the block holds nor its arguments (a constant) counts
    by shape alone, as do casts: autocast remembers those of parameters from forward to forward.

    arguments: memory of the tensors that the block was given, which is the same in both runs.
    """

    def __init__(self, block: nn.Module, arguments: Collection[int]) -> None:
        self._block = block
        self._arguments = arguments
        self._of: dict[int, int] = {}
        self._slots: dict[int, tuple[str, Any, str]] | None = None
        self._given: set[int] = set()  # memory of the arguments of the call that runs

    def of_call(self, operation: Operation, args: Any, kwargs: Any) -> int:
        """Of the result of a call that is about to be made."""
        self._given = set()
        parts = [self._tensor(v) if isinstance(v, torch.Tensor) else self._other(v) for v in args]
        return hash((operation, *parts, *map(self._other, kwargs.values())))

    def made(self, origin: int, result: Any) -> None:
        """The call has been made: what is in none of its arguments' memory is new."""
        for place, tensor in enumerate(tensors_in(result)):
            if has_storage(tensor) and (key := storage_key(tensor)) not in self._given:
                self._of[key] = hash((origin, place))

    def unknown(self, result: Any) -> None:
        """Of this memory nothing is known any more."""
        for tensor in tensors_in(result):
            if has_storage(tensor):
                self._of.pop(storage_key(tensor), None)

    def wrote(self, origin: int, tensor: torch.Tensor) -> None:
        """The call has changed what lies there."""
        if has_storage(tensor):
            self._of[storage_key(tensor)] = origin

    def _tensor(self, tensor: torch.Tensor) -> int:
        if tensor.is_nested or not has_storage(tensor):
            return hash((tensor.layout, tensor.dtype))
        key = storage_key(tensor)
        self._given.add(key)
        base = tensor._base
        if base is None:
            base = tensor
        if base.is_leaf and (base.requires_grad or type(base) is nn.Parameter):
            origin = self._slot(key, comes_and_goes=True)
        else:
            known = self._of.get(key)
            origin = self._slot(key) if known is None else known
        return hash((origin, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()))

    def _other(self, value: Any) -> int:
        if isinstance(value, PLAIN):
            return hash(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, list | tuple):
            return hash(tuple(map(self._other, value)))
        return hash(type(value))  # a generator, a process group

    def _slot(self, key: int, comes_and_goes: bool = False) -> int:
        """By the name under which it hangs in the block. comes_and_goes: its memory may have been another a moment
        ago, as that of parameters that are gathered where they are needed."""
        if key in self._arguments:
            return key
        if self._slots is None or (comes_and_goes and not self._hangs(key)):
            self._slots = {
                storage_key(tensor): (f"{path}.{name}", store, name)
                for path, part in self._block.named_modules()
                for store in (part._parameters, part._buffers)
                for name, tensor in store.items()
                if has_storage(tensor)
            }
        return hash(self._slots[key][0]) if key in self._slots else 0

    def _hangs(self, key: int) -> bool:
        """Whether what hung there when they were looked up still does."""
        if self._slots is None or key not in self._slots:
            return False
        _, store, name = self._slots[key]
        now = store[name] if name in store else None  # a ScriptModule's has no get()
        return has_storage(now) and storage_key(now) == key


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Of arguments or results of an operation."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)


def says_what_it_writes(operation: Operation) -> bool:
    """c10d's do not: collectives write to some of their arguments."""
    return getattr(operation, "namespace", "") != "c10d"


def written(operation: Operation, args: Any, kwargs: Any) -> Iterable[torch.Tensor]:
    """The tensors that an operation writes to, or may write to."""
    if not says_what_it_writes(operation):
        return tensors_in((args, kwargs))
    return tensors_in(
        [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(operation._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    )

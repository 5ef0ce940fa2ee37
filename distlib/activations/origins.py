"""How a tensor came to be, as a number: the same in a forward of a block and in its recomputation, where both compute
alike. So it tells whether the n-th call of an operation in the one is the n-th in the other.

    w  parameter "up.weight"       x  argument 4711       mm(x, w)  (mm, origin of x, origin of w)

It is noted by memory, which views share: what an operation makes comes of its arguments, and so does what it writes to.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from distlib.activations.live import has_storage, storage_key

Operation = Any  # torch._ops.OpOverload
NUMBERS = (int, float, complex)
PLAIN = (str, torch.dtype, torch.device, type(None))
READ = 256  # bytes: constants in a CPU's memory count up to it by their values, as those that a block makes each time
PRUNED = 256  # entries from which on memory that is gone is forgotten


class Remembered:
    """Origins by memory, for as long as that lives: what comes to lie there later has another."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[StorageWeakRef, int]] = {}
        self._prune_at = PRUNED

    def get(self, tensor: torch.Tensor) -> int | None:
        weak, origin = self._of.get(storage_key(tensor), (None, None))
        return None if weak is None or weak.expired() else origin

    def put(self, tensor: torch.Tensor, origin: int) -> int:
        if len(self._of) >= self._prune_at:
            self._of = {key: entry for key, entry in self._of.items() if not entry[0].expired()}
            self._prune_at = max(PRUNED, 2 * len(self._of))
        self._of[storage_key(tensor)] = StorageWeakRef(tensor.untyped_storage()), origin
        return origin


class Origins:
    """Of one run of a block. Memory that neither the run made nor the block holds nor its arguments is a constant.

    arguments: memory of the tensors that the block was given, which is the same in both runs. constants: of both runs.
    casts: those of parameters, of all runs of the block: autocast remembers them from forward to forward.
    """

    def __init__(self, block: nn.Module, arguments: Collection[int], constants: Remembered, casts: Remembered) -> None:
        self._block = block
        self._arguments = arguments
        self._constants = constants
        self._casts = casts
        self._of: dict[int, int] = {}
        self._slots: dict[int, tuple[str, Any, str]] | None = None
        self._given: set[int] = set()  # memory of the arguments of the call that runs

    def of_call(self, operation: Operation, args: Any, kwargs: Any) -> int:
        """Of the result of a call that is about to be made."""
        self._given = set()
        parts = [self._tensor(v) if isinstance(v, torch.Tensor) else self._other(v) for v in args]
        return hash((operation, *parts, *kwargs, *map(self._other, kwargs.values())))

    def made(self, origin: int, result: Any) -> None:
        """The call has been made: what is in none of its arguments' memory is new."""
        for place, tensor in enumerate(tensors_in(result)):
            for part in (tensor,) if has_storage(tensor) else _parts(tensor):
                if (key := storage_key(part)) not in self._given:
                    self._of[key] = hash((origin, place))

    def cast(self, origin: int, source: Any, result: Any) -> None:
        """As `made`; of a parameter, other runs may find the result, too."""
        self.made(origin, result)
        if isinstance(source, torch.Tensor) and source.is_leaf and source.requires_grad and has_storage(result):
            self._casts.put(result, self._of.get(storage_key(result), origin))

    def wrote(self, origin: int, tensor: torch.Tensor) -> None:
        """The call has changed what lies there."""
        for part in (tensor,) if has_storage(tensor) else _parts(tensor):
            self._of[storage_key(part)] = origin

    def _tensor(self, tensor: torch.Tensor) -> int:
        if tensor.is_nested or not has_storage(tensor):
            return self._by_parts(tensor)
        key = storage_key(tensor)
        self._given.add(key)
        base = tensor._base
        if base is None:
            base = tensor
        if base.is_leaf and (base.requires_grad or type(base) is nn.Parameter):
            origin = self._slot(key, tensor, comes_and_goes=True)
        else:
            known = self._of.get(key)
            origin = self._slot(key, tensor) if known is None else known
        return hash((origin, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()))

    def _by_parts(self, tensor: torch.Tensor) -> int:
        parts = _parts(tensor)
        if not parts and not tensor.is_meta:
            return next(_numbers)  # its memory is not told: it is like no other
        shape = None if tensor.is_nested else tensor.size()
        return hash((tensor.layout, tensor.dtype, shape, *map(self._tensor, parts)))

    def _other(self, value: Any) -> int:
        if isinstance(value, NUMBERS):
            return hash((type(value), repr(value)))  # hash(-1) == hash(-2), and 1 == 1.0 == True
        if isinstance(value, PLAIN):
            return hash(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, list | tuple):
            return hash(tuple(map(self._other, value)))
        return hash(type(value))  # a generator, a process group

    def _slot(self, key: int, tensor: torch.Tensor, comes_and_goes: bool = False) -> int:
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
        if key in self._slots:
            return hash(self._slots[key][0])
        cast = self._casts.get(tensor)
        return self._constant(tensor) if cast is None else cast

    def _constant(self, tensor: torch.Tensor) -> int:
        known = self._constants.get(tensor)
        if known is not None:
            return known
        storage = tensor.untyped_storage()
        if storage.device.type == "cpu" and storage.nbytes() <= READ:
            return hash(ctypes.string_at(storage.data_ptr(), storage.nbytes()))
        return self._constants.put(tensor, next(_numbers))

    def _hangs(self, key: int) -> bool:
        """Whether what hung there when they were looked up still does."""
        if self._slots is None or key not in self._slots:
            return False
        _, store, name = self._slots[key]
        now = store[name] if name in store else None  # a ScriptModule's has no get()
        return has_storage(now) and storage_key(now) == key


_numbers = itertools.count()  # of constants, each another


def _parts(tensor: torch.Tensor) -> Collection[torch.Tensor]:
    """What a tensor of another layout than strided consists of; nothing where that is not told."""
    if tensor.is_nested:
        return (tensor._values, tensor._offsets) if tensor.layout is torch.jagged else ()
    if tensor.is_meta:
        return ()
    if tensor.layout is torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return ()


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

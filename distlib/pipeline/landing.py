"""What a stage sends is made where it is sent from: an operator writes its result into a slot of shared memory.

    first run      every operator is watched:  x's memory came from the 2nd addition of [8, 512, 1024] tensors
    later runs     that addition is called as out=room.tensor(...); autograd above it sees a result like any other

A module of the model, wrapped in whatever, makes the result somewhere inside. Which operator it was is known only below
autograd, in torch's dispatcher. Seeing all of a module's operators costs some 6 us each, so it is for large messages
(channels.py says from where on); where no operator can write into given memory, no later run is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from distlib.comm.slots import Room

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_TRIES = 3  # a step that makes its result elsewhere each time is left alone


class Maker(NamedTuple):
    """An operator's call that makes a tensor: number `number` of `kind`, which is the operator and its arguments'
    shapes and dtypes. into: the same operator for a given result, of this dtype and shape."""

    kind: tuple[Any, Hashable]
    number: int
    into: Callable[..., Tensor]
    dtype: torch.dtype
    shape: torch.Size


class Landing:
    """How the results of one step of a player come to be made in rooms."""

    def __init__(self) -> None:
        self._makers: dict[int, Maker] = {}
        self._tries = _TRIES if hasattr(TorchDispatchMode, "ignore_compile_internals") else 0  # it came in torch 2.9
        self._known = False
        self._before: list[Room] = []  # of the last run

    def run(self, step: Callable[[], None], values: Sequence[Any], rooms: Mapping[int, Room]) -> None:
        """Runs a step that fills in `values`, those of `rooms` in their rooms if that can be."""
        if any(room.kept for room in self._before):  # it had to be copied: the stage itself keeps its results
            self._makers, self._known = {}, True
        self._before = list(rooms.values()) if self._makers else []
        if self._known and not self._makers:
            step()
        elif self._known:
            wanted = {(maker.kind, maker.number): (maker, rooms[v]) for v, maker in self._makers.items() if v in rooms}
            with _Into(wanted):
                step()
            self._known = all(room.used and room.holds(values[v]) for v, room in rooms.items() if v in self._makers)
        elif self._tries:
            self._tries -= 1
            with _Watch() as watch:
                step()
            found = {v: watch.maker_of(values[v]) for v in rooms}
            self._makers = {v: maker for v, maker in found.items() if maker is not None}
            self._known = True
        else:
            step()


class _Mode(TorchDispatchMode):
    """Sees operators, those of programs that torch.compile made excepted: they stay compiled."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[Hashable] = Counter()

    supports_higher_order_operators = True  # they are called as they are

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def _next(self, func: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, Hashable], int]:
        """Of the call of an operator: its kind, and how many there were before."""
        kind = (func, tuple(_trait(x) for x in pytree.tree_leaves((args, kwargs))))
        self._counts[kind] += 1
        return kind, self._counts[kind] - 1


class _Watch(_Mode):
    """Notes of each memory what made it."""

    def __init__(self) -> None:
        super().__init__()
        self._makers: dict[int, Maker | None] = {}  # by storage: of those that ended, others may have the number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_plain(func, args, kwargs):
            return result
        kind, number = self._next(func, args, kwargs)
        declared = func._schema.returns
        results = [result] if len(declared) == 1 else list(result or ())
        given = {_storage(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor, returned in zip(results, declared, strict=True):
            if not _is_dense(tensor) or returned.alias_info is not None or _storage(tensor) in given:
                continue  # memory that was there before, said (a view) or not (aten._unsafe_view)
            into = _into(func) if len(declared) == 1 and tensor.is_contiguous() else None
            maker = None if into is None else Maker(kind, number, into, tensor.dtype, tensor.shape)
            self._makers[_storage(tensor)] = maker
        return result

    def maker_of(self, tensor: Tensor) -> Maker | None:
        """What made all of a tensor; None if nothing that could make it elsewhere."""
        if not _is_dense(tensor):
            return None
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes > 0
        maker = self._makers.get(_storage(tensor)) if whole else None
        return maker if maker is not None and maker.dtype == tensor.dtype else None


class _Into(_Mode):
    """Calls makers with a tensor on their room."""

    def __init__(self, wanted: Mapping[tuple[tuple[Any, Hashable], int], tuple[Maker, Room]]) -> None:
        super().__init__()
        self._wanted = dict(wanted)
        self._operators = {kind[0] for kind, _ in wanted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._operators and _is_plain(func, args, kwargs):
            found = self._wanted.pop(self._next(func, args, kwargs), None)
            if found is not None:
                maker, room = found
                return maker.into(*args, **kwargs, out=room.tensor(maker.dtype, maker.shape))
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor has, while it lives."""
    return tensor.untyped_storage()._cdata


def _is_dense(x: Any) -> bool:
    """Whether it is a tensor with memory of its own. Subclasses and nested tensors know few operators."""
    return type(x) in _PLAIN and x.layout is torch.strided and not x.is_nested


def _is_plain(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is an operator, not one of higher order, and on such tensors only."""
    return isinstance(func, torch._ops.OpOverload) and all(
        _is_dense(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
    )


def _trait(x: Any) -> Any:
    """What of an argument decides the shape and dtype of the result."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    return x if isinstance(x, (int, str, torch.dtype)) else type(x)


def _into(func: Any) -> Callable[..., Tensor] | None:
    """The same operator for a given result, if it has one that makes it there (and does not copy it there)."""
    packet, arguments = func.overloadpacket, func._schema.arguments
    for name in packet.overloads():
        other = getattr(packet, name)
        declared = other._schema.arguments
        outs = [argument for argument in declared if argument.is_out]
        rest = [argument for argument in declared if not argument.is_out]
        alike = [(a.name, str(a.type)) for a in rest] == [(a.name, str(a.type)) for a in arguments]
        if alike and [out.name for out in outs] == ["out"] and torch.Tag.generated not in other.tags:
            return other
    return None

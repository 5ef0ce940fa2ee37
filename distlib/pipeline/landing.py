"""What a stage sends is made where it is sent from: an operator writes its result into a slot of shared memory.

    first run      every operator is watched:  x's memory came from the 1st addition of [8, 512, 1024] tensors
                                               after the block's second dropout had ended
    later runs     from there on operators are seen, and that addition is called as out=room.tensor(...);
                   autograd above it sees a result like any other

A module of the model, wrapped in whatever, makes the result somewhere inside. Which operator it was is known only below
autograd, in torch's dispatcher, where seeing one costs some 6 us. Later runs hence see few: those since the last border
(borders.py) before it. That costs 25 us and what is seen in vain, so it is for large messages (channels.py says from
where on). Where no operator can write into given memory, or too many would be seen, later runs are let be.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from distlib.comm.slots import Room
from distlib.pipeline.borders import Border, all_borders, at_border

_Kind = tuple[Any, Hashable]  # an operator, and what of its arguments decides the shape and dtype of the result

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
LOOK = 256 << 10  # bytes whose copy takes as long as to see an operator
_TRIES = 3  # a step that makes its result elsewhere each time is left alone


class _Made(NamedTuple):
    """How a tensor of this dtype and shape came to be. at: how many calls of operators there were before. into: the
    same operator for a given result."""

    at: int
    into: Callable[..., Tensor]
    dtype: torch.dtype
    shape: torch.Size


class _Maker(NamedTuple):
    """The operator's call that makes a tensor: number `number` of `kind` after the border from which on they are
    seen."""

    kind: _Kind
    number: int
    made: _Made


class Landing:
    """How the results of one step of a player come to be made in rooms.

    module: what the step calls, if that is a module; asked for when a run is watched.
    """

    def __init__(self, module: Callable[[], nn.Module | None]) -> None:
        self._module = module
        self._border: Border | None = None
        self._makers: dict[int, _Maker] = {}
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
            found = [(self._makers[v], room) for v, room in rooms.items() if v in self._makers]
            wanted = {(maker.kind, maker.number): (maker.made, room) for maker, room in found}
            with _entered(_Into(wanted), self._border):
                step()
            self._known = all(room.holds(values[v]) for v, room in rooms.items() if v in self._makers)
        elif self._tries:
            self._tries -= 1
            with _Watch() as watch, all_borders(self._module(), watch.passed):
                step()
            self._border, self._makers = watch.makers_of({v: values[v] for v in rooms})
            self._known = True
        else:
            step()


@contextlib.contextmanager
def _entered(mode: TorchDispatchMode, border: Border | None) -> Iterator[None]:
    """A mode from a border on; without one from now on."""
    if border is None:
        with mode:
            yield
        return
    outer, inside = _get_current_dispatch_mode_stack(), []

    def enter() -> None:
        if _get_current_dispatch_mode_stack() == outer:  # another one begun meanwhile would end before this one
            mode.__enter__()
            inside.append(mode)

    with at_border(border, enter):
        try:
            yield
        finally:
            for entered in inside:
                entered.__exit__(None, None, None)


class _Mode(TorchDispatchMode):
    """Sees operators, those of programs that torch.compile made excepted: they stay compiled."""

    supports_higher_order_operators = True  # they are called as they are

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Watch(_Mode):
    """Notes of each memory what made it."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: list[_Kind | None] = []  # of all calls of operators
        self._borders: list[tuple[int, Border]] = []  # and after how many of them
        self._made: dict[int, _Made | None] = {}  # by storage: of those that ended, others may have the number

    def passed(self, border: Border) -> None:
        if _get_current_dispatch_mode_stack()[-1] is self:  # what began meanwhile ends before this one
            self._borders.append((len(self._kinds), border))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, kind = func(*args, **kwargs), _kind(func, args, kwargs)
        self._kinds.append(kind)
        if kind is None:
            return result
        declared = func._schema.returns
        results = [result] if len(declared) == 1 else list(result or ())
        given = {_storage(x) for x in _leaves(args, kwargs) if isinstance(x, Tensor)}
        for tensor, returned in zip(results, declared, strict=True):
            if not _is_dense(tensor) or returned.alias_info is not None or _storage(tensor) in given:
                continue  # memory that was there before, said (a view) or not (aten._unsafe_view)
            into = _into(func) if len(declared) == 1 and tensor.is_contiguous() else None
            made = None if into is None else _Made(len(self._kinds) - 1, into, tensor.dtype, tensor.shape)
            self._made[_storage(tensor)] = made
        return result

    def makers_of(self, tensors: Mapping[int, Tensor]) -> tuple[Border | None, dict[int, _Maker]]:
        """What made tensors, as far as it could make them elsewhere, and the last border before all of that. Nothing
        where a copy takes less than the looks."""
        found = {v: made for v, tensor in tensors.items() if (made := self._made_of(tensor)) is not None}
        first = min((made.at for made in found.values()), default=0)
        before = [(at, border) for at, border in self._borders if at <= first]
        begin, border = before[-1] if before else (0, None)
        makers = {}
        for v, made in found.items():
            kind = self._kinds[made.at]
            assert kind is not None
            makers[v] = _Maker(kind, self._kinds[begin : made.at].count(kind), made)
        looks = len(self._kinds) - begin
        worth = sum(tensors[v].nbytes for v in makers) >= looks * LOOK
        return (border, makers) if worth else (None, {})

    def _made_of(self, tensor: Tensor) -> _Made | None:
        """How all of a tensor was made; None if not by what could make it elsewhere."""
        if not _is_dense(tensor):
            return None
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes > 0
        made = self._made.get(_storage(tensor)) if whole else None
        return made if made is not None and made.dtype == tensor.dtype else None


class _Into(_Mode):
    """Calls makers with a tensor on their room."""

    def __init__(self, wanted: Mapping[tuple[_Kind, int], tuple[_Made, Room]]) -> None:
        super().__init__()
        self._wanted = dict(wanted)
        self._operators = {kind[0] for kind, _ in wanted}
        self._counts: Counter[_Kind] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func, args, kwargs) if func in self._operators else None
        if kind is not None:
            found = self._wanted.pop((kind, self._counts[kind]), None)
            self._counts[kind] += 1
            if found is not None:
                made, room = found
                return made.into(*args, **kwargs, out=room.tensor(made.dtype, made.shape))
        return func(*args, **kwargs)


def _kind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Kind | None:
    """Of a call; None if it is of higher order, or on other tensors than dense ones."""
    if not isinstance(func, torch._ops.OpOverload):
        return None
    traits: list[Any] = []
    for x in _leaves(args, kwargs):
        if isinstance(x, Tensor):
            if not _is_dense(x):
                return None
            traits.append((x.shape, x.dtype))
        else:
            traits.append(x if isinstance(x, (int, str, torch.dtype)) else type(x))
    return func, tuple(traits)


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Arguments of an operator: those are no deeper than lists."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, (list, tuple)):
            yield from x
        else:
            yield x


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor has, while it lives."""
    return tensor.untyped_storage()._cdata


def _is_dense(x: Any) -> bool:
    """Whether it is a tensor with memory of its own. Subclasses and nested tensors know few operators."""
    return type(x) in _PLAIN and x.layout is torch.strided and not x.is_nested


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

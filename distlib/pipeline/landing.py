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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from distlib.comm.slots import Room
from distlib.pipeline.borders import Border, all_borders, at_border

_Kind = tuple[Any, Hashable]  # an operator, and all of its arguments but the values of tensors

LOOK = 256 << 10  # bytes whose copy takes as long as to see an operator
_TRIES = 3  # a step that makes its result elsewhere each time is left alone


class _Origin(NamedTuple):
    """How a tensor of this dtype and shape came to be. at: how many calls of operators there were before. out_variant:
    the same operator for a given result. memory: it keeps the storage's address from being used again."""

    at: int
    out_variant: Callable[..., Tensor] | None
    dtype: torch.dtype
    shape: torch.Size
    memory: StorageWeakRef


class _Maker(NamedTuple):
    """The call that makes a tensor: number `number` of `kind` after the border from which on operators are seen."""

    kind: _Kind
    number: int
    origin: _Origin


class _Plan(NamedTuple):
    """What later runs do: they see operators from a border on, or from the beginning; makers by value."""

    border: Border | None
    makers: dict[int, _Maker]


class Landing:
    """How the results of one step of a player come to be made in rooms.

    module: what the step calls, if that is a module; asked for when a run is watched.
    """

    def __init__(self, module: Callable[[], nn.Module | None]) -> None:
        self._module = module
        self._plan: _Plan | None = None
        self._tries = _TRIES if hasattr(TorchDispatchMode, "ignore_compile_internals") else 0  # it came in torch 2.9
        self._last_rooms: list[Room] = []

    def run(self, step: Callable[[], None], values: Sequence[Any], rooms: Mapping[int, Room]) -> None:
        """Runs a step that fills in `values`, those of `rooms` in their rooms if that can be."""
        if any(room.kept for room in self._last_rooms):  # it had to be copied: the stage itself keeps its results
            self._plan, self._tries = None, 0
        self._last_rooms = []
        if _get_current_dispatch_mode_stack():  # whatever the user watches is to see what it always sees
            step()
        elif self._plan is not None:
            self._land(self._plan, step, values, rooms)
        elif self._tries:
            self._watch(step, values, rooms)
        else:
            step()

    def _watch(self, step: Callable[[], None], values: Sequence[Any], rooms: Mapping[int, Room]) -> None:
        self._tries -= 1
        with _Watch() as watch, all_borders(self._module(), watch.passed):
            step()
        self._plan = watch.plan({v: values[v] for v in rooms})
        if self._plan is None:
            self._tries = 0

    def _land(self, plan: _Plan, step: Callable[[], None], values: Sequence[Any], rooms: Mapping[int, Room]) -> None:
        makers = {v: maker for v, maker in plan.makers.items() if v in rooms}
        redirect = _Redirect({(m.kind, m.number): (m.origin, rooms[v]) for v, m in makers.items()})
        with contextlib.ExitStack() as entered:

            def enter() -> None:
                # Modes end in reverse order: one that began meanwhile would end first, and take this for itself.
                if not _get_current_dispatch_mode_stack():
                    entered.enter_context(redirect)

            with at_border(plan.border, enter):
                step()
        self._last_rooms = list(rooms.values())
        if not all(rooms[v].holds(values[v]) for v in makers):
            self._plan = None


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
        self._origins: dict[int, _Origin] = {}  # by storage

    def passed(self, border: Border) -> None:
        if _get_current_dispatch_mode_stack() == [self]:  # not inside of an operator, nor of another mode
            self._borders.append((len(self._kinds), border))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        at, kind = len(self._kinds), _kind(func, args, kwargs)
        self._kinds.append(kind)
        result = func(*args, **kwargs)
        if kind is None:
            return result
        declared = func._schema.returns
        results = [result] if len(declared) == 1 else list(result or ())
        given = {_storage(x) for x in _leaves(args, kwargs) if isinstance(x, Tensor)}
        for tensor, returned in zip(results, declared, strict=True):
            if not _is_dense(tensor) or returned.alias_info is not None or _storage(tensor) in given:
                continue  # memory that was there before, said (a view) or not (aten._unsafe_view)
            variant = _out_variant(func) if len(declared) == 1 and tensor.is_contiguous() else None
            memory = StorageWeakRef(tensor.untyped_storage())
            self._origins[_storage(tensor)] = _Origin(at, variant, tensor.dtype, tensor.shape, memory)
        return result

    def plan(self, tensors: Mapping[int, Any]) -> _Plan | None:
        """How to make tensors elsewhere, as far as that can be, and takes less than to copy them; None if none."""
        found = {v: origin for v, tensor in tensors.items() if (origin := self._origin(tensor)) is not None}
        found = {v: origin for v, origin in found.items() if tensors[v].nbytes >= LOOK}
        first = min((origin.at for origin in found.values()), default=0)
        begin, border = 0, None
        for at, passed in self._borders:
            if at <= first:
                begin, border = at, passed
        if not found or sum(tensors[v].nbytes for v in found) < (len(self._kinds) - begin) * LOOK:
            return None
        makers = {}
        for v, origin in found.items():
            kind = self._kinds[origin.at]
            assert kind is not None
            makers[v] = _Maker(kind, self._kinds[begin : origin.at].count(kind), origin)
        return _Plan(border, makers)

    def _origin(self, tensor: Any) -> _Origin | None:
        """How all of a tensor was made; None if not by what could make it elsewhere."""
        origin = self._origins.get(_storage(tensor)) if _is_dense(tensor) else None
        if origin is None or origin.out_variant is None or origin.dtype != tensor.dtype:
            return None
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes > 0
        return origin if whole and origin.shape.numel() == tensor.numel() else None


class _Redirect(_Mode):
    """Calls makers with a tensor on their room."""

    def __init__(self, wanted: Mapping[tuple[_Kind, int], tuple[_Origin, Room]]) -> None:
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
                origin, room = found
                assert origin.out_variant is not None
                return origin.out_variant(*args, **kwargs, out=room.tensor(origin.dtype, origin.shape))
        return func(*args, **kwargs)


# ---------------------------------------------------------------- operators


def _kind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Kind | None:
    """Of a call. None if it is of higher order, on other tensors than dense ones, or if values decide the shape."""
    if not isinstance(func, torch._ops.OpOverload) or torch.Tag.dynamic_output_shape in func.tags:
        return None
    traits: list[Any] = []
    for x in _leaves(args, kwargs):
        if isinstance(x, Tensor):
            if not _is_dense(x):
                return None
            traits.append((x.shape, x.stride(), x.dtype, x.device))
        elif isinstance(x, (int, float, str, torch.dtype)):
            traits.append((type(x), x))
        else:
            traits.append(type(x))
    return func, tuple(traits)


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Arguments of an operator: those are no deeper than lists. Lists are told by their lengths."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, (list, tuple)):
            yield len(x)
            yield from x
        else:
            yield x


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor has, while it lives or a StorageWeakRef does."""
    return tensor.untyped_storage()._cdata


def _is_dense(x: Any) -> bool:
    """Whether it is a tensor with memory of its own. Subclasses and nested tensors know few operators."""
    return (type(x) is Tensor or type(x) is nn.Parameter) and x.layout is torch.strided and not x.is_nested


def _out_variant(func: Any) -> Callable[..., Tensor] | None:
    """The same operator for a given result, if it has one that makes it there (and does not copy it there), by the same
    kernel (what is composed of others, as inference mode shows it, may be composed in another way)."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return None
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

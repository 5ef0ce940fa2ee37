"""What a stage sends is made where it is sent from: an operator writes its result into a slot of shared memory.

    first run      remember the borders: where modules inside begin and end (borders.py)
    second run     since one of the last borders every operator is watched:
                       x's memory came from the 1st addition of [8, 512, 1024] tensors after the 2nd dropout's end
    third run      only where that operator has no out=; it is looked into:
                       the memory came from the 1st layer norm's kernel, which asked for [8, 512, 1024] first
    later runs     operators are seen since that border, and the addition is called as out=room.tensor(...), or the
                   kernel gets the room for memory; autograd above it sees a result like any other

A module of the model, wrapped in whatever, makes the result somewhere inside. Which operator it was is known only below
autograd, in torch's dispatcher, where seeing one costs some 6 us. Later runs hence see few: those since the last border
before it. That costs 25 us and what is seen in vain, so it is for large messages (slots.py says from where on). Where
nothing can write into given memory, or too many would be seen, later runs are let be.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from distlib.comm.slots import Room
from distlib.pipeline.borders import Border, all_borders, at_border
from distlib.pipeline.operators import (
    Kind,
    call,
    call_kernel,
    can_be_looked_into,
    has_default_strides,
    is_dense,
    is_known_to_autograd,
    kind_of,
    leaves,
    out_variant,
    storage_of,
)

LOOKS = 8  # so many operators are seen, beside the hook, in the time in which the smallest message is copied
INSIDE = 4  # to see one inside of another takes so many times as long, with the way there
_BACK = 8  # what made a result is looked for among what follows so many borders, the last ones
_TRIES = 3  # a step that makes its result elsewhere each time is left alone

_Path = tuple[int, ...]  # to a call: how many others there were before it, and so on inside of it


class _Call(NamedTuple):
    """Of an operator. inside: what its kernel called, if that was looked into."""

    kind: Kind | None
    inside: list[_Call]


class _Origin(NamedTuple):
    """How a tensor of this dtype and shape came to be. out_variant: the same operator for a given result. memory: it
    keeps the storage's address from being used again."""

    path: _Path
    out_variant: Callable[..., Tensor] | None
    dtype: torch.dtype
    shape: torch.Size
    memory: StorageWeakRef


class _Maker(NamedTuple):
    """The call that makes a tensor: `number` of its kind after the border, and from there on by the origin's path.
    kinds: of the calls on the way, itself included."""

    number: int
    kinds: tuple[Kind, ...]
    origin: _Origin


class _Plan(NamedTuple):
    """What later runs do: they see operators from a border on, or from the beginning; makers by value."""

    border: Border | None
    makers: dict[int, _Maker]


class Landing:
    """How the results of one step of a player come to be made in rooms.

    module: what the step calls, if that is a module; asked for when a run is watched. least: bytes of the smallest
    message that is worth it.
    """

    def __init__(self, module: Callable[[], nn.Module | None], least: int) -> None:
        self._module, self._look = module, least // LOOKS
        self._borders: list[Border] | None = None  # of the first run
        self._tries = _TRIES if hasattr(TorchDispatchMode, "ignore_compile_internals") else 0  # it came in torch 2.9
        self._opaque: set[Kind] = set()  # what the next watched run looks into
        self._plan: _Plan | None = None
        self._last_rooms: list[Room] = []

    def run(self, step: Callable[[], None], values: Sequence[Any], rooms: Mapping[int, Room]) -> None:
        """Runs a step that fills in `values`, those of `rooms` in their rooms if that can be."""
        if any(room.kept for room in self._last_rooms):  # it had to be copied: the stage itself keeps its results
            self._plan, self._tries = None, 0
        self._last_rooms = []
        # Whatever the user watches is to see what it always sees. In inference mode, torch computes some otherwise if
        # they are seen at all.
        if _get_current_dispatch_mode_stack() or torch.is_inference_mode_enabled():
            step()
        elif self._plan is not None:
            self._land(self._plan, step, values, rooms)
        elif not self._tries:
            step()
        elif self._borders is None and (module := self._module()) is not None:
            self._borders = []
            with all_borders(module, self._borders.append):
                step()
        else:
            self._watch(step, values, rooms)

    def _watch(self, step: Callable[[], None], values: Sequence[Any], rooms: Mapping[int, Room]) -> None:
        self._tries -= 1
        border = next(iter((self._borders or [])[-_BACK:]), None)
        watch = _Watch(border, self._opaque)
        with all_borders(self._module(), watch.passed), _from(border, watch):
            step()
        if border is not None and not watch.calls:  # there is a mode of the user's: next time from before that
            self._borders = []
            return
        sent = {v: values[v] for v in rooms}
        opaque = watch.opaque(sent, self._look) - self._opaque
        self._opaque |= opaque
        if not opaque:
            self._plan = watch.plan(sent, self._look)
            if self._plan is None:
                self._tries = 0

    def _land(self, plan: _Plan, step: Callable[[], None], values: Sequence[Any], rooms: Mapping[int, Room]) -> None:
        fit = {v: m for v, m in plan.makers.items() if v in rooms and rooms[v].fits(m.origin.dtype, m.origin.shape)}
        with _from(plan.border, _Redirect([(maker, rooms[v]) for v, maker in fit.items()])):
            step()
        self._last_rooms = list(rooms.values())
        if not all(rooms[v].holds(values[v]) for v in fit):
            self._plan = None


@contextlib.contextmanager
def _from(border: Border | None, mode: _Mode) -> Iterator[None]:
    """A mode from a border on, or from the beginning."""
    with contextlib.ExitStack() as entered:

        def enter() -> None:
            # Modes end in reverse order: one that began meanwhile would end first, and take this for itself.
            if not _get_current_dispatch_mode_stack():
                entered.enter_context(mode)

        with at_border(border, enter):
            yield


class _Mode(TorchDispatchMode):
    """Sees operators, those of programs that torch.compile made excepted: they stay compiled."""

    supports_higher_order_operators = True  # they are called as they are

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Watch(_Mode):
    """Notes of each memory what made it.

    since: where it begins. opaque: the kinds of operators to look into, where they have no variant for a given result;
    None for all that can be.
    """

    def __init__(self, since: Border | None, opaque: Container[Kind] | None) -> None:
        super().__init__()
        self._since, self._look_into = since, opaque
        self._path: _Path = ()
        self.calls: list[_Call] = []
        self._borders: list[tuple[int, Border]] = []  # and after how many calls
        self._origins: dict[int, _Origin] = {}  # by storage
        self._leaves_be = False  # it saw what is better not seen

    def passed(self, border: Border) -> None:
        if _get_current_dispatch_mode_stack() == [self]:  # not inside of an operator, nor of another mode
            self._borders.append((len(self.calls), border))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        path, kind = (*self._path, len(self.calls)), kind_of(func, args, kwargs)
        self.calls.append(_Call(kind, []))
        self._leaves_be |= not is_known_to_autograd(func)
        if kind is None:
            return call(func, args, kwargs)
        declared = func._schema.returns
        variant = out_variant(func) if len(declared) == 1 else None
        if variant is None and can_be_looked_into(func) and (self._look_into is None or kind in self._look_into):
            with self._inside(path):
                result = call_kernel(func, args, kwargs)
        else:
            result = call(func, args, kwargs)
        given = {storage_of(x) for x in leaves(args, kwargs) if isinstance(x, Tensor)}
        for tensor in [result] if len(declared) == 1 else list(result or ()):  # one that returns nothing gives None
            if is_dense(tensor) and storage_of(tensor) not in given:
                self._note(path, variant, tensor)
        return result

    def _inside(self, path: _Path) -> _Watch:
        """The watch of what the call there calls."""
        inside = _Watch(None, None)
        inside._path, inside.calls, inside._origins = path, self.calls[path[-1]].inside, self._origins
        return inside

    def _note(self, path: _Path, variant: Callable[..., Tensor] | None, tensor: Tensor) -> None:
        if storage_of(tensor) not in self._origins:  # else it was made inside, or is somebody's that was handed on
            variant = variant if has_default_strides(tensor) else None
            memory = StorageWeakRef(tensor.untyped_storage())
            self._origins[storage_of(tensor)] = _Origin(path, variant, tensor.dtype, tensor.shape, memory)

    def opaque(self, tensors: Mapping[int, Any], look: int) -> set[Kind]:
        """What made tensors of `look` bytes or more, and can be looked into."""
        origins = [self._origin(tensor) for tensor in tensors.values() if is_dense(tensor) and tensor.nbytes >= look]
        made = [self.calls[o.path[0]].kind for o in origins if o is not None and o.out_variant is None]
        return {kind for kind in made if kind is not None and can_be_looked_into(kind[0])}

    def plan(self, tensors: Mapping[int, Any], look: int) -> _Plan | None:
        """How to make tensors elsewhere, as far as that can be, and takes less than to copy them; None if none.

        look: bytes that are copied in the time in which an operator is seen.
        """
        found = {v: origin for v, tensor in tensors.items() if (origin := self._origin(tensor)) is not None}
        found = {v: o for v, o in found.items() if o.out_variant is not None and tensors[v].nbytes >= look}
        first = min((origin.path[0] for origin in found.values()), default=0)
        begin, border = 0, self._since
        for at, passed in self._borders:
            if at <= first:
                begin, border = at, passed
        seen = len(self.calls) - begin
        for path in {origin.path[:depth] for origin in found.values() for depth in range(1, len(origin.path))}:
            seen += INSIDE * len(self._called(path).inside)
        if not found or self._leaves_be or sum(tensors[v].nbytes for v in found) < seen * look:
            return None
        return _Plan(border, {v: self._maker(origin, begin) for v, origin in found.items()})

    def _origin(self, tensor: Any) -> _Origin | None:
        """How all of a tensor was made; None if that was not seen."""
        origin = self._origins.get(storage_of(tensor)) if is_dense(tensor) else None
        if origin is None or origin.dtype != tensor.dtype:
            return None
        storage = tensor.untyped_storage()
        whole = has_default_strides(tensor) and storage.nbytes() == tensor.nbytes > 0
        return origin if whole and origin.shape.numel() == tensor.numel() else None

    def _called(self, path: _Path) -> _Call:
        calls = self.calls
        for at in path[:-1]:
            calls = calls[at].inside
        return calls[path[-1]]

    def _maker(self, origin: _Origin, begin: int) -> _Maker:
        kinds = [self._called(origin.path[: depth + 1]).kind for depth in range(len(origin.path))]
        known = [kind for kind in kinds if kind is not None]
        assert known == kinds, "what has no kind is not looked into, and has no variant"
        number = sum(call.kind == kinds[0] for call in self.calls[begin : origin.path[0]])
        return _Maker(number, tuple(known), origin)


_Target = tuple[_Maker, Room]


class _Redirect(_Mode):
    """Calls makers with a tensor on their room."""

    def __init__(self, targets: Sequence[_Target]) -> None:
        super().__init__()
        self._targets = targets
        self._operators = {id(maker.kinds[0][0]) for maker, _ in targets}
        self._counts: Counter[Kind] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func, args, kwargs) if id(func) in self._operators else None
        if kind is None:
            return call(func, args, kwargs)
        number = self._counts[kind]
        self._counts[kind] += 1
        targets = [target for target in self._targets if target[0].number == number and target[0].kinds[0] == kind]
        return _made(targets, 1, func, args, kwargs)


class _RedirectInside(_Mode):
    """The same for what a kernel calls. depth: how many kernels this is inside of."""

    def __init__(self, targets: Sequence[_Target], depth: int) -> None:
        super().__init__()
        self._targets, self._depth, self._at = targets, depth, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, depth = kwargs or {}, self._depth
        targets = [target for target in self._targets if target[0].origin.path[depth] == self._at]
        self._at += 1
        if targets and targets[0][0].kinds[depth] != kind_of(func, args, kwargs):
            targets = []
        return _made(targets, depth + 1, func, args, kwargs)


def _made(targets: Sequence[_Target], depth: int, func: Any, args: Any, kwargs: Any) -> Any:
    """What a call makes. targets: those that it makes, or that are made inside of it; depth: of its inside. Two targets
    of one call are one tensor, sent twice: one room is enough to find out."""
    if not targets:
        return call(func, args, kwargs)
    (maker, room), origin = targets[0], targets[0][0].origin
    if len(maker.kinds) > depth:
        with _RedirectInside(targets, depth):
            return call_kernel(func, args, kwargs)
    assert origin.out_variant is not None
    return origin.out_variant(*args, **kwargs, out=room.tensor(origin.dtype, origin.shape))

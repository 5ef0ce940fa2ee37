"""Plays one stage's part of a program: steps on a table of values, made ready once.

slot          0        1        2    ...   the program's values, then constants
load x        tensor                       from a port, the inputs, a module's parameters
block(x)      .        tensor              slot 0 is empty again: that was its last use
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distlib.comm.slots import Room, least_in_rooms
from distlib.pipeline.cut import Load, Part, Port
from distlib.pipeline.landing import Landing
from distlib.pipeline.operators import storage_of
from distlib.pipeline.program import Branch, Call, Const, Context, Ref, Template, rebuild, refs

_Table = list[Any]
_Get = Callable[[_Table], Any]
_Put = Callable[[_Table, Any], None]
_Step = Callable[[_Table, Sequence[Sequence[Tensor]], Sequence[Any]], None]


class Player:
    """A part, ready to run on the modules of `stage`, which has the names of the whole model."""

    def __init__(self, stage: nn.Module, part: Part) -> None:
        # Not the part itself: a stage keeps a player for as long as somebody keeps its part.
        self._stage, self._number = stage, part.stage
        self._program = program = part.program
        self._ports, self._sends, self._sent = len(part.receives), part.sends, part.sent
        self._blank: _Table = [value.origin if isinstance(value.origin, Tensor) else None for value in program.values]
        last = _last_uses(part)
        self._output = self._getter(program.output) if part.last else None
        self._steps: list[_Step] = []
        self._landings: dict[int, tuple[Landing, tuple[int, ...]]] = {}  # by step: how what it makes is sent
        given = [v for sent in part.sent for v in sent] + (list(refs(program.output)) if part.last else [])
        goes = {v for v, times in Counter(given).items() if times == 1}  # to one place, and then it is that place's
        for k, step in enumerate(part.steps):
            if isinstance(step, Load):
                self._steps.append(self._load(step))
            else:
                drop = tuple(v for v in dict.fromkeys(_used(step)) if last[v] == k)
                self._steps.append(self._call(step, drop, last))
                if made := goes.intersection(refs(step.result)):
                    module = self._finder(step.target) if isinstance(step.target, str) else lambda: None
                    self._landings[k] = Landing(module, least_in_rooms()), tuple(sorted(made))

    def __call__(
        self,
        received: Sequence[Sequence[Tensor]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rooms: Sequence[Sequence[Room]] = (),
    ) -> tuple[tuple[tuple[Tensor, ...], ...], Any]:
        """(tensors per send port, output of the model or None). rooms: per send port, none, or one for each tensor:
        where it is to be made, if that can be."""
        inputs = pytree.tree_leaves((args, dict(kwargs)))
        if len(inputs) != self._program.inputs or len(received) != self._ports:
            raise ValueError(
                f"pipeline: stage {self._number} was given {len(inputs)} inputs and {len(received)} receive ports; its "
                f"program was recorded with {self._program.inputs} and {self._ports}"
            )
        values = self._blank.copy()
        places: dict[int, Room] = {}
        for sent, where in zip(self._sent, rooms, strict=False):  # a port may have none
            places.update(zip(sent, where, strict=False))
        for k, step in enumerate(self._steps):
            landing, made = self._landings[k] if places and k in self._landings else (None, ())
            here = {v: places[v] for v in made if v in places}
            if landing is not None and here:
                landing.run(partial(step, values, received, inputs), values, here)
            else:
                step(values, received, inputs)
        sends = tuple(tuple([values[v] for v in sent]) for sent in self._sent)
        for port, tensors in zip(self._sends, sends, strict=True):
            _check(port, tensors)
        return self._off_buffers(sends), self._output(values) if self._output is not None else None

    def _off_buffers(self, sends: tuple[tuple[Tensor, ...], ...]) -> tuple[tuple[Tensor, ...], ...]:
        """Copies of what lies in a buffer's memory: the next micro-batch may write there before this one is away."""
        if all(tensor.grad_fn is not None for tensors in sends for tensor in tensors):
            return sends
        buffers = {storage_of(buffer) for buffer in self._stage.buffers() if buffer.layout is torch.strided}

        def off(tensor: Tensor) -> Tensor:
            lies_there = tensor.layout is torch.strided and storage_of(tensor) in buffers
            return tensor.clone() if lies_there else tensor

        return tuple(tuple(map(off, tensors)) for tensors in sends)

    # ------------------------------------------------------------ steps

    def _load(self, load: Load) -> _Step:
        value, port, item, copy = load.value, load.port, load.item, load.copy
        origin = self._program.values[value].origin

        if port is not None:

            def step(values: _Table, received: Sequence[Sequence[Tensor]], inputs: Sequence[Any]) -> None:
                tensor = received[port][item]
                values[value] = tensor.clone() if copy else tensor

        elif isinstance(origin, int):

            def step(values: _Table, received: Sequence[Sequence[Tensor]], inputs: Sequence[Any]) -> None:
                values[value] = inputs[origin].clone() if copy else inputs[origin]

        elif isinstance(origin, str):
            path, _, key = origin.rpartition(".")
            owner = self._stage.get_submodule(path)

            def step(values: _Table, received: Sequence[Sequence[Tensor]], inputs: Sequence[Any]) -> None:
                values[value] = getattr(owner, key)  # looked up each time: wrappers exchange parameters

        else:
            assert isinstance(origin, Tensor)

            def step(values: _Table, received: Sequence[Sequence[Tensor]], inputs: Sequence[Any]) -> None:
                values[value] = origin.clone() if copy else origin

        return step

    def _call(self, call: Call, drop: tuple[int, ...], last: Mapping[int, int]) -> _Step:
        run = self._target(call)
        put = _putter(call.result, last, str(call))
        keywords = {key: self._getter(item) for key, item in call.kwargs.items()}
        if not keywords and not any(isinstance(item, Branch) for item in call.args):
            slots = tuple(self._slot(item) for item in call.args)

            def step(values: _Table, received: Sequence[Sequence[Tensor]], inputs: Sequence[Any]) -> None:
                result = run(*[values[slot] for slot in slots])
                for slot in drop:
                    values[slot] = None
                put(values, result)

            return step
        getters = tuple(self._getter(item) for item in call.args)

        def general(values: _Table, received: Sequence[Sequence[Tensor]], inputs: Sequence[Any]) -> None:
            result = run(*[get(values) for get in getters], **{key: get(values) for key, get in keywords.items()})
            for slot in drop:
                values[slot] = None
            put(values, result)

        return general

    def _target(self, call: Call) -> Callable[..., Any]:
        if not isinstance(call.target, str):
            run = call.target
        else:
            find = self._finder(call.target)

            def run(*args: Any, **kwargs: Any) -> Any:
                return find()(*args, **kwargs)

        return run if call.context is None else _within(call.context, run)

    def _finder(self, name: str) -> Callable[[], nn.Module]:
        """Finds a leaf anew each time: wrappers exchange modules."""
        path, _, key = name.rpartition(".")
        siblings = self._stage.get_submodule(path)._modules

        def find() -> nn.Module:
            leaf = siblings[key]
            assert leaf is not None
            return leaf

        return find

    # ------------------------------------------------------------ arguments

    def _slot(self, item: Template) -> int:
        """Where the table holds a value or a constant."""
        if isinstance(item, Ref):
            return item.value
        assert isinstance(item, Const)
        self._blank.append(item.value)
        return len(self._blank) - 1

    def _getter(self, item: Template) -> _Get:
        if not isinstance(item, Branch):
            slot = self._slot(item)
            return lambda values: values[slot]
        getters = tuple(self._getter(inner) for inner in item.items)
        spec = item.spec
        return lambda values: rebuild([get(values) for get in getters], spec)


def _within(context: Context, run: Callable[..., Any]) -> Callable[..., Any]:
    def within(*args: Any, **kwargs: Any) -> Any:
        with context.entered():
            return run(*args, **kwargs)

    return within


def _putter(item: Template, last: Mapping[int, int], where: str) -> _Put:
    """Stores what a call returns, as far as somebody uses it."""
    if isinstance(item, Ref):
        slot = item.value
        if slot not in last:
            return lambda values, result: None

        def put(values: _Table, result: Any) -> None:
            values[slot] = result

        return put
    if isinstance(item, Const):
        return _same(item.value, where)
    putters = [_putter(inner, last, where) for inner in item.items]
    keys = item.spec if type(item.spec) is tuple else None
    flat = item.spec is not list and item.spec is not tuple and keys is None
    wanted = [
        k for k, inner in enumerate(item.items) if isinstance(inner, Const) or any(v in last for v in refs(inner))
    ]

    def put_each(values: _Table, result: Any) -> None:
        if keys is not None:
            result = [result[key] for key in keys]
        elif flat:
            result = pytree.tree_leaves(result)
        if len(result) != len(putters):
            raise ValueError(
                f"pipeline: {where} returned {len(result)} items, and {len(putters)} when it was recorded; what it "
                "returns must depend on the signature of the inputs only"
            )
        for k in wanted:
            putters[k](values, result[k])

    return put_each


def _same(recorded: Any, where: str) -> _Put:
    """Says once that a module returns another number than was recorded: what came of it was decided then."""
    told = not isinstance(recorded, bool | int | float | str)

    def compare(values: _Table, result: Any) -> None:
        nonlocal told
        if not told and type(result) is type(recorded) and result != recorded and result == result:
            told = True
            warnings.warn(
                f"pipeline: {where} returned {recorded!r} when it was recorded, and now {result!r}: the model goes on "
                "with the former. Return a tensor, if it computes with it",
                stacklevel=2,
            )

    return compare


def _used(call: Call) -> list[int]:
    return [v for item in (*call.args, *call.kwargs.values()) for v in refs(item)]


def _last_uses(part: Part) -> dict[int, int]:
    """Value -> the last step that uses it; what is sent or given back is used at the end."""
    found = {v: k for k, step in enumerate(part.steps) if isinstance(step, Call) for v in _used(step)}
    end = len(part.steps)
    found |= {v: end for sent in part.sent for v in sent}
    if part.last:
        found |= {v: end for v in refs(part.program.output)}
    return found


def _check(port: Port, tensors: Sequence[Tensor]) -> None:
    for spec, tensor in zip(port.specs, tensors, strict=True):
        if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"pipeline: stage {port.source} made {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
                f"for stage {port.target}, which expects {spec}, as recorded. A leaf computes in another dtype (mixed "
                "precision: record with that dtype), or its shapes depend on more than the signature of the inputs"
            )

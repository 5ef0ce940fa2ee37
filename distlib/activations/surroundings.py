"""Generators of random numbers that a block's forward draws from, and that are not torch's default ones."""

from __future__ import annotations

import itertools
import pickle
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

WATCHED = 8  # first forwards of a block, in which it is found out whether it draws from Python's and numpy's generators


class _Python:
    """Python's generator, as `random` uses it."""

    def get(self) -> Any:
        return random.getstate()

    def set(self, state: Any) -> None:
        random.setstate(state)


class _Numpy:
    """numpy's, as `numpy.random` uses it."""

    def get(self) -> Any:
        state = sys.modules["numpy"].random.get_state(legacy=False)
        return pickle.dumps(state)  # it has arrays; bytes can be compared

    def set(self, state: Any) -> None:
        sys.modules["numpy"].random.set_state(pickle.loads(state))


class _Torch:
    """One of torch's that somebody has made."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def get(self) -> Any:
        return self._generator.get_state()

    def set(self, state: Any) -> None:
        self._generator.set_state(state)


GLOBAL: dict[str, Callable[[], Any]] = {"random": _Python, "numpy": _Numpy}


class Draws:
    """What is known of a block: which global generators it draws from. To ask them each time would cost a small block
    too much."""

    def __init__(self) -> None:
        self._forwards = 0
        self._from: set[str] = set()

    def candidates(self) -> list[str]:
        """Those that a forward may draw from."""
        self._forwards += 1
        names = GLOBAL if self._forwards <= WATCHED else self._from
        return [name for name in names if name in sys.modules]

    def drew(self, name: str) -> None:
        self._from.add(name)


class OwnRandom:
    """Generators of one forward of a block: make it before, call `ran()` after it. `as_before()` is for around the
    recomputation: it draws what the forward drew, and the numbers behind it are none the wiser.

    parts: the block's modules. leaves: of its arguments.
    """

    def __init__(self, parts: Iterable[nn.Module], leaves: Collection[Any], draws: Draws) -> None:
        places = itertools.chain(leaves, *(part.__dict__.values() for part in parts))
        own = {id(value): value for value in places if type(value) is torch.Generator}
        self._draws = draws
        with _disable_current_modes():  # their states are tensors
            self._global = {name: (its := GLOBAL[name](), its.get()) for name in draws.candidates()}
            self._before = [(its := _Torch(generator), its.get()) for generator in own.values()]

    def keep_all(self) -> None:
        """For a trial: it does not matter who draws."""
        self._before.extend(self._global.values())
        self._global = {}

    def ran(self) -> None:
        """Forgets those that the forward did not draw from."""
        for name, (generator, state) in self._global.items():
            if generator.get() != state:
                self._draws.drew(name)
                self._before.append((generator, state))
        self._global = {}

    @contextmanager
    def as_before(self) -> Iterator[None]:
        if not self._before:
            yield
            return
        with _disable_current_modes():
            now = [generator.get() for generator, _ in self._before]
            for generator, state in self._before:
                generator.set(state)
        try:
            yield
        finally:
            with _disable_current_modes():
                for (generator, _), state in zip(self._before, now, strict=True):
                    generator.set(state)

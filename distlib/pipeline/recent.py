"""What was used last, of things that can be made again: a model whose inputs never repeat would fill memory else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
MOST = 256  # signatures of inputs: with 24 blocks, some 0.3 MB each


class Recent(Generic[Thing]):
    """The `most` things that were asked for last, by key."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._things: OrderedDict[Hashable, Thing] = OrderedDict()

    def __len__(self) -> int:
        return len(self._things)

    def get(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """The thing of a key, made if it is not here (any more)."""
        if key in self._things:
            self._things.move_to_end(key)
            return self._things[key]
        made = self._things[key] = make()
        if len(self._things) > self._most:
            self._things.popitem(last=False)
        return made

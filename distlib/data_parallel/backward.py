"""Where a backward ends: one call at the end of the outermost one, another if it dies on the way.

Autograd runs callbacks at the end of the backward in which they were queued. A re-entrant checkpoint runs a
backward inside the backward, so a callback queued when the first gradient lands could run too early. The
first thing that the outermost backward of a model does is to visit its outputs: the callback is queued there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


class BackwardWatch:
    """Calls `ended()` at the end of each backward through a watched output, `died()` if it stops before.

    Both are bound methods and held weakly: the graph of an output may outlive the model.
    """

    def __init__(self, ended: Callable[[], None], died: Callable[[], None]) -> None:
        self._ended = weakref.WeakMethod(ended)
        self._died = weakref.WeakMethod(died)
        self._running = 0  # the number of the backward under way; 0: none
        self._begun = 0

    def outputs(self, output: object) -> None:
        """Watch the tensors of a forward's output."""
        for tensor in tensors_in(output, set()):
            if tensor.grad_fn is not None:
                tensor.register_hook(self._visited)

    def begin(self) -> None:
        """A backward is running; does nothing when that is known already."""
        if not self._running:
            self._begun += 1
            self._running = self._begun
            torch.autograd.Variable._execution_engine.queue_callback(_End(self, self._begun))

    def forget(self) -> None:
        """The running backward is dealt with."""
        self._running = 0

    def _visited(self, _: torch.Tensor) -> None:
        self.begin()

    def _over(self, number: int, reached: bool) -> None:
        if self._running != number:
            return
        self._running = 0
        method = (self._ended if reached else self._died)()
        if method is not None:
            method()


class _End:
    """The callback. Autograd, its only holder, drops it uncalled when the backward raises."""

    def __init__(self, watch: BackwardWatch, number: int) -> None:
        self._watch = watch
        self._number = number

    def __call__(self) -> None:
        self._watch._over(self._number, reached=True)

    def __del__(self) -> None:
        self._watch._over(self._number, reached=False)


def tensors_in(value: object, seen: set[int]) -> list[torch.Tensor]:
    """The tensors in an output made of mappings, sequences, and objects with attributes."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (str, bytes, int, float, type(None), torch.nn.Module, type)) or id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = list(value)
    else:
        children = list(getattr(value, "__dict__", {}).values())
    return [tensor for child in children for tensor in tensors_in(child, seen)]

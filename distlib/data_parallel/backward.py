"""Where a backward ends: one call at the end of the outermost one, another if it dies on the way.

Autograd runs callbacks at the end of the backward in which they were queued. A re-entrant checkpoint runs a
backward inside the backward, so a callback queued when the first gradient lands could run too early. The
first thing that the outermost backward of a model does is to visit its outputs: the callback is queued there.

A pipeline may run a backward in two passes: the input pass visits outputs, the weight pass comes some time later and
visits none, but where it walks the graph again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass
class Passes:
    """Which pass of a backward in two is under way: none, where a backward is whole."""

    input: bool = False
    weight: bool = False


class BackwardWatch:
    """Calls `ended()` at the end of each backward through a watched output, `died()` if it stops before.

    Both are bound methods and held weakly: the graph of an output may outlive the model.
    """

    def __init__(self, ended: Callable[[], None], died: Callable[[], None], passes: Passes) -> None:
        self._ended = weakref.WeakMethod(ended)
        self._died = weakref.WeakMethod(died)
        self._passes = passes
        self._running = 0  # the number of the backward under way; 0: none
        self._begun = 0
        self._ends = 0

    def outputs(self, output: object) -> bool:
        """Watch the tensors of a forward's output. False: none of those found has a graph."""
        watched = [tensor for tensor in tensors_in(output, set()) if tensor.grad_fn is not None]
        for tensor in watched:
            tensor.register_hook(self._visited)
        return bool(watched)

    def begin(self) -> None:
        """A backward is running; does nothing when that is known already."""
        if not self._running:
            self._begun += 1
            self._running = self._begun
            torch.autograd.Variable._execution_engine.queue_callback(_End(self, self._begun))

    def forget(self) -> None:
        """The running backward is dealt with."""
        self._running = 0

    def settle(self) -> None:
        """Call it outside of a backward, before what follows one: a backward that raised is over. Autograd's thread
        that ran it on a device may hold on to its graph for a while, and would call `died()` later."""
        if self._running and torch._C._current_graph_task_id() == -1:
            self._over(self._running, reached=False)

    @contextlib.contextmanager
    def input_pass(self) -> Iterator[None]:
        """A backward in it is an input pass. `died()` if the block raises: what it began cannot go on."""
        self._passes.input = True
        try:
            yield
        except BaseException:
            _call(self._died)
            raise
        finally:
            self._passes.input = False

    @contextlib.contextmanager
    def weight_pass(self) -> Iterator[None]:
        """A backward in it is a weight pass. `ended()` once, even if no gradient lands; `died()` if it raises first."""
        self._passes.weight = True
        before = self._ends
        try:
            yield
            if self._ends == before:
                self._end()
        except BaseException:
            if self._ends == before:
                _call(self._died)
            raise
        finally:
            self._passes.weight = False

    def _visited(self, _: torch.Tensor) -> None:
        if not self._passes.weight:
            self.begin()

    def _over(self, number: int, reached: bool) -> None:
        if self._running == number:
            self._running = 0
            self._end() if reached else _call(self._died)

    def _end(self) -> None:
        self._ends += 1
        _call(self._ended)


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    bound = method()
    if bound is not None:
        bound()


class _End:
    """The callback. Autograd, its only holder, drops it uncalled when the backward raises."""

    def __init__(self, watch: BackwardWatch, number: int) -> None:
        self._watch = watch
        self._number = number

    def __call__(self) -> None:
        self._watch._over(self._number, reached=True)

    def __del__(self) -> None:
        self._watch._over(self._number, reached=False)


def will_land(leaf: torch.Tensor) -> bool:
    """Whether the backward under way, if there is one, reaches a leaf."""
    if torch._C._current_graph_task_id() == -1:
        return False
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node)


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

"""What happens at the edges of a unit: its parameters become whole before its forward and its backward, and are let go
after."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from distlib.data_parallel.backward import BackwardWatch, tensors_in
from distlib.sharded.gather import Order, Source, UnitState
from distlib.sharded.reduce import Reduction


class Runtime:
    """Drives units through forwards and backwards. modules: the modules of each unit; the root (the first) has none."""

    def __init__(
        self,
        units: Sequence[UnitState],
        modules: Sequence[Sequence[nn.Module]],
        source: Source,
        reduction: Reduction,
        reshard_after_forward: bool,
        prefetch: int,
    ) -> None:
        self.units = list(units)
        self.root = units[0]
        self.source = source
        self.reduction = reduction
        self.order = Order([unit for unit in units if not unit.is_root], prefetch)
        self._reshard = reshard_after_forward
        self._depth = dict.fromkeys(self.units, 0)
        self._in_backward: set[UnitState] = set()
        self._pending = dict.fromkeys(self.units, 0)  # calls of the unit's modules whose backward is not over
        self._backward_runs = False
        self.written = True  # parameters were written by other means than an optimizer
        self._watch = BackwardWatch(self._ended, self._died)
        me = weakref.ref(self)
        for unit, parts in zip(self.units, modules, strict=True):
            for part in parts:
                last = part is parts[-1]
                part.register_forward_pre_hook(_entering(me, unit), prepend=True, with_kwargs=True)
                part.register_forward_hook(_leaving(me, unit, last), always_call=True)
        index = 0
        for unit in reversed(self.units):
            for flat in unit.flats:
                if flat.trained:
                    for i, leaf in enumerate(flat.full):
                        leaf.register_post_accumulate_grad_hook(_landing(me, index, i))
                    index += 1

    # ------------------------------------------------------------ forward

    def begin(self) -> None:
        """A forward of the whole model begins. Every rank must call."""
        self._depth = dict.fromkeys(self.units, 0)
        self.source.begin(self.written or not self.reduction.window.open)
        self.written = False
        if torch.is_grad_enabled():
            self.reduction.forward_paused = self.reduction.paused
        self.order.begin_forward()
        self.source.need(self.root)
        for flat in self.root.flats:
            flat.show_full()

    def end(self, output: Any) -> None:
        """It ended, with this output."""
        self.rest()
        self.order.end_forward()
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(output, set())):
            self._watch.outputs(output)
            for tensor in tensors_in(output, set()):
                if tensor.grad_fn is not None:
                    tensor.register_hook(self._backward_begins)
            if not self.source.frees and self.reduction.window.may_step:
                self.source.end()  # an optimizer may write before a backward makes ranks wait for each other
        else:
            self.source.end()

    def rest(self) -> None:
        """The module holds pieces, whatever a forward that raised has left."""
        for unit in self.units:
            if unit.is_root or self._depth[unit]:
                self._depth[unit] = 0
                for flat in unit.flats:
                    flat.show_pieces()

    def enter(self, unit: UnitState, inputs: Any) -> None:
        """One of the unit's modules begins its forward."""
        self._depth[unit] += 1
        if self._depth[unit] > 1:
            return
        recomputing = _in_backward()
        self.source.need(unit)
        if not recomputing:
            self.source.ahead(self.order.visit(unit))
        for flat in unit.flats:
            flat.show_full()
        if self.source.frees and torch.is_grad_enabled():
            if recomputing:
                self._in_backward.add(unit)
            # A checkpoint that is not re-entrant recomputes what was counted in forward.
            if not (recomputing and self._pending[unit]):
                self._release_after_backward(unit, inputs)

    def leave(self, unit: UnitState, output: Any, last: bool) -> None:
        """It ended, or raised. last: of the unit's modules."""
        self._depth[unit] = max(0, self._depth[unit] - 1)
        if self._depth[unit] or _in_backward():  # a recomputation: what follows of the backward may need it too
            return
        for flat in unit.flats:
            flat.show_pieces()
        if not self.source.frees:
            return
        recording = torch.is_grad_enabled()
        if recording:
            for tensor in tensors_in(output, set()):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(functools.partial(self._before_backward, unit))
        if last and (self._reshard or not recording):
            self.source.release(unit, for_backward=recording)

    # ------------------------------------------------------------ backward

    def _backward_begins(self, _: torch.Tensor | None = None) -> None:
        """Checkpoints inside of units, and in the root, compute with whole parameters again."""
        if self._backward_runs:
            return
        if self.source.frees and torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) through a ShardedDataParallel of stage 3 whose partition group does not "
                "share one host's memory: parameters are freed before the second backward reads them. Use stage 2, or "
                'partition_size="node"'
            )
        self._backward_runs = True
        self._watch.begin()
        self.source.need(self.root)  # a forward without gradients, or another backward, may have let it go
        for unit in self.units:
            if unit.is_root or not self.source.frees:
                for flat in unit.flats:
                    flat.show_full()

    def _before_backward(self, unit: UnitState, _: torch.Tensor) -> None:
        self._backward_begins()
        if unit not in self._in_backward:
            self._in_backward.add(unit)
            self.source.need(unit)
            self.source.ahead(self.order.before(unit))
            for flat in unit.flats:
                flat.show_full()

    def _release_after_backward(self, unit: UnitState, inputs: Any) -> None:
        """When the gradients of all inputs of all its calls are there, the unit's backward is over, frozen parameters
        included. Where no input has a gradient, the end of the backward is the end."""
        self._pending[unit] += 1
        entering = [t for t in tensors_in(inputs, set()) if t.requires_grad]
        if not entering:
            return
        # Autograd visits leaves first of all: what the unit computes from parameters alone may be still to come.
        over = self._over_at_end if any(t.grad_fn is None for t in entering) else self._over
        torch.autograd.graph.register_multi_grad_hook(entering, lambda _: over(unit))

    def _over_at_end(self, unit: UnitState) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._over, unit))

    def _over(self, unit: UnitState) -> None:
        self._pending[unit] = max(0, self._pending[unit] - 1)
        if unit in self._in_backward and not self._pending[unit]:
            self._in_backward.discard(unit)
            for flat in unit.flats:
                flat.show_pieces()
            self.source.release(unit)

    def landed(self, index: int, i: int, leaf: nn.Parameter) -> None:
        """The gradient of a parameter is there."""
        if not self.reduction.begun:
            self._watch.begin()
        self.reduction.landed(index, i, leaf)

    def _ended(self) -> None:
        if self.reduction.begun or self._joins():
            self.reduction.finish(self.source.asked())
        self._release_all()

    def _joins(self) -> bool:
        """Whether a backward that gave no parameter a gradient may have given some on other ranks: not if it was
        torch.autograd.grad() for something else."""
        for unit in self.units:
            for flat in unit.flats:
                if flat.trained:
                    node = torch.autograd.graph.get_gradient_edge(flat.full[0]).node
                    return torch._C._will_engine_execute_node(node)
        return False

    def _died(self) -> None:
        self.reduction.died()
        self._release_all()

    def _release_all(self) -> None:
        self._in_backward.clear()
        self._pending = dict.fromkeys(self.units, 0)
        if self._backward_runs:
            self._backward_runs = False
            for unit in self.units:
                for flat in unit.flats:
                    flat.show_pieces()
        if self.source.frees:
            for unit in self.units:
                self.source.release(unit)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _alive(reference: weakref.ref[Runtime]) -> Runtime:
    runtime = reference()
    if runtime is None:
        raise RuntimeError(
            "this module was sharded by a ShardedDataParallel that is gone: it holds pieces of its parameters. Keep "
            "the wrapper, and take model.full_state_dict() for a module of its own"
        )
    return runtime


def _entering(reference: weakref.ref[Runtime], unit: UnitState) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        _alive(reference).enter(unit, (args, kwargs))

    return hook


def _leaving(reference: weakref.ref[Runtime], unit: UnitState, last: bool) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        _alive(reference).leave(unit, output, last)

    return hook


def _landing(reference: weakref.ref[Runtime], index: int, i: int) -> Callable[[torch.Tensor], None]:
    def hook(leaf: torch.Tensor) -> None:
        _alive(reference).landed(index, i, leaf)

    return hook


def trained_flats(units: Sequence[UnitState]) -> Iterator[Any]:
    """The trained flats in the order in which they are reduced: about that of backward, the root last."""
    for unit in reversed(units):
        yield from (flat for flat in unit.flats if flat.trained)

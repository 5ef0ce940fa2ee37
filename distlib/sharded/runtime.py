"""What happens at the edges of a unit: its parameters become whole before its forward and its backward, and are let go
after."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from distlib.data_parallel.backward import BackwardWatch, tensors_in, will_land
from distlib.sharded import uncalled
from distlib.sharded.gather import Order, Source, UnitState
from distlib.sharded.reduce import Reduction


class _Flight:
    """A forward of the whole model and its backward. Several may be under way: a pipeline's micro-batches."""

    def __init__(self) -> None:
        self.calls: Counter[UnitState] = Counter()  # of units, in the forward
        self.pending: Counter[UnitState] = Counter()  # calls whose backward is not over


class Runtime:
    """Drives units through forwards and backwards. modules: the modules of each unit; the root (the first) has none.

    What hooks call is not for torch.compile's graphs: they end where a unit begins and where it ends.
    """

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
        self._modules = [list(parts) for parts in modules]
        self.source = source
        self.reduction = reduction
        self.order = Order([unit for unit in units if not unit.is_root], prefetch)
        self._reshard = reshard_after_forward
        self._depth = dict.fromkeys(self.units, 0)
        self._entered: dict[UnitState, set[nn.Module]] = {}  # modules of units, which hold whole parameters
        self._flight = _Flight()  # of the last forward
        self._returning: dict[_Flight, None] = {}  # those that the running backward goes through, the current one last
        self._in_backward: dict[UnitState, set[_Flight]] = {}  # units whose backward is under way, and of which flights
        self._backward_runs = False
        self.inside = False  # a forward of the whole model
        self.summoned = False  # the module holds whole copies, with which it computes as a plain one
        self.written = True  # parameters were written by other means than an optimizer
        self._announced = False  # forwards under no_sync() began a window: no optimizer writes before it ends
        self._fresh = False  # units are held, and were gathered since gradients were averaged
        self.watch = BackwardWatch(self._ended, self._died, reduction.passes)
        self._set_held(False)
        me = weakref.ref(self)
        for unit, parts in zip(self.units, modules, strict=True):
            for part in parts:
                last = part is parts[-1]
                part.register_forward_pre_hook(_entering(me, unit), prepend=True, with_kwargs=True)
                part.register_forward_hook(_leaving(me, unit, last), always_call=True)
        index = 0
        for number, unit in reversed(list(enumerate(self.units))):
            for flat in unit.flats:
                if flat.trained:
                    for i, leaf in enumerate(flat.full):
                        leaf.register_post_accumulate_grad_hook(_landing(me, index, i))
                    for name, piece in zip(flat.names, flat.pieces, strict=True):
                        piece.register_post_accumulate_grad_hook(_landing_on_piece(me, number, name))
                    index += 1

    # ------------------------------------------------------------ forward

    @torch._disable_dynamo
    def begin(self) -> None:
        """A forward of the whole model begins. Every rank must call."""
        self._depth = dict.fromkeys(self.units, 0)
        self.inside = True
        self._refresh()
        self._flight = _Flight()
        if torch.is_grad_enabled():
            self.reduction.forward_paused = self.reduction.paused
            if self.reduction.paused and not self.reduction.window.may_step:
                self._announced = True
        self.order.begin_forward()
        self.source.need(self.root)
        for flat in self.root.flats:
            flat.show_full()

    def _refresh(self) -> None:
        """Whole parameters are to have the values that an optimizer may have written. Every rank must call."""
        window = self.reduction.window
        sure = window.open or self._fresh or (self._announced and not window.may_step)
        self.source.begin(self.written or not sure)
        self.written = False

    @torch._disable_dynamo
    def end(self, output: Any) -> None:
        """It ended, with this output."""
        self.rest()
        self.order.end_forward()
        returned = [t for t in tensors_in(output, set()) if t.requires_grad]
        if torch.is_grad_enabled() and returned:
            for tensor in returned:
                if tensor.grad_fn is not None:
                    tensor.register_hook(functools.partial(self._backward_begins, self._flight))
            if not self.source.frees and self.reduction.window.may_step:
                self.source.end()  # an optimizer may write before a backward makes ranks wait for each other
        else:
            self.source.end()

    @torch._disable_dynamo
    def rest(self) -> None:
        """The module holds pieces, whatever a forward that raised has left."""
        self.inside = False
        for unit in self.units:
            if unit.is_root or self._depth[unit]:
                self._depth[unit] = 0
                for flat in unit.flats:
                    flat.show_pieces()
        self.source.rest()

    def why_in_pieces(self, error: BaseException, module: nn.Module) -> str | None:
        """Whether a forward of the whole module raised because it used a unit without calling it."""
        if not isinstance(error, Exception):
            return None
        return uncalled.explain(error, module, list(zip(self.units, self._modules, strict=True))[1:])

    @torch._disable_dynamo
    def enter(self, unit: UnitState, part: nn.Module, inputs: Any) -> None:
        """One of the unit's modules begins its forward. It is shown its own parameters only: with all of the unit's, a
        unit of many small modules would take time with the square of their number."""
        if self.summoned:
            return
        self._depth[unit] += 1
        if self._depth[unit] > 1:
            self._show_full(unit, part)
            return
        recomputing = _in_backward()
        self.source.need(unit)
        if not recomputing:
            self.source.ahead(self.order.visit(unit))
        self._show_full(unit, part)
        if self.source.frees and torch.is_grad_enabled():
            flight = self._current() if recomputing else self._flight
            if recomputing:
                self._in_backward.setdefault(unit, set()).add(flight)
            else:
                flight.calls[unit] += 1
            # A checkpoint that is not re-entrant recomputes what was counted in forward.
            if not (recomputing and flight.pending[unit]):
                self._release_after_backward(flight, unit, inputs)

    def _show_full(self, unit: UnitState, part: nn.Module) -> None:
        """Until the unit is left."""
        self._entered.setdefault(unit, set()).add(part)
        for flat in unit.flats:
            flat.show(flat.full, part)

    @torch._disable_dynamo
    def leave(self, unit: UnitState, output: Any, last: bool) -> None:
        """It ended, or raised. last: of the unit's modules."""
        if self.summoned:
            return
        self._depth[unit] = max(0, self._depth[unit] - 1)
        if self._depth[unit] or _in_backward():  # a recomputation: what follows of the backward may need it too
            return
        for part in self._entered.pop(unit, ()):
            for flat in unit.flats:
                flat.show(flat.pieces, part)
        if not self.source.frees:
            return
        recording = torch.is_grad_enabled()
        if recording:
            for tensor in tensors_in(output, set()):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(functools.partial(self._before_backward, self._flight, unit))
        if last and (self._reshard or not recording):
            self.source.release(unit, for_backward=recording)

    # ------------------------------------------------------------ backward

    def _backward_begins(self, flight: _Flight, _: torch.Tensor | None = None) -> None:
        """Checkpoints inside of units, and in the root, compute with whole parameters again."""
        if self.reduction.passes.weight:  # it walks graphs of backwards that are over
            return
        self._returning.pop(flight, None)
        self._returning[flight] = None
        self.watch.begin()
        if self._backward_runs:
            return
        if self.source.frees and torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) through a ShardedDataParallel of stage 3 whose partition group does not "
                "share one host's memory: parameters are freed before the second backward reads them. Use stage 2, or "
                'partition_size="node"'
            )
        self._backward_runs = True
        self.source.need(self.root)  # a forward without gradients, or another backward, may have let it go
        for unit in self.units:
            if unit.is_root or not self.source.frees:
                for flat in unit.flats:
                    flat.show_full()

    def _current(self) -> _Flight:
        """The flight whose backward runs."""
        return next(reversed(self._returning), self._flight)

    def _before_backward(self, flight: _Flight, unit: UnitState, _: torch.Tensor) -> None:
        self._backward_begins(flight)
        if self.reduction.passes.weight:
            return
        if unit not in self._in_backward:
            self.source.need(unit)
            self.source.ahead(self.order.before(unit))
            for flat in unit.flats:
                flat.show_full()
        self._in_backward.setdefault(unit, set()).add(flight)

    def _release_after_backward(self, flight: _Flight, unit: UnitState, inputs: Any) -> None:
        """When the gradients of all inputs of all its calls are there, the unit's backward is over, frozen parameters
        included. Where no input has a gradient, the end of the backward is the end."""
        flight.pending[unit] += 1
        entering = [t for t in tensors_in(inputs, set()) if t.requires_grad]
        if not entering:
            return
        # Autograd visits leaves first of all: what the unit computes from parameters alone may be still to come.
        over = self._over_at_end if any(t.grad_fn is None for t in entering) else self._over
        torch.autograd.graph.register_multi_grad_hook(entering, lambda _: over(flight, unit))

    def _over_at_end(self, flight: _Flight, unit: UnitState) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._over, flight, unit))

    def _over(self, flight: _Flight, unit: UnitState) -> None:
        flight.pending[unit] = max(0, flight.pending[unit] - 1)
        flights = self._in_backward.get(unit, set())
        if flight in flights and not flight.pending[unit]:
            flights.discard(flight)
            if not flights:
                del self._in_backward[unit]
                for flat in unit.flats:
                    flat.show_pieces()
                self.source.release(unit)

    def landed(self, index: int, i: int, leaf: nn.Parameter) -> None:
        """The gradient of a parameter is there."""
        if not self.reduction.begun:
            self.watch.begin()
        self.reduction.landed(index, i, leaf)

    def landed_on_piece(self, number: int, name: str) -> None:
        """A piece, of the unit of this number, got a gradient of its own. That of a penalty on `parameters()` is there
        before the model's."""
        if self.reduction.begun:
            kinds = [type(part).__name__ for part in self._modules[number]]
            rank = self.units[number].flats[0].grid.world.rank
            raise RuntimeError(f"rank {rank}: {uncalled.explain_gradient(name, kinds)}")

    def _ended(self) -> None:
        if self.reduction.begun or self.reduction.passes.weight or self._joins():
            try:
                self._finish()
            except BaseException:  # a collective failed, or Ctrl-C: autograd calls this a backward that ended
                self._died()
                raise
        if not self.reduction.passes.weight:  # it used no parameters: what is whole is so for a forward
            self._release_all()

    def _finish(self) -> None:
        """Gradients of a backward, or of its input pass, are complete."""
        self.reduction.finish(self.source.asked())
        if not (self.reduction.window.open or self.reduction.passes.input):
            self._announced = self._fresh = False

    def _joins(self) -> bool:
        """Whether a backward that gave no parameter a gradient may have given some on other ranks: not if it was
        torch.autograd.grad() for something else."""
        for unit in self.units:
            for flat in unit.flats:
                if flat.trained:
                    return will_land(flat.full[0])
        return False

    def _died(self) -> None:
        self.reduction.died()
        self._release_all()

    def _release_all(self) -> None:
        self._in_backward.clear()
        for flight in self._returning:
            flight.pending = Counter(flight.calls)  # the graph may be kept for another backward
        self._returning.clear()
        if self._backward_runs:
            self._backward_runs = False
            for unit in self.units:
                for flat in unit.flats:
                    flat.show_pieces()
        if self.source.frees:
            for unit in self.units:
                self.source.release(unit)

    # ------------------------------------------------------------ inside a pipeline

    def hold(self) -> bool:
        """All units become whole and stay so; False: nothing to gather."""
        if not self.source.frees:
            return False
        self._refresh()
        self._fresh = True
        self._set_held(True)
        self.source.ahead(self.units)
        return True

    def release(self) -> bool:
        """The end of `hold`."""
        if not self.source.held:
            return False
        self._fresh = False
        self._set_held(False)
        in_window = self._announced or self.reduction.window.open
        for unit in self.units:
            self.source.release(unit, for_backward=in_window)
        return True

    def _set_held(self, held: bool) -> None:
        self.source.held = held
        for unit in self.units:
            for flat in unit.flats:
                flat.come_and_go(self.source.frees and not held)


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


def outside(runtime: Runtime) -> Callable[..., None]:
    """A pre-hook for the whole model: it computes with pieces unless the wrapper was called."""
    reference = weakref.ref(runtime)

    def hook(module: nn.Module, _: Any) -> None:
        runtime = _alive(reference)
        if not (runtime.inside or runtime.summoned or _in_backward()):
            raise RuntimeError(
                f"{type(module).__name__} was called itself, and not the ShardedDataParallel around it: it holds "
                "pieces of its parameters. Call the wrapper, in which the engine or the trainer put the model; for "
                "anything else, such as generate(), enter `with model.summon_full_params():` on all ranks"
            )

    return hook


def _entering(reference: weakref.ref[Runtime], unit: UnitState) -> Callable[..., None]:
    def hook(part: nn.Module, args: Any, kwargs: Any) -> None:
        _alive(reference).enter(unit, part, (args, kwargs))

    return hook


def _leaving(reference: weakref.ref[Runtime], unit: UnitState, last: bool) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        _alive(reference).leave(unit, output, last)

    return hook


def _landing(reference: weakref.ref[Runtime], index: int, i: int) -> Callable[[torch.Tensor], None]:
    def hook(leaf: torch.Tensor) -> None:
        _alive(reference).landed(index, i, leaf)

    return hook


def _landing_on_piece(reference: weakref.ref[Runtime], number: int, name: str) -> Callable[[torch.Tensor], None]:
    def hook(_: torch.Tensor) -> None:
        runtime = reference()
        if runtime is not None:
            runtime.landed_on_piece(number, name)

    return hook


def trained_flats(units: Sequence[UnitState]) -> Iterator[Any]:
    """The trained flats in the order in which they are reduced: about that of backward, the root last."""
    for unit in reversed(units):
        yield from (flat for flat in unit.flats if flat.trained)

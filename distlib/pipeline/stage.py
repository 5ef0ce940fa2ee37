"""One stage on this rank: forwards and backwards of its micro-batches, each as the table asks for it.

received -> leaves -> forward -> sent                       kept per micro-batch: leaves, and the graph's ends at sent
gradients of sent -> backward (BW, or B and later W) -> gradients of leaves

What was sent is not kept, only where it is in autograd's graph: its memory is free as soon as it is away, unless an
operator saved it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from distlib.comm.group import Group
from distlib.comm.slots import Room
from distlib.pipeline.split_backward import Report, WeightQueue
from distlib.pipeline.stages import Part
from distlib.pipeline.unchanged import Unchanged

Tensors = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]  # None: nothing that the loss depends on came of it


class Replicated(Protocol):
    """What a data-parallel wrapper around a stage's module offers to the pipeline."""

    def no_sync(self) -> contextlib.AbstractContextManager[None]: ...
    def partial_backward(self) -> contextlib.AbstractContextManager[None]: ...
    def weight_backward(self) -> contextlib.AbstractContextManager[None]: ...
    def hold(self) -> bool: ...
    def release(self) -> bool: ...
    @property
    def process_groups(self) -> dict[str, Group | None]: ...


class _Enter(torch.autograd.Function):
    """The same values, no longer a leaf: the stage may write to them in place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass
class _InFlight:
    """One micro-batch between its forward and the end of its backward.

    leaves: per producer stage, what was received. sent: per consumer stage, where in the graph each tensor was made;
    None for one without a gradient. loss: likewise, on the last stage.
    """

    part: Part
    leaves: dict[int, Tensors]
    sent: dict[int, tuple[GradientEdge | None, ...]]
    loss: GradientEdge | None = None
    queue: WeightQueue | None = None


@dataclass
class Stage:
    """index: of the stage. module: its StageModule, maybe in a data-parallel wrapper. report: of its split backward;
    None where the schedule has no W for it. relies_on: what must be as it was when the model was recorded."""

    index: int
    module: nn.Module
    replicas: Replicated | None
    report: Report | None
    relies_on: Unchanged | None = None
    _flying: dict[int, _InFlight] = field(default_factory=dict)

    # ------------------------------------------------------------ forward

    def begin(self) -> None:
        """A step begins. Raises ValueError for what was changed since the model was recorded, and must not be."""
        if self.relies_on is not None:
            self.relies_on.require()

    def forward(
        self,
        micro_batch: int,
        part: Part,
        received: Mapping[int, Tensors],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        train: bool,
        last: bool = False,
        rooms: Mapping[int, tuple[Room, ...]] = MappingProxyType({}),
    ) -> tuple[dict[int, Tensors], Any]:
        """Returns what goes to each consumer stage, and on the last stage the model's output (else None).

        received: by producer stage, tensors without a gradient of their own; this stage's from now on. last: the last
        forward of the step, whose backward averages over replicas. rooms: by consumer stage, where what goes there is
        to be made, if that can be.
        """
        leaves: dict[int, Tensors] = {}
        entering = []
        for port in part.receives:
            tensors = received[port.source]
            if train:
                for tensor, spec in zip(tensors, port.specs, strict=True):
                    tensor.requires_grad_(spec.requires_grad)
            leaves[port.source] = tensors
            entering.append(tuple(_Enter.apply(t) if t.requires_grad else t for t in tensors))
        paused = contextlib.nullcontext() if last or not train else self._no_sync()
        with paused, torch.set_grad_enabled(train):
            sent, output = self.module(
                part, tuple(entering), args, kwargs, tuple(rooms.get(port.target, ()) for port in part.sends)
            )
        by_target = {port.target: tensors for port, tensors in zip(part.sends, sent, strict=True)}
        if train:
            ends = {target: tuple(map(_edge, tensors)) for target, tensors in by_target.items()}
            self._flying[micro_batch] = _InFlight(part, leaves, ends)
        return by_target, output

    def set_loss(self, micro_batch: int, loss: Tensor) -> None:
        """On the last stage: what the backward of the micro-batch starts from."""
        self._flying[micro_batch].loss = _edge(loss)

    # ------------------------------------------------------------ backward

    def backward(
        self, micro_batch: int, gradients: Mapping[int, Gradients], *, split: bool, last: bool
    ) -> dict[int, Gradients]:
        """BW, or (split) B, of a micro-batch. Returns the gradients that go to each producer stage.

        gradients: by consumer stage, of those sent tensors that require one. last: the last backward pass of the step.
        """
        flight = self._flying[micro_batch] if split else self._flying.pop(micro_batch)
        roots, given = self._roots(flight, gradients)
        with contextlib.ExitStack() as around:
            if not last:
                around.enter_context(self._no_sync())
            if split:
                if self.replicas is not None:
                    around.enter_context(self.replicas.partial_backward())
                flight.queue = WeightQueue(self.report)
                if roots:
                    flight.queue.backward(roots, given)
            elif roots:
                torch.autograd.backward(roots, given)
            elif self.replicas is not None:  # those of other ranks may have something to do in it
                around.enter_context(self.replicas.weight_backward())
        flight.sent, flight.loss = {}, None
        back = {port.source: _gradients_of(flight.leaves[port.source]) for port in flight.part.receives}
        flight.leaves = {}
        return back

    def weights(self, micro_batch: int, *, last: bool) -> None:
        """W: the weight gradients of a micro-batch whose B is over."""
        flight = self._flying.pop(micro_batch)
        assert flight.queue is not None
        with contextlib.ExitStack() as around:
            if not last:
                around.enter_context(self._no_sync())
            if self.replicas is not None:
                around.enter_context(self.replicas.weight_backward())
            flight.queue.run()

    # ------------------------------------------------------------ parameters, faults

    def hold(self) -> None:
        """GATHER: sharded parameters stay whole until `release`."""
        if self.replicas is not None:
            self.replicas.hold()

    def release(self) -> None:
        """FREE."""
        if self.replicas is not None:
            self.replicas.release()

    def fail(self, text: str) -> None:
        """The step failed: forgets what is under way, and ends the groups of the stage's replicas with these words."""
        for flight in self._flying.values():
            if flight.queue is not None:
                flight.queue.drop()
        self._flying.clear()
        groups = {} if self.replicas is None else self.replicas.process_groups
        for group in groups.values():
            if group is not None and group.size > 1:
                group.abort(text)

    def _roots(
        self, flight: _InFlight, gradients: Mapping[int, Gradients]
    ) -> tuple[list[GradientEdge], list[Tensor | None]]:
        """Where to start, with gradients; a tensor that several stages got comes once, with the sum."""
        found: dict[tuple[Any, int], tuple[GradientEdge, Tensor | None]] = {}
        if flight.loss is not None:
            found[flight.loss[:2]] = (flight.loss, None)
        for target, edges in flight.sent.items():
            given = iter(gradients.get(target, ()))
            port = next(port for port in flight.part.sends if port.target == target)
            for edge, spec in zip(edges, port.specs, strict=True):
                if not spec.requires_grad:
                    continue
                gradient = next(given)
                if edge is None or gradient is None:
                    continue
                _, before = found.get(edge[:2], (edge, None))
                found[edge[:2]] = (edge, gradient if before is None else before + gradient)
        return [edge for edge, _ in found.values()], [gradient for _, gradient in found.values()]

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.replicas is None else self.replicas.no_sync()


def _edge(tensor: Tensor) -> GradientEdge | None:
    """Where a tensor was made in autograd's graph; its values need not live for it."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _gradients_of(leaves: Sequence[Tensor]) -> Gradients:
    """The gradients of received tensors; None for one that the loss does not depend on."""
    found = []
    for leaf in leaves:
        if leaf.requires_grad:
            found.append(leaf.grad)
            leaf.grad = None
    return tuple(found)

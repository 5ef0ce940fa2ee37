"""What a step is before it runs: its table, its stages' parts, and what each message carries. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from distlib.pipeline.actions import Action, Kind, Schedule
from distlib.pipeline.record import Spec
from distlib.pipeline.stages import Part

Message = tuple[int, int, int]  # from stage, to stage, micro-batch


class Step:
    """All about a step but the values of its data.

    schedule: complete, with messages. parts: per micro-batch, of all stages. numbers: specs of the generators' state.
    """

    def __init__(self, schedule: Schedule, parts: Sequence[tuple[Part, ...]], numbers: Sequence[Spec]) -> None:
        self.schedule = schedule
        self.parts = tuple(parts)
        self._numbers = tuple(numbers)
        # Micro-batches of equal signature share their parts: what is derived from parts is derived once.
        self._carried = {id(p): _carried(p) for p in self.parts}
        self._random = {id(p): any(part.random for part in p) for p in self.parts}

    def is_random(self, stage: int, micro_batch: int) -> bool:
        """Whether this stage or one after it may draw random numbers: the last one has the loss, which may."""
        parts = self.parts[micro_batch]
        return parts[stage].last or self._random[id(parts)]

    def numbers(self, message: Message) -> int:
        """How many of a message's tensors, the first ones, stay on the host. With activations: the generators' state,
        which goes from stage to stage as far as numbers are drawn. With gradients: one, which says what there are."""
        source, target, k = message
        if target < source:
            return 1 if self._gradients(message) else 0
        return len(self._numbers) if target == source + 1 and self._random[id(self.parts[k])] else 0

    def specs(self, message: Message) -> tuple[Spec, ...]:
        """What a message carries: activations, or (to an earlier stage) gradients. Empty: it is not sent."""
        source, target, k = message
        carried = self._carried[id(self.parts[k])]
        if target < source:
            gradients = self._gradients(message)
            return (Spec(torch.Size([len(gradients)]), torch.uint8, False), *gradients) if gradients else ()
        return (*self._numbers[: self.numbers(message)], *carried.get((source, target), ()))

    def _gradients(self, message: Message) -> tuple[Spec, ...]:
        """Of all gradients that may go back; which ones do is known when the later stage's backward is over."""
        source, target, k = message
        return tuple(s for s in self._carried[id(self.parts[k])].get((target, source), ()) if s.requires_grad)

    def read_beyond(self, rank: int) -> list[frozenset[int]]:
        """Per micro-batch, the numbers of the inputs that stages of other ranks than `rank` read."""
        elsewhere = [stage for stage, its in enumerate(self.schedule.placement) if its != rank]
        alike = {id(p): p for p in self.parts}
        found = {key: frozenset[int]().union(*(p[stage].inputs for stage in elsewhere)) for key, p in alike.items()}
        return [found[id(p)] for p in self.parts]

    @cached_property
    def last(self) -> frozenset[Action]:
        """Of each stage, the last forward and the last pass that leaves weight gradients: replicas average there."""
        found = {}
        for line in self.schedule.actions:
            for action in line:
                if action.kind in (Kind.F, Kind.W, Kind.FULL):
                    found[action.stage, action.kind is Kind.F] = action
        return frozenset(found.values())


def _carried(parts: Sequence[Part]) -> dict[tuple[int, int], tuple[Spec, ...]]:
    return {(port.source, port.target): port.specs for part in parts for port in part.sends}

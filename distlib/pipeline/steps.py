"""Looks up what a step is: one recording per signature of inputs, one table per combination of them.

micro-batches -> signatures -> Programs (recorded once each) -> parts of stages -> edges -> table -> Step
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from distlib.pipeline.actions import Schedule
from distlib.pipeline.division import Division
from distlib.pipeline.micro_batches import MicroBatch
from distlib.pipeline.passes import prepare
from distlib.pipeline.record import Program, Spec, signature
from distlib.pipeline.schedules import forwards
from distlib.pipeline.stages import Part, cut, edges
from distlib.pipeline.step import Step
from distlib.pipeline.verify import verify


class Steps:
    """All steps that one model has taken.

    schedule: of compute actions. numbers: specs of the generators' state. sharded: stages whose parameters are
    gathered by the table, `whole` of them at a time on a rank. dtype: that the model computes in, if not its own.
    limit: most micro-batches whose activations a rank may hold.
    """

    def __init__(
        self,
        division: Division,
        schedule: Schedule,
        numbers: Sequence[Spec],
        sharded: Sequence[int],
        whole: int,
        dtype: torch.dtype | None,
        limit: float | None,
    ) -> None:
        self._division, self._ghost = division, division.ghost
        self._schedule, self._numbers = schedule, tuple(numbers)
        self._sharded, self._whole, self._dtype, self._limit = tuple(sharded), whole, dtype, limit
        self._parts: dict[Hashable, tuple[Part, ...]] = {}
        self._steps: dict[Hashable, Step] = {}
        self._tables: dict[Hashable, Schedule] = {}

    def program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """A recording of the model's run on these inputs."""
        return self._division.recordings.of(args, kwargs, self._dtype)

    def of(self, batches: Sequence[MicroBatch], train: bool) -> Step:
        """The step of these micro-batches. Equal on all ranks that are given inputs of equal shapes."""
        with torch.set_grad_enabled(train):
            keys = tuple(signature(batch.args, batch.kwargs, self._ghost) for batch in batches)
            found = self._steps.get((keys, train))
            if found is None:
                parts = [self._parts_of(key, batch) for key, batch in zip(keys, batches, strict=True)]
                found = self._steps[keys, train] = Step(self._table(parts, train), parts, self._numbers)
        return found

    def _parts_of(self, key: Hashable, batch: MicroBatch) -> tuple[Part, ...]:
        if key not in self._parts:
            program = self.program(batch.args, batch.kwargs)
            known = [stage for _, stage in self._division.calls]
            alike = [call.name for call in program.leaf_calls] == [name for name, _ in self._division.calls]
            self._parts[key] = cut(program, known if alike else self._division.stage_of, self._schedule.stages)
        return self._parts[key]

    def _table(self, parts: Sequence[tuple[Part, ...]], train: bool) -> Schedule:
        crossing = tuple(sorted({edge for one in {id(p): p for p in parts}.values() for edge in edges(one)}))
        key = (crossing, train, len(parts))
        if key not in self._tables:
            schedule = self._schedule if train else forwards(self._schedule.placement, len(parts))
            table = prepare(
                schedule.with_edges(crossing),
                sharded=self._sharded,
                whole=self._whole,
                reduced="step" if train else None,
            )
            verify(table, training=train, limit=self._limit if train else None)
            self._tables[key] = table
        return self._tables[key]

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
from distlib.pipeline.recent import Recent
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
        self._parts: Recent[tuple[Part, ...]] = Recent()
        self._steps: Recent[Step] = Recent()
        self._tables: Recent[Schedule] = Recent()

    def program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """A recording of the model's run on these inputs."""
        return self._division.recordings.of(args, kwargs, self._dtype)

    def of(self, batches: Sequence[MicroBatch], train: bool) -> Step:
        """The step of these micro-batches. Equal on all ranks that are given inputs of equal shapes."""
        with torch.set_grad_enabled(train):
            keys = tuple(signature(batch.args, batch.kwargs, self._ghost) for batch in batches)

            def make() -> Step:
                parts = [self._parts_of(key, batch) for key, batch in zip(keys, batches, strict=True)]
                return Step(self._table(parts, train), parts, self._numbers)

            return self._steps.get((keys, train), make)

    def _parts_of(self, key: Hashable, batch: MicroBatch) -> tuple[Part, ...]:
        def make() -> tuple[Part, ...]:
            program = self.program(batch.args, batch.kwargs)
            known = [stage for _, stage in self._division.calls]
            alike = [call.name for call in program.leaf_calls] == [name for name, _ in self._division.calls]
            return cut(program, known if alike else self._division.homes, self._schedule.stages)

        return self._parts.get(key, make)

    def _table(self, parts: Sequence[tuple[Part, ...]], train: bool) -> Schedule:
        crossing = tuple(sorted({edge for one in {id(p): p for p in parts}.values() for edge in edges(one)}))

        def make() -> Schedule:
            schedule = self._schedule if train else forwards(self._schedule.placement, len(parts))
            table = prepare(
                schedule.with_edges(crossing),
                sharded=self._sharded,
                whole=self._whole,
                reduced="step" if train else None,
            )
            verify(table, training=train, limit=self._limit if train else None)
            return table

        return self._tables.get((crossing, train, len(parts)), make)

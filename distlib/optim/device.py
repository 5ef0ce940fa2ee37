"""Steps of parameters on a GPU by the kernels of csrc/cuda: the host queues them, and waits for nothing.

    by class        parameters of a group that were stepped equally often share their scalars
    prepare         scalars in device memory, from what the device has: steps taken, norm, loss scale, infinities
    table           one launch for all segments of a kind
    steps           counted up where they were not skipped

How often a parameter was stepped is known to the device only, which skips steps with infinities. The host divides
parameters into classes by how often it asked, and by which of the steps it asked for that may have been skipped
(MemoryState.history).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from distlib.cuda.step import DeviceTable, Recipe, Scalars
from distlib.optim.kernels import Kind, Row, merged
from distlib.optim.memory import MemoryState

COPIES = {0: None, 1: torch.bfloat16, 2: torch.float16, 3: torch.int16}  # as Kind numbers them; 3: remainders


class Gate(NamedTuple):
    """What a step of all groups depends on, where the gradients are; each is one element.

    squares: fp64, the sum of the squares of all gradients, with max_norm. norm: fp64, becomes their norm after
    unscaling. loss_scale: fp32, gradients are divided by it. found_inf: fp32, not 0 skips the step.
    """

    squares: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    loss_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None


@dataclass
class _Class:
    """Parameters of a group that were stepped equally often."""

    first: int  # one of them
    scalars: Scalars
    counter: torch.Tensor  # steps that they have taken
    tables: list[DeviceTable] = field(default_factory=list)


class GroupSteps:
    """Tables of one parameter group, kept until an address changes."""

    def __init__(self) -> None:
        self._made_of: Any = None
        self._classes: list[_Class] = []

    def knows(self, made_of: Any) -> bool:
        """Whether the tables are those of `made_of`: everything that they depend on."""
        return made_of is not None and made_of == self._made_of

    def make(self, made_of: Any, device: torch.device, classes: list[tuple[int, dict[Kind, list[Row]]]]) -> None:
        """New tables. classes: of each its first parameter, and rows by kind."""
        self._made_of = made_of
        before = self._classes
        self._classes = []
        for number, (first, kinds) in enumerate(classes):
            # Scalars are reused: in one stream, queued steps read theirs before the next ones are written.
            old = before[number] if number < len(before) else None
            scalars = old.scalars if old is not None else Scalars(device)
            counter = old.counter if old is not None else torch.zeros((), dtype=torch.float32, device=device)
            made = _Class(first, scalars, counter)
            for kind, rows in kinds.items():
                rows = merged(kind, rows)
                made.tables.append(DeviceTable(rows, device, kind.param, kind.grad, COPIES[kind.copy]))
            self._classes.append(made)

    def step(self, recipe: Recipe, lr: torch.Tensor | None, store: MemoryState, chosen: list[int], gate: Gate) -> None:
        """One step of the parameters `chosen`, on the current stream."""
        for each in self._classes:
            each.counter.copy_(store.steps[each.first])
            each.scalars.prepare(
                recipe,
                lr=lr,
                squares=gate.squares,
                norm=gate.norm,
                loss_scale=gate.loss_scale,
                found_inf=gate.found_inf,
                steps=each.counter,
            )
            for table in each.tables:
                table.step(recipe.rule, each.scalars)
        taken = 1 if gate.found_inf is None else 1 - (gate.found_inf != 0).float()
        for begin, end in runs(chosen):  # foreach operators may ask the device for a number that lies there
            store.steps[begin:end].add_(taken)


def runs(chosen: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as ranges [begin, end) of neighbours. Pure."""
    found: list[tuple[int, int]] = []
    for i in chosen:
        if found and found[-1][1] == i:
            found[-1] = found[-1][0], i + 1
        else:
            found.append((i, i + 1))
    return found

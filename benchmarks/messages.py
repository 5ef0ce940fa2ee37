"""What a message between stages of one host costs its sender: a copy into a slot, or an operator that writes there.

An addition makes a tensor, and the tensor is lent to another rank: from ordinary memory by a copy, from a room of the
slot without. In the other rows the same is made by a stage whose module has 44 operators, as a transformer's block has.
They are called by a module inside, as most are, and the addition follows: to use a room, it alone is looked at. Or all
are called by the module itself: then each is looked at, where the message is so large that this pays. One process, one
thread; nothing is trained.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import report
import torch
from report import Bar, Report, Row
from torch import Tensor, nn

from distlib.comm.slots import SlotPool
from distlib.pipeline.channels import LEAST_IN_ROOMS
from distlib.pipeline.landing import LOOK, Landing
from distlib.pipeline.program import Spec

COPIED, MADE = "copied", "made there"
MIB = 1 << 20
OPERATORS = 44
GONE = SimpleNamespace(alive=False)  # a receiver that has let go at once


class Others(nn.Module):
    """Operators that cost nothing but their call."""

    def __init__(self, operators: int) -> None:
        super().__init__()
        self.operators, self.little = operators, torch.ones(1)

    def forward(self) -> None:
        for _ in range(self.operators):
            self.little.mul(1.0)


class Sums(nn.Module):
    """The sum of two tensors, after other operators."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        self.before()
        return x + x


MODULES = {
    "an addition": lambda: Sums(lambda: None),
    f"and {OPERATORS - 1} operators by a module inside": lambda: Sums(Others(OPERATORS - 1)),
    f"and {OPERATORS - 1} operators by itself": lambda: Sums(Others(OPERATORS - 1).forward),
}


def sender(module: nn.Module, x: Tensor, in_rooms: bool) -> Callable[[], None]:
    """Makes a tensor and lends it, once per call."""
    pool, landing, spec = SlotPool(), Landing(lambda: module), [Spec.of(x)]
    values: list[Any] = [None]

    def step() -> None:
        values[0] = module(x)

    def send() -> None:
        if in_rooms:
            slot = pool.reserve(spec)
            landing.run(step, values, {0: slot.rooms[0]})
            slot = pool.fill([values.pop()], GONE, slot)
        else:
            step()
            slot = pool.fill([values.pop()], GONE)
        slot._state[0] = 0  # it has come back
        values.append(None)

    return send


def row(what: str, nbytes: int, rounds: int) -> Row:
    x, module = torch.ones(nbytes // 4), MODULES[what]()
    calls = {COPIED: sender(module, x, False), MADE: sender(module, x, True)}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-3, rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= 0:
                samples[name].append(time.perf_counter() - begin)
    looks = OPERATORS if what.endswith("itself") else 1
    bar = Bar(COPIED, MADE, at_least=1.0 if nbytes > max(LEAST_IN_ROOMS, looks * LOOK) else None)
    return Row(f"{nbytes // MIB} MiB, {what}", 1, samples, [bar])


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=101)
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(what, size * MIB, options.rounds) for what in MODULES for size in (1, 2, 4, 8, 16, 32)]
    notes = [
        f"Pipelines make messages from {LEAST_IN_ROOMS // MIB} MiB on where they are sent from, if they have "
        f"{LOOK >> 10} KiB for each operator that is looked at, and copy others."
    ]
    report.publish(Report("messages", "A message between stages of one host", rows, notes), options)


if __name__ == "__main__":
    main()

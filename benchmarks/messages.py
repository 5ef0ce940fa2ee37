"""What a message between stages of one host costs its sender: a copy into a slot, or an operator that writes there.

An addition makes a tensor, and the tensor is lent to another rank: from ordinary memory by a copy, from a room of the
slot without. In the other rows the same is made by a stage whose module has 44 operators, as a transformer's block has:
to use a room, each of them is looked at. One process, one thread; nothing is trained.
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
from distlib.pipeline.landing import Landing
from distlib.pipeline.program import Spec

COPIED, MADE = "copied", "made there"
MIB = 1 << 20
OPERATORS = 44
GONE = SimpleNamespace(alive=False)  # a receiver that has let go at once


class Sums(nn.Module):
    """The sum of two tensors, after other operators that cost nothing but their call."""

    def __init__(self, operators: int) -> None:
        super().__init__()
        self.operators, self.little = operators, torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.operators - 1):
            self.little.mul(1.0)
        return x + x


def sender(module: nn.Module, x: Tensor, in_rooms: bool) -> Callable[[], None]:
    """Makes a tensor and lends it, once per call."""
    pool, landing, spec = SlotPool(), Landing(), [Spec.of(x)]
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


def row(nbytes: int, operators: int, rounds: int) -> Row:
    x, module = torch.ones(nbytes // 4), Sums(operators)
    calls = {COPIED: sender(module, x, False), MADE: sender(module, x, True)}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-3, rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= 0:
                samples[name].append(time.perf_counter() - begin)
    bar = Bar(COPIED, MADE, at_least=1.0 if nbytes > LEAST_IN_ROOMS else None)
    what = f"{nbytes // MIB} MiB, {'an addition' if operators == 1 else f'{operators} operators'}"
    return Row(what, 1, samples, [bar])


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=101)
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [1, 2, 4, 8, 16, 32]
    rows = [row(size * MIB, operators, options.rounds) for operators in (1, OPERATORS) for size in sizes]
    notes = [f"Pipelines make messages from {LEAST_IN_ROOMS // MIB} MiB on where they are sent from, and copy others."]
    report.publish(Report("messages", "A message between stages of one host", rows, notes), options)


if __name__ == "__main__":
    main()

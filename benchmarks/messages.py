"""What a message between stages of one host costs its sender: a copy into a slot, or an operator that writes there.

An addition makes a tensor, and the tensor is lent to another rank: from ordinary memory by a copy, from a room of the
slot without. In other rows the same is made by a stage whose module has 44 operators, as a transformer's block has.
They are called by a module inside, as most are, and the addition follows: to use a room, it alone is looked at. Or all
are called by the module itself: then each is looked at, where the message is so large that this pays. Or a layer norm
makes the tensor, which has no form for a given result: its kernel is looked into. One process, one thread; nothing is
trained.
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
from torch.nn import functional

from distlib.comm.slots import SlotPool, least_in_rooms
from distlib.pipeline.landing import INSIDE, LOOKS, Landing
from distlib.pipeline.program import Spec

COPIED, MADE = "copied", "made there"
MIB = 1 << 20
OTHERS = 43  # a transformer's block has 44 operators
GONE = SimpleNamespace(alive=False)  # a receiver that has let go at once


class Others(nn.Module):
    """Operators that cost nothing but their call."""

    def __init__(self, operators: int) -> None:
        super().__init__()
        self.operators, self.little = operators, torch.ones(1)

    def forward(self) -> None:
        for _ in range(self.operators):
            self.little.mul(1.0)


class Ends(nn.Module):
    """What the last operator makes, after others."""

    def __init__(self, before: Callable[[], None], end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.end = before, end

    def forward(self, x: Tensor) -> Tensor:
        self.before()
        return self.end(x)


def add(x: Tensor) -> Tensor:
    return x + x


def norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x.view(-1, 1024), (1024,))


def nothing() -> None:
    pass


# Modules, and how many operators are looked at: a layer norm asks for memory three times, and makes two views.
MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "an addition": (lambda: Ends(nothing, add), 1),
    f"an addition after {OTHERS} operators of a module inside": (lambda: Ends(Others(OTHERS), add), 1),
    f"an addition after {OTHERS} operators of its own": (lambda: Ends(Others(OTHERS).forward, add), OTHERS + 1),
    f"a layer norm after {OTHERS} operators of a module inside": (lambda: Ends(Others(OTHERS), norm), 1 + 5 * INSIDE),
}


def sender(module: nn.Module, x: Tensor, in_rooms: bool) -> Callable[[], None]:
    """Makes a tensor and lends it, once per call."""
    pool, landing, spec = SlotPool(), Landing(lambda: module, least_in_rooms()), [Spec.of(module(x))]
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
    make, looks = MODULES[what]
    x, module = torch.ones(nbytes // 4), make()
    calls = {COPIED: sender(module, x, False), MADE: sender(module, x, True)}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-3, rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= 0:
                samples[name].append(time.perf_counter() - begin)
    least = least_in_rooms() * max(1.0, looks / LOOKS)
    bar = Bar(COPIED, MADE, at_least=1.0 if nbytes > least else None)
    return Row(f"{nbytes // MIB} MiB, {what}", 1, samples, [bar])


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=101)
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(what, size * MIB, options.rounds) for what in MODULES for size in (1, 2, 4, 8, 16, 32)]
    notes = [
        f"Pipelines make messages from {least_in_rooms() // MIB} MiB on where they are sent from, if they have "
        f"{least_in_rooms() // LOOKS >> 10} KiB for each operator that is looked at ({INSIDE} times that for one "
        "inside of another), and copy others."
    ]
    report.publish(Report("messages", "A message between stages of one host", rows, notes), options)


if __name__ == "__main__":
    main()

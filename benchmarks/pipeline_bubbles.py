"""Bubbles of every schedule with stages that sleep, measured beside simulated.

    stage       forward: sleeps F       gradient of its input: sleeps B       gradient of its weight: sleeps W

Sleeping needs no core, so that eight ranks fit on two. What is left is the runtime: its messages, its order of actions,
and what it does between them. The simulator is given the lengths of the sleeps and what a message costs (until it is
there, and of the time of its sender and receiver), which is measured apart, by ping-pong over the same transport.

Each schedule runs with sleeps of two lengths: half as long as what a rank of the GPT in `pipeline.py` computes for a
micro-batch, and a fifth as long, where what the runtime does per action weighs more than in any such training.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import distlib
from distlib.comm.group import Group
from distlib.pipeline import NAMES, Costs, Schedule, Simulation, generate, lower, parse, simulate
from distlib.pipeline.record import Spec
from distlib.pipeline.simulate import played
from distlib.pipeline.transport import Transport

if TYPE_CHECKING:  # ranks draw nothing
    from report import Row

# Seconds of F, B and W: of a rank's share of the model, for a micro-batch.
LENGTHS = {"50 ms": (0.050, 0.050, 0.040), "20 ms": (0.020, 0.020, 0.016)}
WIDTH = 8  # elements of a message, a few bytes: no sleeping rank's core is needed to copy them
_SET_TIMER_SLACK = 29  # of prctl(2): how much later than asked for the kernel may end a sleep
NEAR = 0.03  # how far a measured bubble may be from the simulated one
DRAWN = ("1f1b", "zb-h1", "zb-v")


class _Sleep(torch.autograd.Function):
    """The same values, a while later; and their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_time = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_time)
        return gradient, None, None


class Sleeper(nn.Module):
    """A Linear that takes as long as it is told to. forward, backward (B), weight (W): seconds.

    Its weight's gradient lands in the weight pass of a divided backward and in a plain backward otherwise: the sleep W
    is a hook there, and so is always where the runtime computes weight gradients.
    """

    def __init__(self, forward: float, backward: float, weight: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.weight.register_post_accumulate_grad_hook(lambda _: time.sleep(weight))
        self.times = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(self.linear(x), *self.times)


@dataclass(frozen=True)
class Measured:
    """bubbles: of the steps. simulated: the bubble by simulation. line: of the step with the median bubble, per rank,
    (action, start, end)."""

    bubbles: list[float]
    simulated: float
    lines: list[list[tuple[str, float, float]]]


# ---- on every rank ----------------------------------------------------------------------------------------


def measure(steps: int) -> dict[str, Any]:
    """{"message": `message_costs`, lengths: {schedule: a `Measured` as a dict}}. Every rank must call it."""
    group = Group.of(None)
    message = message_costs(group)
    found: dict[str, Any] = {"message": message}
    _sleep_exactly()
    for lengths in LENGTHS:
        found[lengths] = {name: asdict(_measure(name, group.size, lengths, message, steps)) for name in NAMES}
    return found


def _sleep_exactly() -> None:
    """Sleeps of this thread, and of those that it starts, end when they should: by default, up to 50 us later."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_TIMER_SLACK, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_TIMERSLACK) failed")


def schedule_of(name: str, ranks: int, lengths: str, message: Mapping[str, float]) -> tuple[Schedule, Costs]:
    """Twice as many micro-batches as ranks: the least at which zb-v has no bubble. Two stages of a rank have half of
    its work each."""
    virtual = 2 if name in ("interleaved", "zb-v") else 1
    costs = Costs(*(seconds / virtual for seconds in LENGTHS[lengths]), **message)
    return generate(name, ranks, 2 * ranks, costs=costs if name == "auto" else None), costs


def _measure(name: str, ranks: int, lengths: str, message: Mapping[str, float], steps: int) -> Measured:
    schedule, costs = schedule_of(name, ranks, lengths, message)
    stages = [Sleeper(costs.forward, costs.backward, costs.weight) for _ in range(schedule.stages)]
    model = distlib.PipelineParallel(
        None,
        schedule=schedule,
        microbatches=schedule.micro_batches,
        split=stages,
        loss_fn=lambda output, _: output.square().mean(),
    )
    batch = torch.ones(schedule.micro_batches, WIDTH)
    for _ in range(2):
        model.train_step(batch)
    gc.collect()  # what the models before left: else Python collects it when a rank is in a step
    runs = sorted((model.timed_step(batch)[1] for _ in range(steps)), key=lambda run: run.bubble)
    lines = [[(str(action), start, end) for action, start, end in line] for line in runs[steps // 2].lines]
    return Measured([run.bubble for run in runs], simulate(lower(schedule), costs).bubble, lines)


def message_costs(group: Group, rounds: int = 60) -> dict[str, float]:
    """Seconds, medians, as `Costs` has them. All ranks must call it.

    comm: from a send on rank 0 to the end of `take` on rank 1, half a round trip. send, post: of these calls on rank 0.
    """
    transport = Transport(group, range(group.size), [(0, 1)])
    tensor = torch.ones(1, WIDTH)
    specs = [Spec.of(tensor)]
    spent: dict[str, list[float]] = {"comm": [], "send": [], "post": []}
    for k in range(rounds):
        if group.rank == 0:
            began = time.perf_counter()
            transport.post(1, 0, k, specs)
            posted = time.perf_counter()
            transport.send(0, 1, k, [tensor])
            sent = time.perf_counter()
            transport.take(1, 0, k)
            spent["comm"].append((time.perf_counter() - posted) / 2)
            spent["send"].append(sent - posted)
            spent["post"].append(posted - began)
        elif group.rank == 1:
            transport.post(0, 1, k, specs)
            transport.take(0, 1, k)
            transport.send(1, 0, k, [tensor])
        transport.finish()
    transport.close()
    found = torch.tensor([statistics.median(times or [0.0]) for times in spent.values()], dtype=torch.float64)
    group.broadcast(found, 0)
    return dict(zip(spent, found.tolist(), strict=True))


# ---- the process that starts the ranks --------------------------------------------------------------------


def rows_of(ranks: int, found: dict[str, Any]) -> list[Row]:
    """A row per schedule and lengths, with what `measure` returned."""
    from pipeline_report import Gap, Plain

    return [
        Plain(
            f"bubble, {name}, m={2 * ranks}, F of {lengths}",
            ranks,
            {"measured": found[lengths][name]["bubbles"], "simulated": [found[lengths][name]["simulated"]]},
            [Gap("measured", "simulated", at_most=NEAR)],
        )
        for lengths in LENGTHS
        for name in NAMES
    ]


def time_line(name: str, ranks: int, found: dict[str, Any]) -> Simulation:
    """What the ranks did when, in the step with the median bubble; for `distlib.pipeline.save_png`."""
    lengths = next(iter(LENGTHS))
    schedule, _ = schedule_of(name, ranks, lengths, found["message"])
    lines: Sequence[Any] = found[lengths][name]["lines"]
    return played(schedule, [[(parse(token), start, end) for token, start, end in line] for line in lines])

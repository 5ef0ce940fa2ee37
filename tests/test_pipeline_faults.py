"""A pipeline when something is wrong: every rank of every replica ends in time, and names stage, micro-batch, action."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import Outcome, run_ranks_raw
from torch import Tensor, nn

import distlib
from distlib.comm.work import CollectiveError
from distlib.pipeline.runtime import StageError

ROWS, MICRO, WIDTH = 8, 4, 6
AT = MICRO + 1  # the call that fails: micro-batch 1 of the second step
TIMEOUT = 2.0  # seconds
PATIENT = 60.0  # where nobody may have to wait so long


class Trouble:
    """Does it in the AT-th of its calls: raises, ends, hangs or stops."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls != AT + 1:
            return
        if self.how == "raises":
            raise ArithmeticError("on purpose")
        if self.how == "is interrupted":
            raise KeyboardInterrupt
        if self.how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "hangs":
            time.sleep(2 * TIMEOUT)


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def set_up(model: nn.Module, phase: str, trouble: Callable[..., None]) -> None:
    """Trouble in a phase of what this rank runs of the model."""
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    if phase == "forward":
        layer.register_forward_hook(trouble)
    if phase == "backward":
        layer.register_forward_hook(lambda _, __, output: output.register_hook(trouble) and None)
    if phase == "weights":
        layer.weight.register_hook(trouble)


@contextlib.contextmanager
def told(found: list[Any]) -> Iterator[None]:
    """Notes what the block raised: type, text, type of the cause, seconds."""
    began = time.monotonic()
    try:
        yield
    except BaseException as error:
        found.append((type(error).__name__, str(error), type(error.__cause__).__name__, time.monotonic() - began))
    else:
        found.append(("nothing", "", "", time.monotonic() - began))


def steps(rank: int, n: int, culprit: int, phase: str, how: str, plan: dict[str, Any], timeout: float) -> list[Any]:
    """Three steps, in the second of which a rank is in trouble. What the second and the third raised."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(plan["pipeline"])))
    found: list[Any] = []
    distlib.init(timeout=timedelta(seconds=timeout))
    trouble = Trouble(how if rank == culprit else "nothing")

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if phase == "loss":
            trouble()
        return mean_square(output, target)

    engine = distlib.parallelize(
        module,
        distlib.Plan(microbatches=MICRO, costs="estimated", **plan),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss_fn=loss_fn,
        example_inputs=torch.randn(ROWS, WIDTH),
    )
    set_up(engine.model, phase, trouble)
    batch = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    engine.train_step(*batch)
    for _ in range(2):
        with told(found):
            engine.train_step(*batch)
    return found


if __name__ == "__main__":
    pass

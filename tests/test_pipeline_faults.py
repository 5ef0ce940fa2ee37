"""A pipeline when something is wrong: all ranks end in time, and say at which stage, micro-batch and action it was."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Outcome, run_ranks_raw
from torch import Tensor, nn

import distlib

ROWS, MICRO, WIDTH = 8, 4, 6
SHORT = 2.0  # seconds: where ranks must notice by themselves that one is silent
PATIENT = 300.0  # where they must be told: the test ends before


class Raised(NamedTuple):
    """What a step raised. kind: "" for nothing."""

    kind: str
    text: str
    cause: str


def attempts(step: Callable[[], Any], count: int = 2) -> list[Raised]:
    """What each of so many steps raised."""
    found = []
    for _ in range(count):
        try:
            step()
            found.append(Raised("", "", ""))
        except BaseException as error:  # noqa: BLE001 - one of them is an interrupt
            found.append(Raised(type(error).__name__, str(error), repr(error.__cause__)))
    return found


class Trouble:
    """Happens in micro-batch 1 of the second step, in its sixth call."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls != MICRO + 2:
            return
        if self.how == "raises":
            raise ArithmeticError("on purpose")
        if self.how == "is interrupted":
            raise KeyboardInterrupt
        if self.how == "sleeps":
            time.sleep(SHORT + 1)
        if self.how in ("is killed", "stops"):
            os.kill(os.getpid(), signal.SIGKILL if self.how == "is killed" else signal.SIGSTOP)


def lay(model: nn.Module, phase: str, trouble: Trouble) -> None:
    """Trouble in a phase of the one layer that this rank has."""
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    if phase == "forward":
        layer.register_forward_hook(trouble)
    if phase == "backward":
        layer.register_forward_hook(lambda _, __, output: output.register_hook(trouble) and None)
    if phase == "weights":  # of the whole weight, which a sharded stage shows in its forward

        def once(*_: Any) -> None:
            handle.remove()
            layer.weight.register_hook(trouble)

        handle = layer.register_forward_pre_hook(once)


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def layers(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)))


@contextlib.contextmanager
def pipelines(rank: int, n: int, each: int) -> Iterator[tuple[int, dist.ProcessGroup]]:
    """Many pipelines beside each other, that share nothing: which of them this rank is in, and its group."""
    distlib.init(timeout=timedelta(seconds=PATIENT))
    limit = timedelta(seconds=PATIENT)  # to meet; messages have their own
    groups = [dist.new_group(range(first, first + each), timeout=limit) for first in range(0, n, each)]
    yield rank // each, groups[rank // each]


# ------------------------------------------------------------ a stage in trouble

# The phase, the stage, and how errors name the action in micro-batch 1. One pipeline of three ranks for each.
PHASES = [
    ("forward", 1, "1F1: forward of micro-batch 1"),
    ("backward", 1, "1B1: backward, input gradients, of micro-batch 1"),
    ("weights", 1, "1W1: weight gradients of micro-batch 1"),
    ("loss", 2, "2F1: forward of micro-batch 1"),
]


def in_trouble(rank: int, n: int, how: str, timeout: float) -> list[Raised]:
    with pipelines(rank, n, 3) as (number, group):
        phase, culprit, _ = PHASES[number]
        trouble = Trouble(how if rank % 3 == culprit else "nothing")

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            if phase == "loss":
                trouble()
            return mean_square(output, target)

        batch = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
        model = distlib.PipelineParallel(
            layers(3), None, "zb-h1", MICRO, loss_fn, ["1", "2"], batch[0], group, costs="estimated", timeout=timeout
        )
        lay(model, phase, trouble)
        model.train_step(*batch)
        return attempts(lambda: model.train_step(*batch), 3)


def by_pipeline(outcomes: list[Outcome], each: int) -> list[list[Outcome]]:
    return [outcomes[first : first + each] for first in range(0, len(outcomes), each)]


def first_error(outcome: Outcome) -> Raised:
    """The first that a rank raised; the step after it raises at once, and says why."""
    assert outcome.ok, outcome
    at = next(i for i, raised in enumerate(outcome.value) if raised.kind)
    assert at < 2, outcome.value  # a rank may be through with the step in which another fails in its last passes
    error, later = outcome.value[at : at + 2]
    assert later.kind == "CollectiveError" and "this pipeline ended in an earlier step" in later.text, later
    assert error.text in later.text or error.kind == "KeyboardInterrupt"
    return error


@pytest.mark.parametrize("how", ["raises", "is interrupted"])
def test_what_a_stage_raises_is_told_on_all_ranks(how: str) -> None:
    outcomes = run_ranks_raw(3 * len(PHASES), in_trouble, how, PATIENT, timeout=60)
    for number, ranks in enumerate(by_pipeline(outcomes, 3)):
        _, culprit, action = PHASES[number]
        what = "ArithmeticError: on purpose" if how == "raises" else "KeyboardInterrupt: "
        words = f"rank {3 * number + culprit}, stage {culprit}, action {action}: {what}"
        for stage, error in enumerate(map(first_error, ranks)):
            if stage != culprit:
                assert error.kind == "CollectiveError" and error.text.endswith(words), error
                assert error.text.startswith(f"rank {3 * number + stage}, "), error
            elif how == "raises":
                assert error == ("StageError", words, "ArithmeticError('on purpose')")
            else:
                assert error.kind == "KeyboardInterrupt"


@pytest.mark.parametrize("how", ["is killed", "stops", "sleeps"])
def test_a_stage_that_is_silent_is_noticed_by_all_ranks(how: str) -> None:
    timeout = PATIENT if how == "is killed" else SHORT
    outcomes = run_ranks_raw(3 * len(PHASES), in_trouble, how, timeout, timeout=60)
    for number, ranks in enumerate(by_pipeline(outcomes, 3)):
        _, culprit, _ = PHASES[number]
        kind = {"is killed": "signal", "stops": "stopped", "sleeps": "value"}[how]
        assert ranks[culprit].kind == kind, ranks[culprit]
        errors = {stage: first_error(outcome) for stage, outcome in enumerate(ranks) if outcome.ok}
        for stage, error in errors.items():
            assert error.kind == "CollectiveError", error
            at = rf"(stage {stage}, action |the end of the step: ).*micro-batch \d"
            assert re.match(rf"rank {3 * number + stage}, {at}", error.text), error
            who = f"rank {3 * number + culprit}"
            if how == "is killed":  # first seen by a receive, be it of the loss, or by the end of a step
                lost = rf"{who} \(pid .*; with it went stage {culprit}$"
                seen = lost, rf"stage . -> {culprit}, .*: {who} ended before"
                assert any(re.search(words, error.text) for words in seen), error
            else:
                assert "ran into the timeout of 2000 ms" in error.text, error
                assert re.search(r"stage \d -> \d, ", error.text), error


def test_between_hosts_all_ranks_hear_who_it_was() -> None:
    """By a last message, or from the group's store."""
    outcomes = run_ranks_raw(3 * len(PHASES), in_trouble, "raises", PATIENT, timeout=60, env={"DISTLIB_NODES": "3"})
    for number, ranks in enumerate(by_pipeline(outcomes, 3)):
        _, culprit, _ = PHASES[number]
        for stage, error in enumerate(map(first_error, ranks)):
            assert error.kind == ("StageError" if stage == culprit else "CollectiveError"), error
            own, _, heard = error.text.partition(": ")
            assert own.startswith(f"rank {3 * number + stage}, "), error
            words = f"rank {3 * number + culprit}, stage {culprit}, action .*: ArithmeticError: on purpose"
            assert stage == culprit or re.search(words, heard), error


def unsaid(rank: int, n: int, how: str) -> list[str]:
    """An error whose words cannot be sent as they are."""

    class Silent(Exception):
        def __str__(self) -> str:
            raise TypeError("no words")

    distlib.init(timeout=timedelta(seconds=PATIENT))
    batch = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    model = distlib.PipelineParallel(
        layers(2), None, "1f1b", MICRO, mean_square, ["1"], batch[0], None, costs="estimated", timeout=PATIENT
    )

    def fail(*_: Any) -> None:
        raise Silent if how == "silent" else RuntimeError("a file named \udcff")

    if rank == 1:
        next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(fail)
    with pytest.raises(RuntimeError) as caught:
        model.train_step(*batch)
    return [type(caught.value).__name__, str(caught.value)]


@pytest.mark.parametrize("hosts", ["1", "2"])
@pytest.mark.parametrize(("how", "words"), [("silent", "its __str__ raises TypeError"), ("surrogate", r"named \udcff")])
def test_an_error_that_cannot_be_said_is_told_all_the_same(how: str, words: str, hosts: str) -> None:
    outcomes = run_ranks_raw(2, unsaid, how, timeout=60, env={"DISTLIB_NODES": hosts})
    assert [outcome.value[0] for outcome in outcomes] == ["CollectiveError", "StageError"], outcomes
    assert all(words in outcome.value[1] for outcome in outcomes)


def threads_left(rank: int, n: int) -> list[int]:
    distlib.init()
    batch = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    found = []
    for _ in range(3):
        model = distlib.PipelineParallel(layers(2), None, "1f1b", MICRO, mean_square, ["1"], batch[0])
        model.train_step(*batch)
        del model
        gc.collect()
        dist.barrier()
        found.append(sum(thread.name.startswith("distlib-pipeline") for thread in threading.enumerate()))
    return found


def test_a_pipeline_that_is_gone_leaves_no_thread() -> None:
    for outcome in run_ranks_raw(2, threads_left, timeout=60, env={"DISTLIB_NODES": "2"}):
        assert outcome.value == [0, 0, 0], outcome



# ------------------------------------------------------------ replicas


def in_replicas(rank: int, n: int, plan: dict[str, Any], phase: str, culprit: int) -> list[Raised]:
    distlib.init(timeout=timedelta(seconds=PATIENT))
    batch = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    engine = distlib.parallelize(
        layers(2),
        distlib.Plan(pipeline=2, schedule="zb-h1", microbatches=MICRO, costs="estimated", **plan),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss_fn=mean_square,
        example_inputs=batch[0],
    )
    lay(engine.model, phase, Trouble("raises" if rank == culprit else "nothing"))
    engine.train_step(*batch)
    return attempts(lambda: engine.train_step(*batch), 3)


@pytest.mark.parametrize(
    ("plan", "phase", "culprit"),
    [
        ({}, "forward", 0),
        ({}, "weights", 3),
        ({"stage": 1}, "backward", 2),
        ({"stage": 3}, "forward", 1),
        ({"stage": 3}, "weights", 2),
        ({"stage": 3, "partition_size": 1}, "weights", 3),
    ],
)
def test_a_failure_in_one_replica_ends_all(plan: dict[str, Any], phase: str, culprit: int) -> None:
    """Ranks 0 and 1 hold stage 0 of two pipelines, ranks 2 and 3 stage 1."""
    outcomes = run_ranks_raw(4, in_replicas, plan, phase, culprit, timeout=60)
    for rank, error in enumerate(map(first_error, outcomes)):
        if rank == culprit:
            assert error.kind == "StageError" and error.cause == "ArithmeticError('on purpose')"
            assert error.text.startswith(f"rank {rank}, stage {rank // 2}, action {rank // 2}"), error
        else:
            assert error.kind == "CollectiveError" and error.text.startswith(f"rank {rank}, "), error
            # A backward that ends lets its replicas know before its stage can.
            assert re.search(rf"rank {culprit}(, stage {culprit // 2}, action |: backward stopped)", error.text), error


# ------------------------------------------------------------ ranks that do not agree

DIFFERENT = ["length", "rows", "too few rows", "loss"]


def different(rank: int, n: int) -> list[Raised]:
    with pipelines(rank, n, 2) as (number, group):
        what, odd = DIFFERENT[number], rank % 2 == 1

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            return (output - target).square().mean(0) if what == "loss" else mean_square(output, target)

        rows = {"rows": ROWS + MICRO, "too few rows": MICRO - 1}.get(what, ROWS) if odd else ROWS
        batch = torch.randn(rows, 5 if odd and what == "length" else 3, WIDTH)
        example = torch.randn(ROWS, 3, WIDTH)
        model = distlib.PipelineParallel(
            layers(2), None, "1f1b", MICRO, loss_fn, ["1"], example, group, costs="estimated", timeout=SHORT
        )
        return attempts(lambda: model.train_step(batch, batch))


def test_ranks_that_are_given_different_batches_or_losses_say_so() -> None:
    outcomes = run_ranks_raw(2 * len(DIFFERENT), different, timeout=60)
    found = dict(zip(DIFFERENT, by_pipeline(outcomes, 2), strict=True))
    for what, first, shapes in [("length", 0, "[2, 3, 6]; rank 1 expects float32 [2, 5, 6]"),
                                ("rows", 2, "[2, 3, 6]; rank 3 expects float32 [3, 3, 6]")]:  # fmt: skip
        for stage, error in enumerate(map(first_error, found[what])):
            assert error.kind == "CollectiveError" and error.text.startswith(f"rank {first + stage}, stage {stage}, ")
            assert f"stage 0 -> 1, micro-batch 0 (activations): rank {first} sent float32 {shapes}" in error.text
            assert "Was one of them given a batch of another size, or another sequence length?" in error.text
    other, odd = found["too few rows"]
    assert [raised.kind for raised in odd.value] == ["ValueError"] * 2 and "a batch of 3 rows" in odd.value[0].text
    assert "rank 5 " in first_error(other).text or "ran into the timeout" in first_error(other).text
    words = "rank 7, stage 1, action 1F0: forward of micro-batch 0: ValueError: loss_fn returned a tensor of shape"
    told, raised = map(first_error, found["loss"])
    assert told.kind == "CollectiveError" and words in told.text
    assert raised.kind == "StageError" and raised.text.startswith(words) and "ValueError(" in raised.cause

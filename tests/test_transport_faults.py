"""Messages between pipeline stages when something is wrong: whatever it is, the ranks it concerns are told, by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcome, process_group, run_ranks, run_ranks_raw, shared_files, store
from test_transport import EVERY_WAY, NO_CORE, ONE, one_tensor, specs_of
from torch import Tensor

from distlib.comm.group import Group
from distlib.comm.work import CollectiveError
from distlib.pipeline.transport import Transport

# ---------------------------------------------------------------- ends that do not agree


def error_of(call: Callable[[], object]) -> CollectiveError:
    with pytest.raises(CollectiveError) as caught:
        call()
    return caught.value


SOUND = [torch.ones(4, 8), torch.ones(2)]
WRONG: dict[str, tuple[int, list[Tensor], str]] = {  # micro-batch, tensors, and how errors call what was sent
    "shape": (1, [torch.ones(4, 6), torch.ones(2)], "rank 0 sent float32 [4, 6], float32 [2]"),
    "dtype": (1, [torch.ones(4, 8).double(), torch.ones(2)], "rank 0 sent float64 [4, 8], float32 [2]"),
    "count": (1, [torch.ones(4, 8)], "rank 0 sent float32 [4, 8]"),
    "micro-batch": (2, SOUND, "rank 0 sent micro-batch 2"),
}


def meet(rank: int, n: int) -> None:
    """No rank ends before all have come here: what they see of each other until then is not their end."""
    store().set(f"met/{rank}", "")
    store().wait([f"met/{r}" for r in range(n)])


def join(rank: int, n: int, backend: str, timeout: float = 10, edges: Any = ((0, 1),)) -> Transport:
    """A chain of a stage on each rank. The group has more patience than the transport."""
    dist.init_process_group(backend, store=store(), rank=rank, world_size=n, timeout=timedelta(seconds=40))
    return Transport(Group.of(), list(range(n)), edges, timeout)


def differ(rank: int, n: int, backend: str, how: str) -> str:
    transport = join(rank, n, backend)
    k, tensors, _ = WRONG[how]

    def send() -> None:
        transport.send(0, 1, 0, SOUND)
        transport.send(0, 1, k, tensors)
        transport.finish()
        transport.post(1, 0, 0, ONE)  # by slots, only who waits for the receiver hears it
        transport.take(1, 0, 0)

    def receive() -> None:
        for m in range(2):
            transport.post(0, 1, m, specs_of(SOUND))
            transport.take(0, 1, m)

    error = error_of(send if rank == 0 else receive)
    assert error.code in ("mismatch", "aborted") and isinstance(error.__cause__, CollectiveError)
    assert "stage 0 -> 1" in str(error_of(transport.finish)), "the transport is of no further use"
    meet(rank, n)
    return str(error)


@EVERY_WAY
@pytest.mark.parametrize("how", ["shape", "dtype", "count", "micro-batch"])
def test_ends_that_do_not_agree_both_say_what_was_sent_and_expected(
    how: str, backend: str, env: dict[str, str]
) -> None:
    for text in run_ranks(2, differ, backend, how, env=env, timeout=30):
        assert "stage 0 -> 1, micro-batch" in text and "(activations)" in text, text
        assert WRONG[how][2] in text, text
        if how == "micro-batch":
            assert "rank 1 expects micro-batch 1" in text, text
        else:
            assert "rank 1 expects float32 [4, 8], float32 [2]" in text and "sequence length" in text, text


def other_arguments(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        with pytest.raises(ValueError, match=rf"rank {rank}: edges .* something else on ranks \[{1 - rank}\]"):
            Transport(group, [0, 1, 0], [(0, 1)] if rank else [(0, 1), (1, 2)])
        with pytest.raises(ValueError, match="placement of the pipeline is"):
            Transport(group, [0, 1, rank], [(0, 1)])
        with pytest.raises(ValueError, match=r"stage 1 is on rank 2; the group has 2 ranks"):
            Transport(group, [0, 2], [(0, 1)])
        with pytest.raises(ValueError, match=r"edges: \(0, 2\) must join two of the 2 stages"):
            Transport(group, [0, 1], [(0, 2)])
        transport = Transport(group, [0, 1, 1], [(1, 0), (1, 2)], timedelta(seconds=20))
        with pytest.raises(ValueError, match=rf"nothing from stage {1 - rank} to stage {rank}; its channels are: "):
            transport.send(1 - rank, rank, 0, [])
        with pytest.raises(RuntimeError, match=r"micro-batch 3 \((activations|gradients)\): take\(\) without a post"):
            transport.take(1 - rank, rank, 3)
        with pytest.raises(ValueError, match="a tensor on meta"):
            transport.send(rank, 1 - rank, 0, [torch.empty(3, device="meta")])
        transport.send(rank, 1 - rank, 0, [])  # as good as before
        transport.post(1 - rank, rank, 0, [])
        with pytest.raises(RuntimeError, match=rf"before these messages were taken: stage {1 - rank} -> {rank}, .* 0"):
            transport.finish()
        assert transport.take(1 - rank, rank, 0) == ()
        transport.finish()
        transport.close()
        transport.close()
        with pytest.raises(RuntimeError, match="was closed on this rank"):
            transport.finish()


def test_arguments_that_cannot_be_right_are_refused_by_name() -> None:
    run_ranks(2, other_arguments)


# ---------------------------------------------------------------- faults


def fails(rank: int, n: int, backend: str, how: str) -> tuple[str, float]:
    """Rank 1 comes to its end after a first message; ranks 0 and 2, its neighbours in the pipeline, wait for it."""
    transport = join(rank, n, backend, 2 if how == "stops" else 20, [(0, 1), (1, 2)])
    if rank == 1:
        transport.post(0, 1, 0, ONE)
        transport.take(0, 1, 0)
        transport.send(1, 2, 0, [one_tensor(1, 0)])
        transport.finish()
        meet(rank, n)
        if how == "aborts":
            transport.abort("stage 1 ran out of luck")
            store().wait(["seen/0", "seen/2"])  # its own end is not what the others see
        elif how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        transport.send(0, 1, 0, [one_tensor(0, 0)])
        transport.finish()
        meet(rank, n)
        transport.send(0, 1, 1, [one_tensor(0, 1)])
        transport.post(1, 0, 0, ONE)
        begin = time.monotonic()
        error = error_of(lambda: transport.take(1, 0, 0))
    else:
        transport.post(1, 2, 0, ONE)
        held = transport.take(1, 2, 0)[0]
        transport.post(1, 2, 1, ONE)
        meet(rank, n)
        begin = time.monotonic()
        error = error_of(lambda: transport.take(1, 2, 1))
        assert torch.equal(held, one_tensor(1, 0)), "what came before stays"
    assert isinstance(error.__cause__, CollectiveError)
    seconds = time.monotonic() - begin
    store().set(f"seen/{rank}", "")
    transport.abort("the step failed")
    error_of(transport.finish)
    transport.close()
    return str(error), seconds


@EVERY_WAY
@pytest.mark.parametrize("how", ["is killed", "stops", "aborts"])
def test_a_stage_that_fails_is_named_by_its_neighbours(how: str, backend: str, env: dict[str, str]) -> None:
    shm = shared_files()
    outcomes: list[Outcome] = run_ranks_raw(3, fails, backend, how, env=env, timeout=30)
    assert shared_files() <= shm
    for outcome, words in ((outcomes[0], "stage 1 -> 0, micro-batch 0 (gradients)"), (outcomes[2], "stage 1 -> 2, ")):
        assert outcome.ok, outcome
        text, seconds = outcome.value
        assert words in text, text
        assert seconds < 12, text
        if how == "aborts":
            assert "stage 1 ran out of luck" in text, text


def dies_with_what_it_was_sent(rank: int, n: int) -> str:
    transport = join(rank, n, "distlib")
    if rank == 1:
        meet(rank, n)
        os.kill(os.getpid(), signal.SIGKILL)
    transport.send(0, 1, 4, [one_tensor(0, 4)])
    meet(rank, n)
    until = time.monotonic() + 10
    while transport._senders[0, 1].edge.line.memory.alive and time.monotonic() < until:
        time.sleep(0.01)
    return str(error_of(transport.finish))


@NO_CORE
def test_a_receiver_that_dies_before_it_takes_a_slot_is_named_at_the_end_of_the_step() -> None:
    text = run_ranks_raw(2, dies_with_what_it_was_sent, timeout=20)[0].value
    assert "stage 0 -> 1, micro-batch 4 (activations): rank 1 ended before it took the message" in text, text

"""Communicators of a group where a rank is late, gone or of another mind: one verdict on all ranks, from stand-ins for
NCCL whose works never end."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import process_group, run_ranks, run_ranks_raw
from test_device_collectives import Case, Player
from test_nccl import CPU, KINDS, TWO_HOSTS, Unfussy, nccl_group

from distlib import native
from distlib.comm import nccl_notes
from distlib.comm.batches import Bracket, exchange
from distlib.comm.channel import Collective, Message
from distlib.comm.group import Group
from distlib.comm.nccl import NcclChannel, NcclOperation, connect_nccl
from distlib.comm.nccl_notes import Note, verdict
from distlib.comm.work import CollectiveError

pytestmark = pytest.mark.skipif(native.core() is None, reason=f"no C++ core: {native.why_not()}")


class Stuck:
    """A process group whose works never end, but those of barriers. Aborted, all look as if they were done: so NCCL's
    do, whose kernels end early."""

    def __init__(self, store: Any, rank: int, size: int, name: str, ranks: list[int], timeout: timedelta) -> None:
        self.aborted = False

    def allreduce(self, tensors: Any, op: Any) -> Any:
        return StuckWork(self)

    def barrier(self, options: Any) -> Any:
        return StuckWork(self, done=True)

    def _start_coalescing(self) -> None: ...

    def _end_coalescing(self) -> Any:
        return StuckWork(self)

    def send(self, tensors: Any, dst: int, tag: int) -> None: ...

    recv = send

    def abort(self) -> None:
        self.aborted = True

    shutdown = abort


class StuckWork(Unfussy):
    def __init__(self, group: Stuck, done: bool = False) -> None:
        self._group, self._done = group, done

    def wait(self) -> bool:
        """As NCCL's: it orders streams, and returns."""
        return True

    def is_completed(self) -> bool:
        return self._done or self._group.aborted


def late(rank: int, n: int, how: str) -> tuple[str, float]:
    nccl_notes.ASK_EVERY, nccl_notes.PATIENCE = 0.2, 1.5
    with nccl_group(rank, n, Stuck, timeout=1.0) as group:
        channel = group.cpu_channel
        assert isinstance(channel, NcclChannel)
        begin = time.monotonic()
        if how == "hangs" or rank != 2:
            group.all_reduce(torch.ones(101 if how == "disagrees" and rank == 1 else 100))
        if how == "does not answer" and rank == 2:
            channel._notes = None
        with pytest.raises(CollectiveError) as caught:
            while time.monotonic() < begin + 15:
                time.sleep(0.05)
                if how == "hangs" or rank != 2:
                    group.all_reduce(torch.ones(1))
                else:
                    channel.look()
                    if channel.aborted():
                        raise CollectiveError(channel.aborted() or "")
        assert channel.pg.aborted
        with pytest.raises(CollectiveError) as on_cpu:
            Group.of().all_reduce(torch.ones(1))
        assert str(on_cpu.value) == str(caught.value)
        return str(caught.value), time.monotonic() - begin


@pytest.mark.parametrize("how", ["never comes", "does not answer", "hangs", "disagrees"])
def test_a_late_collective_ends_all_ranks_with_one_sentence(how: str) -> None:
    results = run_ranks(3, late, how)
    assert len({text for text, _ in results}) == 1, results
    text, seconds = results[0]
    assert "all_reduce(float32, 10" in text and "#1 of group 'world' was not done within 1.0 s" in text
    said = {
        "never comes": "not started by rank 2 (it has started none)",
        "does not answer": "no answer from rank 2",
        "hangs": "started by all ranks, not done on rank 0, rank 1, rank 2",
        "disagrees": "not started by rank 2",
    }[how]
    assert said in text, text
    if how == "disagrees":
        assert "ranks disagree: " in text and "101 elements" in text
    assert seconds < 10


def judged_after_an_end(rank: int, n: int, how: str) -> str:
    nccl_notes.ASK_EVERY, nccl_notes.PATIENCE = 0.2, 1.5
    with nccl_group(rank, n, Stuck, timeout=1.0) as group:
        before = group._start(Collective("barrier"), [], None, True, None)
        x = torch.ones(3)
        if how == "batch":
            work = exchange(group, [Message(x, 1 - rank, 0, True), Message(x.clone(), 1 - rank, 0, False)])[0]
        elif how == "bracket":
            channel = group.cpu_channel
            assert isinstance(channel, NcclChannel)
            work = Bracket(group, channel).end(channel.pg._end_coalescing)
        else:
            work = group.all_reduce(x, async_op=True)
        assert before is not None and work is not None
        until = time.monotonic() + 15
        while not group.cpu_channel.aborted() and time.monotonic() < until:
            time.sleep(0.02)
        with pytest.raises(CollectiveError) as caught:
            work.wait()
        assert work.is_completed() and not work.is_success()
        assert before.wait() and before.is_success()
        return str(caught.value)


@pytest.mark.parametrize("how", ["collective", "batch", "bracket"])
def test_what_an_abort_ended_has_failed_though_its_work_looks_done(how: str) -> None:
    texts = run_ranks(2, judged_after_an_end, how)
    assert texts[0] == texts[1] and "#2 of group 'world' was not done within 1.0 s" in texts[0], texts


def slow_store(rank: int, n: int) -> tuple[str, float]:
    """The store takes its time while the watch ends the group."""
    nccl_notes.ASK_EVERY, nccl_notes.PATIENCE = 0.2, 1.5
    settle = nccl_notes.Notes.settle

    def slow(self: nccl_notes.Notes, text: str) -> str:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(3.0)
        return settle(self, text)

    nccl_notes.Notes.settle = slow  # type: ignore[method-assign]
    longest = 0.0
    with nccl_group(rank, n, Stuck, timeout=1.0) as group:
        until = time.monotonic() + 20
        with pytest.raises(CollectiveError) as caught:
            while time.monotonic() < until:
                begin = time.monotonic()
                group.all_reduce(torch.ones(1))
                longest = max(longest, time.monotonic() - begin)
                time.sleep(0.05)
        return str(caught.value), longest


def test_no_caller_waits_for_a_store_that_is_slow_to_take_the_verdict() -> None:
    for text, longest in run_ranks(2, slow_store):
        assert "was not done within 1.0 s" in text and longest < 2.0, (text, longest)


def test_the_verdict_names_ranks_by_what_they_did() -> None:
    mine = Note(3, "all_gather(float32, 9 elements)", 3, "all_gather(float32, 9 elements)")
    notes = [mine, Note(2, "barrier", 0, ""), None, Note(3, "broadcast", 3, "broadcast"), Note(5, "barrier", 4, "x")]
    text = verdict("g", [10, 11, 12, 13, 14], notes, mine, 60.0)
    assert text == (
        "all_gather(float32, 9 elements) #3 of group 'g' was not done within 60.0 s; not started by rank 11 (its last "
        "was barrier #2); no answer from rank 12: ended, or stopped; ranks disagree: rank 10 called "
        "all_gather(float32, 9 elements), rank 13 called broadcast"
    )


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 5), st.integers(0, 5))), max_size=6))
def test_a_verdict_always_accuses_somebody(others: list[tuple[int, int] | None]) -> None:
    mine = Note(3, "barrier", 3, "barrier")
    notes = [mine] + [None if o is None else Note(o[0], "x", o[1] if o[1] <= o[0] else 0, "barrier") for o in others]
    text = verdict("g", list(range(len(notes))), notes, mine, 1.0)
    assert text.startswith("barrier #3 of group 'g' was not done within 1.0 s; ") and "rank" in text.split("; ", 1)[1]


def loses_a_rank(rank: int, n: int) -> tuple[str, float]:
    nccl_notes.ASK_EVERY = 0.2
    with nccl_group(rank, n, Stuck, timeout=60.0) as group:
        group.all_reduce(torch.ones(100))
        if rank == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            while time.monotonic() < begin + 15:
                time.sleep(0.05)
                group.all_reduce(torch.ones(1))
        return str(caught.value), time.monotonic() - begin


@pytest.mark.parametrize("env", [{}, TWO_HOSTS], ids=["one host", "two hosts"])
def test_a_rank_that_is_killed_is_named_by_all_others_at_once(env: dict[str, str]) -> None:
    """Those of its host see it, and tell the others through the store."""
    outcomes = run_ranks_raw(2 if not env else 4, loses_a_rank, env=env, timeout=40)
    for outcome in outcomes:
        if outcome.rank == 1:
            continue
        assert outcome.ok, outcome
        text, seconds = outcome.value
        assert "all_reduce(float32, 100 elements) #1" in text and "cannot complete: rank 1 ended" in text, text
        assert seconds < 10


class OldWork(StuckWork):
    """As those of torch 2.11 and older, which cannot tell their exception."""

    def __init__(self, result: int | None) -> None:
        self._result: torch.futures.Future[int] = torch.futures.Future()
        if result is not None:
            self._result.set_result(result)

    def exception(self) -> Any:
        raise TypeError("Unable to convert function return value to a Python type!")

    def get_future_result(self) -> torch.futures.Future[int]:
        return self._result


@pytest.mark.parametrize(("result", "failed"), [(0, False), (1, True), (None, True)])
def test_a_work_that_cannot_tell_its_exception_is_asked_for_its_result(result: int | None, failed: bool) -> None:
    fields = {field.name: None for field in dataclasses.fields(NcclOperation)}
    operation = NcclOperation(**(fields | {"work": OldWork(result)}))
    assert operation.work_failed is failed


def ends_with_the_cpu(rank: int, n: int) -> str:
    with nccl_group(rank, n, Stuck) as group:
        if rank == 1:
            Group.of().abort("somebody was here")
        with pytest.raises(CollectiveError) as caught:
            for _ in range(200):
                group.all_reduce(torch.ones(3))
                time.sleep(0.02)
        assert group.cpu_channel.pg.aborted  # type: ignore[attr-defined]
        return str(caught.value)


def test_an_end_of_the_cpu_group_ends_the_communicators() -> None:
    assert run_ranks(2, ends_with_the_cpu) == ["somebody was here"] * 2


def by_nccl_itself(rank: int, n: int) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    with process_group(rank, n):
        world = Group.of()
        channel = connect_nccl(world, device)
        group = Group(world.name, rank, world.ranks, world.topology, channel, 20.0)
        cases = [Case(kind, torch.int64, op, 999, root=1) for kind in [*KINDS, "all_to_all"] for op in ("sum", "max")]
        cases += [Case(kind, torch.int32, numel=50, strided=True) for kind in KINDS if kind != "ring"]
        for case in cases:
            assert Player(group, device).play(case) == Player(world, CPU).play(case), f"{case} on rank {rank}"
        x = torch.full((4,), float(rank), device=device)
        work = group.all_reduce(x, "avg", async_op=True)
        assert work is not None and work.get_future().wait()[0].tolist() == [(n - 1) / 2] * 4
        assert work.wait() and x.tolist() == [(n - 1) / 2] * 4
        group.abort("enough")
        with pytest.raises(CollectiveError, match="enough"):
            group.all_reduce(x)
        channel.close()


@pytest.mark.gpu
def test_nccl_itself_with_a_gpu_for_each_rank() -> None:
    run_ranks(min(torch.cuda.device_count(), 4), by_nccl_itself, timeout=100)

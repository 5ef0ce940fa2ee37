"""Ranks that end in the middle of a transfer between hosts: gloo itself does not tell whoever is at the other end."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import sys
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcome, process_group, run_ranks, run_ranks_raw, store

import distlib
from distlib.comm.bounded_store import BoundedStore
from distlib.comm.gloo_faults import Waiting
from distlib.comm.group import Group
from distlib.comm.threads import Runner, Step, Waiters
from distlib.comm.work import CollectiveError

LARGE = 100_000_000  # elements: the transfer takes a good part of a second
TIMEOUT = 60


def hosts(n: int) -> dict[str, str | None]:
    return {"DISTLIB_NODES": str(n)}


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails(call: Any) -> tuple[str, str]:
    """The code and text of the CollectiveError that it raises, well before the timeout."""
    begin = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        call()
    assert time.monotonic() - begin < TIMEOUT / 3
    return caught.value.code, str(caught.value)


def in_time(outcomes: list[Outcome]) -> None:
    """Nor does anything keep the survivors from ending."""
    for outcome in outcomes:
        assert outcome.seconds < TIMEOUT * 0.75, str(outcome)


# ---------------------------------------------------------------- messages


def ends_in_a_message(rank: int, n: int, dying: int) -> tuple[str, str]:
    dist.init_process_group("distlib", store=store(), rank=rank, world_size=n)
    group, kept = Group.of(), store()
    tensor = (torch.zeros if rank else torch.ones)(LARGE)
    group.barrier()
    if rank == 0:
        work = group.send(tensor, 1, async_op=True, timeout=TIMEOUT)
        kept.wait(["coming"])
    else:
        work = group.recv(tensor, 0, async_op=True, timeout=TIMEOUT)
        while not tensor[0]:
            pass
        kept.set("coming", "")
    if rank == dying:
        end()
    return fails(work.wait)


@pytest.mark.parametrize("dying", [0, 1])
def test_whoever_is_in_the_middle_of_a_message_hears_that_the_other_end_has_gone(dying: int) -> None:
    outcomes = run_ranks_raw(2, ends_in_a_message, dying, env=hosts(2))
    assert outcomes[dying].kind == "signal"
    survivor = outcomes[1 - dying]
    assert survivor.ok, str(survivor)
    code, text = survivor.value
    assert code == "dead" and text.startswith(f"{'recv from' if dying == 0 else 'send to'} rank {dying}"), text
    in_time(outcomes)


def aborts_in_a_message(rank: int, n: int) -> tuple[str, str] | None:
    dist.init_process_group("distlib", store=store(), rank=rank, world_size=n)
    group, kept = Group.of(), store()
    group.barrier()
    if rank == 1:
        group.recv(torch.zeros(10), 0, tag=1, async_op=True)
        work = group.recv(torch.zeros(LARGE), 0, async_op=True)
        kept.set("posted", str(os.getpid()))
        time.sleep(3600)
        work.wait()
    kept.wait(["posted"])
    os.kill(pid := int(kept.get("posted")), signal.SIGSTOP)
    work = group.send(torch.ones(LARGE), 1, async_op=True, timeout=TIMEOUT)
    threading.Timer(1.0, group.abort, ["enough"]).start()
    found = fails(work.wait)
    os.kill(pid, signal.SIGKILL)
    return found


def test_a_group_that_is_aborted_ends_messages_that_are_half_sent() -> None:
    outcomes = run_ranks_raw(2, aborts_in_a_message, env=hosts(2))
    assert outcomes[0].ok, str(outcomes[0])
    in_time(outcomes)


def interrupted(rank: int, n: int) -> float:
    with process_group(rank, n, timeout=TIMEOUT):
        group = Group.of()
        seconds = 0.0
        if rank == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
            tensor, begin = torch.zeros(4), time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                group.recv(tensor, 0)
            seconds = time.monotonic() - begin
        group.barrier()
        if rank == 0:
            group.send(torch.ones(4), 1)
        group.barrier()
    return seconds


def test_whoever_waits_for_a_message_can_be_interrupted() -> None:
    assert run_ranks(2, interrupted, env=hosts(2))[1] < 10


def waits_in_vain(rank: int, n: int, how: str) -> str:
    """Rank 1 is late for a message of rank 0, or ends."""
    dist.init_process_group("distlib", store=store(), rank=rank, world_size=n)
    group, shared = Group.of(), store()
    group.barrier()
    if rank == 1:
        if how == "ends":
            time.sleep(0.5)
            end()
        shared.wait(["told"])
        return ""
    text = fails(lambda: group.recv(torch.zeros(3), 1, timeout=1.5 if how == "late" else TIMEOUT))[1]
    shared.set("told", "")
    return text


@pytest.mark.parametrize(("how", "seconds"), [("late", r"1\.[5-9]"), ("ends", r"0\.\d")])
def test_a_message_that_fails_says_how_long_it_was_waited_for(how: str, seconds: str) -> None:
    outcome = run_ranks_raw(2, waits_in_vain, how, env=hosts(2))[0]
    assert outcome.ok, str(outcome)
    assert re.match(rf"recv from rank 1 \(tag 0\) failed after {seconds} s\. gloo says: ", outcome.value), outcome.value


def ends_before_its_child(rank: int, n: int) -> tuple[str, str]:
    """A child that rank 1 had forked holds what it inherited, as a data loader's worker would."""
    dist.init_process_group("distlib", store=store(), rank=rank, world_size=n)
    group = Group.of()
    group.barrier()
    if rank == 1:
        if os.fork() == 0:
            os.setsid()  # else it would be killed with its parent's group
            time.sleep(20)
            os._exit(0)
        end()
    return fails(lambda: group.all_reduce(torch.zeros(3), timeout=TIMEOUT))


@pytest.mark.parametrize("env", [{"DISTLIB_NODES": "2"}, {"DISTLIB_CORE": "0"}])
def test_a_rank_is_seen_to_end_though_a_child_of_it_lives(env: dict[str, str]) -> None:
    outcome = run_ranks_raw(2, ends_before_its_child, env=env)[0]
    assert outcome.ok, str(outcome)
    assert outcome.value[0] == "dead" and "rank 1" in outcome.value[1] and outcome.seconds < 12, str(outcome)


def forks_and_goes_on(rank: int, n: int) -> str:
    """Only sockets of gloo are not for children, and the parent keeps all."""
    kept, other = socket.socketpair()
    with process_group(rank, n):
        dist.destroy_process_group(dist.new_group(range(n)))  # its descriptors are free again
        late, answer = socket.socketpair()
        if (child := os.fork()) == 0:
            kept.send(b"a")
            late.send(b"b")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        x = torch.ones(3)
        dist.all_reduce(x)
        assert x.tolist() == [n] * 3
        return (other.recv(1) + answer.recv(1)).decode()


def test_a_child_keeps_the_sockets_that_are_not_of_a_group() -> None:
    assert run_ranks(2, forks_and_goes_on, env=hosts(2)) == ["ab", "ab"]


# ---------------------------------------------------------------- collectives


def ends_in_a_collective(rank: int, n: int) -> tuple[str, str]:
    dist.init_process_group("distlib", store=store(), rank=rank, world_size=n)
    group = Group.of()
    group.barrier()
    channel: Any = group._channel
    exchange = channel.exchange

    def watched(out: torch.Tensor, *rest: Any) -> Any:
        work = exchange(out, *rest)
        if rank == 2:
            while not (out[3] or out[out.numel() // n + 3]):  # the last byte of a 1.0, from either
                pass
            end()
        return work

    channel.exchange = watched
    given = [torch.ones(LARGE // n) for _ in range(n)]
    return fails(lambda: group.all_to_all([torch.zeros(LARGE // n) for _ in range(n)], given, timeout=TIMEOUT))


def test_all_who_are_in_the_middle_of_a_collective_hear_who_has_gone() -> None:
    outcomes = run_ranks_raw(3, ends_in_a_collective, env=hosts(3))
    assert outcomes[2].kind == "signal"
    for outcome in outcomes[:2]:
        assert outcome.ok, str(outcome)
        code, text = outcome.value
        assert code == "dead" and "ranks that ended or do not answer: rank 2." in text, text
    in_time(outcomes)


def leaves(rank: int, n: int, how: str) -> Any:
    """Rank 1 has sent its part, and ends while rank 0 still waits for rank 2's."""
    dist.init_process_group("distlib", store=store(), rank=rank, world_size=n)
    group = Group.of()
    group.barrier()
    if rank == 2:
        time.sleep(8)
    out = [torch.zeros(3) for _ in range(n)] if rank == 0 else None
    call = lambda: group.gather(out, torch.full((3,), float(rank)), 0, timeout=TIMEOUT)  # noqa: E731
    if rank == 0 and how == "dies":
        return fails(call)
    if rank == 2 and how == "dies":
        return None
    call()
    if rank == 1 and how == "dies":
        end()
    dist.destroy_process_group()
    return [t.tolist() for t in out] if out else None


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_a_rank_that_left_in_good_order_is_not_taken_for_one_that_ended(how: str) -> None:
    outcomes = run_ranks_raw(3, leaves, how, env={**hosts(3), "DISTLIB_FINGERPRINT": "0"})
    assert outcomes[0].ok, str(outcomes[0])
    assert outcomes[1].seconds < 8
    if how == "leaves":
        assert outcomes[0].value == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    else:
        assert "rank 1" in outcomes[0].value[1]


def ends_meanwhile(rank: int, n: int) -> list[str]:
    """A rank ends its group from another thread while an all-reduce of its own is under way: never a result."""
    found = []
    for k in range(4):
        dist.init_process_group("distlib", store=dist.PrefixStore(str(k), store()), rank=rank, world_size=n)
        group = Group.of()
        for value in (7.0, 1.0):
            tensor = torch.full((20_000_000,), value)
            work = group.all_reduce(tensor, async_op=True)
            if value == 1.0 and rank == 0:
                time.sleep(0.01 * (k + 1))
                group.abort("rank 0 has had enough")
            try:
                work.wait()
                found.append("well" if bool((tensor == n * value).all()) else "wrong")
            except CollectiveError as error:
                found.append(str(error))
        dist.destroy_process_group()
    return found


def test_a_collective_that_was_ended_meanwhile_has_no_result() -> None:
    for rank, found in enumerate(run_ranks(2, ends_meanwhile, env=hosts(2))):
        for k in range(4):
            assert found[2 * k] == "well"
            assert found[2 * k + 1] == "rank 0 has had enough" or (rank == 1 and found[2 * k + 1] == "well"), found


def told(rank: int, n: int, how: str) -> tuple[str, str]:
    """Rank 1 ends the group while the others wait for rank 0, or for it."""
    dist.init_process_group("distlib", store=store(), rank=rank, world_size=n)
    group = Group.of()
    group.barrier()
    if rank == 1:
        time.sleep(1)
        group.abort("rank 1 has had enough")
        return "", "rank 1 has had enough"
    if how == "messages":
        return fails(lambda: group.recv(torch.zeros(3), 1, timeout=TIMEOUT))
    return fails(lambda: group.all_reduce(torch.zeros(3), timeout=TIMEOUT))


@pytest.mark.parametrize("how", ["messages", "collectives"])
def test_who_finds_connections_closed_reads_why(how: str) -> None:
    outcomes = run_ranks_raw(3, told, how, env=hosts(3))
    for rank, outcome in enumerate(outcomes):
        assert outcome.ok, str(outcome)
        assert outcome.value == ("" if rank == 1 else "aborted", "rank 1 has had enough")


def comes_late(rank: int, n: int) -> str:
    """Ranks 2 and 3 are somewhere else while the others make a group."""
    distlib.init(timeout=timedelta(seconds=40))
    if rank > 1:
        time.sleep(8)
        return ""
    with pytest.raises(CollectiveError) as caught:
        dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=3))
    return str(caught.value)


def test_who_did_not_come_to_make_a_group_is_named() -> None:
    for text in run_ranks(4, comes_late, env=hosts(4))[:2]:
        assert "ranks 2-3 did not come within 3 s to make a group with rank" in text, text


# ---------------------------------------------------------------- threads, and what is asked when


def test_a_runner_that_is_abandoned_fails_what_is_queued_and_starts_again() -> None:
    runner, go = Runner("test"), threading.Event()
    stuck, queued = runner.start(go.wait), runner.start(lambda: 1)
    error = CollectiveError("rank 7 has gone", "dead")
    while runner._line.steps.qsize() > 1:
        time.sleep(0.001)
    runner.abandon(error)
    assert queued.wait(5) and queued.text == "rank 7 has gone"
    stuck.fail(error)
    assert stuck.wait(5) and stuck.text == "rank 7 has gone"
    assert (after := runner.start(lambda: 2)).wait(5) and after.result == 2
    closing = threading.Thread(target=runner.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    go.set()  # it comes back after all, and changes nothing
    time.sleep(0.1)
    assert stuck.text == "rank 7 has gone" and stuck.result is None


def test_closing_waits_for_no_thread_that_is_given_up() -> None:
    runner, go = Runner("test"), threading.Event()
    runner.start(go.wait)
    closing = threading.Thread(target=runner.close)
    closing.start()
    while not runner._line.closing:
        time.sleep(0.001)
    assert closing.is_alive()
    runner.abandon(CollectiveError("given up"))
    closing.join(5)
    assert not closing.is_alive()
    assert (after := runner.start(lambda: 2)).wait(5) and after.result == 2
    go.set()


def test_no_step_is_lost_between_threads_that_start_and_one_that_gives_up() -> None:
    steps: list[Step] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(200):
            runner = Runner("test")
            starting = threading.Thread(target=lambda r=runner: steps.extend(r.start(int) for _ in range(10)))
            starting.start()
            runner.abandon(CollectiveError("given up"))
            starting.join()
            runner.close()
    finally:
        sys.setswitchinterval(before)
    assert all(step.wait(5) for step in steps)


def collected(rank: int, n: int) -> list[bool]:
    """What a collective or a message held goes with it, without the garbage collector."""
    with process_group(rank, n):
        group = Group.of()
        gc.disable()
        found = []
        for kind in ("all_reduce", "messages"):
            tensor = torch.ones(1000)
            if kind == "all_reduce":
                work = group.all_reduce(tensor, async_op=True)
            else:
                work = group.send(tensor, 1, async_op=True) if rank == 0 else group.recv(tensor, 0, async_op=True)
            work.wait()
            held = weakref.ref(work.operation)
            group.sweep()
            del work, tensor
            group.barrier()
            group.sweep()
            found.append(held() is None)
        return found


def test_what_is_over_is_held_by_no_circle_of_references() -> None:
    for found in run_ranks(2, collected, env=hosts(2)):
        assert found == [True, True]


def test_waiters_run_side_by_side_and_are_kept() -> None:
    waiters, go = Waiters(), threading.Event()
    steps = [Step(go.wait) for _ in range(5)]
    for step in steps:
        waiters.start(step)
    assert not any(step.done for step in steps)
    go.set()
    assert all(step.wait(5) for step in steps)
    until = time.monotonic() + 5
    while waiters._idle < 5 and time.monotonic() < until:
        time.sleep(0.001)
    threads = threading.active_count()
    again = Step(lambda: threading.current_thread().name)
    waiters.start(again)
    assert again.wait(5) and again.result == "distlib-waiter" and threading.active_count() == threads


def test_connections_that_stand_are_asked_ever_more_seldom() -> None:
    waiting, asked = Waiting(begun=1000.0), []
    for now in range(1001, 1200):
        if waiting.may_ask(float(now)):
            asked.append(now - 1000)
            waiting.judge("", float(now))
    assert asked == [1, 2, 4, 8, 16, 32, 62, 92, 122, 152, 182]


def test_what_was_found_once_may_be_over() -> None:
    waiting = Waiting(begun=1000.0)
    found = {1001.0: "gone", 1002.0: "", 1003.0: "gone", 1004.0: "gone", 1005.0: "gone"}
    assert [waiting.judge(why, now) for now, why in found.items()] == [False, False, False, False, True]
    assert waiting.may_ask(1005.5) and waiting.why == "gone"


class Silent:
    """A store whose keeper was stopped."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked = 0

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        self.go.wait()
        return True

    def get(self, key: str) -> bytes:
        return b"value"


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    silent = Silent()
    asked = BoundedStore(silent, seconds=0.2)  # type: ignore[arg-type]
    for words in ("has not answered within", "does not answer", "does not answer"):
        with pytest.raises(RuntimeError, match=words):
            asked.has("key")
    assert silent.asked == 1  # and no more threads wait for it
    silent.go.set()
    until = time.monotonic() + 5
    while True:
        try:
            assert asked.get("key") == "value"
            break
        except RuntimeError:
            assert time.monotonic() < until
            time.sleep(0.01)

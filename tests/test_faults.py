"""Faults: whatever happens to a rank, every other raises in time, names the culprit, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from endings import ENDINGS, end
from ranks import Outcome, process_group, run_ranks, run_ranks_raw, shared_files, store
from torch.distributed import distributed_c10d

import distlib
from distlib import native
from distlib.comm.group import Group
from distlib.comm.work import CollectiveError

CORE = pytest.param({}, id="shared memory", marks=pytest.mark.skipif(native.core() is None, reason=native.why_not()))
SPANNING = pytest.param(
    {"DISTLIB_NODES": "2"}, id="two nodes", marks=pytest.mark.skipif(native.core() is None, reason=native.why_not())
)
GLOO = pytest.param({"DISTLIB_CORE": "0"}, id="without the core")
EVERY_WAY = pytest.mark.parametrize("env", [CORE, SPANNING, GLOO])
NO_CORE = pytest.mark.skipif(native.core() is None, reason=native.why_not())


def error_of(call: Callable[[], object]) -> str:
    """The message of the CollectiveError that `call` must raise."""
    with pytest.raises(CollectiveError) as caught:
        call()
    return str(caught.value)


def join(rank: int, n: int, timeout: float = 20.0, to_meet: float = 30.0) -> Group:
    """A group whose collectives have `timeout`."""
    dist.init_process_group("distlib", store=store(), rank=rank, world_size=n, timeout=timedelta(seconds=to_meet))
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
    return Group.of()


# ---------------------------------------------------------------- ranks that disagree


def disagree(rank: int, n: int, how: str) -> str:
    group = join(rank, n)
    odd = rank == n - 1
    x = torch.ones(100)
    calls = {
        "operation": lambda: group.broadcast(x, 0) if odd else group.all_reduce(x),
        "dtype": lambda: group.all_reduce(x.double() if odd else x),
        "size": lambda: group.all_reduce(torch.ones(101) if odd else x),
        "large size": lambda: group.all_reduce(torch.ones((1 << 20) + int(odd))),
        "root": lambda: group.broadcast(x, 1 if odd else 0),
        "reduction": lambda: group.all_reduce(x, "max" if odd else "sum"),
        "barrier": lambda: group.barrier() if odd else group.all_reduce(x),
    }
    begin = time.monotonic()
    first = error_of(calls[how])
    assert error_of(lambda: group.all_reduce(x)) == first, "a group that failed stays failed, with the same words"
    assert time.monotonic() - begin < 15
    return first


@EVERY_WAY
@pytest.mark.parametrize("how", ["operation", "dtype", "size", "large size", "root", "reduction", "barrier"])
def test_ranks_that_disagree_all_raise_and_say_who_called_what(how: str, env: dict[str, str]) -> None:
    for text in run_ranks(3, disagree, how, env=env):
        assert "ranks disagree in call #1" in text and "rank 2 called" in text and "rank 0 called" in text, text


def disagree_on_parts(rank: int, n: int) -> str:
    group = join(rank, n)
    wrong = [torch.ones(5 if rank == 0 and d == 1 else 4) for d in range(n)]
    return error_of(lambda: group.all_to_all([torch.ones(4) for _ in range(n)], wrong))


@NO_CORE
def test_an_all_to_all_whose_parts_do_not_fit_raises_on_every_rank() -> None:
    for text in run_ranks(3, disagree_on_parts):
        assert "rank 0 sends 20 bytes to rank 1, which expects 16" in text, text


def message_of_another_size(rank: int, n: int) -> str:
    group = join(rank, n)
    if rank == 0:
        group.send(torch.ones(5), 1)
        return error_of(lambda: group.recv(torch.ones(1), 1))
    return error_of(lambda: group.recv(torch.ones(4), 0))


@NO_CORE
def test_a_message_of_another_size_than_expected_raises_on_both_ranks() -> None:
    for text in run_ranks(2, message_of_another_size):
        assert "rank 0 sent 20 bytes, this rank expects 16" in text, text


# ---------------------------------------------------------------- ranks that end


def loses_a_rank(rank: int, n: int, how: str) -> tuple[str, float]:
    group = join(rank, n, timeout=30)
    x = group.registered_empty(1 << 20).fill_(1)
    group.all_reduce(x)
    if rank == 1:
        end(how, group, lambda: group.all_reduce(x))
    begin = time.monotonic()

    def work() -> None:
        while True:
            group.all_reduce(x)

    return error_of(work), time.monotonic() - begin


@EVERY_WAY
@pytest.mark.parametrize("how", ENDINGS[:-1])  # one that leaves: below
def test_a_rank_that_ends_is_named_by_all_others_at_once(how: str, env: dict[str, str]) -> None:
    outcomes = run_ranks_raw(3, loses_a_rank, how, env=env, timeout=40)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.ok, outcome
        text, seconds = outcome.value
        assert "rank 1" in text, text
        assert seconds < 10, f"{seconds:.1f} s until: {text}"


@NO_CORE
def test_a_rank_that_leaves_is_named() -> None:
    outcomes = run_ranks_raw(3, loses_a_rank, "leaves", timeout=40)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.ok and "rank 1" in outcome.value[0] and "left the group" in outcome.value[0], outcome


def dies_at_start(rank: int, n: int, when: str) -> str:
    shared = store()
    shared.set(f"up/{rank}", "")
    shared.wait([f"up/{r}" for r in range(n)])  # no process has still to start in the 3 s below
    if rank == 1 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:  # after it has told the others of itself
        from distlib.comm.meeting import Host

        Host.meet = lambda self, *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as caught:
        join(rank, n, to_meet=3)
    return str(caught.value)


@NO_CORE
@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_a_rank_that_dies_during_init_is_named(when: str) -> None:
    outcomes = run_ranks_raw(3, dies_at_start, when, timeout=30)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.ok and "rank 1" in outcome.value and outcome.seconds < 12, outcome


def waits_for_a_message(rank: int, n: int) -> str:
    group = join(rank, n, timeout=30)
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(lambda: group.recv(torch.ones(4), 1))


@NO_CORE
def test_a_receive_from_a_rank_that_is_killed_raises() -> None:
    outcome = run_ranks_raw(2, waits_for_a_message, timeout=20)[0]
    assert outcome.ok and "rank 1" in outcome.value and "ended" in outcome.value, outcome


def is_stopped(rank: int, n: int, victim: int) -> tuple[str, float]:
    group = join(rank, n)
    x = torch.ones(10)
    group.all_reduce(x)
    pids = [0] * n
    dist.all_gather_object(pids, os.getpid())
    distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    waker = threading.Timer(5, os.kill, (pids[victim], signal.SIGCONT))
    if rank == 0:
        os.kill(pids[victim], signal.SIGSTOP)
        waker.start()
    if rank == victim:
        time.sleep(1)  # it is stopped here
    begin = time.monotonic()
    text, seconds = error_of(lambda: group.all_reduce(x)), time.monotonic() - begin
    if rank == 0:
        waker.join()
    return text, seconds


@NO_CORE
def test_a_stopped_rank_is_named_after_the_timeout_and_raises_too_when_it_wakes() -> None:
    results = run_ranks(3, is_stopped, 2, timeout=30)
    for text, seconds in results[:2]:
        assert "ran into the timeout of 2.0 s" in text and "waiting for: rank 2" in text, text
        assert seconds < 6, seconds
    assert "waiting for: rank 2" in results[2][0], "the same words on the rank that was stopped"


def sends_to_who_has_ended(rank: int, n: int) -> list[str]:
    group = join(rank, n, timeout=30)
    x = torch.ones(4)
    group.all_reduce(x)
    if rank == 1:
        os._exit(0)
    said = []
    end = time.monotonic() + 20
    while len(said) < 3 and time.monotonic() < end:  # the first may leave before the end is known
        try:
            group.send(x, 1)
        except RuntimeError as error:
            assert isinstance(error, CollectiveError), repr(error)
            said.append(str(error))
    return said


@EVERY_WAY
def test_a_message_to_a_rank_that_has_ended_raises_whenever_that_is_known(env: dict[str, str]) -> None:
    outcome = run_ranks_raw(2, sends_to_who_has_ended, env=env, timeout=50)[0]
    assert outcome.ok and len(outcome.value) == 3 and all("rank 1" in text for text in outcome.value), outcome


def receives_early(rank: int, n: int) -> list[float]:
    """Rank 1 has begun to receive long before it waits, and before there is anything to receive."""
    group, shared = join(rank, n, timeout=1), store()
    x = torch.full((4,), 1.0 - rank)
    if rank == 1:
        work = group.recv(x, 0, async_op=True)
        time.sleep(2)
        shared.set("late", "")
        assert work is not None and work.wait()
    else:
        shared.wait(["late"])
        group.send(x, 1)
    group.barrier()
    return x.tolist()


@EVERY_WAY
def test_the_timeout_of_a_message_counts_from_when_somebody_waits_for_it(env: dict[str, str]) -> None:
    assert run_ranks(2, receives_early, env=env) == [[1.0] * 4] * 2


def asks_for_a_future(rank: int, n: int) -> tuple[str, float]:
    """A future waits, too."""
    group, shared = join(rank, n, timeout=1), store()
    text, begin = "", time.monotonic()
    if rank == 1:
        work = group.recv(torch.ones(4), 0, async_op=True)
        assert work is not None
        with pytest.raises(RuntimeError) as caught:
            work.get_future().wait()
        text = str(caught.value)
        shared.set("told", "")
    shared.wait(["told"])
    return text, time.monotonic() - begin


@NO_CORE
def test_a_message_that_only_a_future_waits_for_has_its_timeout() -> None:
    text, seconds = run_ranks(2, asks_for_a_future)[1]
    assert "recv from rank 0 (tag 0, 16 bytes)" in text and "ran into the timeout of 1000 ms" in text, text
    assert 1 <= seconds < 6


# ---------------------------------------------------------------- memory, forks, crowds


def asks_for_too_much(rank: int, n: int) -> None:
    group = join(rank, n)
    with pytest.raises(MemoryError, match="MiB asked for"):
        distlib.registered_empty(1 << 48, dtype=torch.uint8)
    x = torch.ones(1000)
    group.all_reduce(x)  # nothing is lost
    assert x[0] == n
    dist.destroy_process_group()


@NO_CORE
def test_memory_that_is_not_there_is_refused_with_numbers_and_the_group_goes_on() -> None:
    run_ranks(2, asks_for_too_much)


def runs_out_inside(rank: int, n: int) -> str:
    group = join(rank, n)
    keep = group.registered_empty(60 << 20, dtype=torch.uint8) if rank == 0 else None
    text = error_of(lambda: group.all_reduce(torch.ones(1 << 20)))
    del keep
    return text


@NO_CORE
def test_memory_that_runs_out_inside_a_collective_raises_on_every_rank() -> None:
    for text in run_ranks(2, runs_out_inside, env={"DISTLIB_ARENA_MB": "64", "DISTLIB_STAGING_KB": "4096"}):
        assert "rank 0" in text and "arena is full" in text and "DISTLIB_ARENA_MB" in text, text


def forks(rank: int, n: int) -> str:
    group = join(rank, n, timeout=20)
    x = torch.ones(4)
    group.all_reduce(x)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            group.all_reduce(torch.ones(4))
            text = "no error"
        except CollectiveError as error:
            text = f"{error.code}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reader, 4096).decode()
    group.all_reduce(x)  # the parent goes on
    assert x[0] == n * n
    dist.destroy_process_group()
    return text


@NO_CORE
def test_a_child_forked_after_init_is_refused_and_its_parent_goes_on() -> None:
    for text in run_ranks(2, forks):
        assert text.startswith("forked:") and "forked after it was made" in text, text


def dies_while_its_child_lives(rank: int, n: int) -> str:
    group = join(rank, n, timeout=20)
    group.barrier()
    if rank == 1:
        if os.fork() == 0:
            os.setsid()  # else it would be killed with its parent's group
            time.sleep(4)  # holds what it inherited, as a data loader's worker would
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    text = error_of(group.barrier)
    assert time.monotonic() - begin < 3
    return text


@pytest.mark.alone
@NO_CORE
def test_a_rank_is_seen_to_die_though_its_forked_child_lives() -> None:
    outcome = run_ranks_raw(2, dies_while_its_child_lives, timeout=20)[0]
    assert outcome.ok and "rank 1" in outcome.value, outcome


def two_jobs(rank: int, n: int) -> float:
    job, me = divmod(rank, 2)
    prefix = dist.PrefixStore(f"job{job}", store())
    dist.init_process_group("distlib", store=prefix, rank=me, world_size=2, timeout=timedelta(seconds=20))
    x = torch.full((50_000,), float(job + 1))
    for _ in range(20):
        dist.all_reduce(x, dist.ReduceOp.AVG)
    dist.destroy_process_group()
    return x[-1].item()


def test_two_jobs_of_one_user_do_not_meet() -> None:
    assert run_ranks(4, two_jobs) == [1.0, 1.0, 2.0, 2.0]


def crowd(rank: int, n: int) -> float:
    with process_group(rank, n):
        x, begin = torch.ones(20_000), time.monotonic()
        for _ in range(50):
            dist.all_reduce(x, dist.ReduceOp.AVG)
        return time.monotonic() - begin


def test_eight_ranks_on_few_cores_do_not_starve_each_other() -> None:
    assert max(run_ranks(8, crowd)) < 20


# ---------------------------------------------------------------- nothing is left


def shared_kib() -> int:
    return int(next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "Shmem:" in line))


def all_are_killed(rank: int, n: int) -> None:
    group = join(rank, n)
    x = group.registered_empty(64 << 20, dtype=torch.uint8).fill_(1)
    group.all_reduce(x)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.alone  # looks at all shared memory
@NO_CORE
def test_nothing_is_left_after_every_rank_is_killed() -> None:
    shm, before = shared_files(), shared_kib()
    outcomes: list[Outcome] = run_ranks_raw(3, all_are_killed, timeout=30)
    assert all(outcome.kind == "signal" for outcome in outcomes), outcomes
    assert shared_files() <= shm
    assert shared_kib() < before + (64 << 10), "the arenas went with their processes"
    for outcome in outcomes:
        assert "@distlib-" not in outcome.output

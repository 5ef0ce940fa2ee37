"""Bugs of the communication that were found by reading: one test per property that they broke."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks, store
from test_faults import join

from distlib import native
from distlib.comm.group import Group
from distlib.comm.meeting import Host
from distlib.comm.work import CollectiveError
from distlib.topology import Topology

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())


# ---------------------------------------------------------------- memory


def child_drops_a_tensor(rank: int, n: int) -> float:
    with process_group(rank, n):
        x = Group.of().registered_empty(1 << 16).fill_(7)
        child = os.fork()
        if not child:
            del x
            gc.collect()
            os._exit(0)
        os.waitpid(child, 0)
        return float(x.mean())


def test_a_forked_child_that_drops_registered_memory_leaves_its_parents_alone() -> None:
    assert run_ranks(2, child_drops_a_tensor) == [7.0, 7.0]


def keeps_a_work(rank: int, n: int) -> int:
    shared = store()
    dist.init_process_group("distlib", store=shared, rank=rank, world_size=n)
    group, x = Group.of(), torch.ones(4)
    kept = group.send(x, 1 - rank, async_op=True)
    group.recv(x, 1 - rank)
    dist.barrier()
    if rank == 1:
        group.close()
        shared.set("closed", "1")
        shared.wait(["taken"])
        group.abort("too late")
        del kept, group
        dist.destroy_process_group()
        gc.collect()
        shared.set("dropped", "1")
        return 0
    shared.wait(["closed"])
    group.close()
    del kept, group
    Group.create(dist.HashStore(), 0, 1, timedelta(seconds=9), "another", (0,)).close()  # looks what can be freed
    blocks = [Host.here().arena.allocate(4096, True) for _ in range(40)]
    shared.set("taken", "1")
    shared.wait(["dropped"])
    return sum(sum(bytes(memoryview(block))) for block in blocks)


def test_what_is_left_of_a_closed_group_writes_to_no_memory_of_others() -> None:
    assert run_ranks(2, keeps_a_work)[0] == 0


def makes_groups(rank: int, n: int, first: int) -> list[int]:
    shared, used = store(), []
    for i in range(5):
        dist.init_process_group("distlib", store=dist.PrefixStore(str(i), shared), rank=rank, world_size=n)
        x = torch.ones(1 << 20)
        dist.all_reduce(x)
        if rank == 0:
            dist.send(x, 1)
        else:
            dist.recv(x, 0)
        shared.set(f"{i}/done/{rank}", "1")
        shared.wait([f"{i}/done/{1 - rank}"])
        if rank != first:
            shared.wait([f"{i}/closed"])
        dist.destroy_process_group()
        if rank == first:
            shared.set(f"{i}/closed", "1")
        used.append(Host.here().arena.in_use)
    return used


@pytest.mark.parametrize("first", [0, 1])
def test_a_destroyed_group_gives_back_its_memory_whoever_leaves_first(first: int) -> None:
    for used in run_ranks(2, makes_groups, first):
        assert max(used) == used[0], f"bytes in use after each group: {used}"


# ---------------------------------------------------------------- messages that nobody waits for


def polls(rank: int, n: int) -> float:
    with process_group(rank, n):
        x = torch.full((4,), float(rank))
        work = dist.irecv(x, 1) if rank == 0 else dist.isend(x, 0)
        until = time.monotonic() + 20
        while not work.is_completed() and time.monotonic() < until:
            time.sleep(0.01)
        assert work.is_completed()
        return float(x[0])


def test_a_started_message_completes_though_nobody_waits_for_it() -> None:
    assert run_ranks(2, polls) == [1.0, 1.0]


def meets_first(rank: int, n: int) -> float:
    with process_group(rank, n):
        x = Group.of().registered_empty(1 << 16).fill_(rank)
        if rank == 0:
            work = dist.irecv(x, 1)
            dist.barrier()
            work.wait()
        else:
            dist.send(x, 0)  # it lies in shared memory: sent when it has been read
            dist.barrier()
        return float(x[0])


def test_a_started_receive_takes_its_message_while_its_rank_is_in_a_collective() -> None:
    assert run_ranks(2, meets_first) == [1.0, 1.0]


# ---------------------------------------------------------------- tensors in flight


def interrupts_a_queued_call(rank: int, n: int) -> float:
    def stop(*_: object) -> None:
        raise InterruptedError

    with process_group(rank, n):
        group, shared = Group.of(), store()
        first, x = group.registered_empty(1 << 18), group.registered_empty(1 << 18).fill_(1)
        if rank == 1:
            shared.wait(["interrupted"])
            group.all_reduce(first)
            group.all_reduce(x)
            group.barrier()
            return 5.0
        work = group.all_reduce(first, async_op=True)
        signal.signal(signal.SIGALRM, stop)
        with contextlib.suppress(InterruptedError):
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            group.all_reduce(x)  # waits for its turn behind the first
        del x
        gc.collect()
        other = group.registered_empty(1 << 18).fill_(5)
        shared.set("interrupted", "1")
        assert work is not None
        work.wait()
        group.barrier()  # after the second
        return float(other.mean())


def test_an_interrupted_call_keeps_its_tensors_until_it_is_over() -> None:
    assert run_ranks(2, interrupts_a_queued_call) == [5.0, 5.0]


class _Sweeps:
    """A work whose completion calls back into the group, as futures can."""

    def __init__(self, group: Group) -> None:
        self.group, self.entered = group, False

    def is_completed(self) -> bool:
        if not self.entered:
            self.entered = True
            self.group.sweep()
        return True


class _Open:
    def is_completed(self) -> bool:
        return False


def test_a_group_lets_go_of_no_work_that_is_under_way() -> None:
    group = Group("alone", 0, [0], Topology(((0,),)), None, 1.0)  # type: ignore[arg-type]
    under_way = _Open()
    group._in_flight.extend([_Sweeps(group), under_way])  # type: ignore[list-item]
    group.sweep()
    assert list(group._in_flight) == [under_way]


# ---------------------------------------------------------------- the end of a process

SENDS_AND_ENDS = """
import sys, time, torch, torch.distributed as dist
rank, port, leaves = map(int, sys.argv[1:])
store = dist.TCPStore("127.0.0.1", port, is_master=False)
dist.init_process_group("distlib", store=store, rank=rank, world_size=2)
x = torch.full((1 << 18,), 3.0 - 3 * rank)
if rank == 0:
    dist.send(x, 1)
else:
    store.wait(["ended"])
    dist.recv(x, 0)
if rank == 1 or leaves:
    dist.destroy_process_group()
sys.exit(0 if bool((x == 3).all()) else "another message came")
"""


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_message_arrives_though_its_sender_has_ended_since(leaves: int) -> None:
    shared = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-W", "ignore", "-c", SENDS_AND_ENDS]
    sender, receiver = (subprocess.Popen([*command, str(rank), str(shared.port), str(leaves)]) for rank in (0, 1))
    try:
        assert sender.wait(60) == 0
        shared.set("ended", "1")
        assert receiver.wait(50) == 0
    finally:
        for process in (sender, receiver):
            process.kill()
            process.wait()


# ---------------------------------------------------------------- faults


def ends_while_it_aborts(rank: int, n: int) -> float:
    group = join(rank, n, timeout=1)
    if rank == 0:  # as if a rank had been killed after it had claimed the abort and before it had written why
        memoryview(group._channel._block)[0] = 1  # type: ignore[attr-defined]
    begin = time.monotonic()
    with pytest.raises(CollectiveError, match="ran into the timeout"):
        group.all_reduce(torch.ones(4)) if rank else group.recv(torch.ones(4), 1)
    seconds, shared = time.monotonic() - begin, store()
    shared.set(f"raised/{rank}", "")
    shared.wait([f"raised/{r}" for r in range(n)])  # the end of one is not what the other sees
    return seconds


@pytest.mark.alone
def test_a_rank_that_ends_while_it_aborts_holds_up_nobody() -> None:
    assert max(run_ranks(2, ends_while_it_aborts, timeout=20)) < 5


def names_another_dtype(rank: int, n: int) -> str:
    group = join(rank, n)
    with pytest.raises(CollectiveError) as caught:
        group.broadcast(torch.ones(64, dtype=(torch.uint16, torch.uint32)[rank]), 0)
    return str(caught.value)


def test_dtypes_that_are_only_moved_are_compared_too() -> None:
    for text in run_ranks(2, names_another_dtype):
        assert "ranks disagree" in text, text


# ---------------------------------------------------------------- groups over gloo, and of other backends


def disagrees_on_sizes(rank: int, n: int, src: int) -> str:
    group = join(rank, n)
    given = [torch.ones(3) for _ in range(n)]
    found = [torch.zeros(4 if (r, rank) == (src, 0) else 3) for r in range(n)]
    with pytest.raises(CollectiveError) as caught:
        group.all_to_all(found, given)
    assert caught.value.code == "mismatch"
    return str(caught.value)


@pytest.mark.parametrize("src", [0, 1])  # rank 0 itself, and the other
@pytest.mark.parametrize("where", [{"DISTLIB_CORE": "0"}, {"DISTLIB_NODES": "2"}, {}])
def test_sizes_of_an_all_to_all_are_compared_before_bytes_travel(where: dict[str, str], src: int) -> None:
    for text in run_ranks(2, disagrees_on_sizes, src, env=where, timeout=20):
        assert f"rank {src} sends 12 bytes to rank 0, which expects 16" in text, text


def aborts_after_it_left(rank: int, n: int) -> None:
    group = join(rank, n)
    group.barrier()
    group.close()
    group.abort("too late")
    with pytest.raises(CollectiveError, match="was closed on this rank"):
        group.barrier()


@pytest.mark.parametrize("where", [{"DISTLIB_CORE": "0"}, {"DISTLIB_NODES": "2"}, {}])
def test_a_group_that_was_left_can_still_be_aborted(where: dict[str, str]) -> None:
    run_ranks(2, aborts_after_it_left, env=where)


def polls_another_backend(rank: int, n: int) -> float:
    with process_group(rank, n, "gloo"):
        group, x = Group.of(), torch.full((4,), float(2 * rank))
        works = [group.all_reduce(x, "avg", async_op=True), group.barrier(async_op=True)]
        until = time.monotonic() + 20
        while not all(work is not None and work.is_completed() for work in works) and time.monotonic() < until:
            time.sleep(0.01)
        assert all(work is not None and work.is_success() for work in works)
        for work in works:
            assert work is not None and work.wait()
        group.sweep()
        assert not group._in_flight
        return float(x[0])


def test_a_collective_of_another_backend_completes_though_nobody_waits_for_it() -> None:
    assert run_ranks(2, polls_another_backend) == [1.0, 1.0]

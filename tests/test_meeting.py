"""Ranks of a host that meet, or look after each other, under the limits that a process may have been given."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks, run_ranks_raw, store
from test_faults import join

from distlib import native
from distlib.comm.meeting import Host

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())


@contextlib.contextmanager
def few_files(left: int) -> Iterator[None]:
    """This process may open so many more files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    opened = []
    with contextlib.suppress(OSError):
        while True:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    try:
        for _ in range(left):
            os.close(opened.pop())
        yield
    finally:
        for file in opened:
            os.close(file)


def meets(rank: int, n: int) -> str:
    """What this rank hears of the meeting: "" if all went well."""
    shared = store()
    shared.set(f"pid/{rank}", str(os.getpid()))
    shared.wait([f"pid/{r}" for r in range(n)])
    try:
        dist.init_process_group("distlib", store=shared, rank=rank, world_size=n, timeout=timedelta(seconds=6))
    except (RuntimeError, MemoryError) as error:
        return str(error)
    return ""


def meets_with_few_files(rank: int, n: int, victim: int, left: int) -> tuple[str, int]:
    meet, shared = Host.meet, store()

    def with_few(self: Host, *arguments: Any) -> set[int]:
        if rank != victim:
            shared.wait(["few"])
            return meet(self, *arguments)
        with few_files(left):
            shared.set("few", "")
            return meet(self, *arguments)

    Host.meet = with_few  # type: ignore[method-assign]
    return meets(rank, n), os.getpid()


# Needed are one to knock (not to be knocked at), one for the memory that comes, and one to keep the connection.
@pytest.mark.parametrize(("victim", "left"), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)])
def test_a_process_without_descriptors_says_so_and_is_named_by_the_others(victim: int, left: int) -> None:
    outcomes = run_ranks_raw(2, meets_with_few_files, victim, left, timeout=40)
    assert all(outcome.ok and outcome.seconds < 15 for outcome in outcomes), outcomes
    (said, pid), (heard, _) = outcomes[victim].value, outcomes[1 - victim].value
    assert f"pid {pid}: Too many open files" in said and "ulimit -n" in said, said
    assert f"rank {victim} (pid {pid})" in heard or f"pid {pid}: Too many open files" in heard, heard


@pytest.mark.parametrize(("victim", "left"), [(0, 2), (1, 3)])
def test_no_more_descriptors_are_needed_to_meet(victim: int, left: int) -> None:
    assert [said for said, _ in run_ranks(2, meets_with_few_files, victim, left)] == ["", ""]


def test_a_door_that_cannot_be_opened_for_want_of_descriptors_is_tried_again() -> None:
    errors, said = [errno.EMFILE, errno.ENFILE, errno.EBADF], []

    def accept() -> None:
        raise OSError(errors.pop(0), "")

    host: Any = SimpleNamespace(_listener=SimpleNamespace(accept=accept), _set_full=said.append)
    Host._welcome(host)
    assert not errors and said == [True, False, True, False]


def test_whoever_waits_at_a_door_that_cannot_be_opened_is_told_at_once() -> None:
    host: Any = SimpleNamespace(pid=7, peers={"a": 1}, _refused={"b": ""}, _full=True, _changed=threading.Condition())
    assert Host._came(host, "a", time.monotonic() + 60) and Host._came(host, "b", time.monotonic() + 60)
    with pytest.raises(RuntimeError, match=r"pid 7: Too many open files.* see ulimit -n"):
        Host._came(host, "c", time.monotonic() + 60)


def waits_without_descriptors(rank: int, n: int) -> None:
    group = join(rank, n)
    group.barrier()
    with few_files(0) if rank == 0 else contextlib.nullcontext():
        time.sleep(rank)  # rank 0 looks whether rank 1 is alive, and cannot ask the kernel
        group.barrier()
    group.barrier()


def test_whoever_has_no_descriptors_takes_nobody_for_dead() -> None:
    run_ranks(2, waits_without_descriptors)


def meets_with_less(rank: int, n: int, limit: int, bytes: int) -> str:
    if rank == 1:
        resource.setrlimit(limit, (bytes, resource.getrlimit(limit)[1]))
    return meets(rank, n)


def test_an_arena_that_does_not_fit_under_the_limit_of_addresses_names_what_to_change() -> None:
    for said in run_ranks(2, meets_with_less, resource.RLIMIT_AS, 6 << 30, env={"DISTLIB_ARENA_MB": "16384"}):
        assert "cannot map the arena of pid" in said and "16384 MiB of addresses" in said, said
        assert "ulimit -v" in said and "DISTLIB_ARENA_MB" in said, said


def test_an_arena_that_is_larger_than_files_may_be_names_the_limit() -> None:
    outcome = run_ranks_raw(2, meets_with_less, resource.RLIMIT_FSIZE, 32 << 20, grace=0)[1]
    assert "File too large" in outcome.value and "ulimit -f" in outcome.value, outcome

"""Faults on devices: whatever happens to a rank, the others raise in time and name it; nothing is left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from device_groups import SMALL, card, device_group, emulated, on_card
from endings import ENDINGS, end
from ranks import run_ranks, run_ranks_raw, shared_files, store

from distlib import native
from distlib.comm.group import Group
from distlib.comm.work import CollectiveError

pytestmark = [
    pytest.mark.card,
    pytest.mark.skipif(native.core() is None, reason=f"no C++ core: {native.why_not()}"),
]


def error_of(call: Callable[[], object]) -> str:
    """The message of the CollectiveError that `call`, or a look soon after it, must raise: a host does not wait."""
    with pytest.raises(CollectiveError) as caught:
        call()
        for _ in range(2000):
            time.sleep(0.01)
            call()
    return str(caught.value)


def one() -> torch.Tensor:
    return torch.ones(100, device=card())


# ---------------------------------------------------------------- ranks that disagree


def disagree(rank: int, n: int, path: str, how: str) -> list[str]:
    with device_group(rank, n, path, timeout=10) as group:
        odd, x = rank == n - 1, one()
        group.all_reduce(x)
        begin = time.monotonic()
        calls = {
            "operation": lambda: group.broadcast(x, 0) if odd else group.all_reduce(x),
            "dtype": lambda: group.all_reduce(x.double() if odd else x),
            "size": lambda: group.all_reduce(x[:99] if odd else x),
            "large size": lambda: group.all_reduce(torch.ones((1 << 16) * (1 + int(odd)), device=card())),
            "root": lambda: group.broadcast(x, 1 if odd else 0),
            "reduction": lambda: group.all_reduce(x, "max" if odd else "sum"),
        }
        first = error_of(calls[how])
        again = error_of(lambda: group.all_reduce(x))
        on_cpu = error_of(lambda: Group.of().all_reduce(torch.ones(3)))
        assert time.monotonic() - begin < 15
        return [first, again, on_cpu]


@pytest.mark.parametrize("how", ["operation", "dtype", "size", "large size", "root", "reduction"])
def test_ranks_that_disagree_all_raise_and_say_who_called_what(how: str) -> None:
    for texts in raised(run_ranks_raw(3, disagree, emulated(), how, env=SMALL, timeout=40)):
        assert len(set(texts)) == 1, "a group that failed stays failed, on the CPU too, with the same words"
        assert "ranks disagree in call #2" in texts[0] and "rank 2 called" in texts[0] and "rank 0 called" in texts[0]


def raised(outcomes: list, but: int = -1) -> list:  # type: ignore[type-arg]
    """The values of all ranks but one; a rank that failed otherwise shows how."""
    for outcome in outcomes:
        assert outcome.rank == but or outcome.ok, outcome
    return [outcome.value for outcome in outcomes if outcome.rank != but]


def parts_do_not_fit(rank: int, n: int, path: str) -> str:
    with device_group(rank, n, path) as group:
        sizes = [5 if rank == 0 and d == 1 else 4 for d in range(n)]
        given = [torch.ones(size, device=card()) for size in sizes]
        out = [torch.ones(4, device=card()) for _ in range(n)]
        return error_of(lambda: group.all_to_all(out, given))


def test_an_all_to_all_whose_parts_do_not_fit_raises_on_every_rank() -> None:
    for text in run_ranks(3, parts_do_not_fit, emulated(), env=SMALL):
        assert "rank 0 sends 20 bytes to rank 1, which expects 16" in text, text


def message_does_not_fit(rank: int, n: int, path: str, by_tag: bool) -> str:
    with device_group(rank, n, path) as group:
        if rank == 1:
            return error_of(lambda: group.recv(torch.ones(4, device=card()), 0, tag=8 if by_tag else 7))

        def talk() -> None:  # where the other rank is quick, the first call raises already
            group.send(torch.ones(4 if by_tag else 5, device=card()), 1, tag=7)
            group.recv(torch.ones(1, device=card()), 1)

        return error_of(talk)


@pytest.mark.parametrize("by_tag", [False, True])
def test_a_message_of_another_size_or_tag_raises_on_both_ranks(by_tag: bool) -> None:
    for text in run_ranks(2, message_does_not_fit, emulated(), by_tag, env=SMALL):
        assert "message #1 from rank 0 to rank 1" in text
        assert ("its tag is 7, not 8" if by_tag else "sends 20 bytes to rank 1, which expects 16") in text


# ---------------------------------------------------------------- ranks that end, or never come


def loses_a_rank(rank: int, n: int, path: str, how: str) -> tuple[str, float]:
    with device_group(rank, n, path, timeout=30) as group:
        x = one()
        group.all_reduce(x)
        if rank == 1:
            end(how, group, lambda: group.all_reduce(x))
        begin = time.monotonic()
        return error_of(lambda: group.all_reduce(x)), time.monotonic() - begin


@pytest.mark.parametrize("how", ENDINGS)
def test_a_rank_that_ends_or_leaves_is_named_by_all_others_at_once(how: str) -> None:
    before = shared_files()
    outcomes = run_ranks_raw(3, loses_a_rank, emulated(), how, env=SMALL, timeout=40)
    values = raised(outcomes, but=1)
    for text, seconds in values:
        assert "all_reduce(float32, 100 elements, sum) #" in text and "cannot complete: rank 1 (pid" in text, text
        assert ("left the group" if how == "leaves" else "ended") in text, text
        assert seconds < 10, f"{seconds:.1f} s until: {text}"
    assert len({text for text, _ in values}) == 1
    assert shared_files() <= before  # a test beside this one may take its own away


def never_comes(rank: int, n: int, path: str) -> tuple[str, float]:
    with device_group(rank, n, path, timeout=1.5) as group:
        x, begin = one(), time.monotonic()
        if rank == 1:
            time.sleep(4)
            return error_of(lambda: group.all_reduce(x)), 0.0
        return error_of(lambda: group.all_reduce(x)), time.monotonic() - begin


def test_a_rank_that_never_comes_is_named_after_the_timeout() -> None:
    results = run_ranks(3, never_comes, emulated(), env=SMALL)
    assert len({text for text, _ in results}) == 1, results
    text = results[0][0]
    assert "all_reduce(float32, 100 elements, sum) #1" in text and "ran into the timeout of 1.5 s" in text
    assert "waiting for: rank 1 (pid" in text and "rank 2" not in text.split("waiting for")[1]
    assert all(seconds < 4 for _, seconds in results)


def no_receiver(rank: int, n: int, path: str) -> str:
    with device_group(rank, n, path, timeout=1.0) as group:
        if rank == 0:  # the ring has room for some of it
            text = error_of(lambda: group.send(torch.ones(1 << 16, device=card()), 1))
            store().set("raised", "")
            return text
        store().wait(["raised"])
        return error_of(lambda: group.recv(one(), 0))


def test_a_message_that_nobody_takes_ends_after_the_timeout() -> None:
    for text in run_ranks(2, no_receiver, emulated(), env=SMALL):
        assert "ran into the timeout of 1.0 s" in text and "waiting for: rank 1" in text, text


def aborts(rank: int, n: int, path: str, where: str) -> tuple[str, float]:
    with device_group(rank, n, path, timeout=30) as group:
        x, begin = one(), time.monotonic()
        if rank == 0:
            time.sleep(0.5)
            (group if where == "device" else Group.of()).abort("the loss is not a number")
        text = error_of(lambda: group.all_reduce(x))
        return text, time.monotonic() - begin


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_an_abort_of_the_group_ends_kernels_that_wait(where: str) -> None:
    for text, seconds in run_ranks(3, aborts, emulated(), where, env=SMALL):
        assert text == "the loss is not a number" and seconds < 5, (text, seconds)


def a_wait_with_a_timeout(rank: int, n: int, path: str) -> bool:
    with device_group(rank, n, path) as group:
        work = group.all_reduce(one(), async_op=True)
        assert work is not None
        return work.wait(timedelta(seconds=5))


def test_a_wait_with_a_timeout_keeps_the_host_until_it_is_done() -> None:
    assert run_ranks(2, a_wait_with_a_timeout, emulated(), env=SMALL) == [True, True]


def descriptors() -> int:
    """How many this process has, but those of CUDA's driver, which opens them as it sees fit."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(not os.readlink(link).startswith("/dev/nvidia") for link in links if link.is_symlink())


def open_files(rank: int, n: int, path: str) -> tuple[int, int]:
    with device_group(rank, n, path) as group:  # what stays for the process's life is there after the first
        group.all_reduce(one())
        before = descriptors()
        for _ in range(3):
            again = on_card(Group.of(), "again")
            again.all_reduce(one())
            again.close()
        Group.of().barrier()
        for _ in range(100):
            if descriptors() <= before:
                break
            time.sleep(0.05)
        return before, descriptors()


def test_closed_groups_leave_no_descriptor_behind() -> None:
    for before, after in run_ranks(3, open_files, emulated(), env=SMALL):
        assert after <= before

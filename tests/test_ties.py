"""Groups that end together: ranks that are in only one of two hear what went wrong in the other."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks, run_ranks_raw
from test_faults import EVERY_WAY, NO_CORE, error_of
from test_sharded_features import Block, Net, square

import distlib
from distlib.comm.group import Group
from distlib.comm.ties import tie, tied_to
from distlib.comm.work import CollectiveError


def groups(n: int, tied: bool = True) -> tuple[Group, Group]:
    """Two groups of all ranks."""
    pair = tuple(Group.of(dist.new_group(range(n))) for _ in range(2))
    if tied:
        tie(pair)
    return pair[0], pair[1]


# ---------------------------------------------------------------- what ends


def ends(rank: int, n: int, how: str) -> tuple[str, str]:
    """Rank 1 ends the first group, or makes another call there. What all hear in the first, and in the second."""
    with process_group(rank, n):
        first, second = groups(n)
        first.barrier()
        if how == "abort" and rank == 1:
            first.abort("rank 1 has had enough")
        said = error_of(lambda: first.all_reduce(torch.ones(n + rank)))
        return said, error_of(second.barrier)


@EVERY_WAY
@pytest.mark.parametrize("how", ["abort", "differs"])
def test_tied_groups_end_in_the_same_words(how: str, env: dict[str, str]) -> None:
    for first, second in run_ranks(2, ends, how, env=env):
        assert first == second and ("rank 1 has had enough" if how == "abort" else "ranks disagree") in first


def goes_on(rank: int, n: int) -> None:
    """Neither leaving a group nor what a forked child does with it is a fault."""
    with process_group(rank, n):
        first, second = groups(n)
        first.barrier()
        if (child := os.fork()) == 0:
            with pytest.raises(CollectiveError, match="forked after it was made"):
                first.barrier()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        first.barrier()
        work = first.recv(torch.ones(3), 1 - rank, async_op=True)
        first.close()
        assert work is not None and "was closed on this rank" in error_of(work.wait)
        second.barrier()
        loose, other = groups(n, tied=False)
        loose.abort("enough")
        other.barrier()


@NO_CORE
def test_groups_go_on_where_nothing_failed() -> None:
    run_ranks(2, goes_on)


def lives(rank: int, n: int) -> None:
    with process_group(rank, n):
        gc.disable()
        made = [dist.new_group(range(n)) for _ in range(3)]
        tie(Group.of(pg) for pg in made[:2])
        tie(Group.of(pg) for pg in made[1:])
        assert set(tied_to(Group.of(made[0]))) == {Group.of(made[1]), Group.of(made[2])}
        kept = Group.of(made[0])
        held = [weakref.ref(Group.of(pg)) for pg in made]
        for pg in made:
            dist.destroy_process_group(pg)
        del made, pg
        assert [group() is None for group in held] == [False, True, True] and tied_to(kept) == []


@NO_CORE
def test_ties_keep_no_group_alive() -> None:
    run_ranks(1, lives)


# ---------------------------------------------------------------- sharded models in several partition groups


def loses_rank_1(rank: int, n: int) -> str:
    """Rank 1 is killed in the second forward. Rank 2 and 3 share no partition group with it."""
    with process_group(rank, n, timeout=30):
        model: Any = distlib.ShardedDataParallel(Net().double(), units=[Block], partition_size=2)
        square(model, 0, rank).backward()

        def die(*_: Any) -> None:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        model.blocks[1].register_forward_hook(die)
        with pytest.raises(CollectiveError) as caught:
            for step in range(1, 4):
                square(model, step, rank).backward()
        return str(caught.value)


@pytest.mark.parametrize("nodes", [1, 2])
@NO_CORE
def test_ranks_of_other_partition_groups_hear_who_was_at_fault(nodes: int) -> None:
    outcomes = run_ranks_raw(4, loses_rank_1, timeout=60, env={"DISTLIB_NODES": str(nodes)})
    assert outcomes[1].kind == "signal"
    for outcome in (outcomes[0], outcomes[2], outcomes[3]):
        assert outcome.ok, str(outcome)
        assert "rank 1" in outcome.value, outcome.value
        for innocent in ("rank 0", "rank 2", "rank 3"):
            assert f"answer: {innocent}" not in outcome.value and f"{innocent} has ended" not in outcome.value
            assert f"complete: {innocent}" not in outcome.value, outcome.value

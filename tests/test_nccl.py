"""A group's own communicators: calls, levels between hosts, accounts, and what is late. gloo's groups, over tensors on
the CPU, and works that never end stand in for NCCL's."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import process_group, run_ranks, run_ranks_raw
from test_device_collectives import Case, Player

import distlib
from distlib import native
from distlib.comm import gloo, hierarchical, nccl_levels, nccl_notes
from distlib.comm.batches import Bracket, exchange
from distlib.comm.channel import Collective, Message
from distlib.comm.group import Group
from distlib.comm.nccl import NcclChannel, connect_nccl
from distlib.comm.nccl_notes import Note, verdict
from distlib.comm.work import CollectiveError
from distlib.sharded.build import device_for

pytestmark = pytest.mark.skipif(native.core() is None, reason=f"no C++ core: {native.why_not()}")
CPU = torch.device("cpu")
TWO_HOSTS = {"DISTLIB_NODES": "2"}


class Unfussy:
    """gloo's work, with what NCCL's does not have left out."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> bool:
        return all([work.wait() for work in self._works])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def exception(self) -> Any:
        return None

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def _source_rank(self) -> int:
        raise RuntimeError("sourceRank() may only be called on work objects that correspond to a recv call.")


class UnfussyGloo:
    """gloo's group, as NCCL's would take the calls: some dtypes only, no tags, messages together in brackets."""

    HAS = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float64}
    HAS |= {torch.float16, torch.bfloat16, torch.float32}

    def __init__(
        self, store: dist.Store, rank: int, size: int, name: str, global_ranks: list[int], timeout: timedelta
    ) -> None:
        assert len(global_ranks) == size
        self._pg = gloo.process_group(store, rank, size, timeout.total_seconds(), "127.0.0.1")
        self._bracket: list[Any] | None = None
        self.brackets, self.timeout = 0, timeout

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeout = timeout

    def _start_coalescing(self) -> None:
        self._bracket = []

    def _end_coalescing(self) -> Any:
        started, self._bracket = self._bracket, None
        self.brackets += 1
        return Unfussy(started) if started else None

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._pg, name)

        def checked(*args: Any) -> Any:
            for leaf in torch.utils._pytree.tree_leaves(args):
                if isinstance(leaf, torch.Tensor) and leaf.dtype not in self.HAS:
                    raise TypeError(f"Input tensor data type is not supported for NCCL process group: {leaf.dtype}")
            assert name not in ("send", "recv") or args[2] == 0, "a tag"
            work = call(*args)
            if self._bracket is None or not isinstance(work, dist.Work):
                return Unfussy([work]) if isinstance(work, dist.Work) else work
            return self._bracket.append(work)

        return checked


@contextmanager
def nccl_group(rank: int, n: int, make: Callable[..., Any] = UnfussyGloo, timeout: float = 20.0) -> Iterator[Group]:
    with process_group(rank, n, timeout=timeout):
        world = Group.of()
        channel = connect_nccl(world, CPU, make)
        yield Group(world.name, rank, world.ranks, world.topology, channel, timeout)
        channel.close()


KINDS = ["all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "gather", "scatter", "ring"]


def same_results(rank: int, n: int, cases: list[Case]) -> None:
    with nccl_group(rank, n) as group:
        for case in cases:
            got, expected = Player(group, CPU).play(case), Player(Group.of(), CPU).play(case)
            assert got == expected, f"{case} on rank {rank}"


@pytest.mark.parametrize("env", [{}, TWO_HOSTS], ids=["one host", "two hosts"])
def test_every_kind_gives_what_the_cpu_gives(env: dict[str, str]) -> None:
    ints = [Case(kind, torch.int64, op, 999, root=1) for kind in KINDS for op in ("sum", "max")]
    strided = [Case(kind, torch.int64, numel=50, strided=True) for kind in KINDS if kind != "ring"]
    moved = ["all_gather", "broadcast", "gather", "scatter", "ring"]
    ints += [Case(kind, dtype, numel=33, root=1) for kind in moved for dtype in (torch.int16, torch.float8_e5m2)]
    averages = [Case(kind, torch.float32, "avg", 0) for kind in ("all_reduce", "reduce", "reduce_scatter")]
    run_ranks(4, same_results, [*ints, *strided, *averages], env=env)


def averages(rank: int, n: int) -> None:
    with nccl_group(rank, n) as group:
        given = [torch.tensor([10 * rank + d]) for d in range(n)]  # gloo's parts must be equal
        got = [torch.zeros(1, dtype=torch.int64) for _ in range(n)]
        group.all_to_all(got, given)
        assert torch.cat(got).tolist() == [10 * r + rank for r in range(n)]
        x = torch.full((5,), float(rank))
        group.all_reduce(x, "avg")
        assert x.tolist() == [1.5] * 5
        y = torch.full((5,), rank)
        group.all_reduce(y, "avg", async_op=True).wait()
        assert y.tolist() == [1] * 5


def test_an_all_to_all_and_averages_of_a_backend_that_has_none() -> None:
    run_ranks(4, averages)


def messages(rank: int, n: int) -> tuple[str, list[tuple[str, int]]]:
    with nccl_group(rank, n) as group:
        distlib.ledger().reset()
        got = torch.zeros(3)
        if rank == 0:
            group.send(torch.arange(3.0), 1)
        else:
            work = group.recv(got, 0, async_op=True)
            assert work is not None and work.wait() and work.source_rank() == 0 and got.tolist() == [0.0, 1.0, 2.0]
        # Each first sends what the other takes later: one by one, long ones would wait for ever.
        back = torch.zeros(5, dtype=torch.int16)
        mine = torch.full((5,), rank, dtype=torch.int16)
        works = exchange(group, [Message(mine, 1 - rank, 0, True), Message(back, 1 - rank, 0, False)])
        assert len(works) == 1 and works[0].wait() and back.tolist() == [1 - rank] * 5
        assert group.cpu_channel.pg.brackets == 1  # type: ignore[attr-defined]
        assert exchange(group, []) == []
        with pytest.raises(ValueError, match="peer=7 is not a rank"):
            exchange(group, [Message(back, 7, 0, False)])
        with pytest.raises(ValueError, match="must be contiguous"):
            exchange(group, [Message(torch.zeros(4, 2)[:, 0], 1 - rank, 0, False)])
        with pytest.raises(ValueError) as caught:
            exchange(group, [Message(back, 1 - rank, 5, False)])
        for start in (group.send, group.recv):
            with pytest.raises(ValueError, match="tag=5, which NCCL would ignore"):
                start(got, 1 - rank, tag=5)
        group.sweep()
        rows = [(r.op, r.bytes) for r in distlib.ledger().rows]
        return str(caught.value), rows


def test_messages_over_nccl_start_together_and_tags_are_refused() -> None:
    found = run_ranks(2, messages)
    assert all("tag=5, which NCCL would ignore" in text for text, _ in found)
    assert dict(found[0][1]) == {"send": 12 + 10} and dict(found[1][1]) == {"recv": 0, "send": 10}


def other_backends(rank: int, n: int) -> None:
    with process_group(rank, n, backend="gloo"):
        group = Group.of()
        assert group.on_device("cpu") and not group.on_device("cuda")
    with nccl_group(rank, n) as group:
        channel = group.cpu_channel
        assert isinstance(channel, NcclChannel)
        channel.device = torch.device("cuda", 0)  # as of one that the user made
        assert group.on_device("cuda") and not group.on_device("cpu")
        with pytest.raises(ValueError, match="backend does not communicate tensors on cpu"):
            device_for(torch.nn.Linear(1, 1), None, group)
        channel.device = CPU


def test_a_group_of_another_backend_says_which_tensors_it_takes() -> None:
    run_ranks(1, other_backends)


def patient(rank: int, n: int) -> list[float]:
    found = []
    with nccl_group(rank, n) as group:
        channel = group.cpu_channel
        assert isinstance(channel, NcclChannel)
        for timeout in (None, 3600.0, 60.0):
            group.all_reduce(torch.ones(1), timeout=timeout)
            found.append(channel.pg.timeout.total_seconds())
        group.all_gather(torch.ones(n * 5), torch.ones(5), hierarchical=True)
        assert channel._levels is not None
        found += [pg.timeout.total_seconds() for pg in channel._levels.process_groups()]
        group.all_reduce(torch.ones(1), timeout=4000.0)
        return found + [pg.timeout.total_seconds() for pg in channel._process_groups()]


def test_torchs_watchdog_is_as_patient_as_the_longest_timeout() -> None:
    """It ends the process; ours ends the group, with a reason, and comes first."""
    later = 300.0
    expected = [20.0, 3600.0 + later, 3600.0 + later, 3600.0, 3600.0, *[4000.0 + later] * 3]
    assert run_ranks(4, patient, env=TWO_HOSTS) == [expected] * 4


# ---------------------------------------------------------------- levels


def whole_numbers(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums of these are exact in any order."""
    return torch.randint(-9, 9, (numel,), generator=torch.Generator().manual_seed(rank)).to(dtype)


def in_levels(rank: int, n: int, dtype: torch.dtype, chunk: int) -> list[tuple[str, str, int, int]]:
    nccl_levels.CHUNK_BYTES = chunk
    with nccl_group(rank, n) as group:
        for numel, as_list in itertools.product((0, 1, 7, 1000), (False, True)):
            all = [whole_numbers(r, numel, dtype) for r in range(n)]
            out = torch.zeros(n * numel, dtype=dtype)
            pieces = [torch.zeros(numel, dtype=dtype) for _ in range(n)]
            group.all_gather(pieces if as_list else out, all[rank], hierarchical=True)
            assert torch.equal(torch.cat(pieces) if as_list else out, torch.cat(all))
        for op, numel, as_list in itertools.product(("sum", "max", "avg"), (0, 1, 7, 1000), (False, True)):
            all = [whole_numbers(r, n * numel, dtype) for r in range(n)]
            mine = torch.zeros(numel, dtype=dtype)
            given = [p.clone() for p in all[rank].view(n, numel)] if as_list else all[rank]
            group.reduce_scatter(mine, given, op, hierarchical=True)
            stack = torch.stack(all).double()
            expected = {"sum": stack.sum(0), "max": stack.amax(0), "avg": stack.sum(0) / n}[op]
            if not dtype.is_floating_point:
                expected = expected.trunc()
            assert torch.equal(mine, expected.view(n, numel)[rank].to(dtype)), (op, numel)
        distlib.ledger().reset()
        group.all_gather(torch.zeros(n * 1000, dtype=dtype), torch.zeros(1000, dtype=dtype), hierarchical=True)
        group.reduce_scatter(torch.zeros(1000, dtype=dtype), torch.zeros(n * 1000, dtype=dtype), hierarchical=True)
        return [(r.op, r.link, r.calls, r.bytes) for r in distlib.ledger().rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("chunk", [1 << 30, 4000])
def test_gathers_and_scatters_in_levels(dtype: torch.dtype, chunk: int) -> None:
    for rows in run_ranks(4, in_levels, dtype, chunk, env=TWO_HOSTS):
        piece = 1000 * dtype.itemsize
        wide = 4000 if dtype is torch.bfloat16 else piece
        found = {(op, link): bytes for op, link, _, bytes in rows}
        assert found["all_gather", "between hosts"] == piece and found["all_gather", "same host"] == 2 * piece
        assert found["reduce_scatter", "between hosts"] == wide and found["reduce_scatter", "same host"] == 2 * wide


def widened(rank: int, n: int) -> None:
    with nccl_group(rank, n) as group:
        given = torch.tensor([256.0 if rank == 0 else 1.0] * n, dtype=torch.bfloat16)
        out = torch.zeros(1, dtype=torch.bfloat16)
        group.reduce_scatter(out, given, hierarchical=True)
        assert out.item() == 260.0  # 259, rounded once; one by one in bfloat16 it stays 256


def test_half_types_are_rounded_once() -> None:
    run_ranks(4, widened, env=TWO_HOSTS)


def flat_where_it_must_be(rank: int, n: int) -> None:
    with nccl_group(rank, n) as group:
        with pytest.raises(ValueError, match="share one host"):
            group.all_gather(torch.zeros(n), torch.zeros(1), hierarchical=True)
        large = hierarchical.PAYS_FROM
        out = torch.zeros(n * large, dtype=torch.uint8)
        group.all_gather(out, torch.full((large,), rank, dtype=torch.uint8))
        assert out.view(n, -1)[:, 5].tolist() == list(range(n))


def test_one_host_has_no_levels() -> None:
    run_ranks(2, flat_where_it_must_be)


# ---------------------------------------------------------------- what is late


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
            time.sleep(2.0)
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
        assert "was not done within 1.0 s" in text and longest < 1.0, (text, longest)


def test_the_verdict_names_ranks_by_what_they_did() -> None:
    mine = Note(3, "all_gather(float32, 9 elements)", 3, "all_gather(float32, 9 elements)")
    notes = [mine, Note(2, "barrier", 0, ""), None, Note(3, "broadcast", 3, "broadcast"), Note(5, "barrier", 4, "x")]
    text = verdict("g", [10, 11, 12, 13, 14], notes, mine, 60.0)
    assert text == (
        "all_gather(float32, 9 elements) #3 of group 'g' was not done within 60.0 s; not started by rank 11 (its last "
        "was barrier #2); no answer from rank 12: ended, or stopped; ranks disagree: rank 10 called "
        "all_gather(float32, 9 elements), rank 13 called broadcast"
    )


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

"""Groups over several (pretend) hosts and groups without the core: same results, bytes as the formulas say."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import process_group, run_ranks, run_ranks_raw
from test_collectives import KINDS, Case, check, place, values

import distlib
from distlib import native
from distlib.comm.gloo_bytes import broadcast_targets, expected_sent
from distlib.comm.group import Group
from distlib.comm.spanning import Shares
from distlib.comm.work import CollectiveError

NO_CORE = pytest.mark.skipif(native.core() is None, reason=native.why_not())


def sum_by_host(group: Group, tensors: list[torch.Tensor], op: str) -> torch.Tensor:
    """The order that spanning.py states: ranks in order inside a host, then hosts in order; halves rounded once."""
    wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
    hosts = []
    for node in group.topology.nodes:
        total = wide[node[0]].clone()
        for r in node[1:]:
            total += wide[r]
        hosts.append(total)
    total = hosts[0]
    for host in hosts[1:]:
        total = total + host
    if op == "avg":
        total = total / len(tensors)
    return total.to(tensors[0].dtype)


def all_reduce_over_hosts(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        assert len(group.topology.nodes) == 2
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for numel in (1, 2, 7, 1000, 400_003):  # the last: several chunks, an uneven tail
                for op in ("sum", "avg"):
                    for layout in ("ordinary", "registered"):
                        case = Case("all_reduce", dtype, op, numel, layout, 0, numel, False)
                        x = place(group, case, values(case, rank, numel))
                        group.all_reduce(x, op)
                        expected = sum_by_host(group, [values(case, r, numel) for r in range(n)], op)
                        assert torch.equal(x, expected), case


@NO_CORE
@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_reduce_over_two_hosts_is_exact_in_its_order_of_summation(n: int) -> None:
    run_ranks(n, all_reduce_over_hosts, env={"DISTLIB_NODES": "2", "DISTLIB_CHUNK_KB": "256"}, timeout=100)


def every_kind(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        sub = dist.new_group(list(range(n - 1)))
        for kind in KINDS:
            for dtype, op in [
                (torch.int64, "sum"),
                (torch.float32, "max"),
                (torch.bool, "bxor"),
                (torch.uint8, "band"),
            ]:
                for numel in (0, 1, 1000, 70_001):
                    case = Case(kind, dtype, op, numel, "strided", 1, 3, numel % 2 == 0)
                    check(group, case)
                    if rank < n - 1 and kind != "message":
                        check(Group.of(sub), case)


@pytest.mark.parametrize("env", [{"DISTLIB_NODES": "2"}, {"DISTLIB_NODES": "3"}, {"DISTLIB_CORE": "0"}], ids=str)
def test_every_kind_of_collective(env: dict[str, str]) -> None:
    run_ranks(3, every_kind, env=env, timeout=100)


def sums_in_rank_order(rank: int, n: int) -> bytes:
    with process_group(rank, n):
        case = Case("all_reduce", torch.float32, "sum", 10_007, "ordinary", 0, 4, False)
        x = values(case, rank, 10_007).clone()
        Group.of().all_reduce(x)
        return x.numpy().tobytes()


@NO_CORE
def test_with_and_without_the_core_the_bits_are_the_same() -> None:
    results = [*run_ranks(3, sums_in_rank_order), *run_ranks(3, sums_in_rank_order, env={"DISTLIB_CORE": "0"})]
    assert len(set(results)) == 1


def warns(rank: int, n: int) -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with process_group(rank, n):
            dist.new_group()
            x = distlib.registered_empty(10).fill_(1)
            dist.all_reduce(x)
            assert x[0] == n
    return [str(w.message) for w in caught if "distlib" in str(w.message)]


def test_without_the_core_there_is_one_clear_warning() -> None:
    first, second = run_ranks(2, warns, env={"DISTLIB_CORE": "0"})
    assert len(first) == 1 and "DISTLIB_CORE=0" in first[0] and "gloo" in first[0]
    assert second == [], "rank 0 speaks for all"


# ---------------------------------------------------------------- bytes


def counted(rank: int, n: int, kind: str) -> list[tuple[str, int, int]]:
    with process_group(rank, n):
        distlib.ledger().reset()
        case = Case(kind, torch.int32, "sum", 96_000, "ordinary", 0, 1, False)
        check(Group.of(), case)
        ledger = distlib.ledger()
        pairs = zip(ledger.rows, ledger.expected(), strict=True)
        return [(row.link, row.bytes, formula.bytes) for row, formula in pairs if row.op == kind]


@NO_CORE
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("message", "all_to_all")])
def test_bytes_counted_are_the_bytes_of_the_formula(kind: str, nodes: int) -> None:
    of_ranks = run_ranks(4, counted, kind, env={"DISTLIB_NODES": str(nodes)})
    for link in ("same host", "between hosts"):
        total = sum(bytes for rows in of_ranks for where, bytes, _ in rows if where == link)
        formula = sum(expected for rows in of_ranks for where, _, expected in rows if where == link)
        assert total == formula, (link, of_ranks)
    if kind == "all_reduce":
        size = 96_000 * 4
        between = sum(bytes for rows in of_ranks for where, bytes, _ in rows if where == "between hosts")
        same = sum(bytes for rows in of_ranks for where, bytes, _ in rows if where == "same host")
        if nodes == 1:
            assert same == 4 * 2 * size * 3 // 4, "2 M (n-1)/n per rank"
        else:
            assert between == 2 * 2 * size // 2, "each host sends M once: 2 M (h-1)/h over its rails"


def one_loses_its_network(rank: int, n: int) -> tuple[float, str]:
    """On rank 1 gloo fails between the two stages inside its host, where rank 0 then waits for it."""
    with process_group(rank, n, timeout=50):
        group = Group.of()
        x = torch.ones(1000)
        group.all_reduce(x)
        if rank == 1:

            def fail(*_: object) -> None:
                raise RuntimeError("the cable was pulled")

            group._channel._sum_between = fail  # type: ignore[attr-defined]
        begin = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            group.all_reduce(x)
        return time.monotonic() - begin, str(caught.value)


@NO_CORE
def test_a_rank_whose_network_fails_does_not_let_its_host_wait_in_memory() -> None:
    ends = run_ranks(4, one_loses_its_network, env={"DISTLIB_NODES": "2"})
    assert all(seconds < 15 for seconds, _ in ends), ends
    assert "the cable was pulled" in ends[0][1] and "failed on rank 1" in ends[0][1], ends[0]
    assert "the cable was pulled" in ends[1][1]


def message_bytes(rank: int, n: int) -> dict[tuple[str, str], int]:
    with process_group(rank, n):
        group = Group.of()
        distlib.ledger().reset()
        x = torch.ones(1000)
        if rank == 0:
            group.send(x, 1)
            group.send(x, 2)
        else:
            group.recv(x, 0)
        group.barrier()
        return {(row.op, row.link): row.bytes for row in distlib.ledger().rows}


@NO_CORE
def test_messages_are_counted_by_link() -> None:
    sender = run_ranks(3, message_bytes, env={"DISTLIB_NODES": "2"})[0]
    assert sender["send", "same host"] == 4000 and sender["send", "between hosts"] == 4000


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(0, 69))
def test_a_broadcast_tree_reaches_every_rank_once(size: int, root: int) -> None:
    root %= size
    reached = [to for rank in range(size) for to in broadcast_targets(rank, root, size)]
    assert sorted([*reached, root]) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 1024), st.integers(0, 10_000))
def test_an_all_reduce_sends_two_parts_to_each_other_rank(n: int, parts: int) -> None:
    sent = expected_sent("all_reduce", n, 0, 0, parts * n, parts * n)
    assert sum(bytes for to, bytes in sent.items() if to != 0) == (2 * parts * (n - 1) if n > 1 else 0)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 16), st.integers(1, 16))
def test_shares_cover_every_element_once(count: int, rails: int, hosts: int) -> None:
    shares = Shares(count, rails, hosts)
    ends = [shares.of(r) for r in range(rails + 2)]
    assert [i for b, e in ends for i in range(b, e)] == list(range(count))
    assert shares.share * rails >= count and shares.share == shares.part * hosts


def rail_fails(rank: int, n: int) -> str:
    """The network between ranks 0 and 2 fails at the limit; their neighbours, whose rail works, wait for them."""
    with process_group(rank, n, timeout=2):
        group = Group.of()
        group.all_reduce(torch.ones(8))
        channel: Any = group.cpu_channel

        def fail(*_: Any) -> None:
            time.sleep(2.5)
            raise RuntimeError("Timed out waiting 2000ms for recv operation to complete")

        if rank in (0, 2):
            channel._sum_between = fail
        with pytest.raises(CollectiveError) as caught:
            group.all_reduce(torch.ones(8))
        return str(caught.value)


@NO_CORE
def test_the_network_tells_that_it_failed_before_those_who_wait_for_it_are_named() -> None:
    for text in run_ranks(4, rail_fails, env={"DISTLIB_NODES": "2"}):
        assert "Timed out waiting 2000ms" in text and "ran into the timeout" not in text, text


def stops(rank: int, n: int) -> str:
    """Rank 1 is stopped inside an all-reduce. Rank 0 waits for it in memory, and rank 2, by the network, for rank 0."""
    with process_group(rank, n, timeout=2):
        group = Group.of()
        group.all_reduce(torch.ones(8))
        channel: Any = group.cpu_channel

        def stop(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)  # the signal takes a moment to reach all threads

        if rank == 1:
            channel._sum_inside = stop
        with pytest.raises(CollectiveError) as caught:
            group.all_reduce(torch.ones(8))
        return str(caught.value)


@NO_CORE
def test_who_is_stopped_inside_a_host_is_named_over_the_network() -> None:
    outcomes = run_ranks_raw(3, stops, env={"DISTLIB_NODES": "2"})
    assert outcomes[0].ok and outcomes[0].seconds < 10, outcomes[0]
    assert outcomes[2].ok and "ranks that ended or do not answer: rank 1." in outcomes[2].value, outcomes[2]


def lateness(rank: int, n: int) -> Any:
    with process_group(rank, n):
        group = Group.of()
        group.barrier()
        distlib.ledger().reset()
        for _ in range(4):
            time.sleep(0.05 if rank == 1 else 0.0)
            group.all_reduce(torch.ones(10), label="bucket 0")
        ledger = distlib.ledger()
        return ledger.slowest_rank, ledger.arrivals["bucket 0"], ledger.seconds


@pytest.mark.alone
@pytest.mark.parametrize("env", [{}, {"DISTLIB_NODES": "2"}, {"DISTLIB_CORE": "0"}], ids=str)
def test_the_slowest_rank_is_named_on_every_rank(env: dict[str, str]) -> None:
    for slowest, arrivals, _ in run_ranks(3, lateness, env=env):
        assert slowest == 1
        assert arrivals[1] > 0.03 and arrivals[1] > 3 * max(arrivals[0], arrivals[2])


def in_a_graph(rank: int, n: int) -> None:
    with process_group(rank, n):
        group = Group.of()
        weight = torch.full((6, 4), float(rank + 1), requires_grad=True)
        for dtype in (torch.float32, torch.bfloat16):
            results = [torch.empty(6, 4, dtype=dtype) for _ in range(n)]
            with torch.no_grad():  # as in the forward of an autograd.Function
                summed = (weight.detach() * 2).to(dtype).requires_grad_()
                group.all_reduce(summed)
                group.all_gather(torch.stack(results).requires_grad_(), summed)
                group.broadcast(summed, 0)
            assert summed.tolist() == [[2.0 * sum(range(1, n + 1))] * 4] * 6


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_tensors_of_a_graph_are_taken_as_they_are(nodes: str) -> None:
    run_ranks(4, in_a_graph, env={"DISTLIB_NODES": nodes})

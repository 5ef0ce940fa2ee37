"""Groups over torch's fake backend: one rank of 1,024, in this process, counted by the formulas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import distlib
from distlib.comm.counting import pretend_topology
from distlib.comm.group import Group
from distlib.comm.work import CollectiveError
from distlib.topology import Topology

N, P, K = 1024, 8, 8  # the world, a partition group, ranks per host


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Starts the fake world, as `rank` of N on so many hosts."""

    def start(rank: int = 0, nodes: int | None = N // K, size: int = N) -> None:
        if nodes is None:
            monkeypatch.delenv("DISTLIB_NODES", raising=False)
        else:
            monkeypatch.setenv("DISTLIB_NODES", str(nodes))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        distlib.ledger().reset()

    yield start
    dist.destroy_process_group()
    distlib.ledger().reset()


def counted(run: Callable[[], object]) -> dict[str, int]:
    """Bytes by link of what `run` does; counts equal formulas, as nothing moves."""
    distlib.ledger().reset()
    run()
    ledger = distlib.ledger()
    assert ledger.rows == ledger.expected()
    assert "Communication of this rank" in str(ledger) and ledger.rows[0].op in str(ledger)
    return {row.link: row.bytes for row in ledger.rows}


def test_a_partition_group_inside_a_host_counts_the_bytes_of_zero(world: Callable[..., None]) -> None:
    world(rank=500)
    group = Group.of(dist.new_group(list(range(496, 504))))
    assert (group.rank, group.size, group.ranks) == (4, P, tuple(range(496, 504)))
    assert group.topology == Topology((tuple(range(P)),))
    shard, whole = torch.full((1000,), 3.0), torch.zeros(1000 * P)
    of_gather = counted(lambda: group.all_gather(whole, shard))
    assert of_gather == {"same host": whole.nbytes * (P - 1) // P}
    assert torch.equal(whole.view(P, -1)[4], shard) and whole.sum() == shard.sum(), "its own piece, no other"
    whole.copy_(torch.arange(whole.numel()))
    of_scatter = counted(lambda: group.reduce_scatter(shard, whole, "avg"))
    assert of_scatter == of_gather
    assert torch.equal(shard, whole.view(P, -1)[4]), "its own values"


def test_replication_groups_cross_hosts(world: Callable[..., None]) -> None:
    world(rank=3)
    group = Group.of(dist.new_group(list(range(3, N, P))))
    r = N // P
    assert group.topology == Topology(tuple((i,) for i in range(r)))
    piece = torch.ones(r * 100)
    assert counted(lambda: group.all_reduce(piece)) == {"between hosts": 2 * piece.nbytes * (r - 1) // r}
    assert bool((piece == 1).all())
    with pytest.raises(ValueError, match="one rank on each host"):
        group.all_gather(torch.zeros(r * 4), torch.zeros(4), hierarchical=True)


@pytest.mark.parametrize(("n", "nodes"), [(16, 2), (N, N // K)])
def test_in_levels_a_gather_counts_the_bytes_of_the_paper(world: Callable[..., None], n: int, nodes: int) -> None:
    world(size=n, nodes=nodes)
    group, h = Group.of(), nodes
    shard = torch.ones(10_000)
    whole = torch.empty(10_000 * n)
    expected = {"between hosts": (h - 1) * shard.nbytes, "same host": (K - 1) * h * shard.nbytes}
    assert counted(lambda: group.all_gather(whole, shard)) == expected
    assert counted(lambda: group.reduce_scatter(shard, whole)) == expected
    assert K * expected["between hosts"] == (n - K) * whole.nbytes // n, "(p - k) M / p per host"


def test_flat_the_ring_crosses_at_the_last_rank_of_a_host(world: Callable[..., None]) -> None:
    world(rank=7)
    group = Group.of()
    shard, whole = torch.ones(100), torch.empty(100 * N)
    assert counted(lambda: group.all_gather(whole, shard, hierarchical=False)) == {"between hosts": 400 * (N - 1)}
    by_scatter = counted(lambda: group.reduce_scatter(shard, whole, hierarchical=False))
    assert by_scatter == {"between hosts": 400 * (N - K), "same host": 400 * (K - 1)}


def test_every_kind_is_over_at_once_and_counted(world: Callable[..., None]) -> None:
    world(rank=9, nodes=2, size=16)
    group = Group.of()
    x, parts = torch.arange(4.0), [torch.full((4,), float(i)) for i in range(16)]
    outs = [torch.zeros(4) for _ in range(16)]
    assert counted(lambda: group.barrier()) == {"between hosts": 0}
    counted(lambda: group.gather(outs, x, 9))
    assert torch.equal(outs[9], x) and not any(out.any() for i, out in enumerate(outs) if i != 9)
    counted(lambda: group.scatter(x, parts, 9))
    assert torch.equal(x, parts[9])
    assert counted(lambda: group.all_to_all(outs, parts)) == {"between hosts": 16 * 8, "same host": 16 * 7}
    assert torch.equal(outs[9], parts[9])
    assert counted(lambda: group.broadcast(x, 0)) == {"between hosts": 0}
    assert counted(lambda: group.reduce(x, 0)) == {"between hosts": 16}
    assert counted(lambda: group.send(x, 8)) == {"same host": 16}
    assert counted(lambda: group.send(x, 0)) == {"between hosts": 16}
    work = group.all_reduce(x, async_op=True)
    assert work is not None and work.is_completed() and work.get_future().wait() == [x]
    assert torch.equal(x, parts[9])
    group.recv(x, 0)
    group.recv(x)
    strided = torch.zeros(32, 2)[:, 0]
    group.all_gather(strided, torch.ones(2))
    assert strided.nonzero().flatten().tolist() == [18, 19]


def test_a_world_on_one_host_and_an_uneven_one(world: Callable[..., None]) -> None:
    world(nodes=None)
    group = Group.of()
    assert len(group.topology.nodes) == 1
    x = torch.ones(N * 10)
    assert counted(lambda: group.all_reduce(x)) == {"same host": 2 * x.nbytes * (N - 1) // N}
    with pytest.raises(ValueError, match="share one host"):
        group.all_gather(torch.zeros(N), torch.zeros(1), hierarchical=True)
    with pytest.raises(ValueError, match="all_gather: output has 7 elements"):
        group.all_gather(torch.zeros(7), torch.zeros(1))


def test_hosts_are_contiguous_blocks_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLIB_NODES", "3")
    assert pretend_topology(range(7), 7) == Topology(((0, 1, 2), (3, 4), (5, 6)))
    assert pretend_topology([6, 0, 1, 5], 7) == Topology(((0, 3), (1, 2)))
    monkeypatch.setenv("DISTLIB_NODES", "8")
    with pytest.raises(ValueError, match="DISTLIB_NODES='8'"):
        pretend_topology(range(7), 7)


def test_after_an_abort_nothing_is_counted(world: Callable[..., None]) -> None:
    world()
    group = Group.of()
    group.abort("enough")
    with pytest.raises(CollectiveError, match="enough"):
        group.barrier()
    assert distlib.ledger().rows == []


def test_a_thousand_calls_take_seconds(world: Callable[..., None]) -> None:
    world()
    begin = time.monotonic()
    groups = [Group.of(), Group.of(dist.new_group(list(range(P)))), Group.of(dist.new_group(list(range(0, N, P))))]
    for group in groups:
        whole, shard = torch.zeros(group.size), torch.zeros(1)
        for _ in range(100):
            group.all_gather(whole, shard)
            group.reduce_scatter(shard, whole)
            group.all_reduce(whole)
    assert time.monotonic() - begin < 20
    calls = sorted((row.link, row.calls) for row in distlib.ledger().rows if row.op == "all_reduce")
    assert calls == [("between hosts", 100)] * 2 + [("same host", 100)] * 2, "the world has both links"

"""Topology: any division into nodes keeps its ranks; contradictions are refused by name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib.topology import Topology


@st.composite
def hosts_of_ranks(draw: st.DrawFn) -> list[int]:
    """The host of each of 1 to 24 ranks, in any order, on any number of hosts."""
    return draw(st.lists(st.integers(0, 6), min_size=1, max_size=24))


def topology_of(hosts: list[int]) -> Topology:
    return Topology.from_colocation(
        {rank: {other for other, there in enumerate(hosts) if there == host} for rank, host in enumerate(hosts)}
    )


@settings(deadline=None)
@given(hosts_of_ranks())
def test_colocation_becomes_nodes(hosts: list[int]) -> None:
    topology = topology_of(hosts)
    assert topology.size == len(hosts)
    assert sorted(rank for node in topology.nodes for rank in node) == list(range(len(hosts)))
    assert [min(node) for node in topology.nodes] == sorted(min(node) for node in topology.nodes)
    for a, host in enumerate(hosts):
        assert a in topology.local_ranks(a) == tuple(sorted(topology.local_ranks(a)))
        assert a in topology.nodes[topology.node_of(a)]
        for b, there in enumerate(hosts):
            assert topology.same_host(a, b) == (host == there)


@settings(deadline=None)
@given(hosts_of_ranks(), st.randoms())
def test_a_subgroup_keeps_who_is_beside_whom(hosts: list[int], random) -> None:  # type: ignore[no-untyped-def]
    world = topology_of(hosts)
    ranks = random.sample(range(world.size), random.randint(1, world.size))
    group = world.restrict(ranks)
    assert group.size == len(ranks)
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            assert group.same_host(i, j) == world.same_host(a, b)


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_pretend_nodes_are_contiguous_and_even(size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size))
    nodes = Topology((tuple(range(size)),)).split(k).nodes
    assert [rank for node in nodes for rank in node] == list(range(size))
    sizes = [len(node) for node in nodes]
    assert len(sizes) == k and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5))
def test_rails_cross_every_node_once(nodes: int, local: int) -> None:
    topology = Topology((tuple(range(nodes * local)),)).split(nodes)
    assert topology.is_uniform and len(topology.rails) == local
    for i, rail in enumerate(topology.rails):
        assert [topology.node_of(rank) for rank in rail] == list(range(nodes))
        assert all(topology.local_ranks(rank)[i] == rank for rank in rail)


def test_uneven_nodes_have_no_rails() -> None:
    topology = Topology(((0, 1), (2,)))
    assert not topology.is_uniform
    with pytest.raises(ValueError, match=r"not \[2, 1\]"):
        _ = topology.rails


def test_real_hosts_split_only_within_themselves() -> None:
    two_hosts = Topology(((0, 1, 2, 3), (4, 5, 6, 7)))
    assert two_hosts.split(4).nodes == ((0, 1), (2, 3), (4, 5), (6, 7))
    with pytest.raises(ValueError, match=r"nodes=3 .* ranks \[3, 4, 5\], which are on different hosts"):
        two_hosts.split(3)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_an_impossible_number_of_nodes_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"nodes={k} is not possible with 4 ranks: choose 1 to 4"):
        Topology(((0, 1, 2, 3),)).split(k)


@pytest.mark.parametrize(
    ("colocated", "words"),
    [
        ({0: {0, 1}, 1: {1}}, "rank 0 shares a host with ranks [0, 1], but rank 1 with [1]"),
        ({0: {0, 1}, 1: {0, 1, 2}, 2: {1, 2}}, "but rank 1 with [0, 1, 2]"),
        ({0: {0, 7}}, "but rank 7 with []"),
    ],
    ids=["asymmetric", "intransitive", "unknown rank"],
)
def test_contradictory_colocation_is_refused(colocated: dict[int, set[int]], words: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(words)):
        Topology.from_colocation(colocated)


@pytest.mark.parametrize("nodes", [(), ((),), ((0,), (2,)), ((0, 0),), ((1, 0),), ((1,), (0,)), ((0,), ())])
def test_a_division_that_is_none_is_refused(nodes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="nodes="):
        Topology(nodes)


def test_ranks_outside_are_refused() -> None:
    topology = Topology(((0, 1),))
    for ask in (topology.node_of, topology.local_ranks, lambda rank: topology.restrict([rank])):
        with pytest.raises(ValueError, match="rank=2 is not in a world of 2"):
            ask(2)
    with pytest.raises(ValueError, match="twice"):
        topology.restrict([1, 1])

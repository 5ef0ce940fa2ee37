"""Where a plan puts ranks, what they must be for it, and what it takes: against formulas and real groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from distlib.memory import PerParameter
from distlib.pipeline import NAMES, peak_activations
from distlib.plan import Mesh, Plan, options, world
from distlib.sharded.groups import make_grid, partition_of
from distlib.topology import Topology

# ------------------------------------------------------------ mesh


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Plan, Topology]:
    """A plan and up to 48 ranks, which mostly divide as it says, on hosts of equal or different size, numbered host by
    host or all mixed."""
    pipeline, replicas, p = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n = draw(st.just(pipeline * replicas * p) | st.integers(1, 24)) if draw(st.booleans()) else pipeline * replicas * p
    ranks = draw(st.permutations(range(n))) if draw(st.booleans()) else list(range(n))
    each = draw(st.integers(1, 8))
    hosts = [tuple(sorted(ranks[i : i + each])) for i in range(0, n, each)]
    stage = draw(st.sampled_from([0, 3, 3, 3]))
    size = {"partition_size": draw(st.sampled_from([p, p, None, "node"]))} if stage else {}
    return Plan(pipeline=pipeline, stage=stage, **size), Topology(tuple(sorted(hosts)))


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_every_rank_is_in_one_group_of_each_kind(layout: tuple[Plan, Topology]) -> None:
    plan, topology = layout
    pipeline, stage, size = plan.pipeline, plan.stage, plan.partition_size
    n = topology.size
    try:
        mesh = Mesh.of(plan, topology)
    except ValueError as error:
        divides = n % pipeline == 0
        assert not divides or size == "node" or (n // pipeline) % size, error
        assert f"{n} ranks" in str(error) if not divides else "partition" in str(error)
        return
    p, r = mesh.partition_size, mesh.replicas
    assert p * r * pipeline == n and (p == 1 or stage > 0)
    for groups, each in (
        (mesh.pipelines, pipeline),
        (mesh.data_parallel, p * r),
        (mesh.partitions, p),
        (mesh.replications, r),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(n))
        assert all(len(group) == each and list(group) == sorted(group) for group in groups), "as new_group orders them"
    for rank in range(n):
        place = mesh.place(rank)
        for name in ("pipeline", "data_parallel", "partition", "replication"):
            assert rank in getattr(place, name)
        assert place.pipeline[place.pipeline_rank] == place.partition[place.part] == rank
        assert place.replication[place.replica] == rank and set(place.partition) <= set(place.data_parallel)
        assert all(mesh.place(other).pipeline_rank == place.pipeline_rank for other in place.data_parallel)
        seeds = {options.seed(plan.replace(seed=5), mesh.place(other)) for other in place.data_parallel}
        assert seeds == set(range(5, 5 + p * r)), "replicas differ"
        assert len({options.seed(plan.replace(seed=5), mesh.place(other)) for other in place.pipeline}) == 1
        # What ShardedDataParallel makes of the data-parallel group.
        within = partition_of(topology.restrict(place.data_parallel), p)
        ours = [g for g in mesh.partitions if set(g) <= set(place.data_parallel)]
        assert [tuple(place.data_parallel[i] for i in group) for group in within] == ours
    with pytest.raises(ValueError, match=f"rank={n} is not"):
        mesh.place(n)


def test_neighbours_are_partition_groups_then_replicas_then_stages() -> None:
    plan = Plan(pipeline=2, stage=3, partition_size=2)
    mesh = Mesh.of(plan, Topology(((0, 1, 2, 3), (4, 5, 6, 7))))
    assert mesh.partitions == ((0, 1), (2, 3), (4, 5), (6, 7)) and mesh.replications == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.pipelines == ((0, 4), (1, 5), (2, 6), (3, 7)) and mesh.data_parallel == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert max(map(mesh.hosts, mesh.data_parallel)) == 1 and mesh.hosts(mesh.pipelines[0]) == 2
    assert "4 pipelines               of 2 ranks, on up to 2 hosts" in str(mesh)
    assert Mesh.of(plan.replace(partition_size="node"), mesh.topology).partition_size == 4


def made_groups(rank: int, size: int) -> tuple[Any, Any]:
    import distlib

    plan = Plan(pipeline=2, stage=3, partition_size=2)
    with distlib.init(nodes=2) as world_:
        found = []
        for one in (plan, Plan(stage=3, partition_size="node")):
            mesh = Mesh.of(one, world_)
            place = mesh.place(rank)
            group = [dist.new_group(list(ranks)) for ranks in mesh.data_parallel][
                mesh.data_parallel.index(place.data_parallel)
            ]
            grid = make_grid(group, one.partition_size)
            made = [None if g is None else tuple(g.ranks) for g in (grid.gather, grid.replication)]
            ours = [g if len(g) > 1 else None for g in (place.partition, place.replication)]
            found.append(((*made, grid.part, grid.replica), (*ours, place.part, place.replica)))
    return tuple(found)


def test_the_mesh_is_the_grid_that_ranks_make() -> None:
    for found in run_ranks(4, made_groups):
        for made, ours in found:
            assert made == ours


# ------------------------------------------------------------ the world


@dataclass
class FakeWorld:
    topology: Topology
    device: torch.device = torch.device("cpu")


def fake(nodes: int, each: int, device: str = "cpu") -> FakeWorld:
    ranks = range(nodes * each)
    return FakeWorld(
        Topology(tuple(tuple(ranks[i : i + each]) for i in range(0, len(ranks), each))), torch.device(device)
    )


NEEDS: list[tuple[str, dict[str, Any], FakeWorld, FakeWorld]] = [
    ('offload="cpu"', {"stage": 1, "offload": "cpu"}, fake(1, 2), fake(1, 2, "cuda")),
    ("hierarchical=True", {"stage": 3, "hierarchical": True}, fake(1, 4), fake(2, 2)),
    ("hierarchical=True", {"stage": 3, "hierarchical": True}, fake(4, 1), fake(2, 2)),
    ("gather_dtype", {"stage": 3, "gather_dtype": "int8"}, fake(1, 2), fake(2, 1)),
    ("reshard_after_forward= a number", {"stage": 3, "reshard_after_forward": 2}, fake(1, 4), fake(2, 2)),
    ("reshard_after_forward= a number", {"stage": 3, "reshard_after_forward": 3}, fake(2, 2), fake(2, 3)),
    ('activations "offload" without a folder', {"activations": "offload"}, fake(1, 2), fake(1, 2, "cuda")),
    (
        "activations.folder",
        {"activations": {"policy": "offload", "folder": "disk"}},
        fake(1, 2, "cuda"),
        fake(1, 2),
    ),
]


def test_ranks_that_cannot_do_a_plan_say_why() -> None:
    assert {row.settings for row in world.NEEDS} == {name for name, *_ in NEEDS}
    for name, kwargs, cannot, can in NEEDS:
        plan = Plan(**kwargs)
        row = [row for row in world.NEEDS if row.settings == name]
        with pytest.raises(ValueError) as error:
            plan.check(cannot)
        assert any(f"{name}: needs {one.needs}. {one.fix}" in str(error.value) for one in row)
        plan.check(can)
        plan.replace(**{key: Plan.model_fields[key].default for key in kwargs if key != "pipeline"}).check(cannot)
    with pytest.raises(ValueError, match=r"pipeline=3 does not divide 4 ranks: choose one of \[1, 2, 4\]"):
        Plan(pipeline=3).check(4)
    with pytest.raises(
        ValueError, match=r"the 2 ranks of each pipeline stage: partition_size=4 does not divide 2 ranks"
    ):
        Plan(pipeline=2, stage=3, partition_size=4).check(4)
    with pytest.raises(ValueError, match="2 problems"):
        Plan(stage=3, gather_dtype="int8", hierarchical=True).check(fake(1, 2))
    with pytest.raises(ValueError, match="gather_dtype: needs"):
        Plan(stage=3, gather_dtype="int8", partition_size=1).check(fake(1, 2, "cuda"))
    Plan(stage=3, gather_dtype="int8").check(2)  # nothing is known of devices


# ------------------------------------------------------------ what it should take


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 4), st.integers(1, 10**4))
def test_memory_and_bytes_are_the_published_formulas(p: int, r: int, s: int, lines: int) -> None:
    n, psi = p * r, lines * p * r * 16  # so that all divides
    mixed = PerParameter(compute=2, master=4, gradient=2, optimizer=8)
    parts: dict[int, float] = {0: 16 * psi, 1: 4 * psi + 12 * psi / n, 2: 2 * psi + 14 * psi / n, 3: 16 * psi / n}
    for stage, total in parts.items():
        assert sum(Plan(stage=stage).expected(psi, n, each=mixed).memory[0].values()) == total
    mics = Plan(stage=3, partition_size=p, microbatches=s)
    assert sum(mics.expected(psi, n, each=mixed).memory[0].values()) == 16 * psi / p
    assert sum(mics.expected(psi, n).memory[0].values()) == 16 * psi / p, "fp32 AdamW: the same"

    m = 4 * psi  # bytes of the model
    assert Plan().expected(psi, n).wire[0] == {"partition": 0, "replicas": 2 * m * (n - 1) // n, "pipeline": 0}
    for stage, hops in ((1, 1), (2, s)):
        sent = Plan(stage=stage, microbatches=s).expected(psi, n).wire[0]
        assert sent["partition"] == (1 + hops) * m * (n - 1) // n, "one gather; hop 1 per step, or per micro-step"
    assert Plan(stage=3, microbatches=s).expected(psi, n).wire[0]["partition"] == 3 * m * (n - 1) // n * s
    sent = mics.expected(psi, n).wire[0]
    assert sent == {"partition": 3 * m * (p - 1) // p * s, "replicas": 2 * (m // p) * (r - 1) // r, "pipeline": 0}
    one_host = mics.expected(psi, n, shared=True).wire[0]
    assert one_host["partition"] == m * (p - 1) // p * s, "gathers move nothing"
    halved = mics.replace(precision="bf16").expected(psi, n)
    assert halved.wire[0]["partition"] * 2 == sent["partition"] and halved.wire[0]["replicas"] == sent["replicas"]
    assert halved.memory[0] == {
        "parameters": 2 * psi / p,
        "gradients": 4 * psi / p,
        "optimizer": 12 * psi / p,
        "activations": 0,
    }
    for k in (k for k in range(2, p) if p % k == 0):
        secondary = mics.replace(reshard_after_forward=k, microbatches=1).expected(psi, n).wire[0]["partition"]
        assert secondary == 2 * m * (p - 1) // p + m * (k - 1) // k
    kept = mics.replace(reshard_after_forward=False).expected(psi, n).wire[0]["partition"]
    assert kept == 2 * m * (p - 1) // p * s
    quantized = mics.replace(gather_dtype="int8").expected(psi, n).wire[0]["partition"]
    assert quantized == pytest.approx(m * (p - 1) / p * s * (1 + 2 * 260 / 1024), abs=1)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([n for n in NAMES if n != "auto"]), st.integers(2, 5), st.integers(1, 12), st.integers(1, 3))
def test_a_pipeline_sends_and_holds_what_its_schedule_does(schedule: str, p: int, m: int, v: int) -> None:
    virtual = {"virtual": v} if schedule == "interleaved" else {}
    plan = Plan(pipeline=p, schedule=schedule, microbatches=m, **virtual)
    per_rank = plan.stages // p
    found = plan.expected([100 * (i + 1) for i in range(plan.stages)], 2 * p, activations=6, messages=10)
    if not (schedule == "zb-v" and m < 2 * p):
        peak = peak_activations(schedule, p, m, v)
        assert max(held["activations"] for held in found.memory) == pytest.approx(6 * per_rank * peak, abs=1)
    crossings = plan.stages - 1 - (schedule == "zb-v")
    assert sum(sent["pipeline"] for sent in found.wire) == 2 * m * 10 * crossings
    whole = sum(100 * (i + 1) for i in range(plan.stages))
    assert sum(held["parameters"] for held in found.memory) == 4 * whole
    assert sum(sent["replicas"] for sent in found.wire) == 4 * whole, "2 (n-1)/n of two replicas is 1"
    sharded = plan.replace(stage=3).expected([100 * (i + 1) for i in range(plan.stages)], 2 * p)
    if per_rank <= 2:  # each stage is gathered once, and kept
        assert sum(sent["partition"] for sent in sharded.wire) == 4 * whole // 2 * (1 + m)
        assert sum(held["whole stages"] for held in sharded.memory) == 4 * whole
    assert 0 <= found.bubble < 1 and f"{found.bubble:.1%}" in str(found)
    with pytest.raises(ValueError, match=f"parameters: 1 values for {plan.stages} stages"):
        assume(plan.stages > 1)
        plan.expected([1], 2 * p)

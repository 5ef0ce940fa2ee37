"""Bytes on the wire and calls of one optimizer step at 1,024 ranks, counted in one process, against the formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import distlib
from distlib.sharded import MixedPrecision

WORLD, PARTITION, HOST = 1024, 8, 8
WIDTH, BLOCKS = 64, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Every parameter is a multiple of 1,024 cache lines: no padding, so that formulas hold to the byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1024, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DISTLIB_NODES", str(WORLD // HOST))
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    distlib.ledger().reset()
    try:
        yield
    finally:
        dist.destroy_process_group()


def step(model: nn.Module, micro_steps: int) -> None:
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    for _ in range(micro_steps - 1):
        with model.no_sync():
            model(tokens).backward()
    model(tokens).backward()


Counts = dict[tuple[str, str], tuple[int, int]]


def counted(model: nn.Module, micro_steps: int) -> Counts:
    """(calls, bytes over all links) of one optimizer step, by (group, operation), after one that sets things up."""
    step(model, micro_steps)
    distlib.ledger().reset()
    step(model, micro_steps)
    roles = {g.name: role for role, g in model.process_groups.items() if g is not None}
    found: Counts = {}
    for row in distlib.ledger().rows:
        calls, size = found.get((roles[row.group], row.op), (0, 0))
        found[roles[row.group], row.op] = (max(calls, row.calls), size + row.bytes)
    return found


BLOCK_BYTES = BLOCKS * 8 * WIDTH * WIDTH * 4
ROOT_BYTES = 1024 * WIDTH * 4
M = BLOCK_BYTES + ROOT_BYTES


def wrapped(**options: object) -> nn.Module:
    return distlib.ShardedDataParallel(Model(), units=[Block], **options)  # type: ignore[arg-type]


def flags(found: Counts) -> int:
    """Takes out the one small all-reduce per step that agrees on which parameters had gradients."""
    calls, size = found.pop(("world", "all_reduce"))
    assert calls == 1
    return size


@pytest.mark.parametrize("micro_steps", [1, 4])
def test_mics_keeps_micro_steps_inside_and_crosses_once(world: None, micro_steps: int) -> None:
    found = counted(wrapped(stage=3, partition_size=PARTITION), micro_steps)
    p, r = PARTITION, WORLD // PARTITION
    assert flags(found) < 1024
    # The root (embedding) is whole from forward to backward: one gather, where a block needs two.
    gathered = (2 * BLOCK_BYTES + ROOT_BYTES) * (p - 1) // p
    assert found == {
        ("partition", "all_gather"): (micro_steps * (2 * BLOCKS + 1), micro_steps * gathered),
        ("reduction", "reduce_scatter"): (micro_steps * (BLOCKS + 1), micro_steps * M * (p - 1) // p),
        ("replication", "all_reduce"): (1, 2 * (M // p) * (r - 1) // r),
    }
    # NUMBERS: 3 M (p-1)/p a micro-step, less the root's second gather.
    assert gathered + M * (p - 1) // p == (3 * M - ROOT_BYTES) * (p - 1) // p


def test_mics_moves_nothing_between_hosts_but_hop_2(world: None) -> None:
    model = wrapped(stage=3, partition_size=PARTITION)
    counted(model, 4)
    names = {g.name: role for role, g in model.process_groups.items() if g is not None}
    between = {names[row.group] for row in distlib.ledger().rows if row.link == "between hosts" and row.bytes}
    assert between == {"replication", "world"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_over_all_ranks(world: None, stage: int) -> None:
    s, n = 2, WORLD
    found = counted(wrapped(stage=stage), s)
    assert flags(found) < 1024
    gathered = (2 * BLOCK_BYTES + ROOT_BYTES) * s if stage == 3 else M
    gathers = (2 * BLOCKS + 1) * s if stage == 3 else BLOCKS + 1
    hops = 1 if stage == 1 else s  # stage 1 keeps whole gradients, and makes hop 1 once
    assert found == {
        ("partition", "all_gather"): (gathers, gathered * (n - 1) // n),
        ("reduction", "reduce_scatter"): (hops * (BLOCKS + 1), hops * M * (n - 1) // n),
    }


def test_optimizer_state_over_the_world_costs_no_more_bytes_between_replicas(world: None) -> None:
    found = counted(wrapped(stage=3, partition_size=PARTITION, shard_optimizer="world"), 1)
    p, r = PARTITION, WORLD // PARTITION
    half = (M // p) * (r - 1) // r
    assert found["replication", "reduce_scatter"] == (1, half)
    assert found["replication", "all_gather"] == (BLOCKS + 1, half)


def test_halves_travel_as_halves(world: None) -> None:
    model = wrapped(stage=3, partition_size=PARTITION, mixed_precision=MixedPrecision(param=torch.bfloat16))
    found = counted(model, 1)
    p, r = PARTITION, WORLD // PARTITION
    assert found["partition", "all_gather"][1] == (2 * BLOCK_BYTES + ROOT_BYTES) // 2 * (p - 1) // p
    assert found["reduction", "reduce_scatter"][1] == M // 2 * (p - 1) // p
    assert found["replication", "all_reduce"][1] == 2 * (M // p) * (r - 1) // r  # the accumulator is fp32


def test_a_partition_over_two_hosts_gathers_in_levels(world: None) -> None:
    p, k = 2 * HOST, HOST
    model = wrapped(stage=3, partition_size=p, hierarchical=True)
    counted(model, 1)
    name = model.process_groups["partition"].name
    gathered = 2 * BLOCK_BYTES + ROOT_BYTES
    per_host = k * next(
        row.bytes
        for row in distlib.ledger().rows
        if (row.group, row.op, row.link) == (name, "all_gather", "between hosts")
    )
    assert per_host == (p - k) * gathered // p
    # Rank 7's successor in a flat ring is on the other host: it would send (p-1)M/p there.
    assert per_host < (p - 1) * gathered // p

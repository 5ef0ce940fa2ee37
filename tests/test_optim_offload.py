"""Optimizer state in files: the same bits as in memory, in little memory, and nothing left behind."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_optim import RULES, gradients, parameters, train
from torch import nn

from distlib.optim import SGD, AdamW, files
from distlib.optim.files import CHUNK, SLOTS, FileState, chunks_of
from distlib.shards import Shard, mark


@settings(deadline=None)
@given(
    numels=st.lists(st.integers(0, 40), max_size=8),
    wide=st.lists(st.booleans(), min_size=8, max_size=8),
    skipped=st.sets(st.integers(0, 7)),
    limit=st.sampled_from([8, 24, 64, 1000]),
)
def test_chunks_hold_every_chosen_element_once(
    numels: list[int], wide: list[bool], skipped: set[int], limit: int
) -> None:
    itemsizes = [8 if w else 4 for w in wide][: len(numels)]
    offsets, end = [], 0
    for numel, size in zip(numels, itemsizes, strict=True):
        end = -(-end // size) * size
        offsets.append(end)
        end += numel * size
    chosen = [i for i in range(len(numels)) if i not in skipped]
    seen = []
    for chunk in chunks_of(offsets, numels, itemsizes, chosen, limit):
        assert 0 < chunk.size <= limit
        assert chunk.size == sum(s.count * itemsizes[s.index] for s in chunk.slices)
        for s in chunk.slices:
            assert chunk.offset + s.at == offsets[s.index] + s.start * itemsizes[s.index]
            assert s.at % itemsizes[s.index] == 0
            seen += [(s.index, s.start + k) for k in range(s.count)]
    assert seen == [(i, k) for i in chosen for k in range(numels[i])]


@pytest.mark.parametrize(("kind", "theirs", "options"), RULES)
def test_the_bits_are_those_of_state_in_memory(
    kind: Any, theirs: Any, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 4096)
    monkeypatch.setattr(files.chunks_of, "__defaults__", (4096,))
    sizes = [(50, 30), (3,), (0,), (9000,), (), (17, 11)]
    mine, filed = parameters(sizes, 0), parameters(sizes, 0)
    mine.append(nn.Parameter(torch.ones(700, dtype=torch.float64)))
    filed.append(nn.Parameter(torch.ones(700, dtype=torch.float64)))
    a, b = kind(mine, **options, max_norm=2.0), kind(filed, **options, max_norm=2.0, offload=tmp_path)
    for step in range(6):
        for i, (p, q, g) in enumerate(zip(mine, filed, gradients(mine, step), strict=True)):
            p.grad, q.grad = (None, None) if i == step else (g.to(p.dtype), g.to(p.dtype))
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, filed, strict=True))
    assert_same_state(a, b)
    assert not list(tmp_path.iterdir())  # the file has no name


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for number, state in first["state"].items():
        assert state.keys() == second["state"][number].keys()
        assert all(torch.equal(value, second["state"][number][name]) for name, value in state.items())


def test_state_is_loaded_into_files_and_read_back(tmp_path: Path) -> None:
    mine, filed = parameters([(60,), (5, 5)], 1), parameters([(60,), (5, 5)], 1)
    a, b = AdamW(mine), AdamW(filed, offload=tmp_path)
    train(a, range(5))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for p, q in zip(mine, filed, strict=True):
        q.data.copy_(p.data)
    assert_same_state(a, b)
    train(a, range(5, 8))
    train(b, range(5, 8))
    assert_same_state(a, b)
    c = AdamW(parameters([(60,), (5, 5)], 1), offload=tmp_path)
    b.load_state_dict(c.state_dict())  # of no steps: the file's values must not come back
    a.load_state_dict(c.state_dict())
    train(a, range(2))
    train(b, range(2))
    assert_same_state(a, b)
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(b)


def test_shards_say_where_the_state_goes(tmp_path: Path) -> None:
    params = parameters([(40,), (30,)], 2)
    for number, p in enumerate(params):
        half = torch.zeros(p.numel(), dtype=torch.bfloat16)
        mark(p, Shard(f"p{number}", p.shape, 0, p.numel(), None, None, compute=half, offload=tmp_path))  # type: ignore[arg-type]
    optimizer = AdamW(params)
    train(optimizer, range(3))
    assert isinstance(optimizer._stores[0], FileState)
    assert all(set(optimizer.state[p]) == {"step"} for p in params)
    for p in params:
        assert torch.equal(p._distlib_shard.compute, p.bfloat16())  # type: ignore[attr-defined]
        assert p._distlib_shard.is_written(p)  # type: ignore[attr-defined]
    plain = parameters([(3,)], 2)
    with pytest.raises(ValueError, match="a group of its own"):
        train(AdamW([*params, *plain]), range(1))


def test_a_rule_without_state_needs_no_file_and_one_cannot_gain_state(tmp_path: Path) -> None:
    params = parameters([(4,)], 3)
    train(SGD(params, lr=0.1, offload=tmp_path / "none"), range(2))
    assert not (tmp_path / "none").exists()
    optimizer = SGD(params, lr=0.1, momentum=0.9, offload=tmp_path)
    train(optimizer, range(2))
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="cannot change what it keeps"):
        train(optimizer, range(1))


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": 100})())
    with pytest.raises(RuntimeError, match=r"cannot be kept in .*No space left.* 100 bytes are free.*disk with room"):
        train(AdamW(parameters([(4000,)], 0), offload=tmp_path), range(1))
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(RuntimeError, match="cannot be kept in"):
        train(AdamW(parameters([(4000,)], 0), offload=occupied), range(1))


def test_a_failing_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("preadv", "pwritev"):
        optimizer = AdamW(parameters([(4000,)], 0), offload=tmp_path)
        train(optimizer, range(1))

        def broken(*given: Any) -> int:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="Input/output error"):
            patch.setattr(os, call, broken)
            train(optimizer, range(1))


def anonymous() -> int:
    """Bytes of memory that belong to this process alone, not to files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def growth(rank: int, n: int, folder: str) -> int:
    params = [nn.Parameter(torch.ones(2_500_000)) for _ in range(10)]  # 200 MB of state
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = AdamW(params, offload=Path(folder))
    before = anonymous()
    highest = 0
    for _ in range(2):
        optimizer.step()
        highest = max(highest, anonymous())
    assert float(params[0][0].detach()) < 1
    return highest - before


def test_memory_is_the_ring_not_the_state(tmp_path: Path) -> None:
    ring = SLOTS * CHUNK * 2
    grown = run_ranks(1, growth, str(tmp_path))[0]
    assert ring / 2 < grown < ring + (8 << 20), f"{grown / 2**20:.0f} MiB"

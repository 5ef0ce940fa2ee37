"""Real sharded models saved on n ranks and loaded on m, under other stages, partitions and wrappers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks
from sharded_models import loss_of, part_of, tiny

import distlib

BATCH = 12  # divides over 1, 2, 3, 4 and 6 ranks
FIRST, THEN = 4, 4


def wrapped(n: int, stage: int, **options: object) -> torch.nn.Module:
    model = tiny(seed=0)
    if stage == 0:
        return distlib.DataParallel(model)
    partition = n // 2 if n % 2 == 0 and stage != 1 else None
    return distlib.ShardedDataParallel(model, stage=stage, partition_size=partition, **options)  # type: ignore[arg-type]


def steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int, n: int, begin: int, end: int
) -> list[float]:
    losses = []
    for step in range(begin, end):
        loss = loss_of(model, *part_of(step, rank, n, BATCH // n))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / n
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def train_and_save(rank: int, n: int, folder: Path, stage: int) -> list[float]:
    with process_group(rank, n):
        model = wrapped(n, stage)
        optimizer = distlib.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        steps(model, optimizer, rank, n, 0, FIRST)
        distlib.save(folder, model=model, optimizer=optimizer, step=FIRST)
        return steps(model, optimizer, rank, n, FIRST, FIRST + THEN)


def load_and_train(
    rank: int, n: int, folders: dict[int, Path], stages: list[int]
) -> dict[tuple[int, int], list[float]]:
    with process_group(rank, n):
        found = {}
        for saved_on, folder in folders.items():
            for stage in stages:
                model = wrapped(n, stage)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)  # hyperparameters come from the checkpoint
                assert distlib.load(folder, model=model, optimizer=optimizer).step == FIRST
                found[saved_on, stage] = steps(model, optimizer, rank, n, FIRST, FIRST + THEN)
        return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of ranks; other stages save on other numbers."""
    made = {n: tmp_path_factory.mktemp("saved") / str(n) for n in (1, 2, 3, 4, 6)}
    for (n, folder), stage in zip(made.items(), (3, 3, 2, 3, 1), strict=True):
        run_ranks(n, train_and_save, folder, stage)
    return made


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6])
def test_saved_on_n_continues_on_m(m: int, folders: dict[int, Path]) -> None:
    model, losses = tiny(seed=0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(FIRST + THEN):
        loss = loss_of(model, *part_of(step, 0, 1, BATCH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for found in run_ranks(m, load_and_train, folders, [0, 1, 2, 3], timeout=120):
        for curve in found.values():
            assert curve == pytest.approx(losses[FIRST:], rel=1e-5)


def resume_twice(rank: int, n: int, folder: Path, stage: int) -> bool:
    with process_group(rank, n):
        model = wrapped(n, stage)
        optimizer = distlib.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        distlib.load(folder, model=model, optimizer=optimizer)
        resumed = steps(model, optimizer, rank, n, FIRST, FIRST + THEN)
        weights = model.full_state_dict()

        model = wrapped(n, stage)
        optimizer = distlib.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        whole = steps(model, optimizer, rank, n, 0, FIRST + THEN)
        expected = model.full_state_dict()
        return resumed == whole[FIRST:] and all(torch.equal(weights[k], expected[k]) for k in expected)


@pytest.mark.parametrize(("n", "stage"), [(2, 3), (3, 2), (6, 1)])
def test_resumed_is_uninterrupted_bit_for_bit(n: int, stage: int, folders: dict[int, Path]) -> None:
    assert all(run_ranks(n, resume_twice, folders[n], stage))

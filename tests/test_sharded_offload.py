"""Optimizer state of sharded models in files: the same bits, and no optimizer that would keep it in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import process_group, run_ranks
from sharded_models import loss_of, part_of, tiny

import distlib
from distlib.sharded.files import file_zeros


def weights_after(rank: int, n: int, offload: Path | None, mixed: bool) -> dict[str, torch.Tensor]:
    precision = distlib.MixedPrecision(param=torch.bfloat16) if mixed else None
    plain = tiny()
    plain.scale = plain.scale.to(torch.bfloat16) if mixed else plain.scale  # buffers are not cast
    model = distlib.ShardedDataParallel(plain, offload=offload, mixed_precision=precision)
    optimizer = distlib.optim.AdamW(model.parameters(), lr=3e-3, max_norm=1.0)
    for step in range(5):
        loss_of(model, *part_of(step, rank, n)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.full_state_dict()


def in_files_and_in_memory(rank: int, n: int, folder: Path) -> str:
    with process_group(rank, n):
        for mixed in (False, True):
            files, memory = weights_after(rank, n, folder, mixed), weights_after(rank, n, None, mixed)
            assert all(torch.equal(files[name], memory[name]) for name in memory)
        model = distlib.ShardedDataParallel(tiny(), offload=folder)
        optimizer = torch.optim.AdamW(model.parameters())
        loss_of(model, *part_of(0, rank, n)).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            message = str(error)
        del model  # nothing is watched any more
        another = distlib.ShardedDataParallel(tiny())
        loss_of(another, *part_of(0, rank, n)).backward()
        torch.optim.AdamW(another.parameters()).step()
        return message


def test_state_in_files_gives_the_same_bits_and_other_optimizers_are_refused(tmp_path: Path) -> None:
    for message in run_ranks(2, in_files_and_in_memory, tmp_path):
        assert "offload=" in message and "AdamW of torch.optim" in message
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_masters_lie_in_a_file_without_a_name(tmp_path: Path) -> None:
    master = file_zeros(tmp_path / "new", 1000, torch.float32)
    assert master.sum() == 0 and not list((tmp_path / "new").iterdir())
    master.fill_(2)
    with open("/proc/self/maps") as maps:
        assert any(str(tmp_path / "new") in line and "(deleted)" in line for line in maps)
    with pytest.raises(OSError, match="offload: no .* bytes in"):
        file_zeros(tmp_path, 1 << 50, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]

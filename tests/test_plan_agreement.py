"""The ranks of a run have one plan: where theirs differ, all say so at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import distlib


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (rows, 6) -> the same."""
        return self.blocks(x)


def _engine(plan: dict[str, Any]) -> distlib.Engine:
    torch.manual_seed(0)
    return distlib.parallelize(
        Model(),
        distlib.Plan(**plan),
        optimizer=lambda p: distlib.optim.AdamW(p, lr=1e-2),
        loss_fn=nn.functional.mse_loss,
    )


def _unlike(rank: int, n: int, folder: str) -> dict[str, str]:
    """By a word, what is said where plans differ; then plans that differ by their folders train."""
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "clip": ({"clip": 0.01}, {"clip": 1.0}),
        "stage": ({"stage": 3}, {"stage": 1}),
        "partition_size": ({"stage": 3, "partition_size": 3}, {"stage": 3}),  # one rank alone would refuse its plan
        "activations": ({"activations": "full"}, {}),
        "engine": ({"engine": "deepspeed"}, {}),
    }
    said = {}
    with distlib.init():
        for word, plans in cases.items():
            with pytest.raises(RuntimeError) as error:
                _engine(plans[rank])
            said[word] = str(error.value)
        Path(folder, f"a{rank}").mkdir()
        offload = {"policy": "offload", "folder": f"{folder}/a{rank}"}
        engine = _engine({"stage": 1, "offload": f"{folder}/{rank}", "activations": offload})
        losses = [float(engine.train_step(torch.ones(4, 6), torch.zeros(4, 6))) for _ in range(2)]
        assert losses[1] < losses[0]
    return said


def test_plans_that_differ_between_ranks_are_refused_on_all(tmp_path: Path) -> None:
    for said in run_ranks(2, _unlike, str(tmp_path)):
        assert "clip: 0.01 on rank 0; 1.0 on rank 1" in said["clip"]
        assert "stage: 3 on rank 0; 1 on rank 1" in said["stage"]
        assert "partition_size: 3 on rank 0; None on rank 1" in said["partition_size"]
        assert "activations: full on rank 0; None on rank 1" in said["activations"]
        assert "engine: deepspeed on rank 0; distlib on rank 1" in said["engine"]

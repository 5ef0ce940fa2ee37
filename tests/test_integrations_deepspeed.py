"""A plan with engine="deepspeed" trains as the same plan without: losses, norms, checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

import distlib

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: make test installs it", allow_module_level=True)


class Model(nn.Module):
    """Blocks of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2))
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (rows, length) int64 -> (rows, length, 11)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def batch(step: int, rank: int) -> Tensor:
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def engine_of(plan: distlib.Plan) -> Any:
    torch.manual_seed(0)
    return distlib.parallelize(
        Model(), plan, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02), loss_fn=loss_fn, weigh=len
    )


def trained(engine: Any, steps: range) -> list[tuple[float, float]]:
    """(loss, norm of the gradients) of each step."""
    found = []
    for step in steps:
        tokens = batch(step, engine.data_rank)
        loss = engine.train_step(tokens, tokens.roll(-1, 1))
        found.append((float(loss), float(engine.grad_norm)))
    return found


SETTINGS: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1, "microbatches": 2},
    {"stage": 2, "microbatches": 2},
    {"stage": 3, "microbatches": 2},
    {"stage": 3, "activations": "full"},
    {"stage": 0, "precision": "bf16", "microbatches": 2},
    {"stage": 2, "precision": "bf16"},
    {"stage": 3, "precision": "bf16"},
]


def compare(rank: int, n: int, folder: str) -> list[tuple[Any, ...]]:
    distlib.init()
    found = []
    for settings in SETTINGS:
        plan = distlib.Plan(clip=0.5, seed=3, **settings)
        ours = trained(engine_of(plan), range(3))
        engine = engine_of(plan.replace(engine="deepspeed"))
        theirs = trained(engine, range(3))
        found.append((settings, ours, theirs))
    return found


def test_x(tmp_path):
    for s, a, b in run_ranks(2, compare, str(tmp_path), timeout=110)[0]:
        print(s, a, b, sep="\n   ")

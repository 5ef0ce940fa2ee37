"""Optimizers that look at shapes, where parameters are pieces: decay by `p.ndim`, and Adafactor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import distlib
from distlib.shards import shard_of


class Model(nn.Module):
    """Matrices in the first blocks, vectors alone in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (rows, 6) -> the same."""
        return self.blocks(x)


def grouped(dimensions: Callable[[torch.Tensor], int], decay: float = 0.5) -> Callable[[Any], torch.optim.Optimizer]:
    def make(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        matrices = [p for p in parameters if dimensions(p) > 1]
        others = [p for p in parameters if dimensions(p) <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2)

    return make


def by_shape(parameter: torch.Tensor) -> int:
    return len((shard_of(parameter) or parameter).shape)


def by_ndim(parameter: torch.Tensor) -> int:
    return parameter.ndim


X = torch.linspace(-1, 1, 48).view(8, 6)
SPLIT = {"pipeline": 2, "microbatches": 2, "split": ["blocks.2"]}  # the last stage has vectors only
CASES: list[tuple[dict[str, Any], Any, bool]] = [
    ({"stage": 1}, grouped(by_ndim), True),
    ({"stage": 2}, grouped(by_ndim), True),
    ({"stage": 3}, grouped(by_ndim), True),
    ({"stage": 1, **SPLIT}, grouped(by_ndim), True),
    ({"stage": 0}, grouped(by_ndim), False),
    ({"stage": 1, "ownership": "whole"}, grouped(by_ndim), False),  # pieces are whole, or empty
    ({"stage": 3}, grouped(by_shape), False),
    ({"stage": 1, **SPLIT}, grouped(by_shape), False),
    ({"stage": 3}, grouped(by_ndim, decay=0.0), False),
    ({"stage": 3}, lambda p: torch.optim.AdamW(p, weight_decay=0.0), False),
]


def warned(rank: int, n: int) -> list[list[str]]:
    """By case, the warnings of decay."""
    found = []
    with distlib.init():
        for plan, make, _ in CASES:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                distlib.parallelize(
                    Model(),
                    distlib.Plan(**plan),
                    optimizer=make,
                    loss_fn=nn.functional.mse_loss,
                    example_inputs=torch.ones(4, 6),
                )
            found.append([str(one.message) for one in caught if "decays nothing" in str(one.message)])
    return found


def test_a_plan_warns_once_where_pieces_are_grouped_by_their_own_dimensions() -> None:
    for by_case in run_ranks(2, warned, timeout=110):
        for (plan, _, is_wrong), texts in zip(CASES, by_case, strict=True):
            assert len(texts) == is_wrong, (plan, texts)
            assert all("blocks.0.weight (6, 6)" in text and "shard_of" in text for text in texts)


def adafactor(rank: int, n: int) -> tuple[list[str], list[list[float]]]:
    """What is said of it on pieces; and losses where each parameter is whole on some rank."""

    def engine(make: Any, **plan: Any) -> distlib.Engine:
        torch.manual_seed(0)
        return distlib.parallelize(
            Model(), distlib.Plan(**plan), optimizer=make, loss_fn=nn.functional.mse_loss, example_inputs=X[:4]
        )

    def not_empty(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adafactor([p for p in parameters if p.numel()], lr=0.05)

    said, losses = [], []
    with distlib.init():
        for plan in ({"stage": 1}, {"stage": 3}, {"stage": 1, "ownership": "whole"}, {"stage": 1, **SPLIT}):
            with pytest.raises(ValueError) as error:
                engine(lambda p: torch.optim.Adafactor(p, lr=0.05), **plan)
            said.append(str(error.value))
        for plan in ({}, {"stage": 1, "ownership": "whole"}):
            made = engine(not_empty, **plan)
            x = X.chunk(n)[rank]
            losses.append([float(made.train_step(x, torch.zeros_like(x))) for _ in range(4)])
    return said, losses


def test_adafactor_is_refused_on_pieces_with_the_way_out() -> None:
    for said, (replicated, whole) in run_ranks(2, adafactor, timeout=110):
        assert all("computes with rows and columns" in text and 'ownership="whole"' in text for text in said)
        assert whole == pytest.approx(replicated, rel=1e-5) and whole[-1] < whole[0]

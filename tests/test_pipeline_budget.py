"""Activation budgets in a pipeline: the peak of every rank is as predicted, and losses are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm.model import GPT, next_token_loss
from ranks import run_ranks

import distlib
from distlib.activations import apply

pytestmark = pytest.mark.slow

ROWS, LENGTH, STEPS = 8, 64, 3
LOSS = next_token_loss


def model(layers: int = 8) -> GPT:
    torch.manual_seed(0)
    return GPT(layers, 64, 2)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def alone(layers: int = 8) -> list[float]:
    module = model(layers)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        inputs, targets = batch(step)
        loss = LOSS(module(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def engine_of(plan: dict[str, Any], layers: int = 8) -> distlib.Engine:
    inputs, targets = (t.chunk(2)[0] if plan.get("halved") else t for t in batch(0))
    return distlib.parallelize(
        model(layers),
        distlib.Plan(**{"costs": "estimated", "microbatches": 4, **plan}),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss_fn=LOSS,
        example_inputs=inputs,
        example_target=targets,
    )


def trained(rank: int, n: int, plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    apply.ROUNDS = 1
    found = []
    with distlib.init():
        for plan in plans:
            engine = engine_of(plan)
            losses = []
            for step in range(STEPS):
                inputs, targets = (t.chunk(engine.data_size)[engine.data_rank] for t in batch(step))
                losses.append(float(engine.train_step(inputs, targets)))
            (report,) = engine.activation_reports
            for p in engine.model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            with report.measuring():
                engine.model.train_step(inputs, targets)
            assert report.predicted_step is not None
            found.append(
                {
                    "losses": losses,
                    "budget": report.budget,
                    "predicted": report.predicted_step.peak,
                    "measured": report.measured_peak,
                    "kinds": report.choices,
                    "in flight": report.in_flight,
                    "saved": report.saved_bytes,
                    "text": str(report),
                    "kept": {one.name: one.record.kept for one in report._wrapped},
                    "expected": {name: one.kept for name, one in report.predicted.items()},
                }
            )
    return found


PLANS: list[dict[str, Any]] = [
    {"pipeline": 2, "schedule": schedule, "activations": {"budget": part}}
    for schedule, part in (
        ("1f1b", 0.0),
        ("1f1b", 0.5),
        ("gpipe", 0.5),
        ("zb-h1", 0.5),
        ("zb-h2", 0.99),
        ("interleaved", 0.5),
        ("zb-v", 0.5),
    )
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan['schedule']}-{plan['activations']['budget']}")
def test_the_peak_of_every_rank_is_as_predicted(plan: dict[str, Any]) -> None:
    expected = alone()
    for (found,) in run_ranks(2, trained, [plan], timeout=110):
        assert found["losses"] == pytest.approx(expected, rel=1e-5)
        assert found["measured"] == pytest.approx(found["predicted"], rel=0.1), found["text"]
        assert found["measured"] <= found["budget"] * 1.02, found["text"]
        assert found["saved"] > 0 and "measured" in found["text"]
        for name, kept in found["kept"].items():  # of one micro-batch
            assert kept == pytest.approx(found["expected"][name], rel=0.15, abs=4 * 2 * LENGTH * 64)

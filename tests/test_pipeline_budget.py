"""Activation budgets in a pipeline: the peak of every rank is as predicted, and losses are those of one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lm.model import GPT, next_token_loss
from pipeline_models import CASES
from ranks import run_ranks
from torch import nn

import distlib
from distlib.activations import apply
from distlib.activations.wrapped import Wrapped

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


def engine_of(plan: dict[str, Any], layers: int = 8, module: nn.Module | None = None) -> distlib.Engine:
    ranks = torch.distributed.get_world_size() // plan.get("pipeline", 1)
    inputs, targets = (t.chunk(ranks)[0] for t in batch(0))
    settings = {"microbatches": 4, **({"costs": "estimated"} if "pipeline" in plan else {}), **plan}
    return distlib.parallelize(
        model(layers) if module is None else module,
        distlib.Plan(**settings),
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
            engine.measured_step(inputs, targets)
            (report,) = engine.activation_reports
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
                    "describe": engine.describe(),
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


def assert_as_predicted(found: dict[str, Any], expected: list[float], close: float = 1e-5) -> None:
    assert found["losses"] == pytest.approx(expected, rel=close)
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.02), found["text"]
    assert found["measured"] <= found["budget"] * 1.02, found["text"]
    assert found["saved"] > 0 and "measured" in found["text"]
    assert f"  {found['predicted']:,}  " in found["describe"] and "predicted for the budget" in found["describe"]
    for name, kept in (
        found["kept"].items() if close < 1e-3 else ()
    ):  # of one micro-batch; autocast's casts are there, too
        assert kept == pytest.approx(found["expected"][name], rel=0.15, abs=4 * 2 * LENGTH * 64)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan['schedule']}-{plan['activations']['budget']}")
def test_the_peak_of_every_rank_is_as_predicted(plan: dict[str, Any]) -> None:
    expected = alone()
    for (found,) in run_ranks(2, trained, [plan], timeout=110):
        assert_as_predicted(found, expected)


SHARDED: list[dict[str, Any]] = [
    {"pipeline": 2, "schedule": "zb-h1", "stage": 3, "partition_size": 2, "microbatches": 2},
    {"pipeline": 2, "schedule": "zb-v", "stage": 1, "partition_size": 1, "precision": "bf16", "microbatches": 2},
    {"pipeline": 2, "precision": "bf16", "microbatches": 2},
]


def test_replicas_and_precisions_too() -> None:
    expected = alone()
    plans = [{**plan, "activations": {"budget": 0.5}} for plan in SHARDED]
    everyone = run_ranks(4, trained, plans, timeout=110)
    for found in everyone:
        for plan, its in zip(plans, found, strict=True):
            assert_as_predicted(its, expected, 0.01 if "precision" in plan else 1e-5)
    for i in range(len(plans)):  # ranks 0 and 1 hold the same stages, as do 2 and 3
        kinds = [found[i]["kinds"] for found in everyone]
        assert kinds[0] == kinds[1] and kinds[2] == kinds[3]


def test_without_a_pipeline_the_loss_and_the_precision_count() -> None:
    plans: list[dict[str, Any]] = [{}, {"precision": "bf16"}, {"stage": 3}, {"stage": 2, "precision": "bf16"}]
    plans = [{**plan, "activations": {"budget": 0.5}} for plan in plans]
    expected = alone()
    everyone = run_ranks(2, trained, plans, timeout=110)
    for found in everyone:
        for plan, its in zip(plans, found, strict=True):
            assert_as_predicted(its, expected, 0.01 if "precision" in plan else 1e-5)
    assert [its["kinds"] for its in everyone[0]] == [its["kinds"] for its in everyone[1]]


# ------------------------------------------------------------ sizes in bytes, and what cannot be had


def refused(rank: int, n: int) -> list[str]:
    torch.set_num_threads(1)
    apply.ROUNDS = 1
    said = []
    with distlib.init():

        def attempt(budget: Any, module: nn.Module | None = None, **plan: Any) -> str:
            with pytest.raises(ValueError) as error:
                engine_of({"pipeline": 2, "activations": {"budget": budget}, **plan}, module=module)
            return str(error.value)

        said.append(attempt("64KiB"))
        both = [int(number) for number in re.findall(r"smallest possible peak is (\d+) bytes", said[0])]
        assert len(both) == 2, said[0]
        said.append(attempt(max(both) - 1))
        assert f"smallest possible peak is {max(both)} bytes" in said[-1] and str(min(both)) not in said[-1]
        engine = engine_of({"pipeline": 2, "activations": {"budget": max(both)}})
        (report,) = engine.activation_reports
        assert report.predicted_step is not None and report.predicted_step.peak <= max(both) == report.budget
        report.remove()
        for part in engine.model.modules():
            assert not part._forward_hooks and not part._forward_pre_hooks
        assert not any(isinstance(part.__dict__.get("forward"), Wrapped) for part in engine.model.modules())
        engine.train_step(*batch(0))
        with torch.device("meta"):
            module = GPT(8, 64, 2)
        said.append(attempt(0.5, module, stage=3, partition_size=1))
        with pytest.warns(UserWarning, match="0 bytes are saved"):
            engine = engine_of({"pipeline": 2, "activations": {"budget": "1GiB"}})
        assert set(engine.activation_reports[0].choices.values()) == {"keep"}
        with pytest.raises(ValueError, match="activations.budget needs example_inputs"):
            distlib.parallelize(
                model(),
                distlib.Plan(pipeline=2, microbatches=2, activations={"budget": 0.5}),
                optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
                loss_fn=LOSS,
            )
        with pytest.raises(RuntimeError, match="give Plan"):
            engine_of({"pipeline": 2}).measured_step(*batch(0))
    return said


def test_what_cannot_be_met_is_said_on_all_ranks_with_the_smallest_that_can() -> None:
    first, second = run_ranks(2, refused, timeout=110)
    assert first == second
    assert "rank 0 of the pipeline, stage 0: budget=65536" in first[0] and "rank 1 of the pipeline, stage 1" in first[0]
    assert "must not be on the meta device" in first[2]


def uneven(rank: int, n: int) -> dict[str, list[float]]:
    """Models whose stages have skips, dropout, shared blocks, or no blocks at all: losses with a budget and without."""
    torch.set_num_threads(1)
    apply.ROUNDS = 1
    found = {}
    with distlib.init():
        for name, split in (("skips", "auto"), ("dropout", "auto"), ("tied", ["norm"]), ("lengths", "auto")):
            case = CASES[name]
            for activations in (None, {"budget": 0.3}):
                costs = {"costs": "estimated"} if split == "auto" else {}
                plan = distlib.Plan(
                    pipeline=2,
                    schedule="zb-h1",
                    microbatches=3,
                    split=split,
                    activations=activations,
                    seed=5,
                    **costs,
                )
                engine = distlib.parallelize(
                    case.made(),
                    plan,
                    optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
                    loss_fn=case.loss,
                    example_inputs=case.batch(7, 0)[0],
                )
                found[f"{name} {activations is None}"] = [float(engine.train_step(*case.batch(7, s))) for s in range(3)]
                if activations and split != "auto" and rank == 1:
                    assert not engine.activation_reports[0].choices, "norm and head: no blocks"
                    engine.measured_step(*case.batch(7, 0))
                    assert "predicted" in str(engine.activation_reports[0])
                elif activations and split != "auto":
                    engine.measured_step(*case.batch(7, 0))
    return found


def test_skips_dropout_lengths_and_stages_without_blocks() -> None:
    for found in run_ranks(2, uneven, timeout=110):
        for name in ("skips", "dropout", "tied", "lengths"):
            assert found[f"{name} False"] == pytest.approx(found[f"{name} True"], rel=1e-6), name

"""Checkpoints move between pipeline layouts: what one plan saved, any other continues, tied weights and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import CASES, Case, Language
from ranks import run_ranks
from torch import nn

import distlib
from distlib.checkpoint import optimizer_state
from distlib.checkpoint.reader import Checkpoint

ROWS, SAVED, STEPS = 24, 3, 6

PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "pipeline 4": (4, {"pipeline": 4, "schedule": "1f1b", "microbatches": 4}),
    "pipeline 2 x sharded 2": (
        4,
        {"pipeline": 2, "schedule": "zb-h1", "microbatches": 2, "stage": 3, "partition_size": 2},
    ),
    "pipeline 2 x replicas 2": (4, {"pipeline": 2, "schedule": "interleaved", "microbatches": 4}),
    "V of 2": (2, {"pipeline": 2, "schedule": "zb-v", "microbatches": 4}),
    "sharded 3": (3, {"stage": 2}),
}


class Counting(Language):
    """With a buffer that counts its batches, which no gradient tells of."""

    def __init__(self) -> None:
        super().__init__(8, tied=True)
        self.register_buffer("seen", torch.full((3,), 7.0))


def case() -> Case:
    return Case(Counting, CASES["tied"].batch, CASES["tied"].loss)


def _train(rank: int, n: int, plan: dict[str, Any], folder: str, begin: int, fused: bool) -> tuple[list[float], Any]:
    torch.set_num_threads(1)
    make = distlib.optim.AdamW if fused else torch.optim.AdamW
    with distlib.init():
        mine = case()
        module = mine.made()
        if begin:
            for p in module.parameters():
                p.data.zero_()
            module.seen.zero_()

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            matrices = list(parameters)
            return make([{"params": matrices, "weight_decay": 0.1}], lr=1e-2)

        settings = {**plan, "clip": 1.0}
        if plan.get("pipeline"):
            settings["costs"] = "estimated"
        engine = distlib.parallelize(
            module, distlib.Plan(**settings), optimizer=optimizer, loss_fn=mine.loss, example_inputs=mine.batch(4, 0)[0]
        )
        if begin:
            state = engine.load(folder)
            assert (engine.steps, state.step) == (SAVED, SAVED)
        losses = []
        for step in range(begin, STEPS):
            rows = torch.arange(ROWS).tensor_split(engine.data_size)[engine.data_rank]
            inputs, target = (t[rows] for t in mine.batch(ROWS, step))
            losses.append(float(engine.train_step(inputs, target)))
            if step == SAVED - 1 and not begin:
                engine.save(folder)
        state = (
            engine.model.full_state_dict() if hasattr(engine.model, "full_state_dict") else engine.model.state_dict()
        )
        return losses, {name: value.clone() for name, value in state.items()} if rank == 0 else None


@pytest.mark.parametrize(
    ("saved", "loaded", "fused"),
    [
        ("pipeline 4", ["1 rank", "pipeline 2 x sharded 2", "V of 2"], False),
        ("1 rank", ["pipeline 4", "pipeline 2 x replicas 2"], True),
        ("pipeline 2 x sharded 2", ["pipeline 4", "sharded 3", "V of 2"], True),
        ("V of 2", ["pipeline 2 x sharded 2", "1 rank"], False),
        ("sharded 3", ["pipeline 2 x replicas 2"], False),
    ],
)
def test_training_goes_on_in_any_other_layout(saved: str, loaded: list[str], fused: bool, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    n, plan = PLANS[saved]
    straight = run_ranks(n, _train, plan, str(folder), 0, fused)
    names = {name for name, _ in case().made().named_parameters()} | {"seen"}
    held = {name.removeprefix("model.") for name in Checkpoint(folder).tensors if name.startswith("model.")}
    assert held - {"head.weight"} == names  # each once, and the tied weight under its other name too
    for other in loaded:
        n, plan = PLANS[other]
        resumed = run_ranks(n, _train, plan, str(folder), SAVED, fused)
        for losses, _ in resumed:
            assert losses == pytest.approx(straight[0][0][SAVED:], rel=1e-5), other
        expected, got = straight[0][1], resumed[0][1]
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def _another(rank: int, n: int, folder: str) -> None:
    with distlib.init():
        mine = CASES["language"]
        model = distlib.PipelineParallel(
            mine.made(), microbatches=2, loss_fn=mine.loss, example_inputs=mine.batch(4, 0)[0], costs="estimated"
        )
        with pytest.raises(ValueError, match="tied in the checkpoint|another model"):
            distlib.load(folder, model=model)


def test_another_model_is_refused_on_all_ranks(tmp_path: Path) -> None:
    n, plan = PLANS["pipeline 4"]
    run_ranks(n, _train, plan, str(tmp_path / "saved"), 0, False)
    run_ranks(2, _another, str(tmp_path / "saved"))


class _Empty(nn.Linear):
    """With a parameter of no elements."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.none.sum()


def _empty(rank: int, n: int, plan: dict[str, Any], path: str, begin: bool, old: bool) -> list[float]:
    torch.manual_seed(0)
    if old:  # as files were that lack the scalars of such a parameter
        optimizer_state._is_first = lambda parameter, piece: False
    with distlib.init():
        engine = distlib.parallelize(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), _Empty()),
            distlib.Plan(**plan),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            loss_fn=nn.functional.mse_loss,
            example_inputs=torch.zeros(4, 4),
        )
        if begin:
            engine.load(path)
        x = torch.arange(16.0).view(4, 4)[engine.data_rank :: engine.data_size]
        losses = [float(engine.train_step(x, x + 1)) for _ in range(2)]
        if not begin:
            engine.save(path)
        return losses


@pytest.mark.parametrize("old", [False, True])
def test_parameters_without_elements_are_saved_with_their_scalars(old: bool, tmp_path: Path) -> None:
    plans = [
        (2, {"pipeline": 2, "microbatches": 2, "costs": "estimated"}),
        (4, {"pipeline": 2, "microbatches": 2, "costs": "estimated", "stage": 3}),
        (1, {}),
    ]
    for k, (n, plan) in enumerate(plans):
        run_ranks(n, _empty, plan, str(tmp_path / str(k)), False, old)
        continued = [run_ranks(m, _empty, other, str(tmp_path / str(k)), True, False)[0] for m, other in plans]
        assert all(losses == pytest.approx(continued[0], rel=1e-5) for losses in continued)

"""`parallelize` and `Engine`: a plan's settings reach what honours them, and steps are those of a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import CASES, Case, Language
from ranks import run_ranks
from torch import nn

import distlib

ROWS = 8


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return distlib.optim.AdamW(parameters, lr=1e-2)


def _engine(
    case: Case, plan: dict[str, Any], optimizer: Any = _adamw, module: nn.Module | None = None
) -> distlib.Engine:
    settings = {**plan, **({"costs": "estimated"} if plan.get("pipeline") else {})}
    return distlib.parallelize(
        case.made() if module is None else module,
        distlib.Plan(**settings),
        optimizer=optimizer,
        loss_fn=case.loss,
        example_inputs=case.batch(ROWS, 0)[0],
    )


def _losses(engine: distlib.Engine, case: Case, steps: int = 5) -> list[float]:
    losses = []
    for step in range(steps):
        inputs, target = (t.chunk(engine.data_size)[engine.data_rank] for t in case.batch(ROWS, step))
        losses.append(float(engine.train_step(inputs, target)))
    return losses


def _together(rank: int, n: int, plans: list[dict[str, Any]]) -> list[tuple[list[float], str, float | None]]:
    found = []
    with distlib.init():
        for plan in plans:
            engine = _engine(CASES["tied"], plan)
            losses = _losses(engine, CASES["tied"])
            norm = None if engine.grad_norm is None else float(engine.grad_norm)
            assert engine.steps == 5 and engine.memory_report().total > 0
            found.append((losses, engine.describe(), norm))
    return found


def _plain(clip: float | None) -> tuple[list[float], float]:
    case = CASES["tied"]
    model = case.made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norm = [], 0.0
    for step in range(5):
        inputs, target = case.batch(ROWS, step)
        loss = case.loss(model(inputs), target)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norm


def test_clipping_loss_scales_and_precisions_reach_every_layout() -> None:
    layouts: list[dict[str, Any]] = [
        {"microbatches": 2},
        {"pipeline": 2, "microbatches": 4, "schedule": "zb-h1"},
        {"stage": 3, "microbatches": 2},
    ]
    plans = [{**layout, "clip": 0.3} for layout in layouts]
    half = [{**layout, "precision": "bf16"} for layout in layouts]
    scaled = [{**layout, "precision": {"dtype": "fp16", "init_scale": 1024.0}, "clip": 0.3} for layout in layouts[1:]]
    everyone = run_ranks(2, _together, plans + half + scaled, timeout=110)
    expected, norm = _plain(0.3)
    for found in everyone:
        for losses, text, measured in found[:3]:
            assert losses == pytest.approx(expected, rel=1e-5)
            assert measured == pytest.approx(norm, rel=1e-4)
            assert "clip" in text and "Bytes per rank" in text
        unclipped = _plain(None)[0]
        for losses, _, _ in found[3:6]:
            assert losses != unclipped and losses == pytest.approx(unclipped, rel=0.03)
        for losses, _, _ in found[6:]:
            assert losses == pytest.approx(expected, rel=0.03)
    assert everyone[0] == everyone[1]  # losses, words and norms are the same on all ranks


# Stages of ZeRO and MiCS inside of a pipeline whose first and last stage share a weight.
NORMS: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1, "partition_size": 2, "schedule": "zb-h1"},
    {"stage": 1, "partition_size": 2, "ownership": "whole"},
    {"stage": 2, "partition_size": 1},
    {"stage": 3, "partition_size": 2, "schedule": "zb-v"},
    {"stage": 3, "partition_size": 1, "schedule": "interleaved"},
]


def _measured(rank: int, n: int, plans: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """By plan: losses and norms before clipping, with torch's optimizer and ours, with a scaled loss and without."""
    found = []
    with distlib.init():
        case = CASES["tied"]
        for plan in plans:
            by_way: dict[str, list[float]] = {}
            for name, make in (("torch", lambda p: torch.optim.AdamW(p, lr=1e-2)), ("distlib", _adamw)):
                for scaled in (False, True):
                    engine = _engine(case, {"pipeline": 2, "microbatches": 4, "clip": 0.3, **plan}, make)
                    if scaled:
                        engine.scaler = distlib.optim.GradScaler(init_scale=1024.0)
                    values = by_way[f"{name}, scaled {scaled}"] = []
                    for step in range(3):
                        batch = case.batch(2 * ROWS, step)
                        inputs, target = (t.chunk(engine.data_size)[engine.data_rank] for t in batch)
                        values.append(float(engine.train_step(inputs, target)))
                        assert engine.grad_norm is not None
                        values.append(float(engine.grad_norm))
            found.append(by_way)
    return found


@pytest.mark.parametrize(("n", "plans"), [(4, NORMS), (8, [{"stage": 3, "partition_size": 2}])])
def test_norms_over_sharded_stages_are_those_of_one_process(n: int, plans: list[dict[str, Any]]) -> None:
    case, expected = CASES["tied"], []
    model = case.made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        inputs, target = case.batch(2 * ROWS, step)
        loss = case.loss(model(inputs), target)
        loss.backward()
        expected += [loss.item(), float(nn.utils.clip_grad_norm_(model.parameters(), 0.3))]
        optimizer.step()
        optimizer.zero_grad()
    for found in run_ranks(n, _measured, plans, timeout=110):
        for plan, by_way in zip(plans, found, strict=True):
            for way, values in by_way.items():
                assert values == pytest.approx(expected, rel=1e-4), (plan, way)


# ------------------------------------------------------------ weights that ranks do not share equally


def _counted(target: torch.Tensor) -> float:
    return float((target >= 0).sum())


def _counted_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1)


def _padded(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths, the longest first: the first rank has most tokens that count."""
    inputs, target = CASES["language"].batch(2 * ROWS, step)
    target = target.clone()
    for row in range(len(target)):
        target[row, max(1, 7 - row // 2) :] = -1
    return inputs, target


def _weighed(rank: int, n: int, plans: list[dict[str, Any]]) -> list[list[float]]:
    found = []
    with distlib.init():
        for plan in plans:
            engine = distlib.parallelize(
                CASES["language"].made(),
                distlib.Plan(**plan, clip=0.3),
                optimizer=_adamw,
                loss_fn=_counted_loss,
                example_inputs=_padded(0)[0],
                weigh=_counted,
            )
            values = []
            for step in range(3):
                inputs, target = (t.chunk(engine.data_size)[engine.data_rank] for t in _padded(step))
                if not engine.needs_batch:
                    inputs = target = None
                values += [float(engine.train_step(inputs, target)), float(engine.grad_norm)]
            with pytest.raises(ValueError, match="weigh= reads the target"):
                engine.eval_step(inputs)
            values.append(float(engine.eval().eval_step(inputs, target)))
            found.append(values)
    return found


def test_a_weighed_loss_is_that_of_one_process_over_all_ranks() -> None:
    model, expected = CASES["language"].made(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        inputs, target = _padded(step)
        loss = _counted_loss(model(inputs), target)
        loss.backward()
        expected += [loss.item(), float(nn.utils.clip_grad_norm_(model.parameters(), 0.3))]
        optimizer.step()
        optimizer.zero_grad()
    expected.append(_counted_loss(model(inputs), target).item())
    plans: list[dict[str, Any]] = [
        {"microbatches": 2},
        {"microbatches": 2, "stage": 3, "partition_size": 2},
        {"microbatches": 2, "pipeline": 2, "costs": "estimated", "schedule": "zb-h1"},
        {"microbatches": 2, "pipeline": 2, "costs": "estimated", "shape_header": True},
    ]
    for found in run_ranks(4, _weighed, plans, timeout=110):
        for plan, values in zip(plans, found, strict=True):
            assert values == pytest.approx(expected, rel=1e-4), plan


def _pieces(rank: int, n: int, folder: str) -> None:
    with distlib.init():
        case = CASES["language"]
        # Activation memory by a plan, measured on a micro-batch.
        engine = _engine(case, {"microbatches": 2, "activations": {"budget": 0.5}})
        assert _losses(engine, case) == pytest.approx(_losses(_engine(case, {}), case), rel=1e-5)
        assert "budget" in str(engine.plan) and engine.activation_reports
        # Optimizer state in files, under a pipeline.
        engine = _engine(case, {"pipeline": 2, "microbatches": 2, "stage": 1, "partition_size": 1, "offload": folder})
        assert _losses(engine, case) == pytest.approx(_losses(_engine(case, {}), case), rel=1e-5)
        # A model on meta.
        with torch.device("meta"):
            module = Language(4)

        def initialize(part: nn.Module) -> None:
            for p in part.parameters(recurse=False):
                nn.init.normal_(p, std=0.1)

        engine = distlib.parallelize(
            module,
            distlib.Plan(pipeline=2, microbatches=2, stage=3, partition_size=1, costs="estimated"),
            optimizer=_adamw,
            loss_fn=case.loss,
            example_inputs=case.batch(ROWS, 0)[0],
            initialize=initialize,
        )
        losses = _losses(engine, case)
        assert losses[-1] < losses[0]
        # Evaluation and outputs.
        inputs, target = case.batch(ROWS, 0)
        before = [p.clone() for p in engine.model.parameters()]
        loss = engine.eval().eval_step(inputs, target)
        assert float(case.loss(engine(inputs), target)) == pytest.approx(float(loss), rel=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
        with pytest.raises(ValueError, match="clips at 1.0, the optimizer at max_norm=2.0"):
            _engine(case, {"clip": 1.0}, lambda p: distlib.optim.AdamW(p, lr=1e-2, max_norm=2.0))
        with pytest.raises(ValueError, match="pipeline=3 does not divide 2 ranks"):
            _engine(case, {"pipeline": 3})


def test_budgets_files_meta_and_evaluation(tmp_path: Path) -> None:
    run_ranks(2, _pieces, str(tmp_path), timeout=110)


class _Fails(nn.Module):
    """Raises in the call with this number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.at = nn.Linear(4, 4), 0, -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("a bad sample")
        return self.linear(x)


def _going_on(rank: int, n: int) -> list[list[float]]:
    """Per stage, losses of the steps beside one that fails in its third micro-batch."""
    found = []
    with distlib.init():
        for stage in range(4):
            torch.manual_seed(0)
            module = _Fails()
            engine = distlib.parallelize(
                module,
                distlib.Plan(stage=stage, microbatches=4),
                optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
                loss_fn=lambda output, target: (output - target).square().mean(),
            )
            losses = []
            for step in range(4):
                numbers = torch.Generator().manual_seed(step)
                x, y = torch.randn(2, ROWS, 4, generator=numbers)
                if step == 1:
                    module.at = module.calls + 3
                    with pytest.raises(RuntimeError, match="a bad sample"):
                        engine.train_step(10 * x, y)
                else:
                    losses.append(float(engine.train_step(x, y)))
            found.append(losses)
    return found


def test_a_step_that_fails_leaves_nothing_to_the_next() -> None:
    torch.manual_seed(0)
    model = _Fails()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    expected = []
    for step in (0, 2, 3):
        x, y = torch.randn(2, ROWS, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for found in run_ranks(2, _going_on):
        for stage, losses in enumerate(found):
            assert losses == pytest.approx(expected, rel=1e-5), stage


class _TwoKinds(nn.Module):
    """Encoder blocks first, blocks of another class then: stages have one kind each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.decoder = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.encoder, *self.decoder]:
            x = block(x)
        return x


def _kinds(rank: int, n: int) -> list[float]:
    with distlib.init():
        found = []
        for activations in (None, "full", "selective"):
            torch.manual_seed(0)
            plan = distlib.Plan(pipeline=2, microbatches=2, split=["decoder.0"], activations=activations)
            engine = distlib.parallelize(
                _TwoKinds(),
                plan,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
                loss_fn=lambda output, _: output.square().mean(),
                example_inputs=torch.ones(2, 3, 4),
            )
            engine.train_step(torch.ones(2, 3, 4))
            found.append(float(engine.train_step(torch.ones(2, 3, 4))))
        return found


def test_stages_with_other_kinds_of_blocks_keep_less_too() -> None:
    for losses in run_ranks(2, _kinds):
        assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)


class _Reaches(nn.Module):
    """Layers without parameters at the end, and a parameter that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.last = nn.ModuleList(nn.Tanh() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for part in self.last:
            x = part(x)
        return x


def _reaching(rank: int, n: int) -> list[list[float]]:
    found = []
    plans: list[dict[str, Any]] = [
        {"pipeline": 2, "split": ["last.0"], "stage": stage, "schedule": schedule}
        for stage in (0, 1, 3)
        for schedule in ("1f1b", "zb-h1")
    ]
    with distlib.init():
        for plan in plans:
            for optimizer in (
                lambda p: torch.optim.SGD(p, lr=0.5),
                lambda p: torch.optim.SGD([{"params": [x for x in p if (x.ndim > 1) == wide]} for wide in (0, 1)], 0.5),
                lambda p: distlib.optim.SGD(p, lr=0.5),
            ):
                torch.manual_seed(0)
                engine = distlib.parallelize(
                    _Reaches(),
                    distlib.Plan(microbatches=2, **plan),
                    optimizer=optimizer,
                    loss_fn=lambda output, _: output.square().mean(),
                    example_inputs=torch.ones(2, 4),
                )
                found.append([float(engine.train_step(torch.ones(2, 4))) for _ in range(3)])
        with pytest.raises(RuntimeError, match=r"unused \(on all ranks\).*find_unused_parameters=True, to .* the Plan"):
            engine = distlib.parallelize(
                _Reaches(),
                optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
                loss_fn=lambda output, _: output.square().mean(),
            )
            engine.train_step(torch.ones(2, 4))
    return found


def test_one_replica_trains_what_one_process_trains() -> None:
    torch.manual_seed(0)
    model = _Reaches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = []
    for _ in range(3):
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for found in run_ranks(2, _reaching):
        for losses in found:
            assert losses == pytest.approx(expected, rel=1e-5)


class _FailingSGD(torch.optim.SGD):
    """Raises in one step, before it changes anything."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise ArithmeticError("on purpose")
        return super().step(closure)


def _optimizer_fails(rank: int, n: int, plan: dict[str, Any]) -> tuple[list[float], list[float]]:
    found = []
    with distlib.init():
        for trouble in (False, True):
            optimizers: list[_FailingSGD] = []

            def make(parameters: Any, optimizers: list[_FailingSGD] = optimizers) -> torch.optim.Optimizer:
                optimizers.append(_FailingSGD(parameters, lr=0.1))
                return optimizers[0]

            engine = _engine(CASES["tied"], plan, make)
            losses = _losses(engine, CASES["tied"], 2)
            if trouble:
                optimizers[0].fails = True
                with pytest.raises(ArithmeticError):
                    _losses(engine, CASES["tied"], 1)
                optimizers[0].fails = False
            found.append(losses + _losses(engine, CASES["tied"], 2))
    return found[0], found[1]


@pytest.mark.parametrize("plan", [{"microbatches": 2}, {"stage": 2}, {"pipeline": 2, "microbatches": 2}], ids=str)
def test_gradients_of_a_step_whose_optimizer_failed_are_of_no_step(plan: dict[str, Any]) -> None:
    for undisturbed, disturbed in run_ranks(2, _optimizer_fails, plan):
        assert disturbed == undisturbed

"""Optimizers that have some of a model's parameters, or none on a rank: norms, loss scales and gradients are the
model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import distlib
from distlib.optim import global_norm
from distlib.pipeline.micro_batches import Batch, MicroBatch
from distlib.shards import shard_of

CLIP = 0.01


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def bare_end() -> nn.Module:
    """Its second stage has no parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Softmax(-1))


def frozen_start() -> nn.Module:
    """Its first stage trains nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[0].requires_grad_(False)
    return model


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(step))
    return x, y


def trained_of(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def in_groups(parameters: Any) -> list[dict[str, Any]]:
    matrices, others = [], []
    for p in trained_of(parameters):
        (matrices if len((shard_of(p) or p).shape) > 1 else others).append(p)
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


Make = Callable[[Any], torch.optim.Optimizer]
RULES: dict[str, Make] = {
    "torch's": lambda p: torch.optim.SGD(trained_of(p), lr=5.0),
    "ours": lambda p: distlib.optim.SGD(trained_of(p), lr=5.0),
    "torch's groups": lambda p: torch.optim.SGD(in_groups(p), lr=5.0),
    "our groups": lambda p: distlib.optim.SGD(in_groups(p), lr=5.0),
}
PLANS: list[dict[str, Any]] = [
    {"clip": CLIP},
    {"clip": CLIP, "stage": 1},
    {"clip": CLIP, "stage": 3, "schedule": "zb-h1"},
    {"clip": CLIP, "precision": {"dtype": "fp16", "init_scale": 1024.0}},
]


def plainly(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Losses and norms of three steps in one process."""
    found = []
    for step in range(3):
        x, y = batch(step)
        loss = mse(model(x), y)
        loss.backward()
        found += [loss.item(), float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))]
        optimizer.step()
        model.zero_grad()
    return found


def steps_of(engine: distlib.Engine) -> list[float]:
    found = []
    for step in range(3):
        found.append(float(engine.train_step(*(t.chunk(engine.data_size)[engine.data_rank] for t in batch(step)))))
        assert engine.grad_norm is not None
        found.append(float(engine.grad_norm))
        assert all(p.grad is None for p in engine.model.parameters())
    return found


def without(rank: int, n: int, model: Callable[[], nn.Module], split: str) -> list[list[float]]:
    found = []
    with distlib.init():
        for plan in PLANS:
            for rule in RULES.values():
                engine = distlib.parallelize(
                    model(),
                    distlib.Plan(pipeline=2, microbatches=2, split=[split], **plan),
                    optimizer=rule,
                    loss_fn=mse,
                    example_inputs=batch(0)[0],
                )
                found.append(steps_of(engine))
    return found


@pytest.mark.parametrize(("model", "split"), [(bare_end, "1"), (frozen_start, "2")])
def test_a_stage_without_trained_parameters_clips_and_scales_with_the_others(
    model: Callable[[], nn.Module], split: str
) -> None:
    whole = model()
    rules = [torch.optim.SGD(trained_of(whole.parameters()), lr=5.0)]
    expected = [plainly(whole, rules[0])]
    whole = model()
    expected.append(plainly(whole, torch.optim.SGD(in_groups(whole.parameters()), lr=5.0)))
    everyone = run_ranks(2, without, model, split, timeout=110)
    assert everyone[0] == everyone[1]
    for k, values in enumerate(everyone[0]):
        is_half = "precision" in PLANS[k // len(RULES)]
        assert values == pytest.approx(expected[k % len(RULES) // 2], rel=2e-2 if is_half else 1e-4), k


def norms(rank: int, n: int) -> list[float]:
    with distlib.init():
        model = distlib.PipelineParallel(
            bare_end(), loss_fn=mse, example_inputs=batch(0)[0], microbatches=2, split=["1"]
        )
        model.train_step(*batch(0))
        pipeline = distlib.comm.group.Group.of(None)
        found = [float(global_norm(model.parameters(), order, pipeline=pipeline)) for order in (2.0, 3.0, math.inf)]
        found.append(float(model.clip_grad_norm_(CLIP)))
        found.append(float(global_norm(model.parameters(), pipeline=pipeline)))
    return found


def test_any_norm_of_a_pipeline_counts_a_rank_without_parameters() -> None:
    model = bare_end()
    mse(model(batch(0)[0]), batch(0)[1]).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    expected = [float(nn.utils.get_total_norm(grads, order)) for order in (2.0, 3.0, math.inf)]
    for found in run_ranks(2, norms):
        assert found == pytest.approx([*expected, expected[0], CLIP], rel=1e-4)


# ------------------------------------------------------------ some of the parameters


def matrices(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if len((shard_of(p) or p).shape) > 1]


def some(rank: int, n: int) -> list[list[float]]:
    found = []
    half = {"precision": {"dtype": "fp16", "init_scale": 1024.0}}
    layouts = ({}, {"stage": 1}, {"stage": 3}, {"pipeline": 2, "microbatches": 2, "split": ["2"]}, half)
    with distlib.init():
        for layout in layouts:
            for kind in (torch.optim.SGD, distlib.optim.SGD):
                torch.manual_seed(0)
                engine = distlib.parallelize(
                    nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)),
                    distlib.Plan(clip=CLIP, **layout),
                    optimizer=lambda p, kind=kind: kind(matrices(p), lr=5.0),
                    loss_fn=mse,
                    example_inputs=batch(0)[0],
                )
                found.append(steps_of(engine))
    return found


def test_the_norm_is_the_models_where_the_optimizer_has_some_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    expected = plainly(model, torch.optim.SGD(matrices(model.parameters()), lr=5.0))
    for found in run_ranks(2, some, timeout=110):
        for values in found[:-2]:
            assert values == pytest.approx(expected, rel=1e-4)
        for values in found[-2:]:  # in half precision
            assert values == pytest.approx(expected, rel=2e-2)


class _Overflows(torch.autograd.Function):
    """As it is; its gradient is not."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, number: float) -> torch.Tensor:
        context.number = number
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.full_like(grad, context.number), None


class _Biased(nn.Module):
    """The gradient of its bias alone overflows."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6, 6)), nn.Parameter(torch.ones(6))
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + _Overflows.apply(self.bias, self.number)


def overflowing(rank: int, n: int) -> list[tuple[bool, float]]:
    """Whether a step changed nothing, and the scale after it."""
    found = []
    with distlib.init():
        for kind in (torch.optim.SGD, distlib.optim.SGD):
            for number in (math.inf, math.nan):
                engine = distlib.parallelize(
                    _Biased(number),
                    distlib.Plan(clip=CLIP, precision={"dtype": "fp16", "init_scale": 1024.0}),
                    optimizer=lambda p, kind=kind: kind(matrices(p), lr=5.0),
                    loss_fn=mse,
                )
                before = [p.detach().clone() for p in engine.model.parameters()]
                engine.train_step(*batch(0))
                same = all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
                assert engine.scaler is not None
                found.append((same, engine.scaler.get_scale()))
    return found


def test_an_overflow_outside_of_the_optimizer_skips_the_step() -> None:
    assert run_ranks(1, overflowing) == [[(True, 512.0)] * 4]


# ------------------------------------------------------------ what the engine is given


def given(rank: int, n: int) -> dict[str, Any]:
    said: dict[str, Any] = {}
    with distlib.init():
        for layout in ({}, {"stage": 1}, {"pipeline": 2, "microbatches": 2, "split": ["1"]}):
            with pytest.raises(ValueError) as error:
                distlib.parallelize(
                    bare_end(),
                    distlib.Plan(**layout),
                    optimizer=lambda p: None,  # type: ignore[arg-type, return-value]
                    loss_fn=mse,
                    example_inputs=batch(0)[0],
                )
            said.setdefault("optimizer", []).append(str(error.value))
        for size in (1, n):
            plan = distlib.Plan() if size == n else distlib.Plan(pipeline=2, microbatches=2, split=["1"])
            engine = distlib.parallelize(
                bare_end(), plan, optimizer=RULES["ours"], loss_fn=mse, example_inputs=batch(0)[0], weigh=lambda t: 1.0
            )
            assert engine.data_size == size
            x, y = batch(0)
            said.setdefault("keywords", []).append(
                [float(engine.eval_step(target=y, input=x)), float(engine.eval_step(x, y))]
            )
            with pytest.raises(ValueError, match=r"weigh= gave 0 for the batches of all ranks together"):
                engine._part(Batch([MicroBatch((x,), {}, y, 8, 0.0, 0.0)]))
            said.setdefault("parts", []).append(
                engine._part(Batch([MicroBatch((x,), {}, y, 8, 1.0, float(rank))])) if size > 1 else None
            )
    return said


def test_mistakes_are_named_and_keywords_alone_are_inputs() -> None:
    for rank, said in enumerate(run_ranks(2, given)):
        assert all("optimizer= made a NoneType: it must return a torch.optim.Optimizer" in t for t in said["optimizer"])
        for by_keyword, by_place in said["keywords"]:
            assert by_keyword == by_place
        assert said["parts"] == [None, 2.0 * rank]


class OwnSGD(torch.optim.SGD):
    """A subclass counts as what it is of."""


def described(rank: int, n: int) -> list[str]:
    kinds: list[Make] = [
        lambda p: OwnSGD(p, lr=0.1),
        lambda p: distlib.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: distlib.optim.Lion(p),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.AdamW(p),
    ]
    with distlib.init():
        engines = [distlib.parallelize(bare_end(), optimizer=kind, loss_fn=mse) for kind in kinds]
        return [engine.describe() for engine in engines]


def test_a_description_counts_the_state_of_its_optimizer() -> None:
    (texts,) = run_ranks(1, described)
    rows = [next(line for line in text.splitlines() if line.split()[:2] == ["0", "168"]).split() for text in texts]
    assert [int(row[3]) for row in rows] == [0, 168, 168, 168, 336]  # 42 parameters

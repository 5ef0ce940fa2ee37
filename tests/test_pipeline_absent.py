"""Parameters that the loss does not depend on get no gradient in a pipeline either: an optimizer must skip them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import distlib

STEPS, WIDTH, ROWS = 4, 4, 8
Batch = tuple[dict[str, Any], Tensor]


def blocks() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))


class Pooler(nn.Module):
    """What its first stage makes, and the loss does not look at, travels to the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.blocks = nn.Linear(WIDTH, WIDTH), blocks()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x, pooled


class Gate(nn.Module):
    """A block that lets no gradient through in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        stopped = (self.calls - 1) // self.micro_batches % 2
        return torch.tanh(self.inner(x.detach() if stopped else x))

    micro_batches = 2


class Stopping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks()
        self.blocks[2] = Gate()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Tied(nn.Module):
    """Its first and last stage have one weight, which no stage uses where `skip` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(WIDTH, WIDTH), blocks(), nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        if not skip:
            x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x if skip else self.last(x)


MODELS: dict[str, Callable[[], nn.Module]] = {"pooler": Pooler, "stopping": Stopping, "tied": Tied}
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "1f1b": (2, {"schedule": "1f1b"}),
    "zb-h1": (2, {"schedule": "zb-h1"}),
    "zb-v": (2, {"schedule": "zb-v"}),
    "interleaved": (2, {"schedule": "interleaved"}),
    "sharded": (4, {"schedule": "1f1b", "stage": 3, "partition_size": 2}),
    "sharded zb-h1": (4, {"schedule": "zb-h1", "stage": 2, "partition_size": 2}),
    "replicas": (4, {"schedule": "1f1b", "find_unused_parameters": True}),
    "replicas zb-h1": (4, {"schedule": "zb-h1", "find_unused_parameters": True}),
    "headers": (2, {"schedule": "1f1b", "shape_header": True}),
}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def batch(name: str, step: int) -> Batch:
    numbers = torch.Generator().manual_seed(step)
    given: dict[str, Any] = {"x": torch.randn(ROWS, WIDTH, generator=numbers)}
    if name == "tied":
        given["skip"] = step % 3 > 0
    return given, torch.randn(ROWS, WIDTH, generator=numbers)


def loss_of(output: Any, target: Tensor) -> Tensor:
    return ((output[0] if isinstance(output, tuple) else output) - target).square().mean()


def cut(values: Batch, parts: int, part: int) -> Batch:
    given, target = values
    rows = {k: v.chunk(parts)[part] if isinstance(v, Tensor) else v for k, v in given.items()}
    return rows, target.chunk(parts)[part]


def one_process(name: str) -> dict[str, Tensor]:
    model = made(name)
    optimizer = adamw(model.parameters())
    for step in range(STEPS):
        for k in range(2):
            given, target = cut(batch(name, step), 2, k)
            (loss_of(model(**given), target) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def in_a_pipeline(rank: int, n: int, name: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    plan = distlib.Plan(pipeline=2, microbatches=2, costs="estimated", **settings)
    with distlib.init():
        example = batch(name, 0)[0]
        engine = distlib.parallelize(
            made(name), plan, optimizer=adamw, loss_fn=loss_of, example_inputs=cut((example, example["x"]), 2, 0)[0]
        )
        for step in range(STEPS):
            engine.train_step(*cut(batch(name, step), engine.data_size, engine.data_rank))
        model: Any = engine.model
        return model.full_state_dict()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_what_the_loss_does_not_depend_on_stays_as_it_is(name: str, plan: str) -> None:
    n, settings = PLANS[plan]
    expected = one_process(name)
    for found in run_ranks(n, in_a_pipeline, name, settings):
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def in_half(rank: int, n: int) -> tuple[float, torch.dtype]:
    with distlib.init():
        plan = distlib.Plan(pipeline=2, stage=2, partition_size=1, microbatches=3, costs="estimated", precision="bf16")
        torch.manual_seed(0)
        engine = distlib.parallelize(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))),
            plan, optimizer=adamw, loss_fn=lambda a, b: (a - b).abs().mean(), example_inputs=torch.zeros(2, WIDTH),
        )  # fmt: skip
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(engine.data_rank)).bfloat16()
        loss = engine.train_step(x, x.flip(0) * 3)
        return float(loss), loss.dtype


def test_the_loss_is_one_number_on_all_ranks_in_half_precision() -> None:
    assert len(set(run_ranks(4, in_half))) == 1


def trains_nothing(rank: int, n: int, how: str) -> str:
    with distlib.init():
        engine = distlib.parallelize(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))),
            distlib.Plan(pipeline=2, microbatches=2, costs="estimated"),
            optimizer=adamw,
            loss_fn=lambda a, b: (a - b).square().mean().detach() if how == "detached" else (a - b).square().mean(),
            example_inputs=torch.zeros(2, WIDTH),
        )
        x = torch.ones(ROWS, WIDTH)
        with pytest.raises(RuntimeError) as caught, torch.set_grad_enabled(how == "detached"):
            engine.train_step(x, x)
        return str(caught.value)


@pytest.mark.parametrize(("how", "words"), [("no_grad", "would train nothing"), ("detached", "is it detached")])
def test_a_step_that_would_train_nothing_says_so(how: str, words: str) -> None:
    assert all(words in text for text in run_ranks(2, trains_nothing, how))


class AsksAutograd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.inner(y).square().sum(), y, create_graph=True)
        return self.inner(x) + force


def divided(rank: int, n: int) -> list[float]:
    with distlib.init():
        torch.manual_seed(0)
        engine = distlib.parallelize(
            nn.Sequential(*(AsksAutograd() for _ in range(4))),
            distlib.Plan(pipeline=2, microbatches=2, costs="estimated"),
            optimizer=adamw,
            loss_fn=loss_of,
            example_inputs=torch.zeros(2, WIDTH),
        )
        x = torch.linspace(0, 1, ROWS * WIDTH).view(ROWS, WIDTH)
        return [float(engine.train_step(x, x)) for _ in range(2)]


def test_blocks_that_call_autograd_are_divided_automatically() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(AsksAutograd() for _ in range(4)))
    optimizer = adamw(model.parameters())
    x = torch.linspace(0, 1, ROWS * WIDTH).view(ROWS, WIDTH)
    expected = []
    for _ in range(2):
        loss = loss_of(model(x), x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert run_ranks(2, divided)[0] == pytest.approx(expected, rel=1e-5)

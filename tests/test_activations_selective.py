"""Selective recomputation: a kept result is given back only where it is what the recomputation would compute."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from activation_models import WIDTH, Wide, same, step
from ranks import process_group, run_ranks
from torch import Tensor, nn

import distlib

aten = torch.ops.aten
X = torch.randn(5, 3, WIDTH, generator=torch.Generator().manual_seed(1))


class Between(nn.Module):
    """Two layers, and what is done to the result of the first."""

    def __init__(self, between: Callable[[Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=bias), nn.Linear(2 * WIDTH, WIDTH, bias=bias)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(self.up(x)))


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ x.transpose(1, 2)
        scores.mul_(0.3)
        scores.add_(torch.eye(scores.shape[-1]))
        return x + scores.softmax(-1) @ self.value(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cells(x)[0]


def by_data(h: Tensor) -> Tensor:
    h.data.mul_(2)
    return h


def by_detached(h: Tensor) -> Tensor:
    h.detach().mul_(2)
    return h


def without_gradient(h: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(2)
    return h


def unsafely_split(h: Tensor) -> Tensor:
    first, second = torch.unsafe_split(h, WIDTH, -1)
    return torch.cat((first.sigmoid_(), second), -1)


def unsafely_in_chunks(h: Tensor) -> Tensor:
    first, second = h.unsafe_chunk(2, -1)
    return torch.cat((first.sigmoid_(), second.add_(first)), -1)


@torch.library.custom_op("distlib_tests::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.copy_(2 * x)


def by_another_operation(h: Tensor) -> Tensor:
    with torch.no_grad():
        double_(h)
    return h


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "silu": lambda: Between(lambda h: F.silu(h, inplace=True)),
    "silu behind a bias": lambda: Between(lambda h: F.silu(h, inplace=True), bias=True),
    "add": lambda: Between(lambda h: h.add_(1.0)),
    "flattened": lambda: Between(lambda h: h.flatten().sigmoid_().view_as(h)),
    "einsum": lambda: Between(lambda h: torch.einsum("btc,cd->btd", h, 1.1 * torch.eye(2 * WIDTH)).tanh_()),
    "data": lambda: Between(by_data),
    "detached": lambda: Between(by_detached),
    "no_grad": lambda: Between(without_gradient),
    "unsafe_split": lambda: Between(unsafely_split),
    "unsafe_chunk": lambda: Between(unsafely_in_chunks),
    "custom operation": lambda: Between(by_another_operation),
    "scores": Scores,
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
}


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(*[make() for _ in range(2)])
    treated = copy.deepcopy(plain)
    distlib.checkpoint_activations(treated, "selective")
    return plain, treated


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore:the activation setting")
def test_a_block_that_writes_a_kept_result(name: str) -> None:
    plain, treated = both(WRITERS[name])
    for seed in range(3):
        assert same(step(plain, X, seed), step(treated, X, seed))


class Twofold(nn.Module):
    """Returns a kept result beside what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x)
        return h, self.down(h.tanh())


@pytest.mark.filterwarnings("ignore:the activation setting")
def test_a_returned_result_that_others_write() -> None:
    plain, treated = both(Twofold)
    for _ in range(3):
        values = []
        for model in (plain, treated):
            model.zero_grad()
            y, total = X, torch.zeros(())
            for block in model:
                h, y = block(y)
                total = total + h.mul_(2).square().mean()
            (total + y.square().mean()).backward()
            values.append([p.grad for p in model.parameters()])
        assert same(*values)


class Reduce(torch.autograd.Function):
    """The sum over all ranks, in place, as tensor parallelism has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(Reduce.apply(self.up(x))))


def reduced_steps(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        plain, treated = both(Parallel)
        for seed in range(3):
            assert same(step(plain, X, seed), step(treated, X, seed))


@pytest.mark.parametrize("nodes", ["1", "2"])
@pytest.mark.parametrize("backend", ["gloo", "distlib"])
def test_a_collective_that_writes_a_kept_result(backend: str, nodes: str) -> None:
    """Those of distlib are no operations of torch's dispatcher."""
    run_ranks(2, reduced_steps, backend, timeout=60, env={"DISTLIB_NODES": nodes})


# ---------------------------------------------------------------- the n-th call is another


class Positions(nn.Module):
    """Makes a table by a matrix product, once for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < len(x):
            self.table = (torch.linspace(0, 1, len(x))[:, None] @ torch.ones(1, WIDTH)).sin()
        return x + self.down((self.up(x) + self.table[: len(x)]).tanh())


class Norms(nn.Module):
    """Looks at its second weight in the first forward, by a product as of the first with the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is None:
            with torch.no_grad():
                self.seen = self.down(x).norm()
        return x + self.down(self.up(x).tanh()) / self.seen


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", [Positions, Norms])
@pytest.mark.filterwarnings("ignore:the activation setting")
def test_a_forward_that_computes_more_than_its_recomputation(block: type[nn.Module]) -> None:
    plain, treated = both(block)
    x = X.flatten(0, 1)
    for rows in (4, 8, 8):
        assert same(step(plain, x[:rows]), step(treated, x[:rows]))
    products = []
    for model in (plain, treated):
        with Count() as count:
            step(model, x[:8])
        products.append(count.calls[aten.mm.default])
    assert products[0] == products[1]  # by then both runs do the same, and none is computed twice


def test_results_are_given_back_where_autocast_remembers_its_casts() -> None:
    """Of the second forward it casts no parameter any more; the recomputation casts them again."""
    products = []
    for model in both(Wide):
        for _ in range(2):
            with Count() as count:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(X).square().mean() + model(2 * X).square().mean()
                loss.backward()
        products.append(count.calls[aten.addmm.default])
    assert products[0] == products[1] == 2 * 4


def products_of_sharded_steps(rank: int, n: int, half: bool) -> list[int]:
    with process_group(rank, n):
        products = []
        for model in both(Wide):
            precision = distlib.MixedPrecision(param=torch.bfloat16) if half else None
            wrapped = distlib.ShardedDataParallel(model, 3, units=[nn.Linear], mixed_precision=precision)
            for _ in range(2):
                with Count() as count:
                    wrapped(X).square().mean().backward()
            products.append(count.calls[aten.addmm.default])
        return products


@pytest.mark.parametrize("half", [False, True])
def test_results_are_given_back_where_parameters_come_and_go(half: bool) -> None:
    """They lie elsewhere in the recomputation, into which other operations gather them."""
    for products in run_ranks(2, products_of_sharded_steps, half, env={"DISTLIB_NODES": "2"}, timeout=60):
        assert products == [4, 4]

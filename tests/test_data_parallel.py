"""DataParallel against its oracle: the plain average of what each rank would compute alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import process_group, run_ranks
from torch import nn

import distlib
from distlib.data_parallel import DataParallel

SMALL = 0.002  # MiB: several buckets even for the small models here


class Tiny(nn.Module):
    """A language model in miniature: embedding tied to the head, norms, a frozen part, a buffer."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 24)
        self.norm = nn.LayerNorm(24)
        self.up = nn.Linear(24, 48)
        self.down = nn.Linear(48, 24)
        self.fixed = nn.Linear(24, 24)
        self.fixed.requires_grad_(False)
        self.head = nn.Linear(24, 17, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(24))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.down(F.gelu(self.up(self.norm(x)))) + self.fixed(x) * self.scale
        return self.head(x)


def tiny(seed: int = 0, tied: bool = True) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(tied)


def tokens_of(rank: int, step: int = 0, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(17, (batch, 8), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, rank: int, step: int = 0) -> torch.Tensor:
    inputs, targets = tokens_of(rank, step)
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def average_alone(
    module: nn.Module, n: int, backward: Callable[[nn.Module, int], None]
) -> dict[str, torch.Tensor | None]:
    """The oracle: what each of n ranks computes, one after the other, added in rank order and divided."""
    sums: dict[str, torch.Tensor | None] = {}
    for rank in range(n):
        alone = copy.deepcopy(module)
        alone.zero_grad()
        backward(alone, rank)
        for name, gradient in gradients(alone).items():
            before = sums.get(name)
            sums[name] = gradient if before is None else before if gradient is None else before + gradient
    return {name: None if total is None else total / n for name, total in sums.items()}


def assert_same(
    got: dict[str, torch.Tensor | None],
    want: dict[str, torch.Tensor | None],
    rtol: float = 1e-6,
    atol: float = 1e-8,
) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None:
            assert got[name] is None, f"{name} has a gradient, the oracle has none"
        else:
            assert got[name] is not None, f"{name} has no gradient"
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def equal_on_all(values: list[dict[str, torch.Tensor | None]]) -> bool:
    """Whether all ranks hold the same bits."""
    return all(
        (a is None and b is None) or torch.equal(a, b)
        for other in values[1:]
        for a, b in zip(values[0].values(), other.values(), strict=True)
    )


@contextmanager
def wrapped(rank: int, n: int, module: nn.Module | None = None, **options: Any) -> Iterator[DataParallel]:
    """In a rank: a process group, and in it a wrapped model of a few small buckets."""
    backend = options.pop("backend", "distlib")
    options.setdefault("bucket_mb", SMALL)
    with process_group(rank, n, backend):
        yield DataParallel(tiny() if module is None else module, **options)


# ------------------------------------------------------------ averages


def _averages(rank: int, n: int, backend: str) -> dict[str, torch.Tensor | None]:
    with wrapped(rank, n, tiny(seed=rank), backend=backend) as model:  # weights of rank 0 reach all
        for _ in range(3):  # with the first layout, and with the rebuilt one
            model.zero_grad()
            loss_of(model, rank).backward()
            assert_same(gradients(model), average_alone(tiny(seed=0), n, lambda m, r: loss_of(m, r).backward()))
        return gradients(model)


@pytest.mark.parametrize("backend", ["distlib", "gloo"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_gradients_are_the_average_and_bit_equal_on_all_ranks(n: int, backend: str) -> None:
    assert equal_on_all(run_ranks(n, _averages, backend))


def _curve(rank: int, n: int, steps: int, bucket_mb: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    with wrapped(rank, n, bucket_mb=bucket_mb) as model:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(steps):
            loss = loss_of(model, rank, step)
            optimizer.zero_grad()
            loss.backward()
            model.clip_grad_norm_(1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses, {name: value.clone() for name, value in model.state_dict().items()}


def test_loss_curve_equals_one_process_and_no_bit_depends_on_the_bucket_size() -> None:
    n, steps = 2, 50
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    want = []
    for step in range(steps):
        losses = [loss_of(model, rank, step) for rank in range(n)]
        optimizer.zero_grad()
        (sum(losses) / n).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        want.append([loss.item() for loss in losses])

    states = []
    for bucket_mb in (0.0001, SMALL, 25.0):
        results = run_ranks(n, _curve, steps, bucket_mb)
        for rank, (losses, state) in enumerate(results):
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(want)[:, rank], rtol=1e-5, atol=0, check_dtype=False
            )
            states.append(state)
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


def test_no_bit_depends_on_the_bucket_size_between_hosts_either() -> None:
    states = [
        state
        for bucket_mb in (0.0001, 25.0)
        for _, state in run_ranks(4, _curve, 3, bucket_mb, env={"DISTLIB_NODES": "2"})
    ]
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


def _runs_twice(rank: int, n: int) -> bool:
    states = []
    with process_group(rank, n):
        for zero_grad_to_none in (True, False):
            model = DataParallel(tiny(), bucket_mb=SMALL)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for step in range(5):
                optimizer.zero_grad(set_to_none=zero_grad_to_none)
                loss_of(model, rank, step).backward()
                optimizer.step()
            states.append(copy.deepcopy(model.module.state_dict()))
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_both_ways_of_clearing_gradients_give_the_same_bits() -> None:
    assert all(run_ranks(2, _runs_twice))


# ------------------------------------------------------------ accumulation


def _accumulates(rank: int, n: int, set_to_none: bool) -> None:
    def two_steps(model: nn.Module, r: int) -> None:
        loss_of(model, r, 0).backward()
        loss_of(model, r, 1).backward()

    want = average_alone(tiny(), n, two_steps)
    with wrapped(rank, n) as model:
        for _ in range(3):
            model.zero_grad(set_to_none=set_to_none)
            calls = collectives(model)
            with model.no_sync():
                loss_of(model, rank, 0).backward()
            assert collectives(model) == calls, "no_sync communicated"
            loss_of(model, rank, 1).backward()
            assert_same(gradients(model), want)

        model.zero_grad(set_to_none=set_to_none)
        loss_of(model, rank, 0).backward()  # averaged twice: avg(avg(a) + b) is avg(a + b)
        loss_of(model, rank, 1).backward()
        assert_same(gradients(model), want, rtol=1e-5, atol=1e-7)

        model.zero_grad(set_to_none=set_to_none)  # several forwards, one backward
        (loss_of(model, rank, 0) + loss_of(model, rank, 1)).backward()
        assert_same(gradients(model), want, rtol=1e-5, atol=1e-7)

        model.zero_grad(set_to_none=set_to_none)  # one forward, several backwards
        loss = loss_of(model, rank, 0)
        loss.backward(retain_graph=True)
        loss.backward()
        double = average_alone(tiny(), n, lambda m, r: (2 * loss_of(m, r)).backward())
        assert_same(gradients(model), double, rtol=1e-5, atol=1e-7)


def collectives(model: DataParallel) -> int:
    return sum(row.calls for row in distlib.ledger().rows)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_micro_steps_accumulate_and_only_the_last_communicates(n: int, set_to_none: bool) -> None:
    run_ranks(n, _accumulates, set_to_none)


def _no_sync_places(rank: int, n: int) -> None:
    want = average_alone(tiny(), n, lambda m, r: loss_of(m, r).backward())
    with wrapped(rank, n) as model:
        alone = average_alone(tiny(), 1, lambda m, _: loss_of(m, rank).backward())
        with model.no_sync():
            loss = loss_of(model, rank)
        loss.backward()  # the forward was inside
        assert_same(gradients(model), alone)

        model.zero_grad()
        loss = loss_of(model, rank)
        with model.no_sync():
            loss.backward()  # the backward is inside
        assert_same(gradients(model), alone)
        with pytest.raises(RuntimeError, match="different gradients"):
            model.clip_grad_norm_(1.0)

        model.zero_grad()
        with pytest.raises(KeyError), model.no_sync():
            raise KeyError  # an exception inside leaves no trace
        loss_of(model, rank).backward()
        assert_same(gradients(model), want)
        model.clip_grad_norm_(1.0)


def test_no_sync_counts_around_forward_or_backward() -> None:
    run_ranks(2, _no_sync_places)

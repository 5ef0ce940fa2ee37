"""Gradients on their way: half-precision communication, and communication hooks, torch's own among them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_data_parallel import assert_same, average_alone, equal_on_all, gradients, loss_of, tiny, wrapped
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from distlib.data_parallel.hooks import GradientBucket

HALF = {"rtol": 1e-2, "atol": 5e-4}


# ------------------------------------------------------------ gradient_dtype


def _in_half(rank: int, n: int, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor | None]:
    def accumulate(m: nn.Module, r: int) -> None:
        loss_of(m, r, 0).backward()
        loss_of(m, r, 1).backward()

    want = average_alone(tiny(), n, accumulate)
    with wrapped(rank, n, gradient_dtype=dtype, backend=backend) as model:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for set_to_none in (True, False, True):
            model.zero_grad(set_to_none=set_to_none)
            with model.no_sync():
                loss_of(model, rank, 0).backward()
            loss_of(model, rank, 1).backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
            if n > 1:
                assert 2 * trained <= model.traffic[1] < 3 * trained, "two bytes an element, and a little"
        return {**gradients(model), **{f"want {k}": v for k, v in want.items()}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "backend"), [(1, "distlib"), (2, "distlib"), (3, "distlib"), (2, "gloo")])
def test_gradients_travel_in_half_precision(n: int, backend: str, dtype: torch.dtype) -> None:
    results = run_ranks(n, _in_half, dtype, backend)
    assert equal_on_all(results)
    got = {k: v for k, v in results[0].items() if not k.startswith("want")}
    want = {k.removeprefix("want "): v for k, v in results[0].items() if k.startswith("want")}
    assert_same(got, want, **HALF)
    if n > 1:  # rounded to the half type
        assert all(torch.equal(v, v.to(dtype).float()) for v in got.values() if v is not None)


def _rounded_once(rank: int, n: int) -> None:
    """Half gradients are added in float32 and rounded once: 2048 + 1 + 1 + 1 would stay 2048 in fp16."""
    module = nn.Linear(1, 1, bias=False)
    with wrapped(rank, n, module, gradient_dtype=torch.float16) as model:
        (model.weight * (2048.0 if rank == 0 else 1.5)).sum().backward()
        model.zero_grad()
        model(torch.tensor([[2048.0 if rank == 0 else 1.5]])).sum().backward()
        want = torch.tensor([[(2048.0 + 1.5 * (n - 1)) / n]]).half().float()
        assert torch.equal(model.weight.grad, want), (model.weight.grad, want)


def test_half_gradients_are_summed_in_single_precision() -> None:
    run_ranks(4, _rounded_once)


# ------------------------------------------------------------ hooks


def _average(log: list[Any], bucket: GradientBucket) -> torch.futures.Future[Any]:
    log.append((bucket.index(), bucket.is_last(), bucket.buffer().numel()))
    assert [g.shape for g in bucket.gradients()] == [p.shape for p in bucket.parameters()]
    assert sum(g.numel() for g in bucket.gradients()) == bucket.buffer().numel()
    assert bucket.gradients()[0].data_ptr() == bucket.buffer().data_ptr()
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future()


def _tensor(_: list[Any], bucket: GradientBucket) -> torch.Tensor:
    total = bucket.buffer().double()
    dist.all_reduce(total)
    return total / dist.get_world_size()


HOOKS = {"future": _average, "tensor": _tensor}


def _hooked(rank: int, n: int, which: str) -> None:
    want = average_alone(tiny(), n, lambda m, r: loss_of(m, r).backward())
    log: list[Any] = []
    with wrapped(rank, n, comm_hook=functools.partial(HOOKS[which], log)) as model:
        for _ in range(3):
            log.clear()
            model.zero_grad()
            loss_of(model, rank).backward()
            assert_same(gradients(model), want)
        if which == "future":
            assert [index for index, _, _ in log] == list(range(len(log))) and len(log) > 2
            assert [last for _, last, _ in log] == [False] * (len(log) - 1) + [True]


@pytest.mark.parametrize("which", sorted(HOOKS))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_hook_averages_buckets_itself(n: int, which: str) -> None:
    run_ranks(n, _hooked, which)


TORCH_HOOKS = {
    "allreduce": lambda: functools.partial(default_hooks.allreduce_hook, None),
    "fp16": lambda: functools.partial(default_hooks.fp16_compress_hook, None),
    "bf16": lambda: functools.partial(default_hooks.bf16_compress_hook, None),
    "fp16 wrapper": lambda: functools.partial(default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook), None),
    "bf16 wrapper": lambda: functools.partial(default_hooks.bf16_compress_wrapper(default_hooks.allreduce_hook), None),
}


def _torch_hook(rank: int, n: int, which: str) -> dict[str, torch.Tensor | None]:
    want = average_alone(tiny(), n, lambda m, r: loss_of(m, r).backward())
    with wrapped(rank, n, comm_hook=TORCH_HOOKS[which]()) as model:
        for _ in range(3):
            model.zero_grad()
            loss_of(model, rank).backward()
            assert_same(gradients(model), want, **({} if which == "allreduce" else HALF))
        return gradients(model)


@pytest.mark.parametrize("which", sorted(TORCH_HOOKS))
def test_torch_s_compression_hooks(which: str) -> None:
    assert equal_on_all(run_ranks(2, _torch_hook, which))


# gloo's threads hold their group for a moment after the last callback of a hook. Were they the last to let go, it would
# end in a thread of its own, and torch would abort the process.
KEPT: list[Any] = []


def _power_sgd(rank: int, n: int, backend: str) -> dict[str, torch.Tensor | None]:
    """PowerSGD communicates several times per bucket, from within callbacks; it must do as in stock DDP."""
    hook = powerSGD_hook.powerSGD_hook

    def state() -> Any:
        return powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)

    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = loss_of(model, rank)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with wrapped(rank, n, comm_hook=functools.partial(hook, state()), bucket_mb=25.0, backend=backend) as model:
        ours = train(model)
        stock = DistributedDataParallel(tiny())
        stock.register_comm_hook(state(), hook)
        theirs = train(stock)
        assert ours[-1] < 0.9 * ours[0]
        assert ours[:3] == pytest.approx(theirs[:3], rel=1e-5)  # not compressed yet
        assert ours[-1] == pytest.approx(theirs[-1], rel=0.1)
        KEPT.append(dist.group.WORLD)
        return gradients(model)


@pytest.mark.parametrize("backend", ["distlib", "gloo"])
def test_power_sgd(backend: str) -> None:
    assert equal_on_all(run_ranks(2, _power_sgd, backend, timeout=40))


def _power_sgd_many_buckets(rank: int, n: int) -> dict[str, torch.Tensor | None]:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    hook = functools.partial(powerSGD_hook.powerSGD_hook, state)
    with wrapped(rank, n, comm_hook=hook) as model:
        for step in range(6):
            model.zero_grad()
            loss_of(model, rank, step).backward()
        return gradients(model)


def test_messages_of_one_bucket_never_overtake_those_of_another() -> None:
    assert equal_on_all(run_ranks(3, _power_sgd_many_buckets, timeout=40))


def _bad_hook(rank: int, n: int) -> None:
    with wrapped(rank, n, comm_hook=lambda bucket: 3) as model:
        with pytest.raises(TypeError, match="Future or a Tensor, got int"):
            loss_of(model, rank).backward()
    with wrapped_again(rank, n, lambda bucket: bucket.buffer()[:1]) as model:
        with pytest.raises(RuntimeError, match="as one tensor, got 1 elements"):
            loss_of(model, rank).backward()


def wrapped_again(rank: int, n: int, hook: Any) -> Any:
    return wrapped(rank, n, comm_hook=hook)


def test_a_hook_that_gives_something_else_is_refused() -> None:
    run_ranks(1, _bad_hook)

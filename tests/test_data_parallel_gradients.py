"""DataParallel's gradients: where they lie, in which order they travel, and what kinds there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from test_data_parallel import (
    SMALL,
    assert_same,
    average_alone,
    gradients,
    loss_of,
    tiny,
    wrapped,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from distlib.buckets import MIB
from distlib.data_parallel import DataParallel

# ------------------------------------------------------------ memory


def _gradients_live_in_buckets(rank: int, n: int) -> None:
    from distlib.comm.memory import is_registered

    with wrapped(rank, n) as model:
        for step in range(3):
            model.zero_grad()
            loss_of(model, rank, step).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        bucket = trained[0].grad.untyped_storage().data_ptr()
        assert all(p.grad.untyped_storage().data_ptr() == bucket for p in trained), "one block holds all"
        assert all(p.grad.data_ptr() % 64 == 0 for p in trained)
        assert all(is_registered(p.grad) for p in trained)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        before = [p.grad.data_ptr() for p in trained]
        loss_of(model, rank).backward()  # static ever after
        assert before == [p.grad.data_ptr() for p in trained]
        calls, sent = model.traffic
        padded = sum(-(-p.numel() * 4 // 64) * 64 for p in trained)
        assert calls > 2
        assert padded <= sent <= padded + 4 * (len(trained) + 2)
        arrivals = model.bucket_arrivals
        assert len(arrivals) == calls
        assert arrivals == sorted(arrivals) and arrivals[0] > 0


def test_gradients_are_slices_of_registered_buckets() -> None:
    run_ranks(2, _gradients_live_in_buckets)


class Backwards(nn.Module):
    """Used in the reverse of registration order on rank 0, and as registered on the others."""

    def __init__(self, reverse: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.reverse = reverse

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = reversed(range(4)) if self.reverse else range(4)
        for i in order:
            x = self.parts[i](x)
        return x


def _order_of_rank_0(rank: int, n: int) -> tuple[int, ...]:
    torch.manual_seed(0)
    with wrapped(rank, n, Backwards(reverse=rank == 0), bucket_mb=0.0001) as model:
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(2, 6) + rank).sum().backward()
        return model._reducer._memory.layout.order


def test_buckets_follow_the_order_of_arrival_on_rank_0() -> None:
    orders = run_ranks(3, _order_of_rank_0)
    assert orders[0] == orders[1] == orders[2]
    parts = [parameter // 2 for parameter in orders[0]]
    assert parts == [0, 0, 1, 1, 2, 2, 3, 3]


def _channels_last(rank: int, n: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)

    def run(m: nn.Module, r: int) -> None:
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(r))
        m(images.to(memory_format=torch.channels_last)).square().mean().backward()

    want = average_alone(module, n, run)
    with wrapped(rank, n, module) as model:
        run(model, rank)
        assert_same(gradients(model), want, rtol=1e-5, atol=1e-7)
        assert all(p.grad.stride() == p.stride() for p in model.parameters())


def test_gradients_have_the_strides_of_their_parameters() -> None:
    run_ranks(2, _channels_last)


def _subgroup(rank: int, n: int) -> None:
    import torch.distributed as dist

    with process_group(rank, n):
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        model = DataParallel(tiny(seed=rank), bucket_mb=SMALL, process_group=pairs[rank % 2])
        loss_of(model, rank).backward()
        mates = [rank % 2, rank % 2 + 2]
        want = average_alone(tiny(seed=rank % 2), 2, lambda m, r: loss_of(m, mates[r]).backward())
        assert_same(gradients(model), want)


def test_any_subgroup() -> None:
    run_ranks(4, _subgroup)


def _large(rank: int, n: int) -> None:
    """Default buckets: the first is small, the rest are full; a parameter above the cap is alone."""
    module = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
    with wrapped(rank, n, module, bucket_mb=2.5) as model:
        assert [b.nbytes for b in model._reducer._memory.layout.buckets][:2] == [MIB, 2 * MIB]
        for _ in range(2):
            model.zero_grad()
            model(torch.full((1, 512), rank + 1.0)).sum().backward()
        want = average_alone(module, n, lambda m, r: m(torch.full((1, 512), r + 1.0)).sum().backward())
        assert_same(gradients(model), want, rtol=1e-4, atol=1e-6)


def test_several_full_buckets() -> None:
    run_ranks(2, _large)


# ------------------------------------------------------------ kinds of parameters


class Mixed(nn.Module):
    """Parameters of four dtypes, one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.fp32 = nn.Parameter(torch.randn(33))
        self.fp64 = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.bf16 = nn.Parameter(torch.randn(50).to(torch.bfloat16))
        self.c64 = nn.Parameter(torch.randn(9, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self, x: float) -> torch.Tensor:
        parts = (self.fp32 * x, self.fp64 * x, self.bf16 * x, self.c64.abs() * x, self.empty)
        return sum(part.double().square().sum() for part in parts)


def _mixed(rank: int, n: int) -> None:
    torch.manual_seed(0)
    module = Mixed()
    want = average_alone(module, n, lambda m, r: m(r + 1.0).backward())
    with wrapped(rank, n, module, bucket_mb=0.0001) as model:
        for _ in range(2):
            model.zero_grad()
            model(rank + 1.0).backward()
            got = gradients(model)
            half, wanted = got.pop("bf16"), want["bf16"]
            torch.testing.assert_close(half.float(), wanted.float(), rtol=1e-2, atol=0)
            assert_same(got, {k: v for k, v in want.items() if k != "bf16"})
            assert model.c64.grad.dtype == torch.complex64


def test_dtypes_may_be_mixed() -> None:
    run_ranks(2, _mixed)


def _tied(rank: int, n: int) -> None:
    with wrapped(rank, n) as model:
        loss_of(model, rank).backward()
        assert model.head.weight is model.embed.weight
        names = [name for name, _ in model.named_parameters()]
        assert "embed.weight" in names and "head.weight" not in names
        assert len(model._reducer._parameters) == sum(p.requires_grad for p in model.parameters())


def test_tied_weights_are_averaged_once() -> None:
    run_ranks(2, _tied)


def _within_checkpoint(rank: int, n: int, reentrant: bool, hidden: bool) -> None:
    torch.manual_seed(0)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            x = self.first(x)
            x = checkpoint(lambda y: self.second(y).tanh(), x, use_reentrant=reentrant)
            x = self.third(x)
            return {"inner": [x]} if hidden else x

    def run(m: nn.Module, r: int) -> None:
        out = m(torch.ones(2, 8) * (r + 1))
        (out["inner"][0] if hidden else out).square().sum().backward()

    module = Parts()
    want = average_alone(module, n, run)
    with wrapped(rank, n, module, bucket_mb=0.0001) as model:
        for _ in range(2):
            model.zero_grad()
            run(model, rank)
            assert_same(gradients(model), want, rtol=1e-5)

        for _ in range(2):  # the wrapper itself within a checkpoint
            model.zero_grad()
            x = torch.full((2, 8), rank + 1.0, requires_grad=True)
            out = checkpoint(lambda y: model(y)["inner"][0] if hidden else model(y), x, use_reentrant=reentrant)
            out.square().sum().backward()
            assert_same(gradients(model), want, rtol=1e-5)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_and_around(reentrant: bool, hidden: bool) -> None:
    run_ranks(2, _within_checkpoint, reentrant, hidden)


def _penalty(rank: int, n: int) -> None:
    def run(m: nn.Module, r: int) -> None:
        x = torch.full((3, 6), r + 1.0, requires_grad=True)
        out = m(x).tanh().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        (out + slope.square().sum()).backward()

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    want = average_alone(module, n, run)
    with wrapped(rank, n, module) as model:
        run(model, rank)
        assert_same(gradients(model), want, rtol=1e-5, atol=1e-7)

        loss = model(torch.ones(1, 6)).sum()
        with pytest.raises(RuntimeError, match=r"create_graph=True\).*not supported"):
            loss.backward(create_graph=True)
        loss = model(torch.ones(1, 6)).sum()
        if n > 1:
            with pytest.raises(RuntimeError, match=r"autograd.grad.*not averaged"):
                torch.autograd.grad(loss, list(model.parameters()))
        with model.no_sync():
            torch.autograd.grad(model(torch.ones(1, 6)).sum(), list(model.parameters()))

        model.zero_grad()
        run(model, rank)  # nothing of it has left a trace
        assert_same(gradients(model), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2])
def test_gradient_penalties_work_and_double_backward_is_refused(n: int) -> None:
    run_ranks(n, _penalty)

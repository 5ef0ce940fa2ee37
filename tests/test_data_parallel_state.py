"""DataParallel as a module: buffers, clipping, names, state, evaluation, the ledger."""

from __future__ import annotations

import copy
import pickle
import time
from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from test_data_parallel import (
    assert_same,
    average_alone,
    collectives,
    gradients,
    loss_of,
    tiny,
    tokens_of,
    wrapped,
)
from torch import nn

import distlib
from distlib.data_parallel import DataParallel

# ------------------------------------------------------------ buffers


class Counting(nn.Module):
    """A batch norm, a buffer that is assigned anew in each forward, and one not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + x.sum().detach()
        return self.norm(x)


class Raises(torch.autograd.Function):
    """Its backward does."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *__: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def _buffers(rank: int, n: int, copied: bool) -> None:
    torch.manual_seed(0)
    with wrapped(rank, n, Counting(), broadcast_buffers=copied) as model:
        sums = 0.0
        for step in range(4):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank))
            y = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step))
            model.zero_grad()
            model(x).sum().backward()
            sums += float(y.sum()) if copied and step < 3 else float(x.sum())
        assert model.seen.item() == pytest.approx(sums, abs=1e-4), "rank 0's before, its own in the last forward"
        model.zero_grad()
        before = model.seen.clone()
        with model.no_sync():
            model(x).sum().backward()
        assert torch.equal(model.seen, before + x.sum()), "no_sync copied buffers"
        model.eval()
        before = model.seen.clone()
        model(x)
        assert torch.equal(model.seen, before + x.sum()), "eval copied buffers"
        model.train()
        model.zero_grad()
        (model(x).sum() + model(x).sum()).backward()  # the second forward must not overwrite what the first saved
        model.norm.running_mean = torch.zeros(5)
        if copied and n > 1:
            with pytest.raises(RuntimeError, match=r"'norm.running_mean' was \(4,\)"):
                model(x)


@pytest.mark.parametrize(("n", "copied"), [(1, True), (2, True), (3, True), (2, False)])
def test_buffers_come_from_rank_0_at_the_first_forward_of_a_step(n: int, copied: bool) -> None:
    run_ranks(n, _buffers, copied)


# ------------------------------------------------------------ nothing to train


UNTRAINED: dict[str, Any] = {
    "frozen": lambda: nn.Sequential(Counting(), nn.Linear(4, 4)).requires_grad_(False),
    "buffers": lambda: nn.BatchNorm1d(4, affine=False),
    "nothing": nn.Tanh,
}


def _untrained(rank: int, n: int, which: str, options: dict[str, Any]) -> None:
    torch.manual_seed(rank)
    plain = UNTRAINED[which]()
    torch.manual_seed(rank)
    with wrapped(rank, n, UNTRAINED[which](), **options) as model:
        if rank == 0:
            assert_same(model.state_dict(), plain.state_dict())
        before = collectives(model)
        x = torch.randn(5, 4, requires_grad=True)
        with model.no_sync():
            model(x).sum().backward()
        first, second = model(x), model(x)  # the second must not overwrite the buffers that the first saved
        (first + second).sum().backward()
        model(x.detach())  # without a graph: no backward follows
        with model.partial_backward():
            model(x).sum().backward()
        with model.weight_backward():
            pass
        model(x)
        copies = 4 if n > 1 and which != "nothing" else 0
        assert collectives(model) - before == copies
        assert x.grad is not None and all(p.grad is None for p in model.parameters())
        model.load_state_dict(model.state_dict())
        assert model.clip_grad_norm_(1.0) == 0 and model.traffic == (0, 0)
        assert model.memory_report().counted["gradients"] == 0
        with pytest.raises(ZeroDivisionError):
            Raises.apply(model(x)).sum().backward()
        with model.join():
            for _ in range(1 + rank):
                model(x).sum().backward()
        model(x).sum().backward()


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_dtype": torch.bfloat16}])
@pytest.mark.parametrize("which", UNTRAINED)
@pytest.mark.parametrize("n", [1, 2])
def test_a_module_without_trained_parameters_has_its_buffers_copied(
    n: int, which: str, options: dict[str, Any]
) -> None:
    run_ranks(n, _untrained, which, options)


def _frozen_stage(rank: int, n: int, stage: int) -> None:
    with process_group(rank, n):
        torch.manual_seed(0)
        module = nn.Sequential(Counting(), nn.Linear(4, 4), nn.Linear(4, 4))
        module[:2].requires_grad_(False)
        plain = copy.deepcopy(module)
        engine = distlib.parallelize(
            module,
            distlib.Plan(pipeline=2, split=["2"], microbatches=2, stage=stage, schedule="zb-h1"),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            loss_fn=nn.functional.mse_loss,
            example_inputs=torch.zeros(4, 4),
        )
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for step in range(3):
            x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
            for half in x.chunk(2):
                (nn.functional.mse_loss(plain(half), half) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.train_step(x, x)
        want = plain.state_dict()
        assert_same(engine.model.full_state_dict(), want, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_pipeline_may_have_a_frozen_stage(stage: int) -> None:
    run_ranks(2, _frozen_stage, stage)


# ------------------------------------------------------------ clipping


def _clips(rank: int, n: int) -> list[float]:
    norms = []
    with wrapped(rank, n) as model:
        for norm_type in (2.0, 1.0, float("inf")):
            module = tiny()
            want = average_alone(module, n, lambda m, r: loss_of(m, r).backward())
            for name, parameter in module.named_parameters():
                parameter.grad = want[name]
            total = nn.utils.clip_grad_norm_(module.parameters(), 0.05, norm_type)

            model.zero_grad()
            loss_of(model, rank).backward()
            got = model.clip_grad_norm_(0.05, norm_type)
            torch.testing.assert_close(got, total, rtol=1e-5, atol=0)
            assert_same(gradients(model), gradients(module), rtol=1e-5)
            norms.append(got.item())
        model.embed.weight.grad[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match="non-finite"):
            model.clip_grad_norm_(1.0, error_if_nonfinite=True)
        model.zero_grad()
        assert model.clip_grad_norm_(1.0) == 0
    return norms


@pytest.mark.parametrize("n", [1, 2])
def test_clipping_gives_the_norm_of_the_average(n: int) -> None:
    norms = run_ranks(n, _clips)
    assert all(norm == norms[0] for norm in norms)


# ------------------------------------------------------------ names and state


class Holder(nn.Module):
    """A module with a wrapped part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def _names(rank: int, n: int) -> None:
    plain = tiny()
    with wrapped(rank, n) as model:
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
        assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
        assert list(model.state_dict()) == list(plain.state_dict())
        assert {name for name, _ in model.named_modules()} == {name for name, _ in plain.named_modules()}
        assert model.up is model.module.up and model.scale is model.module.scale
        with pytest.raises(AttributeError, match="nowhere"):
            _ = model.nowhere

        other = tiny(seed=5)
        assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
        assert torch.equal(model.up.weight, other.up.weight)
        plain.load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({})
        with pytest.raises(ValueError, match="assign=True"):
            model.load_state_dict(other.state_dict(), assign=True)

        holder, plain_holder = Holder(model), Holder(tiny(seed=6))
        assert list(holder.state_dict()) == list(plain_holder.state_dict())
        assert [k for k, _ in holder.named_parameters()] == [k for k, _ in plain_holder.named_parameters()]
        holder.load_state_dict(plain_holder.state_dict())
        assert torch.equal(model.up.weight, plain_holder.part.up.weight)
        loss_of(model, rank).backward()

        model.eval()
        assert not model.module.training and not model.up.training
        model.train()
        assert model.module.training and model.up.training
        for refused in (pickle.dumps, copy.deepcopy, copy.copy):
            with pytest.raises(TypeError, match=r"\.module"):
                refused(model)


def test_names_and_state_are_those_of_the_module() -> None:
    run_ranks(2, _names)


def _without_gradients(rank: int, n: int) -> None:
    with wrapped(rank, n) as model:
        calls = collectives(model)
        with torch.no_grad():
            out = model(tokens_of(rank)[0])
        model.eval()
        with torch.inference_mode():
            model(tokens_of(rank)[0])
        assert not out.requires_grad
        assert collectives(model) == calls + (n > 1), "one broadcast of buffers, in training mode"


@pytest.mark.parametrize("n", [1, 2])
def test_without_gradients_nothing_but_buffers_is_communicated(n: int) -> None:
    run_ranks(n, _without_gradients)


def _goes(rank: int, n: int) -> None:
    module = tiny()
    with process_group(rank, n):
        model = DataParallel(module)
        loss_of(model, rank).backward()
        del model
        module.zero_grad()
        loss_of(module, rank).backward()  # no hook is left: these are this rank's own
        assert_same(gradients(module), average_alone(tiny(), 1, lambda m, _: loss_of(m, rank).backward()))
        again = DataParallel(module)
        again.zero_grad()
        loss_of(again, rank).backward()
        assert_same(gradients(module), average_alone(tiny(), n, lambda m, r: loss_of(m, r).backward()))


def test_a_dropped_wrapper_leaves_no_hooks() -> None:
    run_ranks(2, _goes)


# ------------------------------------------------------------ the ledger


def _slow_rank_1(rank: int, n: int) -> tuple[Any, ...]:
    with wrapped(rank, n) as model:
        loss_of(model, rank).backward()
        distlib.ledger().reset()
        for step in range(3):
            model.zero_grad()
            loss = loss_of(model, rank, step)
            if rank == 1:
                time.sleep(0.3)
            loss.backward()
        ledger = distlib.ledger()
        rows = [row for row in ledger.rows if row.op == "all_reduce"]
        return rows, ledger.slowest_rank, ledger.arrivals, model.traffic


def test_the_ledger_counts_the_buckets_and_names_the_rank_that_is_late() -> None:
    for rows, slowest, arrivals, (calls, sent) in run_ranks(2, _slow_rank_1):
        assert [row.calls for row in rows] == [3 * calls]
        assert [row.bytes for row in rows] == [3 * sent]  # 2 M (n - 1) / n, and n is 2
        assert slowest == 1
        assert set(arrivals) == {f"bucket {i}" for i in range(calls)}
        assert all(late[1] > 0.02 + late[0] for late in arrivals.values())

"""DataParallel against its oracle: the plain average of what each rank would compute alone."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import process_group, run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import distlib
from distlib.buckets import MIB
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
            calls = _collectives(model)
            with model.no_sync():
                loss_of(model, rank, 0).backward()
            assert _collectives(model) == calls, "no_sync communicated"
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


def _collectives(model: DataParallel) -> int:
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
        calls = _collectives(model)
        with torch.no_grad():
            out = model(tokens_of(rank)[0])
        model.eval()
        with torch.inference_mode():
            model(tokens_of(rank)[0])
        assert not out.requires_grad
        assert _collectives(model) == calls + (n > 1), "one broadcast of buffers, in training mode"


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


# ------------------------------------------------------------ the ledger


def _slow_rank_1(rank: int, n: int) -> tuple[Any, ...]:
    with wrapped(rank, n) as model:
        loss_of(model, rank).backward()
        distlib.ledger().reset()
        for step in range(3):
            model.zero_grad()
            loss = loss_of(model, rank, step)
            if rank == 1:
                time.sleep(0.05)
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

"""Half precision with fp32 masters, against one process that emulates it; quantized gathers; whole parameters for
optimizers that need matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from sharded_models import adamw, alone, loss_of, part_of, summed, tiny
from test_sharded_features import NO_CORE, Block, Net, data
from torch import nn

import distlib
from distlib.sharded import MixedPrecision
from distlib.shards import shard_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def model_for_halves() -> nn.Module:
    """Buffers keep their dtype, and one of fp32 would make activations fp32; a scalar does not."""
    model = tiny()
    model.scale = torch.tensor(0.5)
    return model


def emulated(n: int, steps: int, param: torch.dtype, reduce: torch.dtype | None, once: bool) -> Any:
    """Masters in fp32, two micro-steps: every rank computes on rounded copies; gradients are averaged in fp32, rounded.

    once: ranks add micro-steps up before that (stage 1).
    """
    master = model_for_halves()
    optimizer = adamw(master.parameters())
    travels = reduce or param
    for step in range(steps):
        grads: dict[str, list[list[torch.Tensor]]] = {}
        for micro in range(2):
            for r in range(n):
                low = copy.deepcopy(master).to(param)
                (loss_of(low, *part_of(step * 2 + micro, r, n)) / 2).backward()
                for name, p in low.named_parameters():
                    if p.grad is not None:
                        grads.setdefault(name, [[], []])[micro].append(p.grad.float())
        for name, p in master.named_parameters():
            if name in grads:
                parts = torch.stack([torch.stack(by_rank) for by_rank in grads[name]])  # micro-step, rank, ...
                parts = parts.sum(dim=0, keepdim=True) if once else parts
                averages = parts.to(travels).float().mean(dim=1).to(travels).float()
                p.grad = averages.sum(dim=0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in master.state_dict().items()}


def mixed(rank: int, n: int, stage: int, param: torch.dtype, reduce: torch.dtype | None, fused: bool) -> Any:
    model = distlib.ShardedDataParallel(
        model_for_halves(), stage=stage, mixed_precision=MixedPrecision(param, reduce, FP32)
    )
    parameters = list(model.parameters())
    assert all(p.dtype is FP32 for p in parameters)
    if fused:
        from distlib.optim import AdamW

        optimizer: Any = AdamW(parameters, lr=3e-3, weight_decay=0.1)
    else:
        optimizer = adamw(parameters)
    for step in range(4):
        with model.no_sync():
            (loss_of(model, *part_of(2 * step, rank, n)) / 2).backward()
        out = model(part_of(2 * step + 1, rank, n)[0])
        assert out.dtype is FP32
        (loss_of(model, *part_of(2 * step + 1, rank, n)) / 2).backward()
        optimizer.step()
        if fused:
            for p in parameters:
                shard = shard_of(p)
                if p.requires_grad and p.grad is not None:
                    assert shard.is_written(p) and torch.equal(shard.compute.view_as(p), p.to(param))
        optimizer.zero_grad()
    return model.full_state_dict()


KINDS = [(BF16, None), (BF16, FP32), (FP16, None)]


def every_kind(rank: int, n: int, stages: list[int], fused: bool) -> Any:
    with process_group(rank, n):
        return {(stage, kind): mixed(rank, n, stage, *kind, fused) for stage in stages for kind in KINDS}


@pytest.mark.parametrize(("nodes", "fused"), [(1, False), (1, True), pytest.param(2, False, marks=NO_CORE)])
def test_masters_as_one_process_emulates_them(nodes: int, fused: bool) -> None:
    stages = [3, 1] if nodes == 2 else [2, 3]
    outcome = run_ranks(2, every_kind, stages, fused, timeout=90, env={"DISTLIB_NODES": str(nodes)})
    for param, reduce in KINDS:
        for stage in stages:
            want = emulated(2, 4, param, reduce, stage == 1)
            have = outcome[0][stage, (param, reduce)]
            for name, value in want.items():
                assert have[name].dtype is FP32
                close = torch.allclose(have[name], value, rtol=1e-3, atol=2e-4)
                assert close, (stage, param, reduce, name, float((have[name] - value).abs().max()))


def casts(rank: int, n: int) -> None:
    """Floating-point inputs, in structures too, arrive in the compute dtype; others as they are."""
    with process_group(rank, n):
        seen: list[Any] = []

        class Probe(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3, 3))

            def forward(self, x: Any, *, more: Any) -> Any:
                seen.extend([x["a"].dtype, more[0].dtype, more[1].dtype, self.weight.dtype])
                return {"out": x["a"] @ self.weight}

        for output in (None, FP32):
            mixed = MixedPrecision(BF16, output=output)
            model = distlib.ShardedDataParallel(Probe(), mixed_precision=mixed)
            out = model({"a": torch.ones(3, 3)}, more=(torch.ones(1, dtype=torch.float64), torch.ones(1).int()))
            assert seen == [BF16, BF16, torch.int32, BF16]
            assert out["out"].dtype is (output or BF16)
            seen.clear()


def test_inputs_and_outputs_are_cast() -> None:
    run_ranks(2, casts)


def half_models(rank: int, n: int, stage: int) -> None:
    """bf16 parameters without mixed precision: gradients and state are bf16, sums are fp32."""
    with process_group(rank, n):
        torch.manual_seed(0)
        plain = Net().bfloat16()
        torch.manual_seed(0)
        model = distlib.ShardedDataParallel(Net().bfloat16(), stage=stage, units=[Block])
        ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain))
        for step in range(3):
            sums: dict[str, torch.Tensor] = {}
            for r in range(n):
                plain(data(step, r).bfloat16(), step, r).float().square().mean().backward()
                for name, p in plain.named_parameters():
                    if p.grad is not None:
                        sums[name] = sums.get(name, 0) + p.grad.float()
                plain.zero_grad()
            for name, p in plain.named_parameters():
                p.grad = (sums[name] / n).bfloat16() if name in sums else None
            model(data(step, rank).bfloat16(), step, rank).float().square().mean().backward()
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
        for name, value in model.full_state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_half_models_without_masters(nodes: int) -> None:
    run_ranks(2, half_models, 3, env={"DISTLIB_NODES": str(nodes)})


def scaled(rank: int, n: int) -> None:
    """An infinity on one rank: all ranks skip the step, no bit changes, and the scale is halved everywhere."""
    from distlib.optim import AdamW, GradScaler

    with process_group(rank, n):
        model = distlib.ShardedDataParallel(model_for_halves(), mixed_precision=MixedPrecision(FP16))
        optimizer = AdamW(model.parameters(), lr=1e-2)
        scaler = GradScaler(init_scale=256.0)
        for step in range(3):
            before = model.full_state_dict()
            loss = loss_of(model, *part_of(step, rank, n))
            if step == 1 and rank == 1:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            same = all(torch.equal(before[name], value) for name, value in model.full_state_dict().items())
            assert same == (step == 1)
        assert scaler.get_scale() == 128.0


def test_an_infinity_on_one_rank_skips_the_step_on_all() -> None:
    run_ranks(2, scaled)


# ------------------------------------------------------------ quantized gathers


def quantized(rank: int, n: int, steps: int) -> list[float]:
    with process_group(rank, n):
        losses = []
        model = distlib.ShardedDataParallel(tiny(), gather_dtype=torch.int8)
        optimizer = adamw(model.parameters())
        for step in range(steps):
            loss = loss_of(model, *part_of(step, rank, n))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach() / n)
        return summed(losses)


@NO_CORE
def test_int8_gathers_stay_within_two_percent() -> None:
    losses = run_ranks(2, quantized, 30, timeout=60, env={"DISTLIB_NODES": "2"})[0]
    expected, _, _ = alone(2, 30)
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)
    assert losses != pytest.approx(expected, rel=1e-7)  # it does quantize


# ------------------------------------------------------------ whole parameters


class Orthogonal(torch.optim.Optimizer):
    """Muon in miniature: the momentum of a matrix, orthogonalised by its singular vectors; vectors by plain descent."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                if p.dim() == 2:
                    u, _, v = torch.linalg.svd(momentum, full_matrices=False)
                    momentum = u @ v
                p.sub_(momentum, alpha=group["lr"])


def whole_matrices(rank: int, n: int) -> None:
    with process_group(rank, n):
        torch.manual_seed(0)
        plain = Net().double()
        torch.manual_seed(0)
        options: dict[str, Any] = {"stage": 1, "ownership": "whole", "units": [Block]}
        model = distlib.ShardedDataParallel(Net().double(), **options)
        held = torch.tensor([p.numel() for p in model.parameters()])
        for (name, p), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert p.shape == (whole.shape if p.numel() else (0,)), name
        torch.distributed.all_reduce(held)
        assert held.tolist() == [p.numel() for p in plain.parameters()]  # each on one rank
        ours, theirs = Orthogonal(model.parameters(), 0.02), Orthogonal(plain.parameters(), 0.02)
        for step in range(4):
            for r in range(n):
                (plain(data(step, r), step, r).square().mean() / n).backward()
            model(data(step, rank), step, rank).square().mean().backward()
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
        full = model.full_state_dict()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(full[name], value, rtol=1e-6, atol=1e-9)
        model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(("n", "nodes"), [(3, 1), pytest.param(2, 2, marks=NO_CORE)])
def test_optimizers_of_whole_matrices(n: int, nodes: int) -> None:
    run_ranks(n, whole_matrices, env={"DISTLIB_NODES": str(nodes)})

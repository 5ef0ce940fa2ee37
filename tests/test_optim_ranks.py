"""Norms, clipping and the loss scaler over ranks: the numbers of one process, the same decision everywhere."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks
from torch import nn

from distlib.comm.group import Group
from distlib.optim import SGD, AdamW, GradScaler, Lion, clip_grad_norm_, global_norm
from distlib.shards import Shard, mark

SIZES = [(7, 5), (3,), (), (1,), (40, 3)]


def wholes(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in SIZES]


def pieces(rank: int, n: int, group: Group, values: list[torch.Tensor]) -> list[nn.Parameter]:
    """This rank's parts of flat parameters that lie one after the other; small ones are empty on most ranks."""
    total = sum(v.numel() for v in values)
    begin, end = total * rank // n, total * (rank + 1) // n
    found, at = [], 0
    for number, whole in enumerate(values):
        low, high = (min(max(edge, at), at + whole.numel()) - at for edge in (begin, end))
        piece = nn.Parameter(whole.reshape(-1)[low:high].clone())
        mark(piece, Shard(f"p{number}", whole.shape, low, high - low, group, group))
        found.append(piece)
        at += whole.numel()
    return found


def give(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.detach().clone()


# ---------------------------------------------------------------- norm


def norms(rank: int, n: int) -> list[float]:
    with process_group(rank, n):
        group = Group.of()
        params = pieces(rank, n, group, wholes(0))
        give(params, [p for p in pieces(rank, n, group, wholes(1))])
        shared = nn.Parameter(torch.ones(4))  # not sharded: the same on all ranks, counted once
        shared.grad = torch.full((4,), 0.5)
        found = []
        for order in (2.0, 1.0, 3.0, math.inf):
            found.append(float(global_norm([shared, *params], order)))
        before = [p.grad.clone() for p in params]
        found.append(float(clip_grad_norm_([shared, *params], 1.5)))
        found.append(float(global_norm([shared, *params])))
        assert all(torch.allclose(p.grad, g * (1.5 / (found[0] + 1e-6))) for p, g in zip(params, before, strict=True))
        if params[0].numel():
            params[0].grad[0] = math.nan
        found += [float(global_norm(params, order)) for order in (2.0, math.inf)]
        with pytest.raises(RuntimeError, match="norm of order"):
            clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
        return found


@pytest.mark.parametrize("n", [2, 3])
def test_the_norm_is_that_of_one_process_and_the_same_bits_everywhere(n: int) -> None:
    shared = nn.Parameter(torch.ones(4))
    params = [nn.Parameter(w) for w in wholes(0)]
    give([shared, *params], [torch.full((4,), 0.5), *wholes(1)])
    all_of_it = [shared, *params]
    expected = [float(torch.nn.utils.get_total_norm([p.grad for p in all_of_it], o)) for o in (2.0, 1.0, 3.0, math.inf)]
    expected += [expected[0], 1.5]
    assert [float(global_norm(all_of_it, o)) for o in (2.0, 1.0, 3.0, math.inf)] == pytest.approx(
        expected[:4], rel=1e-6
    )
    results = run_ranks(n, norms)
    for found in results:
        assert found[:6] == pytest.approx(expected, rel=1e-6)
        assert all(math.isnan(value) for value in found[6:])
        assert found[:6] == results[0][:6]  # bit for bit


def test_norms_without_gradients_and_of_odd_orders() -> None:
    assert float(global_norm([nn.Parameter(torch.ones(3))])) == 0
    assert float(global_norm([nn.Parameter(torch.ones(3))], math.inf)) == 0
    for order in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="norm_type"):
            global_norm([], order)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, math.inf, 2.0])
    assert float(clip_grad_norm_(p, 1.0)) == math.inf
    assert p.grad.isnan().any()  # as torch's


# ---------------------------------------------------------------- clipped steps


def steps_sharded(rank: int, n: int) -> dict[str, list[Any]]:
    with process_group(rank, n):
        group = Group.of()
        params = pieces(rank, n, group, wholes(0))
        optimizer = AdamW(params, lr=0.01, max_norm=0.7)
        norms = []
        for step in range(5):
            give(params, [p for p in pieces(rank, n, group, wholes(10 + step))])
            optimizer.step()
            norms.append(float(optimizer.grad_norm))
        return {"params": [p.detach() for p in params], "norms": norms}


@pytest.mark.parametrize("n", [2, 3])
def test_clipped_sharded_steps_are_those_of_one_process(n: int) -> None:
    params = [nn.Parameter(w) for w in wholes(0)]
    optimizer = torch.optim.AdamW(params, lr=0.01)
    norms = []
    for step in range(5):
        give(params, wholes(10 + step))
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, 0.7)))
        optimizer.step()
    results = run_ranks(n, steps_sharded)
    for number, whole in enumerate(params):
        together = torch.cat([found["params"][number].reshape(-1) for found in results])
        assert torch.allclose(together, whole.reshape(-1), rtol=1e-5, atol=1e-7)
    assert all(found["norms"] == results[0]["norms"] for found in results)
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-6)


# ---------------------------------------------------------------- the scaler


def bytes_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Everything that a skipped step must leave alone."""
    taken = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state.values():
        taken += [value.clone() for value in state.values() if isinstance(value, torch.Tensor)]
    return taken


def scaled_steps(rank: int, n: int, sharded: bool, kind: Any, options: dict[str, Any], explicit: bool) -> list[float]:
    """Five steps; in the third, an infinity on the last rank alone, in the fourth a NaN on rank 0."""
    with process_group(rank, n):
        group = Group.of()
        params = pieces(rank, n, group, wholes(0)) if sharded else [nn.Parameter(w) for w in wholes(0)]
        optimizer = kind(params, lr=0.01, **options)
        scaler = GradScaler(init_scale=1024.0, growth_interval=2)
        scales = []
        for step in range(5):
            values = wholes(20 + step)
            grads = [p.detach() for p in pieces(rank, n, group, values)] if sharded else values
            scale = float(scaler.scale(torch.ones(())))
            give(params, [g * scale for g in grads])
            bad = {2: (n - 1, math.inf), 3: (0, math.nan)}.get(step)
            if bad is not None and rank == bad[0]:
                next(p for p in params if p.numel()).grad.view(-1)[0] = bad[1]
            if explicit:
                scaler.unscale_(optimizer)
            before = bytes_of(optimizer)
            scaler.step(optimizer)
            same = all(torch.equal(a, b) for a, b in zip(before, bytes_of(optimizer), strict=False))
            assert same == (step in (2, 3)), step
            scaler.update()
            scales.append(scaler.get_scale())
        return [*scales, *torch.cat([p.detach().reshape(-1) for p in params]).tolist()]


@pytest.mark.parametrize(
    ("sharded", "kind", "options", "explicit"),
    [
        (True, AdamW, {}, False),
        (True, AdamW, {"max_norm": 0.5}, False),
        (True, AdamW, {"max_norm": 0.5}, True),
        (False, AdamW, {"max_norm": 0.5}, False),
        (True, SGD, {"momentum": 0.9}, False),
        (False, Lion, {}, True),
        (False, torch.optim.AdamW, {}, False),
        (True, torch.optim.SGD, {"momentum": 0.9}, True),
    ],
)
def test_all_ranks_skip_what_one_cannot_step(sharded: bool, kind: Any, options: dict, explicit: bool) -> None:
    results = run_ranks(2, scaled_steps, sharded, kind, options, explicit)
    assert [found[:5] for found in results] == [[1024, 2048, 1024, 512, 512]] * 2
    # The steps that were taken are those of one process without a scaler.
    params = [nn.Parameter(w) for w in wholes(0)]
    optimizer = kind(params, lr=0.01, **options)
    for step in (0, 1, 4):
        give(params, wholes(20 + step))
        optimizer.step()
    whole = torch.cat([p.detach().reshape(-1) for p in params])
    together = torch.tensor(results[0][5:] + (results[1][5:] if sharded else []))
    assert torch.allclose(together, whole, rtol=1e-5, atol=1e-6)


def two_scalars(rank: int, n: int) -> dict[str, list[tuple[int, str]]]:
    with process_group(rank, n):
        group = Group.of()
        params = pieces(rank, n, group, wholes(0))
        optimizer, scaler = AdamW(params, max_norm=1.0), GradScaler()
        scaler.scale(torch.ones(()))
        counted: dict[str, list[tuple[int, str]]] = {}
        for name, call in (("step", optimizer.step), ("scaled", lambda: scaler.step(optimizer))):
            give(params, [p for p in pieces(rank, n, group, wholes(1))])
            started = []
            inner = group.all_reduce
            group.all_reduce = lambda tensor, op, started=started, inner=inner: (  # type: ignore[method-assign]
                started.append((tensor.numel(), op)),
                inner(tensor, op),
            )
            call()
            group.all_reduce = inner  # type: ignore[method-assign]
            counted[name] = started
        return counted


def test_the_norm_costs_one_scalar_all_reduce() -> None:
    for counted in run_ranks(2, two_scalars):
        assert counted == {"step": [(1, "sum")], "scaled": [(1, "sum"), (1, "max")]}


def test_the_scaler_of_one_process_is_torchs() -> None:
    for grad in (torch.float32, torch.bfloat16, torch.float16):
        ours, theirs = ([nn.Parameter(w) for w in wholes(0)] for _ in range(2))
        a, b = AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
        scaler, torchs = GradScaler(256.0, growth_interval=3), torch.amp.GradScaler("cpu", 256.0, growth_interval=3)
        for step in range(8):
            values = [(g * scaler.get_scale()).to(grad) for g in wholes(30 + step)]
            if step == 4:
                values[0][0, 0] = math.nan
            for params, keep in ((ours, grad), (theirs, torch.float32)):
                for p, g in zip(params, values, strict=True):
                    if hasattr(p, "grad_dtype"):
                        p.grad_dtype = keep  # type: ignore[attr-defined]
                    p.grad = g.to(keep if hasattr(p, "grad_dtype") else torch.float32)
            for optimizer, own in ((a, scaler), (b, torchs)):
                own.scale(torch.ones(()))
                own.step(optimizer)
                own.update()
            assert scaler.get_scale() == torchs.get_scale()
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(ours, theirs, strict=True))
        assert scaler.state_dict() == torchs.state_dict()
        again = GradScaler()
        again.load_state_dict(copy.deepcopy(scaler.state_dict()))
        assert again.get_scale() == scaler.get_scale()


def test_torchs_own_scaler_drives_our_optimizers() -> None:
    ours, plain = ([nn.Parameter(w) for w in wholes(0)] for _ in range(2))
    a, b, scaler = AdamW(ours, max_norm=1.0), AdamW(plain, max_norm=1.0), torch.amp.GradScaler("cpu", 64.0)
    for step in range(3):
        scale = float(scaler.scale(torch.ones(())))
        give(ours, [g * scale for g in wholes(step)])
        give(plain, wholes(step))
        scaler.step(a)
        scaler.update()
        b.step()
        assert float(a.grad_norm) == float(b.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))


def test_huge_finite_fp64_gradients_are_no_infinities() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer, scaler = SGD([p], lr=1e-200), GradScaler(init_scale=1.0)
    scaler.scale(torch.ones(()))
    p.grad = torch.full((3,), 1e200, dtype=torch.float64)
    scaler.step(optimizer)
    assert torch.allclose(p, torch.full((3,), -1.0, dtype=torch.float64))


def test_a_disabled_scaler_only_steps_and_odd_numbers_are_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.full((3,), math.inf)
    scaler = GradScaler(enabled=False)
    assert scaler.scale(p) is p
    scaler.step(SGD([p], lr=1.0))
    assert not p.isfinite().any()
    for options in ({"init_scale": 0}, {"growth_factor": 1}, {"backoff_factor": 1}, {"growth_interval": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GradScaler(**options)


def in_a_group_of_its_own(rank: int, n: int) -> float:
    with process_group(rank, n):
        alone = [dist.new_group([r]) for r in range(n)][rank]
        p = nn.Parameter(torch.zeros(2))
        optimizer, scaler = SGD([p], lr=1.0), GradScaler(init_scale=1.0, process_group=alone)
        scaler.scale(torch.ones(()))
        p.grad = torch.full((2,), math.inf if rank == 0 else 1.0)
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale() + float(p[0].detach())


def test_the_process_group_says_who_decides_together() -> None:
    assert run_ranks(2, in_a_group_of_its_own) == [0.5, 0.0]

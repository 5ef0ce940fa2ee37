"""distlib's optimizers against torch's and an fp64 oracle; their state, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import distlib
from distlib import native
from distlib.optim import SGD, AdamW, Lion, kernels
from distlib.shards import Shard, mark


class ReferenceLion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675 in plain torch: there is none in torch.optim."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (beta1 * m + (1 - beta1) * p.grad).sign()
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


ADAMW = (AdamW, torch.optim.AdamW)
SGDS = (SGD, torch.optim.SGD)
LION = (Lion, ReferenceLion)
RULES = [
    (*ADAMW, {"lr": 1e-3}),
    (*ADAMW, {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}),
    (*ADAMW, {"lr": 1e-2, "betas": (0.0, 0.4), "weight_decay": 0.0}),
    (*SGDS, {"lr": 1e-2}),
    (*SGDS, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    (*SGDS, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.4}),
    (*SGDS, {"lr": 1e-2, "momentum": 0.8, "nesterov": True}),
    (*LION, {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}),
]


def parameters(sizes: list[Any], seed: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)) for size in sizes]


def gradients(params: list[nn.Parameter], seed: int, spread: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) * spread for p in params]


def distance(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    """Relative, of all parameters as one vector."""
    a = torch.cat([p.detach().double().flatten() for p in ours])
    b = torch.cat([p.detach().double().flatten() for p in theirs])
    return float((a - b).norm() / b.norm()) if b.numel() else 0.0


def train(optimizer: torch.optim.Optimizer, steps: range, grad_dtype: torch.dtype | None = None) -> None:
    for step in steps:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, g in zip(params, gradients(params, 1000 + step), strict=True):
            given = g.to(grad_dtype).to(p.dtype) if grad_dtype else g.to(p.dtype)
            p.grad = given
        optimizer.step()


# ---------------------------------------------------------------- against torch, and fp64


@pytest.mark.parametrize(("ours", "theirs", "options"), RULES)
def test_a_hundred_steps_are_torchs_to_a_millionth(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    sizes = [(31, 17), (5,), (), (0, 3), (257,), (2, 3, 4)]
    mine, torchs, exact = parameters(sizes, 0), parameters(sizes, 0), parameters(sizes, 0, torch.float64)
    plain = {} if theirs is ReferenceLion else {"foreach": False}
    train(ours(mine, **options), range(100))
    train(theirs(torchs, **options, **plain), range(100))
    train(theirs(exact, **options, **plain), range(100))
    assert distance(mine, torchs) < 1e-6
    assert distance(mine, exact) < max(1e-6, 1.5 * distance(torchs, exact))
    assert distance(mine, exact) > 0  # the oracle is another computation


def test_fp64_parameters_are_stepped_in_fp64() -> None:
    for ours, theirs, options in RULES:
        mine, torchs = parameters([(9, 7), (130,)], 1, torch.float64), parameters([(9, 7), (130,)], 1, torch.float64)
        train(ours(mine, **options), range(20))
        train(theirs(torchs, **options), range(20))
        assert distance(mine, torchs) < 1e-14, ours


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 130), min_size=1, max_size=6),
    lr=st.floats(1e-5, 0.1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    eps=st.floats(1e-8, 1e-2),
    decay=st.floats(0, 1),
    spread=st.sampled_from([1e-4, 1.0, 1e3]),
    missing=st.integers(0, 5),
)
def test_any_sizes_and_numbers(
    sizes: list[int], lr: float, beta1: float, beta2: float, eps: float, decay: float, spread: float, missing: int
) -> None:
    options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
    mine, exact = parameters(sizes, 2), parameters(sizes, 2, torch.float64)
    ours, oracle = AdamW(mine, **options), torch.optim.AdamW(exact, **options)
    for step in range(4):
        for i, (p, q, g) in enumerate(zip(mine, exact, gradients(mine, step, spread), strict=True)):
            p.grad, q.grad = (None, None) if step == 1 and i == missing else (g, g.double())
        ours.step()
        oracle.step()
    for p, q in zip(mine, exact, strict=True):
        assert torch.allclose(p.double(), q, rtol=1e-5, atol=2e-6), (p, q)


def test_groups_have_their_own_numbers_and_schedulers_change_them() -> None:
    sizes = [(4, 5), (6,), (7, 2)]
    mine, torchs = parameters(sizes, 3), parameters(sizes, 3)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 0.1, "betas": (0.5, 0.9)}]

    ours, theirs = AdamW(groups(mine), lr=0.01), torch.optim.AdamW(groups(torchs), lr=0.01)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20) for optimizer in (ours, theirs)]
    for step in range(15):
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            train(optimizer, range(step, step + 1))
            schedule.step()
    assert distance(mine, torchs) < 1e-6
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr() != [0.01, 0.1]


def test_a_group_can_be_added_and_a_tensor_be_the_rate() -> None:
    mine, torchs = parameters([(4,), (5,)], 4), parameters([(4,), (5,)], 4)
    for kind, params in ((AdamW, mine), (torch.optim.AdamW, torchs)):
        optimizer = kind(params[:1], lr=torch.tensor(0.05))
        train(optimizer, range(3))
        optimizer.add_param_group({"params": params[1:]})
        train(optimizer, range(3, 6))
    assert distance(mine, torchs) < 1e-6


def test_layouts_other_than_contiguous() -> None:
    def make() -> list[nn.Parameter]:
        torch.manual_seed(0)
        wide = torch.randn(6, 8)
        return [
            nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(7, 9).t()),
            nn.Parameter(wide[:, ::2]),  # has gaps
        ]

    for ours, theirs, options in RULES:
        mine, torchs = make(), make()
        train(ours(mine, **options), range(5))  # gradients are contiguous: another layout than the parameters'
        train(theirs(torchs, **options), range(5))
        assert distance(mine, torchs) < 1e-6
        assert not mine[2].is_contiguous()


def test_without_the_core_torch_steps_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for ours, _, options in RULES:
        mine, plain = parameters([(40,), (3, 3)], 5), parameters([(40,), (3, 3)], 5)
        train(ours(mine, **options), range(10))
        with monkeypatch.context() as patch:
            patch.setattr(native, "core", lambda: None)
            kernels.warn_once.cache_clear()
            with pytest.warns(UserWarning, match="core is not in use") as said:
                train(ours(plain, max_norm=1e9, **options), range(10))
            assert len(said) == 1
        assert distance(mine, plain) < 1e-6
    kernels.warn_once.cache_clear()


# ---------------------------------------------------------------- state


@pytest.mark.parametrize(("ours", "theirs", "options"), RULES[:7])
def test_state_goes_to_torch_and_back(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    sizes = [(5, 4), (0,), (9,)]
    mine, torchs = parameters(sizes, 6), parameters(sizes, 6)
    a, b = ours(mine, **options), theirs(torchs, **options)
    train(a, range(5))
    train(b, range(5))
    assert a.state_dict()["state"].keys() == b.state_dict()["state"].keys()
    for number, state in b.state_dict()["state"].items():
        have = a.state_dict()["state"][number]
        assert {name for name, value in state.items() if value is not None} == have.keys()
        assert all(have[name].dtype == state[name].dtype for name in have)
    saved_a, saved_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    c, d = ours(torchs, **options), theirs(mine, **options)  # crosswise
    c.load_state_dict(saved_b)
    d.load_state_dict(saved_a)
    train(c, range(5, 10))
    train(d, range(5, 10))
    assert distance(mine, torchs) < 1e-6


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_resumed_optimizer_continues_bit_for_bit(way: str) -> None:
    for ours, _, options in RULES:
        mine, again = parameters([(50,), (3, 2)], 7), parameters([(50,), (3, 2)], 8)
        a = ours(mine, **options, max_norm=1.0)
        train(a, range(4))
        if way == "state_dict":
            b = ours(again, **options, max_norm=1.0)
            train(b, range(2))  # state that must give way
            b.load_state_dict(copy.deepcopy(a.state_dict()))
            for p, q in zip(again, mine, strict=True):
                p.data.copy_(q.data)
        else:
            b = copy.deepcopy(a) if way == "deepcopy" else pickle.loads(pickle.dumps(a))
            again = [p for group in b.param_groups for p in group["params"]]
        train(a, range(4, 8))
        train(b, range(4, 8))
        assert all(torch.equal(p, q) for p, q in zip(mine, again, strict=True))


def test_state_is_views_of_one_buffer_and_a_replaced_one_counts() -> None:
    params = parameters([(5,), (6,), (7,)], 9)
    optimizer = AdamW(params)
    train(optimizer, range(1))
    first, *others = [optimizer.state[p]["exp_avg"] for p in params]
    assert all(view.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for view in others)
    optimizer.state[params[1]]["exp_avg"] = torch.full((6,), 5.0)
    optimizer.state[params[1]]["step"] = torch.tensor(40.0)
    params[1].grad = torch.zeros(6)
    optimizer.step()
    assert torch.allclose(optimizer.state[params[1]]["exp_avg"], torch.tensor(4.5))
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 41, 2]


def test_an_empty_state_starts_again_from_zero() -> None:
    for ours, _, options in RULES:
        params, fresh = parameters([(20,)], 10), parameters([(20,)], 10)
        a, b = ours(params, **options), ours(fresh, **options)
        begin = copy.deepcopy(a.state_dict())
        train(a, range(3))
        a.load_state_dict(begin)
        params[0].data.copy_(fresh[0].data)
        train(a, range(3, 6))
        train(b, range(3, 6))
        assert torch.equal(params[0], fresh[0]), ours


# ---------------------------------------------------------------- compute copies, versions, clipping


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_compute_copy_is_written_with_the_parameter(dtype: torch.dtype) -> None:
    whole, halves = nn.Parameter(torch.randn(70)), torch.zeros(70, dtype=dtype)
    shard = Shard("w", torch.Size([140]), 0, 70, None, None, compute=halves)  # type: ignore[arg-type]
    mark(whole, shard)
    version = whole._version
    assert not shard.is_written(whole)
    train(AdamW([whole]), range(1))
    assert whole._version > version and shard.is_written(whole)
    assert torch.equal(halves, whole.to(dtype))
    with torch.no_grad():
        whole.zero_()
    assert not shard.is_written(whole)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    weight = nn.Parameter(torch.randn(3))
    loss = (weight * weight).sum()
    train(SGD([weight], lr=0.1), range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_on_the_fly_is_clipping_before(max_norm: float) -> None:
    sizes = [(30, 3), (7,), (0,)]
    mine, torchs = parameters(sizes, 11), parameters(sizes, 11)
    ours, theirs = AdamW(mine, max_norm=max_norm), torch.optim.AdamW(torchs)
    for step in range(10):
        for p, q, g in zip(mine, torchs, gradients(mine, step), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        norm = torch.nn.utils.clip_grad_norm_(torchs, max_norm)
        ours.step()
        theirs.step()
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        assert torch.equal(mine[0].grad, gradients(mine, step)[0])  # not rewritten
    assert distance(mine, torchs) < 1e-6


def test_closures_and_missing_gradients() -> None:
    params = parameters([(4,), (4,)], 12)
    optimizer = AdamW(params)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    before = params[1].detach().clone()
    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()  # nothing to do is no error


def test_lazily_imported() -> None:
    assert distlib.optim.AdamW is AdamW and "optim" in distlib.__all__


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: AdamW([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]), ValueError, "bfloat16.*fp32 masters"),
        (lambda: AdamW([("w", nn.Parameter(torch.zeros(2, dtype=torch.half)))]), ValueError, "'w' is torch.float16"),
        (lambda: SGD([torch.zeros(2, dtype=torch.cfloat)]), ValueError, "complex64"),
        (lambda: AdamW([torch.zeros(2)], lr=-1), ValueError, "lr=-1"),
        (lambda: AdamW([torch.zeros(2)], betas=(0.9, 1.0)), ValueError, "betas"),
        (lambda: AdamW([torch.zeros(2)], max_norm=0), ValueError, "max_norm=0"),
        (lambda: AdamW([{"params": [torch.zeros(2)], "amsgrad": True}]), ValueError, "amsgrad"),
        (lambda: SGD([torch.zeros(2)], nesterov=True), ValueError, "nesterov"),
        (lambda: Lion([torch.zeros(2)], weight_decay=-0.1), ValueError, "weight_decay=-0.1"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_gradients_and_parameters_that_cannot_be_stepped() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="layout torch.sparse_coo"):
        AdamW(table.parameters()).step()
    weight = nn.Parameter(torch.randn(6))
    optimizer = AdamW([weight])
    train(optimizer, range(1))
    weight.data, weight.grad = torch.randn(7), None
    weight.grad = torch.randn(7)
    with pytest.raises(ValueError, match="make a new optimizer"):
        optimizer.step()
    empty = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = AdamW([empty])
    empty.grad = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match="to_empty"):
        optimizer.step()


def test_loaded_state_that_does_not_fit_is_refused() -> None:
    a, b = AdamW(parameters([(4,)], 0)), AdamW(parameters([(5,)], 0))
    train(a, range(1))
    with pytest.raises(ValueError, match=r"exp_avg has shape \(4,\)"):
        b.load_state_dict(a.state_dict())
    amsgrad = torch.optim.AdamW(parameters([(5,)], 0), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        b.load_state_dict(amsgrad.state_dict())
    with pytest.raises(ValueError, match="not decoupled"):
        b.load_state_dict(torch.optim.Adam(parameters([(5,)], 0)).state_dict())


def test_maximize_in_loaded_state_is_followed() -> None:
    mine, torchs = parameters([(9,)], 1), parameters([(9,)], 1)
    theirs = torch.optim.AdamW(torchs, maximize=True)
    ours = AdamW(mine)
    ours.load_state_dict(theirs.state_dict())
    train(ours, range(5))
    train(theirs, range(5))
    assert distance(mine, torchs) < 1e-6


def test_steps_are_counted_in_fp32_whatever_the_default_dtype() -> None:
    """bf16 counts to 256."""
    weight = nn.Parameter(torch.ones(4))
    expected = nn.Parameter(torch.ones(4))
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = distlib.optim.AdamW([weight], lr=1e-3)
        plain = torch.optim.AdamW([expected], lr=1e-3)
        for k in range(300):
            weight.grad = torch.full((4,), math.cos(k), dtype=torch.float32)
            expected.grad = weight.grad.clone()
            optimizer.step()
            plain.step()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert float(optimizer.state_dict()["state"][0]["step"]) == 300

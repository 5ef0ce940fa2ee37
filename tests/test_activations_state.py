"""What a recomputation finds: the buffers, parameters and inputs of the forward; and what is left of a forward that
nobody runs backward."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_models import WIDTH, Averages, Convolution, Wide, make, same, step
from played import compare
from ranks import process_group, run_ranks
from torch import Tensor, nn
from torch.func import functional_call

import distlib
from distlib.activations.wrapped import MOST_TIMES

POLICIES = ("full", "selective", "offload")
X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlib.activations.offload.SMALLEST", 1)


def treat(model: nn.Module, policy: str, folder: Path) -> nn.Module:
    options: dict[str, Any] = {"folder": folder, "resident": 0} if policy == "offload" else {}
    distlib.checkpoint_activations(model, policy, **options)
    return model


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer() for _ in range(3)])


# ---------------------------------------------------------------- buffers


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tensor_that_a_forward_left_hangs_there_after_backward(policy: str, tmp_path: Path) -> None:
    model = treat(make("averages"), policy, tmp_path)
    for _ in range(2):
        loss = model(X).sum()
        left = [dict(block._buffers) for block in model]
        loss.backward()
        for block, held in zip(model, left, strict=True):
            assert list(block._buffers) == list(held)
            assert all(block._buffers[key] is buffer for key, buffer in held.items())


@pytest.mark.parametrize("policy", POLICIES)
def test_buffers_of_several_forwards_are_each_their_own(policy: str, tmp_path: Path) -> None:
    plain, treated = make("averages"), treat(make("averages"), policy, tmp_path)
    for seed in range(2):
        assert same(step(plain, X, seed, forwards=3), step(treated, X, seed, forwards=3))


class Graph(nn.Module):
    """Multiplies with a sparse buffer; `grows`: and changes it."""

    def __init__(self, grows: bool) -> None:
        super().__init__()
        self.grows = grows
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("edges", torch.eye(8).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        if self.grows:
            self.edges.mul_(1.5)
        return torch.sparse.mm(self.edges.clone(), self.linear(x).relu())


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("policy", ["full", "offload"])
def test_a_sparse_buffer(policy: str, grows: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Graph(grows), Graph(grows))
    treated = treat(copy.deepcopy(plain), policy, tmp_path)
    for _ in range(2):
        values = []
        for model in (plain, treated):
            model.zero_grad()
            model(X).square().mean().backward()
            values.append([p.grad for p in model.parameters()] + [b.to_dense() for b in model.buffers()])
        assert same(*values)


def test_a_budget_with_a_sparse_buffer() -> None:
    model = nn.Sequential(Graph(True), Graph(True))
    distlib.checkpoint_activations(model, budget=0.5, example_inputs=X)
    assert all(torch.equal(buffer.to_dense(), torch.eye(8)) for buffer in model.buffers())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_of_a_block(policy: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        blocks = [nn.Sequential(torch.jit.script(nn.BatchNorm1d(WIDTH)), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
        return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})

    values = []
    for treated in (False, True):
        blocks = (treat(model(), policy, tmp_path) if treated else model())["blocks"]
        for _ in range(2):
            blocks[1](blocks[0](X)).square().sum().backward()
        values.append([p.grad for p in blocks.parameters()] + [b.clone() for b in blocks.buffers()])
    assert same(*values)


class Rotary(nn.Module):
    """A buffer that never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("turn", torch.linspace(-1, 1, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x * self.turn).tanh()


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_blocks_with_buffers_can_be_recorded_and_divided(policy: str, tmp_path: Path) -> None:
    """A run is recorded on tensors without values: the guard of buffers asks for none."""
    torch.manual_seed(0)
    inputs = {Rotary: X, Averages: X, Convolution: torch.randn(2, 8, 6, 6)}
    for kind, x in inputs.items():
        model = treat(nn.Sequential(*[kind() for _ in range(3)]), policy, tmp_path)
        compare(model, lambda x=x: ((x.clone(),), {}))


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("policy", POLICIES)
def test_functional_call_is_refused_where_it_would_be_recomputed(policy: str, tmp_path: Path) -> None:
    plain, treated = layers(), treat(layers(), policy, tmp_path)
    gradients = []
    for model in (plain, treated):
        own = {name: (p.detach() * 0.5).requires_grad_() for name, p in model.named_parameters()}
        loss = functional_call(model, own, (X,)).sum()
        if model is treated and policy != "offload":
            with pytest.raises(RuntimeError, match=r'parameter 2.linear.weight .*functional_call.*policy="offload"'):
                loss.backward()
            return
        gradients.append(list(torch.autograd.grad(loss, list(own.values()))))
    assert same(*gradients)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_functional_call_on_the_parameters_memory_is_recomputed(policy: str, tmp_path: Path) -> None:
    plain, treated = layers(), treat(layers(), policy, tmp_path)
    gradients = []
    for model in (plain, treated):
        own = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        gradients.append(list(torch.autograd.grad(functional_call(model, own, (X,)).sum(), list(own.values()))))
    assert same(*gradients)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_another_parameter_between_forward_and_backward_is_refused(policy: str, tmp_path: Path) -> None:
    model = treat(layers(), policy, tmp_path)
    loss = model(X).sum()
    model[1].linear.weight = nn.Parameter(model[1].linear.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"parameter 1.linear.weight is not the one that the forward computed with"):
        loss.backward()


def test_data_that_is_back_by_backward_is_none_of_our_business(tmp_path: Path) -> None:
    plain, treated = layers(), treat(layers(), "full", tmp_path)
    expected = step(plain, X)
    torch.manual_seed(5)
    loss = treated(X).square().mean()
    weight = treated[1].linear.weight
    before = weight.data
    weight.data = before * 2
    weight.data = before
    loss.backward()
    assert same([p.grad for p in treated.parameters()], expected[1:-1])


def sharded_steps(rank: int, n: int, policy: str, stage: int, half: bool) -> None:
    with process_group(rank, n):
        results = []
        for treated in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(*[Wide() for _ in range(3)])
            if treated:
                distlib.checkpoint_activations(model, policy)
            precision = distlib.MixedPrecision(param=torch.bfloat16) if half else None
            wrapped = distlib.ShardedDataParallel(model, stage, units=[nn.Linear], mixed_precision=precision)
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
            for i in range(3):
                torch.manual_seed(10 * rank + i)
                optimizer.zero_grad()
                losses = [wrapped(torch.randn(4, WIDTH)).square().mean() for _ in range(1 + i % 2)]
                torch.stack(losses).sum().backward()
                optimizer.step()
            results.append([p.detach().clone() for p in wrapped.parameters()])
        assert same(*results)


@pytest.mark.parametrize("nodes", ["1", "2"])  # with two, whole parameters come and go
@pytest.mark.parametrize(("policy", "stage", "half"), [("full", 3, False), ("selective", 3, True), ("full", 2, False)])
def test_pieces_of_sharded_parameters_take_turns_inside_of_blocks(
    policy: str, stage: int, half: bool, nodes: str
) -> None:
    """Units lie in the blocks: in forward pieces hang there, and in the recomputation, already, whole parameters."""
    run_ranks(2, sharded_steps, policy, stage, half, env={"DISTLIB_NODES": nodes}, timeout=60)


# ---------------------------------------------------------------- inputs


class WritesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x += self.linear(x.detach().clone()).tanh()
        return x


def writers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), WritesInput(), WritesInput())


def test_counting_bytes_does_not_write_inputs(tmp_path: Path) -> None:
    plain, treated = writers(), treat(writers(), "offload", tmp_path)
    for seed in range(2):
        assert same(step(plain, X, seed), step(treated, X, seed))
    given = X.clone()
    report = distlib.checkpoint_activations(writers(), "offload", folder=tmp_path, example_inputs=given)
    assert torch.equal(given, X) and report.baseline_bytes > 0


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_block_that_writes_its_input_is_refused_by_name(policy: str, tmp_path: Path) -> None:
    model = treat(writers(), policy, tmp_path)
    loss = model(X).sum()
    with pytest.raises(RuntimeError, match=r"block '2' changes its input in place.*blocks="):
        loss.backward()
    model = nn.Sequential(*[nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)) for _ in range(2)])
    treat(model, policy, tmp_path)
    loss = model(X.clone()).sum()
    with pytest.raises(RuntimeError, match=r"block '1' changes its input in place.*ReLU\(inplace=False\)"):
        loss.backward()


# ---------------------------------------------------------------- forwards without a backward


@pytest.mark.parametrize("policy", POLICIES)
def test_results_of_a_forward_without_backward_go_at_once(policy: str, tmp_path: Path) -> None:
    """By counting references, not when a collection of cycles happens to run."""
    model = treat(layers(), policy, tmp_path)
    model(X).sum().backward()
    alive: list[weakref.ref[Any]] = []
    model[0].linear.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output.untyped_storage())))
    gc.collect()
    gc.disable()
    try:
        model(X).sum()
        if policy == "offload":
            model[0].forward.setting.offloader.settle()
        assert alive and all(reference() is None for reference in alive)
    finally:
        gc.enable()


def test_times_of_forwards_without_backward_do_not_pile_up(tmp_path: Path) -> None:
    model = treat(nn.Sequential(Layer(), Layer()), "full", tmp_path)
    for _ in range(MOST_TIMES + 5):
        model[0](X)
    assert len(model[0].forward.record.forwards) == MOST_TIMES


class KeepsItsNorm(nn.Linear):
    """EEGNet's way: the weight gets other memory in each forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_forward_may_give_its_weight_other_memory(policy: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Sequential(KeepsItsNorm(8, 8), nn.Tanh()) for _ in range(2)))
    treated = copy.deepcopy(plain)
    distlib.checkpoint_activations(treated, policy)
    x = torch.randn(4, 8)
    for _ in range(2):
        for model in (plain, treated):
            model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), treated.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)

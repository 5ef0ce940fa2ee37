"""What a block's forward finds and leaves outside of its tensors: the caller's lists, attributes of its modules, random
numbers of other generators, buffers and parameters that somebody writes."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from activation_models import WIDTH, Residual, Values, same, step
from torch import Tensor, nn

import distlib
from distlib.activations import surroundings
from distlib.activations.live import LiveBytes

POLICIES = ("full", "selective", "offload", "budget")
X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:the activation setting")


@pytest.fixture(autouse=True)
def everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlib.activations.offload.SMALLEST", 1)


def treat(model: nn.Module, policy: str, folder: Path) -> nn.Module:
    options: dict[str, Any] = {"policy": policy}
    if policy == "offload":
        options |= {"folder": folder, "resident": 0}
    if policy == "budget":
        options = {"budget": 0.0, "example_inputs": X}
    distlib.checkpoint_activations(model, **options)
    return model


def both(make: Callable[[], nn.Module], policy: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Three blocks, and three of the same that are treated."""
    models = []
    for treated in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[make() for _ in range(3)])
        models.append(treat(model, policy, folder) if treated else model)
    return models[0], models[1]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


# ---------------------------------------------------------------- the caller's lists


class Collects(Layer):
    """As mixtures of experts collect losses."""

    def forward(self, x: Tensor, losses: list[Tensor], seen: dict[str, int]) -> Tensor:  # type: ignore[override]
        y = self.linear(x).tanh()
        losses.append(y.square().mean())
        seen["blocks"] = seen.get("blocks", 0) + 1
        return x + y


class Collecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Collects() for _ in range(3))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        losses: list[Tensor] = []
        seen: dict[str, int] = {}
        for block in self.blocks:
            x = block(x, losses, seen)
        self.seen.append(seen["blocks"])
        assert len(losses) == 3
        return x + torch.stack(losses).sum()


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_block_appends_to_a_list_of_its_caller(policy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Collecting()
    treated = treat(copy.deepcopy(plain), policy, tmp_path)
    for seed in range(3):
        assert same(step(plain, X, seed, 2), step(treated, X, seed, 2))
    assert set(treated.seen) == {3}


class Journal:
    """An object that no block should copy."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []


class Writes(Layer):
    def forward(self, x: Tensor, journal: Journal) -> Tensor:  # type: ignore[override]
        y = self.linear(x).tanh()
        journal.losses.append(y.square().mean())
        return x + y


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_counting_bytes_runs_no_forward_twice(policy: str, tmp_path: Path) -> None:
    blocks = treat(nn.ModuleList(Writes() for _ in range(3)), policy, tmp_path)
    for _ in range(2):
        journal, x = Journal(), X
        for block in blocks:
            x = block(x, journal)
        assert len(journal.losses) == 3
        (x.square().mean() + torch.stack(journal.losses).sum()).backward()


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_bytes_counted_by_a_torch_that_does_not_tell_its_hooks(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.8."""
    found = []
    for older in (False, True):
        if older:
            monkeypatch.setattr("distlib.activations.counting.TOP", None)
        torch.manual_seed(0)
        model = nn.Sequential(*[Residual() for _ in range(3)])
        report = distlib.checkpoint_activations(model, policy)
        values = step(model, X)
        recomputed = [len(block.forward.record.recomputations) for block in model]
        found.append((report.baseline_bytes, report.kept_bytes, recomputed, values))
    assert found[0][:3] == found[1][:3] and found[1][2] == [1, 1, 1]
    assert same(found[0][3], found[1][3])


# ---------------------------------------------------------------- buffers and parameters that others write


class Shifts(Layer):
    """Adds a buffer, which backward does not need: others may write it between forward and backward."""

    def __init__(self, numel: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(numel))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.linear(x) + self.shift[:WIDTH]).tanh()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_buffer_that_others_write_between_two_forwards(policy: str, tmp_path: Path) -> None:
    values = []
    for model in both(Shifts, policy, tmp_path):
        losses = []
        for value in (0.5, -0.7):
            for block in model:
                block.shift.fill_(value)
            losses.append(model(X).square().mean())
        torch.stack(losses).sum().backward()
        values.append([*[p.grad for p in model.parameters()], *model.buffers()])
    assert same(*values)


class Shares(Layer):
    """Several blocks have one buffer; `writes`: this one writes it."""

    def __init__(self, mean: nn.Module, writes: bool) -> None:
        super().__init__()
        self.mean, self.writes = mean, writes

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.mean.running_mean.mul_(0.5).add_(x.detach().mean(0))
        return x + (self.linear(x) + self.mean.running_mean).tanh()


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_a_buffer_that_another_block_writes(policy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mean = nn.BatchNorm1d(WIDTH, affine=False)
    plain = nn.Sequential(*[Shares(mean, bool(i % 2)) for i in range(4)])
    treated = treat(copy.deepcopy(plain), policy, tmp_path)
    for seed in range(3):
        assert same(step(plain, X, seed), step(treated, X, seed))


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_large_buffer_that_others_write_is_refused_by_name(policy: str, tmp_path: Path) -> None:
    _, model = both(lambda: Shifts(1 << 19), policy, tmp_path)
    step(model, X)
    loss = model(X).sum()
    model[1].shift.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"buffer 'shift' .* between its forward and its backward.*backward\(\)"):
        loss.backward()


class Filled(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is None:
            self.shift = torch.linspace(0, 1, WIDTH)
        return x + (self.linear(x) + self.shift).tanh()


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_a_buffer_that_was_made_in_inference_mode(policy: str, tmp_path: Path) -> None:
    plain, treated = both(Filled, policy, tmp_path)
    with torch.inference_mode():
        plain(X)
        treated(X)
    for seed in range(2):
        assert same(step(plain, X, seed), step(treated, X, seed))


class Bounds(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Decays(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)
        return super().forward(x)


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_a_forward_that_bounds_its_weight(policy: str, tmp_path: Path) -> None:
    plain, treated = both(Bounds, policy, tmp_path)
    for seed in range(3):
        assert same(step(plain, X, seed), step(treated, X, seed))
        for model in (plain, treated):
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad)
    loss = treated(X).sum()
    if policy != "offload":
        with torch.no_grad():
            treated[1].linear.weight.add_(1)
        with pytest.raises(RuntimeError, match=r"parameter 1.linear.weight .* before the optimizer's step"):
            loss.backward()


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_forward_that_would_change_its_weight_twice_is_refused(policy: str, tmp_path: Path) -> None:
    _, model = both(Decays, policy, tmp_path)
    loss = model(X).sum()
    left = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"block '2' changes its parameter linear.weight.*blocks="):
        loss.backward()
    assert same(left, list(model.parameters()))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_parametrizations_that_are_cached(policy: str, inside: bool, tmp_path: Path) -> None:
    """inside: backward runs before the cache is cleared."""

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight.triu() + weight

    class Twice(Layer):
        def __init__(self) -> None:
            super().__init__()
            parametrize.register_parametrization(self.linear, "weight", Doubled())

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(super().forward(x))

    plain, treated = both(Twice, policy, tmp_path)
    for _ in range(2):
        values = []
        for model in (plain, treated):
            model.zero_grad()
            with parametrize.cached():
                loss = model(X).square().mean()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            values.append([p.grad.clone() for p in model.parameters()])
        assert same(*values)


# ---------------------------------------------------------------- attributes


class Remembers(nn.Module):
    """Puts a loss into an attribute, and looks at a gradient in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.middle = h = self.up(x).tanh()
        h.retain_grad()
        self.loss = h.square().mean()
        return x + self.down(h)


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_attributes_are_those_of_the_forward_after_backward(policy: str, tmp_path: Path) -> None:
    plain, treated = both(Remembers, policy, tmp_path)
    for _ in range(2):
        values = []
        for model in (plain, treated):
            model.zero_grad()
            loss = model(X).square().mean() + torch.stack([block.loss for block in model]).sum()
            left = [(block.middle, block.loss) for block in model]
            loss.backward()
            now = [(block.middle, block.loss) for block in model]
            assert all(a is b for pair in zip(left, now, strict=True) for a, b in zip(*pair, strict=True))
            values.append([block.middle.grad for block in model] + [p.grad for p in model.parameters()])
        assert same(*values)


class Balances(Remembers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        self.loss = h.square().mean()
        return x + self.down(h)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_an_attribute_holds_no_recomputed_block(policy: str, tmp_path: Path) -> None:
    _, model = both(Balances, policy, tmp_path)
    x = torch.randn(64, WIDTH)
    step(model, x)
    model.zero_grad(set_to_none=False)
    with LiveBytes() as live:
        loss = model(x).square().mean() + torch.stack([block.loss for block in model]).sum()
        loss.backward()
        del loss
        gc.collect()
    assert live.live < x.nbytes  # gradients were there before; one block's `up` alone is four times x


# ---------------------------------------------------------------- other generators


class DrawsOwn(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh() * (torch.rand(x.shape, generator=self.generator) < 0.5)


class DrawsPython(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh() * random.uniform(0, 2)


class DrawsNumpy(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh() * np.random.uniform(0, 2)


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
@pytest.mark.parametrize("block", [DrawsOwn, DrawsPython, DrawsNumpy])
def test_random_numbers_of_other_generators(block: type[Layer], policy: str, tmp_path: Path) -> None:
    plain, treated = both(block, policy, tmp_path)
    values: list[Values] = []
    for model in (plain, treated):
        random.seed(1)
        np.random.seed(1)
        found = []
        for seed in range(surroundings.WATCHED):
            found += step(model, X, seed, forwards=2)
        values.append([*found, torch.tensor([random.random(), np.random.random()])])
    assert same(*values)


def test_a_generator_that_is_an_argument() -> None:
    class Draws(Layer):
        def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]
            return x + self.linear(x).tanh() * torch.rand(x.shape, generator=generator)

    torch.manual_seed(0)
    plain = nn.ModuleList(Draws() for _ in range(2))
    treated = copy.deepcopy(plain)
    distlib.checkpoint_activations(treated, "full")
    values = []
    for blocks in (plain, treated):
        generator, x = torch.Generator().manual_seed(1), X
        for block in blocks:
            x = block(x, generator)
        x.square().sum().backward()
        values.append([*[p.grad for p in blocks.parameters()], torch.rand(1, generator=generator)])
    assert same(*values)


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_vmap_and_jvp(policy: str, trained: bool, tmp_path: Path) -> None:
    """trained: after a step, or before the first one."""
    plain, treated = both(Layer, policy, tmp_path)
    values = []
    for model in (plain, treated):
        if trained:
            step(model, X)
        mapped = torch.func.vmap(model)(X[:, None])
        values.append([mapped, *torch.func.jvp(model, (X,), (torch.ones_like(X),))])
    assert same(*values)
    assert same(step(plain, X), step(treated, X))
    assert treated[0].forward.record.baseline > 0


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_a_loss_of_forward_derivatives(policy: str, tmp_path: Path) -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first, second, third = self.layers
            return x + third(second(first(x).tanh()).tanh())

    values = []
    for model in both(Square, policy, tmp_path):
        for _ in range(2):
            model.zero_grad()
            with torch.autograd.forward_ad.dual_level():
                y = model(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
                value, tangent = torch.autograd.forward_ad.unpack_dual(y)
                (value.square().mean() + tangent.square().mean()).backward()
        values.append([p.grad for p in model.parameters()])
    assert same(*values)

"""What a recomputation finds where something was changed since the forward: modes, attributes of modules, objects among
the arguments, and which parameters are trained."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from activation_models import WIDTH, Values, same
from torch import Tensor, nn

import distlib

POLICIES = ("full", "selective", "offload")
X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:the activation setting")


def both(make: Callable[[], nn.Module], policy: str, folder: Any) -> tuple[nn.Module, nn.Module]:
    """Three blocks, and three of the same that are treated."""
    models = []
    for treated in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[make() for _ in range(3)])
        if treated:
            options = {"folder": folder, "resident": 0} if policy == "offload" else {}
            distlib.checkpoint_activations(model, policy, **options)
        models.append(model)
    return models[0], models[1]


def stepped(model: nn.Module, before: Callable[[Any], None], between: Callable[[Any], None], steps: int = 2) -> Values:
    """Losses and gradients. before, between: what is done to the blocks before the forward, and before backward."""
    found = []
    torch.manual_seed(5)
    for _ in range(steps):
        model.zero_grad()
        before(model)
        loss = model(X).square().mean()
        between(model)
        loss.backward()
        found += [loss.detach(), *[torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]]
    return found


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(self.linear(x).tanh())


# ---------------------------------------------------------------- which parameters are trained


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_parameters_that_are_frozen_or_freed_between_forward_and_backward(
    policy: str, trained: bool, tmp_path: Any
) -> None:
    """As a discriminator's are, while the generator runs forward."""

    def turn(model: nn.Sequential, to: bool) -> None:
        for block in model[1:]:
            block.linear.requires_grad_(to)

    plain, treated = both(Layer, policy, tmp_path)
    values = [stepped(m, lambda m: turn(m, trained), lambda m: turn(m, not trained)) for m in (plain, treated)]
    assert same(*values)
    assert all(block.linear.weight.requires_grad == (not trained) for block in treated[1:])  # as it was left


# ---------------------------------------------------------------- modes


class Drops(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(self.drop(self.linear(x)))


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_another_mode_of_a_part_is_refused_by_name(policy: str, tmp_path: Any) -> None:
    _, model = both(Drops, policy, tmp_path)
    loss = model(X).sum()
    model[2].drop[1].eval()
    with pytest.raises(
        RuntimeError,
        match=r"block '2' ran its forward under train\(\) .* under eval\(\) of its part 'drop.1': .* before .eval\(\)",
    ):
        loss.backward()
    model[2].drop[1].train()
    loss.backward()


# ---------------------------------------------------------------- attributes


class Scales(Layer):
    """Numbers, texts and tensors that hang in the block and its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.by, self.shift, self.act = 2.0, torch.ones(WIDTH), "tanh"
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = getattr(self.drop(self.linear(x)) * self.by + self.shift, self.act)()
        return x + self.other(h)


@pytest.mark.parametrize("policy", POLICIES)
def test_attributes_that_are_replaced_between_forward_and_backward(policy: str, tmp_path: Any) -> None:
    def before(model: nn.Module) -> None:
        for block in model:
            block.by, block.shift, block.act, block.drop.p = 2.0, torch.ones(WIDTH), "tanh", 0.5

    def between(model: nn.Module) -> None:
        for block in model:
            block.by, block.shift, block.act, block.drop.p = -1.0, torch.zeros(WIDTH), "sin", 0.1

    plain, treated = both(Scales, policy, tmp_path)
    assert same(*[stepped(model, before, between) for model in (plain, treated)])
    assert [(block.by, block.act, block.drop.p) for block in treated] == [(-1.0, "sin", 0.1)] * 3


class Stateful(Layer):
    """Its state is of the forward before; it counts its forwards, and remembers what is large in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.pair = torch.zeros(len(X), WIDTH), (torch.zeros(()), 0)
        self.n = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        if not hasattr(self, "first"):
            self.first = self.linear(x).detach()
        y = (self.linear(x) + self.other(self.state) + self.pair[0] / self.n).tanh() * self.first
        self.state, self.pair = y.detach(), (y.detach().mean(), self.n)
        return y


@pytest.mark.parametrize("policy", POLICIES)
def test_attributes_that_the_forward_itself_replaces(policy: str, tmp_path: Any) -> None:
    def nothing(_: nn.Module) -> None:
        pass

    plain, treated = both(Stateful, policy, tmp_path)
    assert same(*[stepped(model, nothing, nothing, steps=3) for model in (plain, treated)])
    for one, other in zip(plain, treated, strict=True):
        assert other.n == one.n == 3 and other.pair[1] == 3
        assert torch.equal(one.state, other.state) and torch.equal(one.pair[0], other.pair[0])


class Balances(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh()
        self.loss = h.square().mean()
        return x + self.other(h)


def test_forwards_without_a_backward_hold_none_before_them(tmp_path: Any) -> None:
    _, model = both(Balances, "full", tmp_path)
    model(X)
    first = weakref.ref(model[0].loss)
    gc.disable()
    try:
        model(X)
        assert first() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- objects among the arguments


class State:
    def __init__(self, h: Tensor) -> None:
        self.h, self.seen = h, [h]

    def __getitem__(self, key: str) -> Tensor:
        return getattr(self, key)

    def __setitem__(self, key: str, value: Tensor) -> None:
        setattr(self, key, value)


@dataclass
class Data(State):
    h: Tensor


class Items(dict):
    pass


class Threads(Layer):
    """Reads an object that all blocks share; `sets`: and writes it itself."""

    def __init__(self, sets: bool) -> None:
        super().__init__()
        self.sets = sets

    def forward(self, state: Any) -> Tensor:  # type: ignore[override]
        h = super().forward(state["h"]) + (state.seen[-1] * len(state.seen) if hasattr(state, "seen") else 0)
        if self.sets:
            state["h"] = h
        if hasattr(state, "seen"):
            state.seen.append(h.detach())
        return h


STATES: dict[str, Callable[[Tensor], Any]] = {
    "object": State,
    "dataclass": lambda h: Data(h),
    "subclass of dict": lambda h: Items(h=h),
    "OrderedDict": lambda h: OrderedDict(h=h),
    "UserDict": lambda h: UserDict(h=h),
}


@pytest.mark.parametrize("sets", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", STATES)
def test_an_object_that_later_blocks_or_the_caller_change(name: str, policy: str, sets: bool, tmp_path: Any) -> None:
    values = []
    for model in both(lambda: Threads(sets), policy, tmp_path):
        for _ in range(2):
            model.zero_grad()
            state = STATES[name](X)
            for block in model:
                state["h"] = block(state)
            loss = state["h"].square().mean()
            seen = list(getattr(state, "seen", []))
            loss.backward(retain_graph=True)
            loss.backward()  # from the same copies as the first
            assert len(getattr(state, "seen", [])) == len(seen)
        values.append([loss.detach(), *[p.grad for p in model.parameters()]])
    assert same(*values)

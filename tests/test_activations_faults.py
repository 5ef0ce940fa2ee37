"""What others write, what fails, and what cannot be treated: noticed, freed and said by name."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from activation_models import WIDTH, same, step
from torch import Tensor, nn

import distlib
from distlib.activations.offload import Moved

X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:the activation setting")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("by", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.by).tanh()


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer() for _ in range(3)])


# ---------------------------------------------------------------- what others write


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_buffer_that_backward_needs_and_others_write(policy: str) -> None:
    """Plain autograd refuses it; the recomputation has a copy of what it held."""
    expected = step(layers(), X)
    model = layers()
    distlib.checkpoint_activations(model, policy)
    torch.manual_seed(5)
    loss = model(X).square().mean()
    for block in model:
        block.by.mul_(3)
    loss.backward()
    assert same([p.grad for p in model.parameters()], expected[1:-4])
    assert all(torch.equal(block.by, torch.full((WIDTH,), 3.0)) for block in model)


class Views(Layer):
    """Of its buffers one is a view of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("both", torch.ones(2, WIDTH))
        self.register_buffer("first", self.both[0])

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        self.both[0].add_(0.1)
        return (h * self.first.clone()).tanh()


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_buffers_that_are_views_of_each_other(policy: str) -> None:
    values = []
    for treated in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Views(), Views())
        if treated:
            distlib.checkpoint_activations(model, policy)
        values.append([value for seed in range(2) for value in step(model, X, seed, forwards=2)])
    assert same(*values)


@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize("what", ["buffer", "parameter", "input"])
@pytest.mark.parametrize("resident", [0, 2])
def test_versions_of_what_stays_are_checked(what: str, resident: int, first_step: bool, tmp_path: Path) -> None:
    """By autograd's own rules, in the step that counts bytes, too. Two blocks stay, or all move their tensors."""
    model = layers()
    distlib.checkpoint_activations(model, "offload", folder=tmp_path, resident=resident)
    if not first_step:
        step(model, X)
    x = X.clone()
    loss = model(x).square().mean()
    with torch.no_grad():
        {"buffer": model[0].by, "parameter": model[1].linear.weight, "input": x}[what].mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- what fails


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_failed_store_holds_no_graph(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlib.activations.offload.SMALLEST", 1)
    model = layers()
    distlib.checkpoint_activations(model, "offload", folder=tmp_path, resident=0)
    for _ in range(2):
        step(model, X)

    def fails(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(RuntimeError, match="No space left on device") as caught:
            step(model, X)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.__traceback__ is None
    del caught
    gc.collect()
    model[0].forward.setting.offloader._stores[torch.device("cpu")]._pool.submit(int).result()  # the worker is idle
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, Moved)]


def test_a_relative_folder_is_the_one_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distlib.activations.offload.SMALLEST", 1)
    model = layers()
    distlib.checkpoint_activations(model, "offload", folder="here", resident=0)
    assert model[0].forward.setting.offloader.folder == tmp_path / "here"
    monkeypatch.chdir("/")
    (tmp_path / "here").rmdir()  # the file has no name there
    assert same(step(model, X), step(layers(), X))


# ---------------------------------------------------------------- measuring


class Draws(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        drawn = random.random() + np.random.rand()
        return super().forward(x) * torch.rand(x.shape, generator=self.generator) * drawn


@pytest.mark.parametrize("options", [{"policy": "full"}, {"budget": 0.5}])
def test_measuring_advances_no_generator(options: dict[str, Any]) -> None:
    model = nn.Sequential(Draws(), Draws())
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), model[0].generator.get_state().tolist()
    distlib.checkpoint_activations(model, example_inputs=X, **options)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), model[0].generator.get_state().tolist())


class Expanded(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.ones(1, WIDTH).expand(len(X), WIDTH))


@pytest.mark.parametrize("options", [{"policy": "full"}, {"budget": 0.0}])
def test_an_expanded_buffer(options: dict[str, Any]) -> None:
    model = nn.Sequential(Expanded(), Expanded())
    distlib.checkpoint_activations(model, example_inputs=X, **options)
    assert model[0].by.stride() == (0, 1) and torch.equal(model[0].by, torch.ones(len(X), WIDTH))
    step(model, X)


class Windows(nn.Module):
    """Attention within windows: its memory is told by an attribute only."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self.qkv = window, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, self.window, 3, WIDTH).unbind(2)
        return x + ((q @ k.transpose(1, 2)).softmax(-1) @ v).flatten(0, 1)


class Acts(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(WIDTH, WIDTH), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.up(x))


@pytest.mark.parametrize(
    "blocks",
    [
        lambda: [Windows(16 if i % 2 else 256) for i in range(4)],
        lambda: [Windows(256 if i % 2 else 16) for i in range(4)],
        lambda: [Acts(nn.Identity() if i < 2 else nn.Sequential(nn.Tanh(), nn.GELU(), nn.SiLU())) for i in range(4)],
    ],
)
def test_unlike_blocks_are_measured_apart(blocks: Any) -> None:
    model, x = nn.Sequential(*blocks()), torch.randn(256, WIDTH)
    report = distlib.checkpoint_activations(model, budget=0.5, example_inputs=x, loss=lambda y: y.square().mean())
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=False)
    with report.measuring():
        model(x).square().mean().backward()
    assert report.measured_peak <= 1.02 * report.budget


# ---------------------------------------------------------------- what cannot be treated


def test_lazy_blocks_are_refused_with_a_hint() -> None:
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyLinear(WIDTH))
    with pytest.raises(ValueError, match=r"block '0' has lazy parameters .*: run a forward of the module before"):
        distlib.checkpoint_activations(model)
    model(X)
    distlib.checkpoint_activations(model)


def test_remove_takes_back_all_blocks_or_none() -> None:
    model = layers()
    report = distlib.checkpoint_activations(model)
    inner = model[1].forward
    model[1].forward = lambda x: inner(x)
    with pytest.raises(RuntimeError, match="block '1': its forward was wrapped again since: undo that first"):
        report.remove()
    assert "forward" in model[0].__dict__
    model[1].forward = inner
    report.remove()
    assert not any("forward" in block.__dict__ for block in model)


def test_numpy_with_another_generator() -> None:
    state = np.random.get_state(legacy=False)
    bits = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        model = nn.Sequential(Draws(), Draws())
        distlib.checkpoint_activations(model, "full")
        step(model, X)
    finally:
        np.random.set_bit_generator(bits)
        np.random.set_state(state)

"""What others write, what fails, and what cannot be treated: noticed, freed and said by name."""

from __future__ import annotations

import gc
import os
import random
from dataclasses import dataclass
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


@pytest.mark.parametrize("operation", ["MT19937", "PCG64", "Philox", "SFC64"])
def test_numbers_of_any_generator_of_numpy(operation: str) -> None:
    bits = np.random.get_bit_generator()
    values = []
    try:
        for treated in (False, True):
            np.random.set_bit_generator(getattr(np.random, operation)(3))
            torch.manual_seed(0)
            random.seed(1)
            model = nn.Sequential(Draws(), Draws())
            if treated:
                distlib.checkpoint_activations(model, "full")
            values.append([*step(model, X), torch.tensor(np.random.rand())])
    finally:
        np.random.set_bit_generator(bits)
    assert same(*values)


aten = torch.ops.aten


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": aten.addmm.default}, r"policy=<OpOverload.*> is no collection: pass a set, {torch.ops"),
        ({"policy": aten.addmm}, "is no collection"),
        ({"policy": nn.Linear}, "is no collection"),
        ({"policy": {aten.tanh_.default}}, "policy has aten.tanh_.default, which writes to its arguments"),
        ({"policy": {aten.view.default}}, "policy has aten.view.default, which returns a view"),
        ({"policy": {aten._to_copy.default}}, "policy has aten._to_copy.default, which casts or copies"),
        ({"policy": {aten.matmul.default}}, "policy has aten.matmul.default, which is made of other operations"),
        ({"blocks": Layer}, r"blocks=<class .*Layer'>: must be a list of module classes, as blocks=\[MyBlock\]"),
        ({"blocks": None}, "blocks=None: must be a list of module classes"),
        ({"policy": "offload", "folder": ".", "resident": "1"}, "resident='1': a number of blocks"),
        ({"policy": "offload", "folder": ".", "resident": 0.5}, "resident=0.5: a number of blocks"),
        ({"budget": 0.5, "example_inputs": X, "loss": lambda y: None}, "loss= returns None: it must be one number"),
        ({"budget": 0.5, "example_inputs": X, "loss": lambda y: 1.5}, "loss= returns 1.5: it must be one number"),
        ({"budget": 0.5, "example_inputs": X, "loss": lambda y: y}, r"loss= returns a tensor of shape \[8, 64\]"),
    ],
)
def test_options_that_are_no_such_thing_are_refused(options: dict[str, Any], message: str) -> None:
    model = layers()
    with pytest.raises(ValueError, match=message):
        distlib.checkpoint_activations(model, **options)
    assert not any("forward" in block.__dict__ for block in model)


# ---------------------------------------------------------------- outputs that are no tensors


def test_copies_of_buffers_count_as_kept() -> None:
    """Of an input and a buffer of one row, in each of three blocks."""
    model = layers()
    report = distlib.checkpoint_activations(model, "full")
    step(model, X)
    assert report.kept_bytes == 3 * (X.nbytes + model[0].by.nbytes)


def test_a_frozen_module_with_example_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="example_inputs: no block has a parameter or an input with a gradient"):
        distlib.checkpoint_activations(layers().requires_grad_(False), example_inputs=X)


@dataclass
class Hidden:
    h: Tensor
    extra: object = None


class Wraps(nn.Module):
    """Gets and returns a dataclass, a subclass of dict, or a tensor."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, state: Any) -> Any:
        h = state if isinstance(state, Tensor) else state["h"] if isinstance(state, dict) else state.h
        return self.kind(h + self.down(self.up(h).tanh()))


class Bag(dict):
    pass


@pytest.mark.parametrize("kind", [Hidden, lambda h: Bag(h=h)])
def test_bytes_of_blocks_that_return_objects(kind: Any) -> None:
    saved = []
    for made in (kind, lambda h: h):
        blocks = nn.ModuleList(Wraps(made) for _ in range(3))
        report = distlib.checkpoint_activations(blocks, "full")
        state = made(X.clone().requires_grad_())
        for block in blocks:
            state = block(state)
        loss = state["h"] if isinstance(state, dict) else getattr(state, "h", state)
        loss.square().mean().backward()
        saved.append(report.baseline_bytes)
    assert saved[0] == saved[1] > 0


class Threaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wraps(Hidden) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state = Hidden(x)
        for block in self.blocks:
            state = block(state)
        return state.h


def test_a_budget_for_blocks_that_are_given_objects_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"block 'blocks.0' is given tensors in a dataclass or mapping.*policy="):
        distlib.checkpoint_activations(Threaded(), budget=0.5, example_inputs=X)

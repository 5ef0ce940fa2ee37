"""Several micro-batches under way at once, as in a stage of a pipeline, and the plain module beside them.

F0 F1 F2 B0 F3 B1 W0 ...      F: forward   B, W: the two passes of a backward   A: a whole backward
G ... R                       G: hold, R: release
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distlib
from distlib.pipeline.split_backward import WeightQueue

WIDTH = 8
WHOLE = "F0 F1 F2 A0 F3 A1 A2 A3"
SPLIT = "F0 F1 F2 B0 F3 W0 B1 B2 B3 W1 W2 W3"  # before W2 and W3 comes no input pass of their own


class Layer(nn.Module):
    """A norm lands in the input pass, Linears in the weight pass; `mix` there too, by a walk over the graph that reads
    it, where it is not freed before."""

    def __init__(self, remade: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 11)
        self.down = nn.Linear(11, WIDTH, bias=False)
        self.mix = nn.Parameter(torch.eye(WIDTH) + 0.1)
        self.remade = remade
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.body, x, use_reentrant=False) if self.remade else self.body(x))

    def body(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.down(torch.tanh(self.up(self.norm(x)))) @ (self.mix * self.mix)


class StageNet(nn.Module):
    """Layers that are units, and a root with a frozen part."""

    def __init__(self, remade: bool = False, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(remade) for _ in range(layers))
        self.fixed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x + self.fixed(x))


class Tied(StageNet):
    """Weights shared within the stage: of two layers, and of a Linear that is also used past its call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].up.weight = self.layers[0].up.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(self.first(x)), self.first.weight)


class Outer(StageNet):
    """Every layer is a checkpoint, made outside of the unit."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.norm(x + self.fixed(x))


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def data(step: int, k: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The input of a micro-batch, as it comes from the stage before."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * k + rank)
    return torch.randn(3, WIDTH, generator=generator).to(dtype).requires_grad_()


def grads_of(output: Tensor, k: int) -> Tensor:
    """What the stage after sends back."""
    return torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype) / (k + 1)


def plain_step(plain: nn.Module, step: int, n: int, micro_batches: int = 4) -> dict[tuple[int, int], Tensor]:
    """The oracle: micro-batches of all ranks one after the other. Gradients of inputs by (rank, micro-batch)."""
    found = {}
    for r in range(n):
        for k in range(micro_batches):
            x = data(step, k, r, next(plain.parameters()).dtype)
            output = plain(x)
            output.backward(grads_of(output, k) / n)
            assert x.grad is not None
            found[r, k] = x.grad * n
    return found


class Driver:
    """Runs the actions of one model as a pipeline's runtime does. Gradients of inputs in `inputs`, by micro-batch.

    model: in a wrapper; its `report` is that of its split backward.
    """

    def __init__(self, model: Any, rank: int, step: int, micro_batches: int = 4, scale: float = 1.0) -> None:
        self.model, self.rank, self.step, self.scale = model, rank, step, scale
        self.left = micro_batches
        self.last = f"F{micro_batches - 1}"
        self.flying: dict[int, tuple[Tensor, Tensor]] = {}
        self.queues: dict[int, WeightQueue] = {}
        self.inputs: dict[int, Tensor] = {}

    def do(self, action: str) -> None:
        kind, k = action[0], int(action[1:] or 0)
        if kind in "GR":
            self.held = self.model.hold() if kind == "G" else self.model.release()
            return
        self.left -= kind in "AW"
        last = action == self.last or (kind in "AW" and not self.left)
        with contextlib.nullcontext() if last else self.model.no_sync():
            self._pass(kind, k)

    def _pass(self, kind: str, k: int) -> None:
        if kind == "F":
            x = data(self.step, k, self.rank, next(self.model.module.parameters()).dtype)
            self.flying[k] = x, self.model(x * 1)
            return
        if kind == "W":
            with self.model.weight_backward():
                self.queues.pop(k).run()
            return
        x, output = self.flying.pop(k)
        gradient = grads_of(output, k) * self.scale
        if kind == "B":
            self.queues[k] = WeightQueue(self.model.report)
            with self.model.partial_backward():
                self.queues[k].backward(output, gradient)
        else:
            output.backward(gradient)
        assert x.grad is not None
        self.inputs[k] = x.grad


def play(model: Any, order: str, rank: int, step: int, scale: float = 1.0) -> dict[int, Tensor]:
    """One step. Returns the gradients of inputs, by micro-batch."""
    driver = Driver(model, rank, step, scale=scale)
    for action in order.split():
        driver.do(action)
    return driver.inputs


def any_order(rng: random.Random, micro_batches: int = 4) -> list[str]:
    """A random order of one stage: each kind in its order, each micro-batch F, then B and W or A."""
    split = [rng.random() < 0.7 for _ in range(micro_batches)]
    lines = [[f"F{k}" for k in range(micro_batches)], [f"{'B' if s else 'A'}{k}" for k, s in enumerate(split)]]
    lines.append([f"W{k}" for k, s in enumerate(split) if s])
    order: list[str] = []
    while any(lines):
        ready = [line for line in lines if line and _may_run(line[0], order)]
        order.append(rng.choice(ready).pop(0))
    if rng.random() < 0.5:
        order.insert(rng.randrange(len(order)), "G")
        order.append("R")
    return order


def _may_run(action: str, done: Sequence[str]) -> bool:
    before = {"F": None, "B": "F", "A": "F", "W": "B"}[action[0]]
    return before is None or before + action[1:] in done


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Of all parameters, by name; copies."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients(want: dict[str, Tensor | None], model: Any, what: object, rtol: float = 1e-9) -> None:
    """This rank's gradients are its parts of the wanted ones."""
    for (name, expected), piece in zip(want.items(), model.parameters(), strict=True):
        assert (expected is None) == (piece.grad is None), (what, name)
        if expected is None or piece.grad is None:
            continue
        have, part = piece.grad.reshape(-1), expected.reshape(-1).to(piece.grad.dtype)
        shard = distlib.shards.shard_of(piece)
        if shard is not None:
            part = part[shard.offset : shard.offset + shard.numel]
        assert torch.allclose(have, part, rtol=rtol, atol=rtol / 10), f"{what}, {name}: {have} is not {part}"

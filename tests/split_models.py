"""Modules, and inputs for them, on which a backward in two passes is compared with one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lm.model import GPT
from torch import nn
from torch.nn import functional


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular")
        self.two = nn.Conv2d(1, 6, 3, stride=2, dilation=2, padding=2, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, padding="same")
        self.three = nn.Conv3d(1, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.one(x))
        x = self.act(self.two(x[:, None]) if x.dim() == 3 else self.two(x[None]))
        x = self.grouped(x)
        return self.three(x.unsqueeze(-4) if x.dim() == 3 else x[:, None])


class Twice(nn.Module):
    """One Linear used three times, an in-place activation, a scale of its own, 1-D and 4-D inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.full((6,), 1.5))
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x).relu_()
        return self.out(self.inner(self.norm(self.inner(x) * self.scale)))


class Bare(nn.Module):
    """Weights that no Linear holds, one of them behind a norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(width, width) / 4)
        self.b = nn.Parameter(torch.randn(width, 2 * width) / 4)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x @ self.a, x.shape[-1:], self.gain).tanh() @ self.b


class OwnLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight * 2, self.bias)


class Dense(nn.Linear):
    """A subclass without a forward of its own."""


def tokens(batch: int = 2, length: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def values(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "gpt": (lambda: GPT(2, 16, 2), lambda seed: tokens(seed=seed)),
    "gpt, tied": (lambda: GPT(2, 16, 2, tied=True), lambda seed: tokens(seed=seed)),
    "convolutions": (Convs, lambda seed: values(2, 3, 16, seed=seed)),
    "convolutions, no batch": (Convs, lambda seed: values(3, 16, seed=seed)),
    "used twice": (Twice, lambda seed: values(5, 6, seed=seed)),
    "used twice, 1-D": (Twice, lambda seed: values(6, seed=seed)),
    "used twice, 4-D": (Twice, lambda seed: values(2, 3, 4, 6, seed=seed)),
    "strided input": (Twice, lambda seed: values(4, 6, 5, seed=seed).transpose(1, 2)),
    "input without gradient": (Twice, lambda seed: values(5, 6, seed=seed, grad=False)),
    "embedding options": (
        lambda: nn.Sequential(nn.Embedding(256, 6, padding_idx=3, scale_grad_by_freq=True), Dense(6, 2)),
        lambda seed: tokens(seed=seed) % 8,
    ),
    "sparse embedding": (lambda: nn.Embedding(256, 6, sparse=True), lambda seed: tokens(seed=seed)),
    "bare weights": (Bare, lambda seed: values(2, 5, 8, seed=seed)),
    "own forward": (lambda: nn.Sequential(nn.Linear(8, 8), OwnLinear(8, 8)), lambda seed: values(5, 8, seed=seed)),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4)),
        lambda seed: values(5, 8, seed=seed),
    ),
}

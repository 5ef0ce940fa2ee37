"""Models that a pipeline must train as one process does, and how one process trains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 12


class Residual(nn.Module):
    """x + up(act(down(x))), with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.up(self.dropout(functional.gelu(self.down(self.norm(x)))))
        return x + (y if scale is None else y * scale)


class Language(nn.Module):
    """Tokens in, logits out: embedding and head tied or not, positions of its own, dropout in the glue."""

    def __init__(self, layers: int, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(32, WIDTH))
        self.blocks = nn.ModuleList(Residual(dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 29, bias=False)
        self.dropout = dropout
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        x = functional.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Skips(nn.Module):
    """A U shape: what goes down is added on the way up, across stages. Two inputs, one by keyword; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Residual() for _ in range(6))
        self.last = nn.Linear(WIDTH, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, mask: Tensor, power: float = 1.0) -> dict[str, Tensor]:
        scale = mask.to(x.dtype).unsqueeze(-1) ** power
        x = self.first(x)
        down = []
        for block in self.blocks[:3]:
            x = block(x, scale)
            down.append(x)
        for block in self.blocks[3:]:
            x = block(x + down.pop(), scale)
        return {"y": self.last(x), "early": down[0].mean(-1) if down else x.mean(-1), "mask": mask}


class Shared(nn.Module):
    """One block called again and again: wherever the model is cut, its weights lie on several stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.block, self.other = Residual(), Residual()
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.other(self.block(x))
        return self.last(x)


@dataclass(frozen=True)
class Case:
    """model: makes one, after torch.manual_seed(0). inputs, target: of a batch of so many rows and a step's number."""

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[Any, Any]]
    loss: Callable[[Any, Any], Tensor]

    def made(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model()


def _numbers(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


def _tokens(rows: int, step: int, length: int = 7) -> tuple[Tensor, Tensor]:
    """Counting up by 1, 2 or 3 from anywhere: something to learn."""
    first = torch.randint(29, (rows, 1), generator=_numbers(step))
    by = torch.randint(1, 4, (rows, 1), generator=_numbers(step))
    tokens = (first + by * torch.arange(length + 1)) % 29
    return tokens[:, :-1], tokens[:, 1:]


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def _masked(rows: int, step: int) -> tuple[dict[str, Any], Tensor]:
    numbers = _numbers(step)
    x = torch.randn(rows, 5, 6, generator=numbers)
    mask = torch.rand(rows, 5, generator=numbers) < 0.7
    return {"x": x, "mask": mask, "power": 1.0}, torch.randn(rows, 5, 3, generator=numbers)


def _masked_loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return functional.mse_loss(output["y"], target) + 0.1 * output["early"].square().mean()


def _plain(rows: int, step: int) -> tuple[Tensor, Tensor]:
    numbers = _numbers(step)
    return torch.randn(rows, 6, generator=numbers), torch.randn(rows, 3, generator=numbers)


CASES = {
    "language": Case(lambda: Language(6), _tokens, _cross_entropy),
    "tied": Case(lambda: Language(6, tied=True), _tokens, _cross_entropy),
    "dropout": Case(lambda: Language(6, dropout=0.3), _tokens, _cross_entropy),
    "lengths": Case(lambda: Language(6), lambda rows, step: _tokens(rows, step, 5 + step), _cross_entropy),
    "skips": Case(Skips, _masked, _masked_loss),
    "shared": Case(Shared, _plain, functional.mse_loss),
}


def reference_step(
    model: nn.Module, case: Case, rows: int, step: int, micro_batches: int, train: bool = True
) -> Tensor:
    """The loss of a batch, and its gradients, on one process: micro-batches one after the other."""
    from distlib.pipeline.micro_batches import divide
    from distlib.pipeline.random import micro_batch_seeds

    inputs, target = case.batch(rows, step)
    batches = divide(inputs, target, micro_batches)
    total = torch.zeros(())
    for seed, batch in zip(micro_batch_seeds(len(batches)), batches, strict=True):
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(train):
            torch.manual_seed(seed)
            loss = case.loss(model(*batch.args, **batch.kwargs), batch.target) * batch.share
        if train:
            loss.backward()
        total += loss.detach()
    return total

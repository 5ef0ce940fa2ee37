"""Models and steps that the tests of sharding share, and the single process that they are compared with."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Odd sizes: nothing divides evenly."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """A language model in miniature: embedding tied to the head, repeated blocks, a frozen part, a buffer."""

    def __init__(self, tied: bool = True, blocks: int = 3, width: int = 13, hidden: int = 29) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.fixed = nn.Linear(width, width).requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 17, bias=False)
        self.scalar = nn.Parameter(torch.ones(()))
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((width,), 0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x + self.fixed(x) * self.scale) * self.scalar)


def tiny(seed: int = 0, **options: object) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(**options)  # type: ignore[arg-type]


def batch_of(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step: `size` sequences."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(17, (size, 8), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def part_of(step: int, rank: int, n: int, each: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of it."""
    inputs, targets = batch_of(step, n * each)
    return inputs[rank * each : (rank + 1) * each], targets[rank * each : (rank + 1) * each]


def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


def summed(values: list[torch.Tensor]) -> list[float]:
    """Scalars, each summed over all ranks. Every rank must call it."""
    all_of_them = torch.stack(values)
    dist.all_reduce(all_of_them)
    return all_of_them.tolist()


def adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1, foreach=False)  # type: ignore[arg-type]


def alone(n: int, steps: int, clip: float | None = None, micro_steps: int = 1, each: int = 2, **options: object):
    """The oracle: one process on the whole batch. Returns losses, norms and the weights."""
    model = tiny(**options)
    optimizer = adamw(model.parameters())
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for micro in range(micro_steps):
            loss = loss_of(model, *batch_of(step * micro_steps + micro, n * each)) / micro_steps
            loss.backward()
            total += loss.item()
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, {name: p.detach().clone() for name, p in model.state_dict().items()}

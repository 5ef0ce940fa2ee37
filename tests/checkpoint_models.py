"""Models cut into hand-made shards by plain arithmetic, with contents that name themselves: for tests of checkpoints.

Every element of every saved tensor is a known function of the tensor's name and the element's place, so that a test
can tell what must be where in any layout, without having trained.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from distlib.shards import Shard, mark


class Toy(nn.Module):
    """Sizes that nothing divides, a tied pair, a frozen parameter, a scalar, an empty one, buffers, mixed dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 5)
        self.stack = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5, bias=False))
        self.head = nn.Linear(5, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.kernel = nn.Parameter(torch.zeros(3, 2, 3, 5))
        self.scale = nn.Parameter(torch.zeros(()))
        self.one = nn.Parameter(torch.zeros(1))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.low = nn.Parameter(torch.zeros(11, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


@dataclass(frozen=True)
class Layout:
    """How n ranks hold the model. kind: "uneven" pieces in partition groups of p, "owner" (whole, in turn), "plain"."""

    n: int
    kind: str = "uneven"
    p: int = 0

    def piece(self, number: int, numel: int, rank: int) -> tuple[int, int]:
        """Offset and numel of this rank's piece of the number-th parameter."""
        parts = self.p or self.n
        part = rank % parts
        if self.kind == "owner":
            return (0, numel) if number % parts == part else (0, 0)
        weights = [1 + (number + i) % 3 for i in range(parts)]
        places = [numel * sum(weights[:i]) // sum(weights) for i in range(parts + 1)]
        return places[part], places[part + 1] - places[part]


def content(name: str, shape: Any, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """What the saved tensor `name` holds."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(100, tuple(shape), generator=generator).to(dtype)


def build(layout: Layout, rank: int, seed: int | None = 0) -> nn.Module:
    """The Toy as `rank` holds it; filled with its contents, or (seed None) with zeros."""
    model = Toy()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(content(name, tensor.shape, tensor.dtype, seed)) if seed is not None else tensor.zero_()
    return model if layout.kind == "plain" else cut(model, layout, rank)


def cut(model: nn.Module, layout: Layout, rank: int) -> nn.Module:
    """Replaces every parameter by this rank's piece."""
    made: dict[int, nn.Parameter] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in list(model.modules()):
        for key, whole in list(module._parameters.items()):
            if whole is None:
                continue
            if id(whole) not in made:
                offset, numel = layout.piece(len(made), whole.numel(), rank)
                data = whole.detach().reshape(-1)[offset : offset + numel].clone()
                if layout.kind == "owner" and numel == whole.numel() > 0:
                    data = data.view(whole.shape)
                piece = made[id(whole)] = nn.Parameter(data, requires_grad=whole.requires_grad)
                parts = layout.p or layout.n
                shard = Shard(
                    names[id(whole)],
                    whole.shape,
                    offset,
                    numel,
                    SimpleNamespace(rank=rank % parts),  # type: ignore[arg-type]
                    None,
                    rank // parts,
                    layout.n // parts,  # type: ignore[arg-type]
                )
                mark(piece, shard)
            module._parameters[key] = made[id(whole)]
    return model


def adamw(model: nn.Module, rank: int, seed: int | None = 0, lr: float = 0.25) -> torch.optim.AdamW:
    """AdamW in two groups; its state filled with contents, or (seed None) not there yet."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "stack" in name], "weight_decay": 0.5},
        {"params": [p for name, p in trained if "stack" not in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    if seed is not None:
        for name, p in trained:
            optimizer.state[p] = {"step": torch.tensor(float(len(name)))}
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][key] = piece_of(f"{name}.{key}", p, torch.float32, seed)
    return optimizer


def piece_of(name: str, parameter: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """This rank's elements of the saved tensor `name`, which has the parameter's geometry."""
    shard = getattr(parameter, "_distlib_shard", None)
    if shard is None:
        return content(name, parameter.shape, dtype, seed)
    whole = content(name, shard.shape, dtype, seed).reshape(-1)
    return whole[shard.offset : shard.offset + shard.numel].clone().view(parameter.shape)


def differences(model: nn.Module, optimizer: torch.optim.AdamW | None, seed: int = 0) -> list[str]:
    """What of this rank does not hold its contents, by name."""
    found = []
    for name, p in model.named_parameters():
        if not torch.equal(p.detach(), piece_of(name, p, p.dtype, seed)):
            found.append(name)
        if optimizer is None or not p.requires_grad:
            continue
        state = optimizer.state[p]
        if float(state["step"]) != len(name):
            found.append(f"{name}.step")
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = piece_of(f"{name}.{key}", p, torch.float32, seed)
            if state[key].dtype != torch.float32 or not torch.equal(state[key], wanted):
                found.append(f"{name}.{key}")
    for name in ("seen", "mean"):
        buffer = getattr(model, name)
        if not torch.equal(buffer, content(name, buffer.shape, buffer.dtype, seed)):
            found.append(name)
    return found

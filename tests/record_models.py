"""Models, and inputs for them, whose stages played one after the other are compared with the whole."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lm.model import GPT
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def tokens(batch: int = 2, length: int = 6, below: int = 256) -> Tensor:
    return torch.randint(0, below, (batch, length), generator=torch.Generator().manual_seed(0))


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.inner(self.norm(x))
        return x + self.drop(y.tanh() if mask is None else y.masked_fill(mask, 0.0))


class UNet(nn.Module):
    """Skips from every level down to the same level up, and a residual around everything."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(c, c + 2, 3, padding=1) for c in (2, 4, 6))
        self.middle = nn.Conv1d(8, 8, 1)
        self.up = nn.ModuleList(nn.Conv1d(2 * c + 4, c, 3, padding=1) for c in (6, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        skips, y = [], x
        for layer in self.down:
            y = functional.relu(layer(y))
            skips.append(y)
        y = self.middle(y)
        for layer in self.up:
            y = layer(torch.cat([y, skips.pop()], dim=1))
        return y + x


@dataclass
class Result:
    logits: Tensor
    hidden: list[Tensor]
    note: str


pytree.register_dataclass(Result)


class ModelOutput(OrderedDict):
    """As in well-known libraries: a dict whose entries are attributes too, and which pytree is told about."""

    def __getattr__(self, key: str) -> Any:
        if key in self:
            return self[key]
        raise AttributeError(key)


pytree.register_pytree_node(
    ModelOutput, lambda d: (list(d.values()), list(d)), lambda items, keys: ModelOutput(zip(keys, items, strict=True))
)


class Many(nn.Module):
    """All kinds of inputs, outputs and state: a position table, a buffer, a two-dimensional mask, a module called
    twice, one that returns a tuple, one that returns a dict."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 16)

        def forward(self, x: Tensor, *, as_dict: bool) -> Any:
            a, b = self.inner(x).chunk(2, dim=-1)
            return {"a": a, "b": (b, None)} if as_dict else (a, b)

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(12, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("causal", torch.ones(12, 8).triu(1).bool())
        self.register_buffer("offset", torch.ones(8), persistent=False)
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.split = self.Split()
        self.head = nn.Linear(8, 5)

    def forward(
        self, x: Tensor, y: dict[str, Any], flag: bool, *, kind: str = "dict", extra: Tensor | None = None
    ) -> Any:
        length = x.shape[1]
        mask = self.causal[:length]
        h = self.embed(x) + self.position[:length]
        first = h
        for block in self.blocks:
            h = block(h, mask=mask)
        a, b = self.split(h, as_dict=False)
        h = self.blocks[0](a * self.scale + self.offset)  # again, on another stage
        both = self.split(h + b + y["add"], as_dict=True)
        h = both["a"] * y["times"] + both["b"][0]
        if flag and extra is not None:
            h = h + extra + first  # a skip over all stages
        logits = self.head(h)
        if kind == "dict":
            return {"logits": logits, "argmax": logits.argmax(-1), "input": x, "none": None, "length": length}
        if kind == "dataclass":
            return Result(logits, [first, h], "note")
        return ModelOutput(logits=logits, hidden=(first, a))


class InPlace(nn.Module):
    """Glue and a leaf that write in place; readers before and after the write, on any stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.act = nn.ReLU(inplace=True)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 1.0
        kept[:, 0] = 0  # of inputs only, then written
        h = self.a(x)
        before = h.exp()
        h += self.bias
        h[:, 1] = 0
        view = h[:, 2:4]
        y = self.b(before)
        view.add_(y[:, 2:4])  # reaches h; and comes after b
        z = self.c(y) + h
        z = self.act(z) + kept
        out = self.d(z * 2)
        out += h.detach()
        return out + kept


class Head(nn.Module):
    """Uses another module's weight: tied by use, not by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.Sequential(Residual(), Residual(), Residual())
        self.shared = nn.Linear(8, 8)
        self.alias = self.shared

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(self.embed(x))
        h = self.alias(self.blocks(h))
        return functional.linear(h, self.embed.weight)


class Modes(nn.Module):
    """Dropout in glue and in leaves, a part without gradients, a part in another precision, integers that cross."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(Residual(dropout=0.2) for _ in range(3))
        self.router = nn.Linear(8, 4)
        self.experts = nn.Embedding(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.dropout(self.embed(x), 0.1, self.training)
        with torch.no_grad():
            target = self.blocks[0](h)
        h = self.blocks[1](h)
        with torch.autocast("cpu", enabled=False):
            h = h.float() - target.float().mean()
        chosen = self.router(h).argmax(-1)
        h = self.blocks[2](h)
        return h + self.experts(chosen)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0]  # on purpose not that of the operators inside


class Custom(nn.Sequential):
    """An autograd Function in glue, a hook on a tensor, and modules that are handed lists."""

    def forward(self, x: Tensor) -> Tensor:
        h = Square.apply(self[0](x))
        h.register_hook(lambda g: 2 * g)
        return torch.stack([self[1](h), self[2](h)]).sum(0)


class CallsForward(nn.Module):
    """Calls the forwards of its blocks, not the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.forward(x)
        return x


def once(*args: Any, **kwargs: Any) -> Callable[[], Inputs]:
    return lambda: (args, kwargs)


def many(kind: str, flag: bool = True) -> Callable[[], Inputs]:
    y = {"add": values(2, 6, 8), "times": 3}
    return once(tokens(below=32), y, flag, kind=kind, extra=values(2, 6, 8))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "sequential": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        ),
        once(values(4, 6)),
    ),
    "gpt": (lambda: GPT(3, 16, 2), once(tokens())),
    "gpt, tied": (lambda: GPT(3, 16, 2, tied=True), once(tokens())),
    "u-net": (UNet, once(values(2, 2, 9))),
    "many, dict": (Many, many("dict")),
    "many, dataclass": (Many, many("dataclass", flag=False)),
    "many, model output": (Many, many("model output")),
    "in place": (InPlace, once(values(3, 6))),
    "another module's weight": (Head, once(tokens(below=32))),
    "forwards called": (CallsForward, once(values(3, 8))),
    "modes": (Modes, once(tokens(below=32))),
    "custom functions": (lambda: Custom(*(nn.Linear(6, 6) for _ in range(3))), once(values(3, 6))),
}

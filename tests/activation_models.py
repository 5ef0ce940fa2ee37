"""Modules that the tests of activation memory share, one per thing that could go wrong, and steps of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
Values = list[Tensor]


class Residual(nn.Module):
    """Linear layers with dropout between: random numbers in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm(x))))))


class Attention(nn.Module):
    """Attention that drops, and draws again behind it; keyword, tuple and non-tensor arguments."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.drop = dropout
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: tuple[Tensor, Tensor], *, causal: bool, scale: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, total = state
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=self.drop if self.training else 0.0)
        y = F.dropout(self.out(y.transpose(1, 2).reshape(x.shape)), self.drop, self.training)
        return x + y * scale["by"], total + y.square().mean()


class AttentionModel(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(dropout) for _ in range(3))
        self.by = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        state = (x, x.new_zeros(()))
        for block in self.blocks:
            state = block(state, causal=True, scale={"by": self.by})
        return state[0] + state[1]


class Convolution(nn.Module):
    """Batch norm changes its buffers in forward: once per step, whatever is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)), inplace=True)


class Averages(nn.Module):
    """Buffers that the forward replaces, writes, and fills the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("first", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.detach().flatten(0, -2).std(0)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().flatten(0, -2).mean(0)
        self.mean.mul_(1.1)
        self.steps += 1
        return x + (self.layer(x) * self.first - self.mean / self.steps).tanh().square()


def frozen() -> nn.Module:
    """The first two blocks are frozen, and the input has no gradient; of the others only one layer is trained."""
    model = nn.Sequential(*[Residual() for _ in range(4)])
    for block in (model[0], model[1]):
        block.requires_grad_(False)
    model[2].up.requires_grad_(False)
    return model


def _tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "dropout": (lambda: nn.Sequential(*[Residual() for _ in range(4)]), _tokens(8, 40, WIDTH)),
    "attention": (AttentionModel, _tokens(4, 40, WIDTH)),
    "flash attention": (lambda: AttentionModel(0.0), _tokens(4, 40, WIDTH)),
    "convolution": (lambda: nn.Sequential(*[Convolution() for _ in range(3)]), _tokens(4, 8, 24, 24)),
    "averages": (lambda: nn.Sequential(*[Averages() for _ in range(3)]), _tokens(8, 40, WIDTH)),
    "frozen": (frozen, _tokens(8, 40, WIDTH)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


class Wide(nn.Module):
    """A residual block with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(self.up(x).tanh()))


def step(model: nn.Module, inputs: Tensor, seed: int = 5, forwards: int = 1) -> Values:
    """Loss, gradients and buffers of one step of `forwards` forwards and one backward; then a random number, for the
    generator's state."""
    torch.manual_seed(seed)
    model.zero_grad()
    losses = [model(inputs * (1 + i)).square().mean() for i in range(forwards)]
    loss = torch.stack(losses).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients, *[b.clone() for b in model.buffers()], torch.rand(1)]


def same(first: Values, second: Values) -> bool:
    """Bit for bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

"""A GPT over bytes: embedding, pre-norm blocks with rotary attention, head. It knows nothing of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # one token per byte value


def rotary_table(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and frequency, fp32 [length, head_width / 2] (RoFormer, Su et al.).

    Computed in each forward, which is cheap: a buffer would be sent between the ranks.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[..., i], x[..., i + half]) by its position's angle. x: [..., length, 2 * half]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention over [batch, length, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, head_width]
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)  # turned in fp32
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """tokens int64 [batch, length] -> logits fp32 [batch, length, 256].

    Raises ValueError where `heads` does not divide `width` into even parts (rotary positions turn pairs).
    """

    def __init__(self, layers: int, width: int, heads: int, tied: bool = False) -> None:
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(
                f"width {width} over {heads} heads is not an even head width: choose a width that is a "
                f"multiple of {2 * heads}, or another number of heads"
            )
        self.head_width = width // heads
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(self._initialise)
        for block in self.blocks:  # each of the 2 x layers branches adds to the residual stream: keep its variance at 1
            for projection in (block.attention.out, block.down):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * layers))
        if tied:
            self.head.weight = self.embedding.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rotary_table(tokens.shape[1], self.head_width, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.final_norm(x))


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats per byte, in fp32. logits [batch, length, 256], targets int64 [batch, length]."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: bytes,
    length: int,
    context: int,
    seed: int,
    device: torch.device,
    temperature: float = 0.8,
) -> bytes:
    """`prompt` and `length` sampled bytes more. Every rank must call it, alike; all get the same bytes.

    Windows are filled up behind the last byte, which the model does not see, so that all have one shape.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    for _ in range(length):
        seen = tokens[:, -context:]
        window = functional.pad(seen, (0, context - seen.shape[1]))
        logits = model(window)[0, seen.shape[1] - 1].float().cpu()
        choice = torch.multinomial((logits / temperature).softmax(dim=0), 1, generator=generator)
        tokens = torch.cat((tokens, choice.to(device)[None]), dim=1)
    return bytes(tokens[0].tolist())

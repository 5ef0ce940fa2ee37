"""A GPT on one device, trained by distlib's full sharded path and by plain torch with the same arithmetic.

Both hold fp32 masters, compute with a bf16 copy of them, clip by the norm of all gradients in fp32, and step AdamW.
Torch's side is what one would write by hand: `_foreach_copy_` casts gradients to fp32, `clip_grad_norm_` clips them,
the fused AdamW steps the masters, which are cast back.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import distlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from lm.model import GPT, next_token_loss

ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
VOCABULARY = 256
Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and next tokens, int64 [batch, length] each


@dataclass(frozen=True)
class Size:
    """A GPT and the tokens of its step."""

    layers: int
    width: int
    heads: int
    batch: int
    length: int

    @property
    def parameters(self) -> int:
        return self.layers * (12 * self.width**2 + 2 * self.width) + (2 * VOCABULARY + 1) * self.width

    @property
    def memory(self) -> int:
        """Bytes that both contenders take at once, by estimate: 20 of each parameter, and one's activations."""
        return 40 * self.parameters + 44 * self.layers * self.width * self.batch * self.length

    def __str__(self) -> str:
        count = f"{self.parameters / 1e9:.2f} B" if self.parameters >= 1e8 else f"{self.parameters / 1e6:.2g} M"
        return f"GPT of {count} parameters, {self.batch * self.length:,} tokens"


SIZES = (  # the largest that fits a card's memory is used
    Size(20, 2048, 16, 4, 2048),
    Size(14, 2048, 16, 4, 2048),
    Size(14, 1536, 12, 4, 2048),
    Size(14, 1536, 12, 2, 2048),
    Size(12, 1024, 8, 4, 1024),
    Size(8, 768, 6, 2, 1024),
    Size(4, 256, 4, 2, 256),
)
SMALL = Size(4, 256, 4, 16, 64)  # for curves of losses
TINY = Size(2, 16, 2, 4, 8)


def size_for(free: int) -> Size:
    """The largest for so many free bytes."""
    fitting = [size for size in SIZES if size.memory <= 0.9 * free]
    if not fitting:
        least = f"the smallest model takes {SIZES[-1].memory:,} bytes"
        raise RuntimeError(f"{free:,} bytes are free on the card, and {least}: end what else uses it")
    return fitting[0]


def module_of(size: Size, device: torch.device) -> GPT:
    """fp32, the same values in every process. A large one is made on its device: that takes no time there."""
    torch.manual_seed(0)
    with torch.device(device):
        return GPT(size.layers, size.width, size.heads)


def batch_of(size: Size, device: torch.device, step: int = 0, rank: int = 0, ranks: int = 1) -> Batch:
    """This rank's rows of the step's batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCABULARY, (size.batch, size.length + 1), generator=generator)[rank::ranks]
    tokens = tokens.to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Contender(ABC):
    """A model and its optimizer. `step` returns the loss, on the device; between its halves it calls `halfway`."""

    model: Callable[[torch.Tensor], torch.Tensor]

    def step(self, batch: Batch, halfway: Callable[[], object] = lambda: None) -> torch.Tensor:
        """One optimizer step. The host is not to wait for the device."""
        loss = next_token_loss(self.model(batch[0]), batch[1])
        loss.backward()
        halfway()
        self.update()
        return loss.detach()

    @abstractmethod
    def update(self) -> None:
        """What follows the backward."""


class Sharded(Contender):
    """distlib: stage 3 and its AdamW. compute: the dtype of the copy to compute with; None: fp32 throughout."""

    def __init__(self, module: nn.Module, device: torch.device, compute: torch.dtype | None, prefetch: int = 2) -> None:
        self.model = distlib.ShardedDataParallel(
            module,
            stage=3,
            mixed_precision=distlib.MixedPrecision(param=compute),
            prefetch=prefetch,
            device=device,
        )
        self.optimizer = distlib.optim.AdamW(self.model.parameters(), **ADAMW, max_norm=MAX_NORM)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Plain(Contender):
    """torch alone, in one process."""

    def __init__(self, module: nn.Module, device: torch.device, compute: torch.dtype | None) -> None:
        self.model = module
        self.masters = [nn.Parameter(p.detach().clone()) for p in module.parameters()]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        if compute is not None:
            module.to(compute)
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(self.masters, **ADAMW, fused=device.type == "cuda")

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in self.parameters])
        nn.utils.clip_grad_norm_(self.masters, MAX_NORM)
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)
        for p in self.parameters:
            p.grad = None

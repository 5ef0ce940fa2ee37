"""A training step under data parallelism: what communication adds to it, over distlib and over gloo.

Two claims. Stock DDP, 25 M parameters and a tiny batch: backend `distlib` beside `gloo`. And a GPT of 33.6 M
parameters, 256 tokens a rank, one thread: `distlib.DataParallel` and DDP over gloo beside the same step of
all ranks without communication. Steps include the optimizer; the variants take turns, step by step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timing import free_groups, interleaved, is_rank, run_ranks, write_samples
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distlib

VOCABULARY, WIDTH, LAYERS, HEADS, TOKENS = 8192, 512, 8, 8, 256
STOCK = "stock DDP, 25 M parameters, 2 samples"
GPT_STEP = "GPT, 33.6 M parameters, 256 tokens"


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, tokens, WIDTH), and so is the result."""
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Fixed sinusoidal positions, blocks, and an output layer of its own."""

    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, VOCABULARY, bias=False)
        angles = torch.arange(TOKENS)[:, None] / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=-1), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (batch, TOKENS) int64 -> logits (batch, TOKENS, VOCABULARY)."""
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions)))


class Step:
    """One training step of its own copy of the model; `loss` is the last step's."""

    def __init__(
        self,
        module: nn.Module,
        wrap: Callable[[nn.Module], nn.Module],
        loss_of: Callable[[nn.Module], torch.Tensor],
        optimizer: Callable[..., torch.optim.Optimizer],
    ) -> None:
        self.model = wrap(module)
        self.loss_of = loss_of
        self.optimizer = optimizer(self.model.parameters())
        self.loss = float("nan")

    def __call__(self) -> None:
        loss = self.loss_of(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.item()


# ---- on every rank ----------------------------------------------------------------------------------------


def on_rank(options: argparse.Namespace) -> None:
    """Measure and let rank 0 write {what: {variant: seconds per round}}."""
    torch.set_num_threads(1)
    with distlib.init():
        gloo = dist.new_group(backend="gloo")
        write_samples(options.samples, {STOCK: _stock(gloo), GPT_STEP: _gpt(gloo)})


def _stock(gloo: dist.ProcessGroup) -> dict[str, list[float]]:
    torch.manual_seed(1 + dist.get_rank())
    batch = torch.randn(2, 2048)

    def step(group: dist.ProcessGroup) -> Step:
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)))
        return Step(
            module,
            lambda module: DistributedDataParallel(module, process_group=group),
            lambda model: model(batch).square().mean(),
            lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        )

    variants = {"distlib": step(dist.new_group(backend="distlib")), "gloo": step(gloo)}
    samples = interleaved(variants, gloo, rounds=15).seconds
    _check_losses(variants["distlib"], variants["gloo"])
    return samples


def _gpt(gloo: dist.ProcessGroup) -> dict[str, list[float]]:
    torch.manual_seed(1 + dist.get_rank())
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1))

    def loss_of(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def step(wrap: Callable[[nn.Module], nn.Module]) -> Step:
        torch.manual_seed(0)
        return Step(GPT(), wrap, loss_of, lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True))

    variants = {
        "no communication": step(lambda module: module),
        "distlib.DataParallel": step(distlib.DataParallel),
        "DDP over gloo": step(lambda module: DistributedDataParallel(module, process_group=gloo)),
    }
    if dist.get_rank() == 0:
        count = sum(parameter.numel() for parameter in variants["no communication"].model.parameters())
        print(f"GPT with {count:,} parameters", flush=True)
    rounds = 12 if dist.get_world_size() == 2 else 8  # more where a bar is to be met
    samples = interleaved(variants, gloo, rounds, warmup=3).seconds
    _check_losses(variants["distlib.DataParallel"], variants["DDP over gloo"])
    return samples


def _check_losses(ours: Step, theirs: Step) -> None:
    if abs(ours.loss - theirs.loss) > 1e-4 * abs(theirs.loss):
        raise RuntimeError(f"rank {dist.get_rank()}: last loss {ours.loss} over distlib, {theirs.loss} over gloo")


# ---- the process that starts the ranks --------------------------------------------------------------------


def main() -> None:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        on_rank(parser.parse_args())
        free_groups()
        return
    import report
    from report import Bar, Row

    options = report.parser(__doc__).parse_args()
    rows = []
    for ranks in (2, 4):
        bars = {
            STOCK: [Bar("gloo", "distlib", at_least=1.5)],
            GPT_STEP: [
                Bar("distlib.DataParallel", "no communication", at_most=1.06 if ranks == 2 else None),
                Bar("DDP over gloo", "no communication"),
            ],
        }
        samples = run_ranks(__file__, ranks)
        rows += [Row(what, ranks, samples[what], bars[what]) for what in bars]
    report.publish(report.Report("data_parallel", "A training step under data parallelism", rows), options)


if __name__ == "__main__":
    main()

"""Contenders that train one GPT over the ranks of a pipeline: distlib's schedules, and torch's over gloo.

    contender = TorchPipeline("1F1B", module, begins)
    contender.step(tokens, targets)             # one optimizer step over all micro-batches

All have the same AdamW, micro-batches and losses. `begins`: names of the modules with which the stages after the first
begin. The loss of torch's contenders is known where their last stage is, and nan elsewhere.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Mapping, Sequence

import peers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data_parallel import GPT, LAYERS
from torch import Tensor, nn

import distlib


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Contender(abc.ABC):
    """A part of a model on this rank, and its optimizer. `loss`: of the last step."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer = peers.torch_adamw(parameters)
        self.loss = math.nan

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """One optimizer step over a batch: int64 [micro-batches, length] each, the same on all ranks."""
        self.loss = self.gradients(tokens, targets)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @abc.abstractmethod
    def gradients(self, tokens: Tensor, targets: Tensor) -> float:
        """Forwards and backwards. Returns the loss where it is known, else nan."""


class Distlib(Contender):
    """distlib.PipelineParallel. begins: "auto", or as above."""

    def __init__(self, schedule: str, module: GPT, begins: str | Sequence[str], tokens: Tensor) -> None:
        self.model = distlib.PipelineParallel(
            module,
            schedule=schedule,
            microbatches=len(tokens),
            loss_fn=loss_of,
            split=begins,
            example_inputs=tokens,
            example_target=tokens,  # as its user has: the loss counts when the model divides itself
            process_group=peers.distlib_group(),
        )
        super().__init__(list(self.model.parameters()))

    @property
    def begins(self) -> list[str]:
        """The names with which its stages begin, for contenders that are to have the same split."""
        return [held.leaves[0] for held in self.model.division.holdings[1:]]

    def gradients(self, tokens: Tensor, targets: Tensor) -> float:
        return self.model.train_step(tokens, targets).item()


def even_split(stages: int) -> list[str]:
    """Where stages begin that have equally many layers, earlier ones one more where it does not come out even.

    Embedding and output layer count as a layer each: the usual rule of those who divide a model by hand.
    """
    small, larger = divmod(LAYERS + 2, stages)
    ends = itertools.accumulate(small + (stage < larger) for stage in range(stages - 1))
    return [f"blocks.{end - 1}" for end in ends]


class _Front(nn.Module):
    """Embedding and positions."""

    def __init__(self, module: GPT) -> None:
        super().__init__()
        self.embedding = module.embedding
        self.register_buffer("positions", module.positions, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) + self.positions


class TorchPipeline(Contender):
    """torch.distributed.pipelining over gloo, with stages made by hand.

    kind: "1F1B" (Schedule1F1B), "ZB1P" (ScheduleInterleavedZeroBubble, here with one stage per rank) or "ZBV"
    (ScheduleZBVZeroBubble, with two in V shape). Outputs are not put together: nothing but losses comes back.
    """

    def __init__(self, kind: str, module: GPT, begins: Sequence[str], tokens: Tensor) -> None:
        from torch.distributed.pipelining import PipelineStage, schedules

        if dist.get_backend() != "gloo":
            raise RuntimeError(f"torch's pipelines are to be measured over gloo, not {dist.get_backend()!r}")
        named = {"embedding": _Front(module), **{f"blocks.{k}": block for k, block in enumerate(module.blocks)}}
        named |= {"norm": module.norm, "head": module.head}
        order, size, count = list(named), dist.get_world_size(), len(begins) + 1
        bounds = [0, *(order.index(name) for name in begins), len(order)]
        parts = [nn.Sequential(*(named[name] for name in order[a:b])) for a, b in itertools.pairwise(bounds)]
        own = sorted({dist.get_rank(), 2 * size - 1 - dist.get_rank()}) if kind == "ZBV" else [dist.get_rank()]
        stages = [PipelineStage(parts[stage], stage, count, torch.device("cpu")) for stage in own]
        makes = {
            "1F1B": lambda: schedules.Schedule1F1B(stages[0], len(tokens), loss_of),
            "ZB1P": lambda: schedules.ScheduleInterleavedZeroBubble(stages, len(tokens), loss_of),
            "ZBV": lambda: schedules.ScheduleZBVZeroBubble(stages, len(tokens), loss_of),
        }
        self._schedule = makes[kind]()
        self._is_first, self._is_last = 0 in own, count - 1 in own
        super().__init__([p for stage in own for p in parts[stage].parameters()])

    def gradients(self, tokens: Tensor, targets: Tensor) -> float:
        losses: list[Tensor] = []
        self._schedule.step(
            *([tokens] if self._is_first else []),
            target=targets if self._is_last else None,
            losses=losses if self._is_last else None,
            return_outputs=False,
        )
        return torch.stack(losses).mean().item() if losses else math.nan


def check_losses(contenders: Mapping[str, Contender]) -> None:
    """RuntimeError on all ranks unless all contenders, having done the same steps, have the same loss."""
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: contender.loss for name, contender in contenders.items()})
    for name, contender in contenders.items():
        contender.loss = next(theirs[name] for theirs in everyone if not math.isnan(theirs[name]))
    peers.check_losses(contenders)

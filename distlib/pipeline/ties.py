"""Weights that lie on several stages: each has a copy, and their gradients are summed before the optimizer steps.

    stage 0   embedding.weight   gradient a  \\
                                              a + b on both: equal gradients, equal weights
    stage 3   head.weight        gradient b  /

Where the copies are sharded, stages cut the weight in different places. Then each rank puts its piece into a whole
gradient, these are summed over the ranks of all copies, and each takes its piece back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distlib import reach
from distlib.comm.group import Group
from distlib.shards import shard_of


@dataclass(frozen=True)
class Tie:
    """A weight on several stages.

    name: the first in the whole model. copies: those of this rank, whole or pieces, by stage. group: all ranks with
    copies, or pieces of them, of one replica; None: this rank alone. owns: whether this rank has the first stage's.
    """

    name: str
    copies: dict[int, nn.Parameter]
    group: Group | None
    owns: bool


class Ties:
    """All tied weights of one rank that are trained, in an order that is equal on all ranks."""

    def __init__(self, ties: Sequence[Tie]) -> None:
        self._ties = list(ties)
        self._waiting: set[int] = set()

    @torch.no_grad()
    def begin(self) -> None:
        """A step begins. What earlier steps left in .grad is the sum already: the first stage's copy keeps it, so that
        it counts once in the next sum."""
        for tie in self._ties:
            first = min(tie.copies)
            for stage, parameter in tie.copies.items():
                if not (tie.owns and stage == first):
                    parameter.grad = None

    def ready(self, stage: int) -> None:
        """All gradients of a stage of this rank are there."""
        self._waiting.add(stage)

    @torch.no_grad()
    def finish(self) -> None:
        """Sums. A collective of each tie's ranks."""
        for tie in self._ties:
            assert self._waiting >= tie.copies.keys(), f"{tie.name}: not all gradients are there"
            total: Tensor | None = None
            for parameter in tie.copies.values():
                whole = _whole_gradient(parameter)
                total = whole if total is None else total.add_(whole)
            assert total is not None
            if tie.group is not None and tie.group.size > 1:
                reach.all_reduce(tie.group, total)
            # A look at what is on a device waits for it: only where this rank does not know.
            if any(parameter.grad is not None for parameter in tie.copies.values()) or total[-1]:
                for parameter in tie.copies.values():
                    _take_back(parameter, total)
        self._waiting.clear()


def _whole_gradient(parameter: nn.Parameter) -> Tensor:
    """A vector of the whole weight's gradient: all of it, or this rank's piece among zeros. After it, whether there is
    one: where no copy was used, none gets one."""
    shard = shard_of(parameter)
    size = parameter.numel() if shard is None else shard.shape.numel()
    whole = torch.zeros(size + 1, dtype=parameter.dtype, device=parameter.device)
    if parameter.grad is not None:
        begin = 0 if shard is None else shard.offset
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        whole[begin : begin + parameter.numel()] = gradient.reshape(-1)
        whole[-1] = 1
    return whole


def _take_back(parameter: nn.Parameter, total: Tensor) -> None:
    shard = shard_of(parameter)
    offset = 0 if shard is None else shard.offset
    mine = total[offset : offset + parameter.numel()].view(parameter.shape)
    if parameter.grad is None or parameter.grad.is_sparse:
        parameter.grad = mine.clone()
    else:
        parameter.grad.copy_(mine)

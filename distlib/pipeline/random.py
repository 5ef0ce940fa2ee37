"""Random numbers of micro-batches: dropout gives the same loss on any number of stages.

    one process      seed 3 | stage 0 ....... stage 1 ....... stage 2         micro-batch 3, one stream of numbers
    pipeline         seed 3 | stage 0 -state-> stage 1 -state-> stage 2       the generators' state goes with the data

A micro-batch's numbers start from its own seed, as micro-batches overlap in time. The seeds of a step are drawn from
torch's generator on every rank, which so stays equal on ranks where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distlib.pipeline.program import Spec


def micro_batch_seeds(count: int) -> list[int]:
    """The seeds of the micro-batches of a step that begins now, drawn from torch's default generator.

    A plain loop that calls torch.manual_seed with them, one per micro-batch, gets the numbers that a pipeline gets.
    """
    return torch.randint(2**62, (count,), device="cpu").tolist()


@dataclass(frozen=True)
class Numbers:
    """Generators of one rank that a model may draw from: the CPU's and, where it computes on one, an accelerator's.

    The states of both lie in host memory; to read and set them makes no host wait for a GPU.
    """

    device: torch.device

    @property
    def _of_device(self) -> Any:
        """torch.cuda, or what another accelerator has in its place; None on the CPU."""
        return None if self.device.type == "cpu" else torch.get_device_module(self.device)

    @property
    def specs(self) -> list[Spec]:
        """Of the tensors that `state` returns."""
        return [Spec.of(tensor) for tensor in self.state()]

    def state(self) -> tuple[Tensor, ...]:
        """The generators' states, uint8 tensors on the CPU."""
        module = self._of_device
        own = torch.get_rng_state()
        return (own,) if module is None else (own, module.get_rng_state(self.device))

    def restore(self, states: tuple[Tensor, ...]) -> None:
        """Sets the generators to states that `state` returned."""
        torch.set_rng_state(states[0])
        module = self._of_device
        if module is not None:
            module.set_rng_state(states[1], self.device)

    @contextmanager
    def of(self, begin: int | tuple[Tensor, ...]) -> Iterator[list[tuple[Tensor, ...]]]:
        """Inside, numbers start from a seed or a state; after it, those outside go on. Yields a list that holds the
        state in which the block ended."""
        before = self.state()
        ended: list[tuple[Tensor, ...]] = []
        try:
            if isinstance(begin, int):
                torch.default_generator.manual_seed(begin)
                module = self._of_device
                if module is not None:
                    with module.device(self.device):
                        module.manual_seed(begin)
            else:
                self.restore(begin)
            yield ended
            ended.append(self.state())
        finally:
            self.restore(before)

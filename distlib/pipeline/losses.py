"""The loss of a step reaches all ranks of the pipeline, without making anyone wait for the end of the step."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

from distlib.comm.group import Group
from distlib.comm.work import Work

_TAG = 1 << 20  # channels of edges have small tags
_STEP = 1e6  # seconds that a step takes at most: who is late in it is for its messages to say


class LossShare:
    """root: the pipeline's rank that holds the last stage. dtype: of the loss on the others. timeout: seconds, of the
    wait at the end of a step; a step itself may take longer."""

    def __init__(self, group: Group, root: int, dtype: torch.dtype, timeout: float) -> None:
        self._group, self._root, self._dtype, self._timeout = group, root, dtype, timeout
        self._coming: tuple[Tensor, Work | None] | None = None
        self._going: list[Work | None] = []
        self._own: Tensor | None = None

    def begin(self) -> None:
        """A step begins: every rank but the root expects a loss."""
        self._own = None
        if self._group.rank != self._root:
            number = torch.zeros((), dtype=torch.float64)
            self._coming = number, self._group.recv(number, self._root, _TAG, async_op=True, timeout=_STEP)

    def tell(self, loss: Tensor) -> None:
        """On the root, as soon as the last micro-batch's loss is there: backwards are still to come."""
        self._own = loss
        number = loss.detach().to("cpu", torch.float64)
        others = (rank for rank in range(self._group.size) if rank != self._root)
        self._going = [self._group.send(number, rank, _TAG, async_op=True, timeout=_STEP) for rank in others]

    def result(self) -> Tensor:
        """The loss, on every rank. A collective at the end of the step."""
        for work in self._going:
            assert work is not None
            work.wait(timedelta(seconds=self._timeout))
        self._going = []
        if self._own is not None:
            return self._own
        assert self._coming is not None
        number, work = self._coming
        assert work is not None
        work.wait(timedelta(seconds=self._timeout))
        self._coming = None
        return number.to(self._dtype)

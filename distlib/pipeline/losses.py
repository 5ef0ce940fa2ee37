"""The loss of a step reaches all ranks of the pipeline, without making anyone wait for the end of the step."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

from distlib import streams
from distlib.comm.group import Group
from distlib.comm.work import Work

_TAG = 1 << 20  # channels of edges have small tags
_STEP = 1e6  # seconds that a step takes at most: who is late in it is for its messages to say


class LossShare:
    """root: the pipeline's rank that holds the last stage. dtype: of the loss on the others. timeout: seconds, of the
    wait at the end of a step; a step itself may take longer. device: where the loss is.

    direct: whether the group carries tensors of the device. Then the loss follows the step's messages, all at the end:
    a receive that waited on the device from the beginning would hold up those that come before it.
    """

    def __init__(self, group: Group, root: int, dtype: torch.dtype, timeout: float, device: torch.device) -> None:
        self._group, self._root, self._dtype, self._timeout = group, root, dtype, timeout
        self._device = device
        self.direct = False
        self._coming: tuple[Tensor, Work | None] | None = None
        self._going: list[Work | None] = []
        self._own: Tensor | None = None
        self._copied: tuple[Tensor, streams.Event] | None = None  # the own loss on its way to the host

    def begin(self) -> None:
        """A step begins: every rank but the root expects a loss."""
        self._own = self._copied = None
        if self._group.rank != self._root and not self.direct:
            number = streams.pinned(1, torch.float64, self._device)[0].zero_()
            self._coming = number, self._group.recv(number, self._root, _TAG, async_op=True, timeout=_STEP)

    def tell(self, loss: Tensor) -> None:
        """On the root, as soon as the last micro-batch's loss is there: backwards are still to come."""
        self._own = loss
        number = loss.detach().to(torch.float64)
        if self._device.type == "cpu":
            self._send(number)
        elif self._group.size > 1 and not self.direct:  # a step later would be soon enough to wait for it
            copy = streams.pinned(1, torch.float64, self._device)[0].copy_(number, non_blocking=True)
            self._copied = copy, streams.record(streams.current(self._device))

    @property
    def _tag(self) -> int:
        return _TAG if not self.direct or self._group.takes_tags(self._device) else 0

    def _send(self, number: Tensor) -> None:
        others = (rank for rank in range(self._group.size) if rank != self._root)
        self._going = [self._group.send(number, rank, self._tag, async_op=True, timeout=_STEP) for rank in others]

    def result(self) -> Tensor:
        """The loss, on every rank, where it computes. A collective at the end of the step."""
        if self.direct:
            return self._on_device()
        if self._copied is not None:
            number, copied = self._copied
            if not streams.has_passed(copied):
                assert copied is not None
                copied.synchronize()
            self._send(number)
        for work in self._going:
            assert work is not None
            work.wait(timedelta(seconds=self._timeout))
        self._going = []
        if self._own is not None:
            return self._own.to(self._dtype)
        assert self._coming is not None
        number, work = self._coming
        assert work is not None
        work.wait(timedelta(seconds=self._timeout))
        self._coming = None
        return number.to(self._device, non_blocking=True).to(self._dtype)

    def _on_device(self) -> Tensor:
        """The same, ordered by streams."""
        if self._own is not None:
            self._send(self._own.detach().to(torch.float64))
            return self._own.to(self._dtype)
        number = torch.zeros((), dtype=torch.float64, device=self._device)
        self._group.recv(number, self._root, self._tag, timeout=self._timeout)
        return number.to(self._dtype)

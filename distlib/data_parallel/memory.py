"""A bucket layout turned into tensors: one flat buffer per bucket, and in it a view per parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distlib.buckets import Bucket, Layout
from distlib.comm.c10d import C10dChannel
from distlib.comm.group import Group

_LINE = 64  # bytes: no two buckets share a cache line


class BucketMemory:
    """The tensors of a layout.

    Attributes:
        layout: the layout these tensors follow.
        buffers: one 1-D tensor per bucket, of the bucket's dtype; padding is zero.
        views: one tensor per parameter, shaped and strided like it, in its bucket; None where the layout
            leaves the parameter out.
        tail: the last `layout.tail` elements of the last buffer.

    All buffers are slices of one block in the group's arena, so that collectives on them copy nothing and a
    new arrangement needs no new memory. With `resizable=True` every buffer has ordinary memory of its own:
    some communication hooks resize the buffer they are handed.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[torch.Tensor],
        group: Group,
        device: torch.device,
        resizable: bool = False,
    ) -> None:
        self._parameters = parameters
        self._group = group
        self._device = device
        self._resizable = resizable
        self._block = torch.empty(0, dtype=torch.uint8, device=device)
        self.arrange(layout)

    def arrange(self, layout: Layout) -> None:
        """Follow another layout of the same parameters. Contents are lost: every element becomes zero."""
        self.layout = layout
        self.buffers = self._separate(layout) if self._resizable else self._slices(layout)
        self.views: list[torch.Tensor | None] = [None] * len(self._parameters)
        for bucket, buffer in zip(layout.buckets, self.buffers, strict=True):
            for index, piece in pieces(bucket, buffer):
                self.views[index] = shaped_like(piece, self._parameters[index])
        last = self.buffers[-1]
        self.tail = last[last.numel() - layout.tail :]

    def _slices(self, layout: Layout) -> list[torch.Tensor]:
        starts, end = [], 0
        for bucket in layout.buckets:
            starts.append(end)
            end += -(-bucket.nbytes // _LINE) * _LINE
        if end > self._block.numel():
            self._block = empty(self._group, end, torch.uint8, self._device)
        self._block.zero_()
        return [
            self._block[start : start + bucket.nbytes].view(bucket.dtype)
            for start, bucket in zip(starts, layout.buckets, strict=True)
        ]

    def _separate(self, layout: Layout) -> list[torch.Tensor]:
        return [torch.zeros(b.numel, dtype=b.dtype, device=self._device) for b in layout.buckets]


def empty(group: Group, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A 1-D tensor on `device`: in the group's arena where the device is the CPU."""
    if device.type == "cpu":
        return group.registered_empty(numel, dtype=dtype)
    return torch.empty(numel, dtype=dtype, device=device)


def numbers_on(group: Group, device: torch.device) -> torch.device:
    """Where numbers that hosts read travel, for a model on `device`: in host memory, so that no host waits for a GPU.

    Groups of other backends may serve GPUs only: there on the device.
    """
    return device if isinstance(group.cpu_channel, C10dChannel) else torch.device("cpu")


def pieces(bucket: Bucket, buffer: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(parameter, its elements) for each member of a bucket."""
    return [(m.parameter, buffer[m.offset : m.offset + m.numel]) for m in bucket.members]


def shaped_like(piece: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A view of 1-D `piece` with the parameter's shape, and its strides where it has no gaps.

    Optimizers take their fast path only where gradient and parameter agree in strides (channels-last
    weights).
    """
    if parameter.is_complex():
        piece = torch.view_as_complex(piece.view(-1, 2))
    if _without_gaps(parameter):
        return piece.as_strided(parameter.size(), parameter.stride())
    return piece.view(parameter.size())


def _without_gaps(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return tensor.numel() > 0

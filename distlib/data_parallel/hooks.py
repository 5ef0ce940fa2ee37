"""A bucket as a communication hook sees it: the interface of torch's `dist.GradBucket`.

A hook is `hook(bucket) -> Future or Tensor`; what it gives back replaces the bucket's gradients, so it
averages itself. torch's own hooks take a state first: `functools.partial(fp16_compress_hook, process_group)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from distlib.buckets import Bucket
from distlib.data_parallel.memory import pieces, shaped_like

CommHook = Callable[["GradientBucket"], "torch.futures.Future[Any] | torch.Tensor"]


class GradientBucket:
    """One bucket of gradients on its way: valid until the hook's future is complete."""

    def __init__(self, bucket: Bucket, buffer: torch.Tensor, parameters: Sequence[torch.Tensor], is_last: bool) -> None:
        self._bucket = bucket
        self._buffer = buffer
        self._parameters = parameters
        self._is_last = is_last

    def index(self) -> int:
        """Buckets are numbered in the order in which they are communicated."""
        return self._bucket.index

    def buffer(self) -> torch.Tensor:
        """The gradients of this rank, 1-D, without gaps; the hook may write into it."""
        return self._buffer

    def set_buffer(self, tensor: torch.Tensor) -> None:
        """Put another tensor of the same length (of any dtype) in the place of the buffer."""
        if tensor.numel() != self._bucket.numel:
            raise ValueError(
                f"bucket {self.index()}: set_buffer wants {self._bucket.numel} elements, got {tensor.numel()}"
            )
        self._buffer = tensor

    def gradients(self) -> list[torch.Tensor]:
        """Views of the buffer, shaped like the parameters."""
        return [shaped_like(p, self._parameters[i]) for i, p in pieces(self._bucket, self._buffer)]

    def parameters(self) -> list[torch.Tensor]:
        """The parameters whose gradients the bucket holds, in the order of the buffer."""
        return [self._parameters[member.parameter] for member in self._bucket.members]

    def is_last(self) -> bool:
        """Whether this is the last bucket of the backward."""
        return self._is_last


class Handed:
    """A bucket handed to a hook: done when the hook's future is."""

    def __init__(self, hook: CommHook, bucket: GradientBucket, into: torch.Tensor) -> None:
        self._index = bucket.index()
        self._into = into
        self._given = hook(bucket)
        if not isinstance(self._given, (torch._C.Future, torch.Tensor)):  # what torch.futures.Future extends
            raise TypeError(
                f"comm_hook must give a Future or a Tensor, got {type(self._given).__name__} for bucket {self._index}"
            )

    def done(self) -> bool:
        return isinstance(self._given, torch.Tensor) or self._given.done()

    def wait(self) -> None:
        """Wait for the future and put its value into the bucket's own memory."""
        value = self._given if isinstance(self._given, torch.Tensor) else self._given.wait()
        if isinstance(value, (list, tuple)) and len(value) == 1:  # a collective's own future has a list
            value = value[0]
        if not isinstance(value, torch.Tensor) or value.numel() != self._into.numel():
            got = f"{value.numel()} elements" if isinstance(value, torch.Tensor) else type(value).__name__
            raise RuntimeError(
                f"comm_hook must give the {self._into.numel()} averaged gradients of bucket {self._index} as "
                f"one tensor, got {got}"
            )
        if value.data_ptr() != self._into.data_ptr() or value.dtype != self._into.dtype:
            self._into.copy_(value.view(-1))

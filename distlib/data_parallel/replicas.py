"""Parameters and buffers made equal on all ranks: packed as bytes, broadcast in few large messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distlib.comm.group import Group
from distlib.data_parallel.memory import empty

_CHUNK_BYTES = 32 << 20
_ALIGN = 16  # bytes: no dtype is wider


@torch.no_grad()
def broadcast(group: Group, tensors: Sequence[torch.Tensor], src: int, device: torch.device) -> None:
    """Overwrite `tensors`, of any dtypes, with those of group rank `src`. All ranks must call it."""
    if group.size == 1:
        return
    start = 0
    while start < len(tensors):
        stop, total = start, 0
        while stop < len(tensors) and (stop == start or total + _padded(tensors[stop]) <= _CHUNK_BYTES):
            total += _padded(tensors[stop])
            stop += 1
        Packed(group, tensors[start:stop], device).broadcast(tensors[start:stop], src)
        start = stop


class Packed:
    """Room for a set of tensors in one message, kept from one broadcast to the next."""

    def __init__(self, group: Group, like: Sequence[torch.Tensor], device: torch.device) -> None:
        self._group = group
        self._bytes = empty(group, max(1, sum(map(_padded, like))), torch.uint8, device)
        self._views, end = [], 0
        for tensor in like:
            piece = self._bytes[end : end + tensor.numel() * tensor.element_size()]
            self._views.append(piece.view(tensor.dtype).view(tensor.shape))
            end += _padded(tensor)

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """`tensors` have the shapes and dtypes given at construction; every rank must call it."""
        if self._group.rank == src:
            torch._foreach_copy_(self._views, list(tensors))
        self._group.broadcast(self._bytes, src)
        if self._group.rank != src:
            torch._foreach_copy_(list(tensors), self._views)


class ModuleBuffers:
    """The buffers of a module (running statistics and the like), looked up anew each time.

    Modules may assign a new tensor to a buffer instead of writing into it, so the place is kept, not the
    tensor.
    """

    def __init__(self, module: torch.nn.Module, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._places: list[tuple[str, dict[str, torch.Tensor | None], str]] = []
        seen: set[int] = set()
        for prefix, owner in module.named_modules():
            for key, tensor in owner._buffers.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    name = f"{prefix}.{key}" if prefix else key
                    self._places.append((name, owner._buffers, key))
        self._kinds = [(t.shape, t.dtype) for t in self.tensors()]
        self._packed: Packed | None = None

    def __len__(self) -> int:
        return len(self._places)

    def tensors(self) -> list[torch.Tensor]:
        found = []
        for name, owner, key in self._places:
            tensor = owner.get(key)
            if tensor is None:
                raise RuntimeError(
                    f"rank {self._group.rank}: buffer {name!r} was removed after wrapping; keep it, or wrap "
                    "with broadcast_buffers=False"
                )
            found.append(tensor)
        return found

    def broadcast(self, src: int) -> None:
        """Overwrite the buffers with those of group rank `src`. Every rank must call it."""
        tensors = self.tensors()
        for (name, _, _), tensor, (shape, dtype) in zip(self._places, tensors, self._kinds, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype:
                raise RuntimeError(
                    f"rank {self._group.rank}: buffer {name!r} was {tuple(shape)} {dtype} when it was "
                    f"wrapped and is {tuple(tensor.shape)} {tensor.dtype} now; keep its shape, or wrap with "
                    "broadcast_buffers=False"
                )
        if self._packed is None:
            self._packed = Packed(self._group, tensors, self._device)
        self._packed.broadcast(tensors, src)


def describe(tensor: torch.Tensor, with_strides: bool) -> str:
    """What must agree between ranks before bytes may be exchanged."""
    strides = f", strides {tuple(tensor.stride())}" if with_strides else ""
    frozen = "" if tensor.requires_grad or not with_strides else ", frozen"
    return f"shape {tuple(tensor.shape)}{strides}, {str(tensor.dtype).removeprefix('torch.')}{frozen}"


def _padded(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN

"""Tensors in the arena: memory that all ranks of the host see, on which collectives copy nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from distlib import native
from distlib.comm.meeting import Host

if TYPE_CHECKING:
    import torch.distributed as dist


def arena_empty(size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised (in fact zero) tensor in this process's arena. Its memory goes back with its last view.

    Raises MemoryError naming what was asked for and what is there.
    """
    elements = math.prod(size)
    if elements == 0:
        return torch.empty(tuple(size), dtype=dtype)
    block = Host.here().arena.allocate(elements * dtype.itemsize, True)
    return torch.frombuffer(block, dtype=torch.uint8, count=elements * dtype.itemsize).view(dtype).view(tuple(size))


def is_registered(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in this process's arena, so that collectives read it where it is."""
    if native.core() is None or tensor.device.type != "cpu" or tensor.numel() == 0:
        return False
    return Host.here().arena.contains(tensor.data_ptr(), tensor.untyped_storage().nbytes()) is not None


def _shape(size: tuple[int | Sequence[int], ...]) -> tuple[int, ...]:
    first = size[0] if len(size) == 1 else size
    shape = tuple(int(n) for n in first) if isinstance(first, Sequence) else (int(first),)  # type: ignore[arg-type]
    if any(n < 0 for n in shape):
        raise ValueError(f"registered_empty: negative size in {shape}")
    return shape


def registered_empty(
    *size: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """A tensor in shared memory: the ranks of this host read and write it in collectives where it lies.

    Any rank may call it, alone. `size` is ints or one sequence, as for `torch.empty`; the tensor is contiguous, on the
    CPU. Where registering cannot help (the C++ core is missing, or the rank shares its host with no other of `group`;
    None: of the world, if there is one), it is an ordinary tensor: results are the same.

    Raises MemoryError, with what there is and what was asked for, and ValueError for a negative size.
    """
    shape = _shape(size)
    if native.core() is None:
        return torch.empty(shape, dtype=dtype)
    if group is not None:
        from distlib.comm.group import Group

        return Group.of(group).registered_empty(*shape, dtype=dtype)
    return arena_empty(shape, dtype)

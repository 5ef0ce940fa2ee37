"""Parameters of a block in its forward and in its recomputation: the same memory, with the same values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from distlib.activations.live import has_storage


class _Memory:
    """Where a tensor lies. It keeps no memory alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._layout = (tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Memory) and self._layout == other._layout and self._storage == other._storage

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class _Slot:
    """What hung in `owner` as `key` in the forward."""

    name: str
    owner: nn.Module
    key: str
    tensor: torch.Tensor
    version: int
    memory: _Memory | None

    def is_written(self) -> bool:
        return self.tensor._version != self.version

    def is_replaced(self) -> bool:
        """By another tensor, on other memory. Nothing can be told of one that got other data (DeepSpeed gathers and
        frees parameters so), of slots that a wrapper has emptied, of pieces of sharded parameters, which take turns
        with whole ones, and of tensors without memory of their own."""
        store = self.owner._parameters
        now = store[self.key] if self.key in store else None
        if now is None or now is self.tensor or _takes_turns(now) or _takes_turns(self.tensor):
            return False
        memory = _memory(now)
        if memory is None or self.memory is None:
            return False
        return now._version != self.version or memory != self.memory


class Parameters:
    """What a block computes with in a forward. Make it before; `require_unchanged()` before the recomputation.

    name: of the block, for errors.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block = name
        self._slots = [
            _Slot(f"{path}.{key}" if path else key, owner, key, tensor, tensor._version, _memory(tensor))
            for path, owner in block.named_modules()
            for key, tensor in owner._parameters.items()
            if tensor is not None
        ]

    def require_unchanged(self) -> None:
        """Raises:
        RuntimeError: a parameter was written since, or another tensor hangs in its place.
        """
        for slot in self._slots:
            if slot.is_written():
                raise RuntimeError(
                    f"parameter {self._block}.{slot.name} that backward needs has been modified by an inplace "
                    f"operation since the forward: it is at version {slot.tensor._version}, and was at version "
                    f"{slot.version}. Call .backward() before the optimizer's step"
                )
            if slot.is_replaced():
                raise RuntimeError(
                    f"parameter {self._block}.{slot.name} is not the one that the forward computed with, so the "
                    "recomputation would be of something else: it was replaced, as by the end of "
                    "torch.func.functional_call. Call .backward() before it is, or use "
                    'checkpoint_activations(policy="offload"), which recomputes nothing'
                )


def _memory(tensor: torch.Tensor) -> _Memory | None:
    """None of tensors without memory of their own: on meta, sparse, of subclasses or transforms that wrap others."""
    return _Memory(tensor) if _memory_is_told(tensor) else None


def _memory_is_told(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor) and has_storage(tensor)


def _takes_turns(tensor: torch.Tensor) -> bool:
    """Whether it is a whole parameter of ShardedDataParallel, or a piece of one."""
    return hasattr(tensor, "_distlib_comes_and_goes") or hasattr(tensor, "_distlib_shard")

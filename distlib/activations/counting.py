"""Counts the bytes that a forward saves for backward, while it runs: by unique memory."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch.multiprocessing.reductions import StorageWeakRef

from distlib.activations.live import has_storage, storage_key, version

TOP = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]  # of saved tensors: pack, unpack


class Account:
    """Bytes of saved tensors by unique memory: what an earlier block counted is not counted again."""

    def __init__(self) -> None:
        self._seen: dict[int, StorageWeakRef] = {}

    def add(self, tensors: dict[int, Any], transient: int = 0) -> int:
        """Bytes of the memory that is new here. tensors: by storage_key; `transient` bytes are new in any case."""
        total = transient
        for key, tensor in tensors.items():
            weak = self._seen.get(key)
            if weak is None or weak.expired():
                storage = tensor.untyped_storage()
                self._seen[key] = StorageWeakRef(storage)
                total += storage.nbytes()
        return total


class Staying:
    """A saved tensor that stays. Without its history: the operation that made it holds it, and it would hold that."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version

    def get(self) -> torch.Tensor:
        require_version(self.tensor, self.version, self.tensor.dtype, self.tensor.size())
        return self.tensor


class Standing:
    """A saved tensor that somebody else has, too: a parameter, a buffer, an input. Its version is checked, as autograd
    does; not that of a sharded parameter, whose memory is freed and filled meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = version(tensor)

    def get(self) -> torch.Tensor:
        base = self.tensor if self.tensor._base is None else self.tensor._base
        if not takes_turns(base) and not self.tensor.is_inference():
            require_version(self.tensor, self.version, self.tensor.dtype, self.tensor.size())
        return self.tensor


def takes_turns(tensor: torch.Tensor) -> bool:
    """Whether it is a whole parameter of ShardedDataParallel, or a piece of one."""
    return hasattr(tensor, "_distlib_comes_and_goes") or hasattr(tensor, "_distlib_shard")


def stay(tensor: torch.Tensor) -> Any:
    """What autograd is to hold of a saved tensor that stays."""
    return Standing(tensor) if tensor.grad_fn is None else Staying(tensor)


def come_back(packed: Any) -> torch.Tensor:
    """The tensor that `stay` was given."""
    return packed.get() if isinstance(packed, Staying | Standing) else packed


def require_version(counter: torch.Tensor, version: int, dtype: torch.dtype, size: torch.Size) -> None:
    """counter: shares the version counter of what was saved."""
    if counter._version != version:
        raise RuntimeError(
            f"a {dtype} tensor of shape {list(size)} that backward needs has been modified by an inplace operation "
            f"since it was saved: it is at version {counter._version}, and was at version {version}"
        )


class Counting(torch.autograd.graph.saved_tensors_hooks):
    """Around a forward: `nbytes` is of what it saves. Hooks that are there already, as those of a checkpoint, see it as
    without.

    own: memory that is not counted. around: those hooks, where the caller knows them.
    """

    def __init__(self, account: Account, own: Collection[int], around: Hooks | None = None) -> None:
        found = self._found = [0]  # the hooks do not hold this, which holds them: a graph is gone when nobody has it
        pack, unpack = around or _hooks_around() or (stay, come_back)

        def count(tensor: torch.Tensor) -> Any:
            if has_storage(tensor) and storage_key(tensor) not in own:
                found.append(account.add({storage_key(tensor): tensor}))
            return pack(tensor)

        super().__init__(count, unpack)

    @property
    def nbytes(self) -> int:
        return sum(self._found)


def _hooks_around() -> Hooks | None:
    """Torch tells from 2.8 on. Before, those of a checkpoint are found where it was called: they are its frame's."""
    if TOP is not None:
        return TOP(True)
    checkpoint = inspect.unwrap(checkpointing.checkpoint).__code__
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller.f_code is not checkpoint:
        caller = caller.f_back
    if caller is None:
        return None
    hooks = checkpointing._checkpoint_hook(caller.f_locals["gen"].gi_frame.f_locals["new_frame"])
    return hooks.pack_hook, hooks.unpack_hook

"""Parameters of a block in its forward and in its recomputation: the same memory, with the same values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from distlib.activations.counting import takes_turns
from distlib.activations.live import has_storage, version


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
    requires_grad: bool

    @classmethod
    def of(cls, name: str, owner: nn.Module, key: str, tensor: torch.Tensor) -> _Slot:
        return cls(name, owner, key, tensor, version(tensor), _memory(tensor), tensor.requires_grad)

    def is_turned(self) -> bool:
        """Whether it was frozen since, or is trained again."""
        return self.tensor.requires_grad != self.requires_grad and self.tensor.is_leaf

    def is_written(self) -> bool:
        return version(self.tensor) != self.version

    def is_replaced(self) -> bool:
        """By another tensor, on other memory. Nothing can be told of one that got other data (DeepSpeed gathers and
        frees parameters so), of slots that a wrapper has emptied, of pieces of sharded parameters, which take turns
        with whole ones, and of tensors without memory of their own."""
        store = self.owner._parameters
        now = store[self.key] if self.key in store else None
        if now is None or now is self.tensor or takes_turns(now) or takes_turns(self.tensor):
            return False
        memory = _memory(now)
        if memory is None or self.memory is None:
            return False
        return version(now) != self.version or memory != self.memory


class Parameters:
    """What a block computes with in a forward. Make it before, call `ran()` after it; `recomputing()` is for around
    the recomputation.

    parts: the block's modules by name, itself as "". name: of the block, for errors.
    """

    def __init__(self, parts: dict[str, nn.Module], name: str) -> None:
        self._block = name
        self._slots = [
            _Slot.of(f"{path}.{key}" if path else key, owner, key, tensor)
            for path, owner in parts.items()
            for key, tensor in owner._parameters.items()
            if tensor is not None
        ]
        self._written: list[_Slot] = []

    def ran(self) -> None:
        """What the forward itself wrote is what backward needs."""
        for place, slot in enumerate(self._slots):
            if slot.is_written():
                self._slots[place] = now = replace(slot, version=version(slot.tensor))
                self._written.append(now)

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Parameters have gradients as in the forward. A forward that writes its parameters does so again here: they
        must be the same after it, as where it bounds them.

        Raises:
            RuntimeError: a parameter was written since the forward, or another tensor hangs in its place; or the
                recomputation has changed one.
        """
        self._require_unchanged()
        with self._turned_back(), self._writing_again():
            yield

    @contextlib.contextmanager
    def _turned_back(self) -> Iterator[None]:
        """Those of a discriminator, say, are frozen in the generator's forward: trained, they would save more."""
        turned = [slot for slot in self._slots if slot.is_turned()]
        for slot in turned:
            slot.tensor.requires_grad_(slot.requires_grad)
        try:
            yield
        finally:
            for slot in turned:
                slot.tensor.requires_grad_(not slot.requires_grad)

    @contextlib.contextmanager
    def _writing_again(self) -> Iterator[None]:
        if not self._written:
            yield
            return
        with _disable_current_modes():
            values = [slot.tensor.detach().clone() for slot in self._written]
        try:
            with contextlib.ExitStack() as versions:
                for slot in self._written:
                    versions.enter_context(torch.autograd._unsafe_preserve_version_counter(slot.tensor))
                yield
        finally:
            self._require_same(values)

    def _require_same(self, values: list[torch.Tensor]) -> None:
        for slot, value in zip(self._written, values, strict=True):
            with torch.no_grad(), _disable_current_modes():
                if torch.equal(slot.tensor, value):
                    continue
                with torch.autograd._unsafe_preserve_version_counter(slot.tensor):
                    slot.tensor.copy_(value)
            raise RuntimeError(
                f"the forward of block {self._block!r} changes its parameter {slot.name}, and changes it again where "
                'it is recomputed: change it outside of the forward, use policy="offload", or leave the block out '
                "(blocks=)"
            )

    def _require_unchanged(self) -> None:
        for slot in self._slots:
            if slot.is_written():
                raise RuntimeError(
                    f"parameter {self._block}.{slot.name} that backward needs has been modified by an inplace "
                    f"operation since the forward: it is at version {version(slot.tensor)}, and was at version "
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
    return type(tensor) in (torch.Tensor, nn.Parameter) and has_storage(tensor)

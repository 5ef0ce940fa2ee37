"""Bytes of tensors that are alive, and their peak: every storage that an operation makes, until it is gone."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_key(tensor: torch.Tensor) -> int:
    """Which memory the tensor looks at; the same for its views. Valid while that memory is alive."""
    return tensor.untyped_storage()._cdata


def has_storage(leaf: Any) -> bool:
    """Whether it is a tensor whose memory can be counted: strided, not of the meta device, and not one that a
    transform (torch.func) has put around another."""
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.layout is torch.strided
        and not leaf.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(leaf)
    )


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """Those of a pytree, and of dataclasses and mappings in it."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_of(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_of([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def version(tensor: torch.Tensor) -> int:
    """How often it was written. Those made in inference mode count nothing, and can't be written outside of it."""
    return 0 if tensor.is_inference() else tensor._version


class LiveBytes(TorchDispatchMode):
    """Counts bytes made by operations inside of the context, backward included, while they live.

    `live`: now; `peak`: the most since `reset_peak()`. What was there before does not count, nor what a kernel
    allocates and frees within itself. Costs some tens of microseconds an operation: for measuring only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize] = {}
        self._lock = threading.RLock()  # storages die in any thread, also while the lock is held

    def reset_peak(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if has_storage(leaf)}
        result = func(*args, **(kwargs or {}))
        self._add(leaf for leaf in tree_leaves(result) if has_storage(leaf) and storage_key(leaf) not in given)
        return result

    def adopt(self, tensors: Iterable[Any]) -> None:
        """Counts memory that no operation made, as what came in a message."""
        self._add(tensor for tensor in tensors if has_storage(tensor))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for ending in list(self._known.values()):
            ending.detach()

    def _add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            with self._lock:
                if key in self._known or not nbytes:
                    continue
                self._known[key] = weakref.finalize(storage, self._gone, key, nbytes)
                self._known[key].atexit = False
                self.live += nbytes
                self.peak = max(self.peak, self.live)

    def _gone(self, key: int, nbytes: int) -> None:
        with self._lock:
            self._known.pop(key, None)
            self.live -= nbytes

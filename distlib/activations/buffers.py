"""Buffers of a block: the recomputation sees what the forward saw, and leaves them as it found them. In the place of a
changed one hangs a copy of what it held, which the recomputed graph may save. A forward that changes them, such as that
of a batch norm, would do so twice without it; and others may write them before backward.

    self.mean.mul_(0.9)           written: the values before are kept
    self.mean = 0.9 * self.mean   replaced: the tensor that hung there before is kept
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from distlib.activations.live import has_storage, storage_key, version

SMALL = 1 << 20  # bytes: up to it, what a buffer held before is copied in every forward, in case it is written
Hanging = list[tuple[nn.Module, dict[str, torch.Tensor | None]]]  # modules, and the buffers that hang in each


@dataclass(frozen=True)
class _Before:
    """A buffer before the forward. copy: of its values; None of one that is too large, or can't be written."""

    name: str
    buffer: torch.Tensor
    version: int
    copy: torch.Tensor | None

    def written(self) -> bool:
        """Not all who write do count up a version: batch norms don't."""
        return version(self.buffer) != self.version

    def write(self, value: torch.Tensor) -> None:
        """To the graph nothing changes: what stood there before is written back at the end."""
        with torch.no_grad(), _disable_current_modes(), torch.autograd._unsafe_preserve_version_counter(self.buffer):
            _in_memory(self.buffer).copy_(_in_memory(value))

    def differs(self) -> bool:
        """Whether it holds something else by now. To compare values on a GPU would stop it: there all small buffers
        count as changed. While a run is recorded there are no values, and sparse ones can't be compared: there the
        version tells."""
        no_values = self.buffer.is_meta or isinstance(self.buffer, FakeTensor)
        if self.copy is None or no_values or self.buffer.layout is not torch.strided:
            return self.written()
        return self.buffer.device.type != "cpu" or not torch.equal(self.buffer, self.copy)


class BufferGuard:
    """Of one forward of a module. Make it before the forward, call `ran()` after it.

    most: bytes of the largest buffer whose values are copied; a sparse one counts as if it were dense.
    """

    def __init__(self, module: nn.Module, most: float = SMALL) -> None:
        self._module = module
        self._hung = _hanging(module)
        self._hang_now: Hanging = []
        self._now: dict[str, torch.Tensor] = {}
        self._before = []
        for name, buffer in module.named_buffers():
            copy = _copied(buffer) if _nbytes(buffer) <= most and not buffer.is_inference() else None
            self._before.append(_Before(name, buffer, version(buffer), copy))

    @classmethod
    def of_any_size(cls, module: nn.Module) -> BufferGuard:
        """Copies all buffers: for a trial, once."""
        return cls(module, math.inf)

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return sum(_nbytes(_in_memory(before.copy)) for before in self._before if before.copy is not None)

    def ran(self) -> None:
        """Raises:
        RuntimeError: a buffer of more than 1 MiB was written, of which there is no copy.
        """
        for before in self._before:
            if before.copy is None and before.written():
                raise RuntimeError(
                    f"the forward of a checkpointed block changes its buffer {before.name!r} of "
                    f"{_nbytes(before.buffer)} bytes, and the recomputation would change it again: buffers above "
                    f"{SMALL} bytes are not restored. Update it outside of the block's forward, or leave the block "
                    "out (blocks=)"
                )

    def undo(self) -> None:
        """The forward was only a trial: buffers are what they were, and hold what they held before."""
        _hang(self._hung)
        for before in self._before:
            if before.copy is not None:
                before.write(before.copy)

    def __enter__(self) -> None:
        for before in self._before:
            if before.copy is None and before.written():
                raise RuntimeError(
                    f"buffer {before.name!r} of a checkpointed block was written between its forward and its backward, "
                    f"which is to recompute it: its {_nbytes(before.buffer)} bytes were not copied, as are those of "
                    f"buffers up to {SMALL}. Call .backward() before it is written"
                )
        with _disable_current_modes():  # these are no operations of the block
            changed = [before for before in self._before if before.differs()]
            self._now = {before.name: _copied(before.buffer) for before in changed}
            instead = {id(before.buffer): _copied(before.copy) for before in changed if before.copy is not None}
        self._hang_now = _hanging(self._module)
        shared = self._in_shared_memory()
        hangs = {id(buffer) for _, store in self._hung for buffer in store.values()} - shared
        stands = {key: copy for key, copy in instead.items() if key in hangs}
        _hang([(part, {key: stands.get(id(b), b) for key, b in store.items()}) for part, store in self._hung])
        for before in changed:
            if before.copy is not None and id(before.buffer) not in stands:
                before.write(before.copy)

    def _in_shared_memory(self) -> set[int]:
        """Buffers of which others are views: a copy of one would not be a view of a copy of the other."""
        of: dict[int, set[int]] = {}
        for before in self._before:
            if has_storage(before.buffer):
                of.setdefault(storage_key(before.buffer), set()).add(id(before.buffer))
        return {one for group in of.values() if len(group) > 1 for one in group}

    def __exit__(self, *_: object) -> None:
        for before in self._before:
            now = self._now.get(before.name, before.copy)
            if now is not None and (before.name in self._now or before.differs()):
                before.write(now)
        _hang(self._hang_now)
        self._now, self._hang_now = {}, []


def _nbytes(buffer: torch.Tensor) -> int:
    return buffer.numel() * buffer.element_size()


def _in_memory(buffer: torch.Tensor) -> torch.Tensor:
    """Without what is expanded: one of them is all of them."""
    for dim in range(buffer.dim() if buffer.layout is torch.strided else 0):
        if buffer.stride(dim) == 0 and buffer.size(dim) > 1:
            buffer = buffer.narrow(dim, 0, 1)
    return buffer


def _copied(buffer: torch.Tensor) -> torch.Tensor:
    """Expanded as it is."""
    inner = _in_memory(buffer.detach())
    return inner.clone() if inner.size() == buffer.size() else inner.clone().expand(buffer.size())


def _hanging(module: nn.Module) -> Hanging:
    """A ScriptModule has no such dict, but one of torch's that is made anew each time."""
    return [(part, dict(part._buffers)) for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]


def _hang(hanging: Hanging) -> None:
    """These buffers, and no others, hang in these modules."""
    for part, buffers in hanging:
        store = part._buffers
        if store.keys() != buffers.keys() or any(store[key] is not buffer for key, buffer in buffers.items()):
            store.clear()
            store.update(buffers)

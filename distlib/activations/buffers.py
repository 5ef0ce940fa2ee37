"""Buffers that a block's forward changes, such as the running averages of a batch norm: the recomputation sees what
the forward saw, and leaves them as it found them. Without it they would be updated twice.

    self.mean.mul_(0.9)           written: the values before are kept
    self.mean = 0.9 * self.mean   replaced: the tensor that hung there before is kept
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

SMALL = 1 << 20  # bytes: up to it, what a buffer held before is copied in every forward, in case it changes
Hanging = list[tuple[nn.Module, dict[str, torch.Tensor | None]]]  # modules, and the buffers that hang in each


@dataclass(frozen=True)
class _Before:
    """A buffer before the forward. copy: of its values; None of one that is too large."""

    name: str
    buffer: torch.Tensor
    version: int
    copy: torch.Tensor | None

    def changed(self) -> bool:
        """Batch norms change theirs without counting up a version, and to compare values on a GPU would stop it: there
        all small buffers count as changed. While a run is recorded there are no values, and sparse ones can't be
        compared: there the version tells."""
        if self.buffer._version != self.version:
            return True
        no_values = self.buffer.is_meta or isinstance(self.buffer, FakeTensor)
        if self.copy is None or no_values or self.buffer.layout is not torch.strided:
            return False
        return self.buffer.device.type != "cpu" or not torch.equal(self.buffer, self.copy)


class BufferGuard:
    """Of one forward of a module. Make it before the forward, call `ran()` after it.

    most: bytes of the largest buffer whose values are copied; a sparse one counts as if it were dense.
    """

    def __init__(self, module: nn.Module, most: float = SMALL) -> None:
        self._module = module
        self._hung = _hanging(module)
        self._hang_now: Hanging = []
        self._now: list[torch.Tensor] = []
        self._before = []
        for name, buffer in module.named_buffers():
            copy = buffer.detach().clone() if _nbytes(buffer) <= most else None
            self._before.append(_Before(name, buffer, buffer._version, copy))

    @classmethod
    def of_any_size(cls, module: nn.Module) -> BufferGuard:
        """Copies all buffers: for a trial, once."""
        return cls(module, math.inf)

    def ran(self) -> None:
        """Forgets values that did not change.

        Raises:
            RuntimeError: a buffer of more than 1 MiB was written, of which there is no copy.
        """
        self._before = [before for before in self._before if before.changed()]
        for before in self._before:
            if before.copy is None:
                raise RuntimeError(
                    f"the forward of a checkpointed block changes its buffer {before.name!r} of "
                    f"{_nbytes(before.buffer)} bytes, and the recomputation would change it again: buffers above "
                    f"{SMALL} bytes are not restored. Update it outside of the block's forward, or leave the block "
                    "out (blocks=)"
                )

    def undo(self) -> None:
        """The forward was only a trial: buffers are what they were, and hold what they held before."""
        _hang(self._hung)
        self._write_before()

    def __enter__(self) -> None:
        with _disable_current_modes():  # these are no operations of the block
            self._now = [before.buffer.detach().clone() for before in self._before]
        self._hang_now = _hanging(self._module)
        self.undo()

    def __exit__(self, *_: object) -> None:
        self._write(self._now)
        _hang(self._hang_now)
        self._now, self._hang_now = [], []

    def _write_before(self) -> None:
        self._write([before.copy for before in self._before if before.copy is not None])

    def _write(self, values: Sequence[torch.Tensor]) -> None:
        for before, value in zip(self._before, values, strict=True):
            # To the graph nothing changes: what stood there before is written back at the end.
            with (
                torch.no_grad(),
                _disable_current_modes(),
                torch.autograd._unsafe_preserve_version_counter(before.buffer),
            ):
                before.buffer.copy_(value)


def _nbytes(buffer: torch.Tensor) -> int:
    return buffer.numel() * buffer.element_size()


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

"""Buffers that a block's forward changes, such as the running averages of a batch norm: the recomputation sees what
the forward saw, and leaves them as it found them. Without it they would be updated twice."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

SMALL = 1 << 20  # bytes: up to it, what a buffer held before is copied in every forward, in case it changes


class BufferGuard:
    """Of one forward of a block. Make it before the forward, call `ran()` after it."""

    def __init__(self, block: nn.Module) -> None:
        self._now: list[torch.Tensor | None] = []
        self._before: list[tuple[str, torch.Tensor, int, torch.Tensor | None]] = []
        for name, buffer in block.named_buffers():
            copy = buffer.detach().clone() if buffer.nbytes <= SMALL else None
            self._before.append((name, buffer, buffer._version, copy))

    def ran(self) -> None:
        """Forgets buffers that did not change. Batch norms change theirs without counting up a version, and to compare
        values on a GPU would stop it: there all small buffers count as changed.

        Raises:
            RuntimeError: a buffer of more than 1 MiB changed, of which there is no copy.
        """
        changed = []
        for name, buffer, version, copy in self._before:
            small = copy is not None and (buffer.device.type != "cpu" or not torch.equal(buffer, copy))
            if buffer._version == version and not small:
                continue
            if copy is None:
                raise RuntimeError(
                    f"the forward of a checkpointed block changes its buffer {name!r} of {buffer.nbytes} bytes, and "
                    f"the recomputation would change it again: buffers above {SMALL} bytes are not restored. Update "
                    "it outside of the block's forward, or leave the block out (blocks=)"
                )
            changed.append((name, buffer, version, copy))
        self._before = changed

    def undo(self) -> None:
        """The forward was only a trial: buffers get back what they held before."""
        self._write([copy for _, _, _, copy in self._before])

    def __enter__(self) -> None:
        if self._before:
            with _disable_current_modes():  # these are no operations of the block
                self._now = [buffer.detach().clone() for _, buffer, _, _ in self._before]
        self._write([copy for _, _, _, copy in self._before])

    def __exit__(self, *_: object) -> None:
        if self._before:
            self._write(self._now)
        self._now = []

    def _write(self, values: list[torch.Tensor | None]) -> None:
        for (_, buffer, _, _), value in zip(self._before, values, strict=True):
            assert value is not None
            # To the graph nothing changes: what stood there before is written back at the end.
            with (
                torch.no_grad(),
                _disable_current_modes(),
                torch.autograd._unsafe_preserve_version_counter(buffer),
            ):
                buffer.copy_(value)

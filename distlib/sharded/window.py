"""What `.grad` means between optimizer steps: micro-steps under no_sync(), then one backward that averages.

micro-step     .grad of every piece is lent: unfinished sums, which show whether the user zeroes them
last backward  .grad of what any rank used: averages; of the rest: what it was before (None: optimizers skip it)
next window    what .grad held when it began is added at its end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from distlib.sharded.flat import Flat
from distlib.sharded.gradients import Accumulator


@dataclass
class _Grads:
    """Of one flat, by parameter."""

    flat: Flat
    used: bytearray = field(default_factory=bytearray)  # it had a gradient in this window, on this rank
    lent: bytearray = field(default_factory=bytearray)  # it had no `.grad` but for this window
    versions: list[int] = field(default_factory=list)  # of `.grad`, after the last micro-step


class Window:
    """See the file. flats: the trained ones, in the order in which they are reduced. rank: for messages."""

    def __init__(self, flats: Sequence[Flat], accumulator: Accumulator, rank: int) -> None:
        self._accumulator = accumulator
        self._rank = rank
        self._grads = [_Grads(flat) for flat in flats]
        self._carried: dict[tuple[int, int], torch.Tensor] = {}  # by flat and parameter: what `.grad` held
        self.open = False  # an optimizer step is still owed micro-steps: parameters cannot have changed

    @property
    def may_step(self) -> bool:
        """Whether an optimizer would find averaged gradients now; the same on all ranks."""
        return not self.open and any(piece.grad is not None for g in self._grads for piece in g.flat.pieces)

    @property
    def used(self) -> bytes:
        """A flag for every parameter: it had a gradient in this window, on this rank."""
        return b"".join(g.used for g in self._grads)

    def begin(self) -> None:
        """A window begins: keep what `.grad`s hold."""
        self._accumulator.allocate()
        self._carried = {}
        for index, g in enumerate(self._grads):
            g.used, g.lent = bytearray(len(g.flat.names)), bytearray(len(g.flat.names))
            for i, piece in enumerate(g.flat.pieces):
                if piece.grad is not None:
                    self._carried[index, i] = piece.grad.clone()

    def use(self, index: int, i: int) -> None:
        """Parameter i of a flat had a gradient."""
        self._grads[index].used[i] = 1

    def zeroed(self) -> list[tuple[int, int]]:
        """Between micro-steps: the (flat, parameter)s that the user set to None or to zeros, which start again.

        Where some were written to, the host waits for a device: once, to see whether they are zeros. Raises
        RuntimeError, by name, where `.grad` was changed in any other way.
        """
        found: list[tuple[int, int]] = []
        written: dict[tuple[int, int], torch.Tensor] = {}
        for index, g in enumerate(self._grads):
            grads = self._accumulator.grads(g.flat)
            for i, (piece, grad) in enumerate(zip(g.flat.pieces, grads, strict=True)):
                if piece.grad is grad and grad._version == g.versions[i]:
                    continue
                if piece.grad is None:
                    g.lent[i] = 1
                elif piece.grad is not grad:
                    raise self._changed(index, i)
                else:
                    written[index, i] = grad
                found.append((index, i))
        if written:
            remain = torch.stack([grad.any() for grad in written.values()]).tolist()
            for (index, i), left in zip(written, remain, strict=True):
                if left:
                    raise self._changed(index, i)
        for index, i in found:
            self._grads[index].used[i] = 0
            self._carried.pop((index, i), None)
        return found

    def _changed(self, index: int, i: int) -> RuntimeError:
        return RuntimeError(
            f"rank {self._rank}: .grad of {self._grads[index].flat.names[i]!r} was changed between micro-steps under "
            "no_sync(), where it holds unfinished sums. Change it after the backward that averages gradients; "
            "zero_grad() may come at any time"
        )

    def lend(self) -> None:
        """A micro-step is over: every parameter has a `.grad`, used on this rank or not."""
        self.open = True
        for g in self._grads:
            grads = self._accumulator.grads(g.flat)
            for i, (piece, grad) in enumerate(zip(g.flat.pieces, grads, strict=True)):
                if piece.grad is None:
                    g.lent[i] = 1
                if piece.grad is not grad:
                    piece.grad = grad
            g.versions = [grad._version for grad in grads]

    def close(self, used: bytes) -> None:
        """The accumulator holds averages: hand them out. used: flags as of the property, of any rank."""
        for (index, i), before in self._carried.items():
            self._accumulator.grads(self._grads[index].flat)[i].add_(before)
        self._carried = {}
        self.open = False
        flags = iter(used)
        for g in self._grads:
            grads = self._accumulator.grads(g.flat)
            for i, piece in enumerate(g.flat.pieces):
                if next(flags):
                    piece.grad = grads[i]
                elif g.lent[i]:
                    piece.grad = None

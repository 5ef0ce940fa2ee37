"""Slots: memory that one rank fills, and another of its host uses in place until it lets go of it.

    in the arena of the sender, mapped by the receiver

    | state | tensor 0 | tensor 1 | ...          state: written by the sender  RETURNED -> LENT
    0       64         (each on a cache line)           and by the receiver    LENT -> TAKEN -> RETURNED

The sender copies into a free slot, or into a new one: it never waits for a slot, so slots add no way to a deadlock. A
receiver's tensors have the slot as their storage. When the last storage ends, whoever held it (a user, autograd), the
receiver writes RETURNED into the slot; the sender reads that when it looks for a free one. No message is needed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from distlib.comm.meeting import Host

_LINE, _PAGE = 64, 4096  # bytes of a cache line, and of a page: the arena gives whole ones
_RETURNED, _LENT, _TAKEN = 0, 1, 2
_KEEP_STEPS = 16  # a free slot that no step used for so long is given back to the arena


class Shaped(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of so many bytes lie in a slot, and the bytes of the slot."""
    offsets, end = [], _LINE
    for size in sizes:
        offsets.append(end)
        end += -(-size // _LINE) * _LINE
    return offsets, end


class Slot:
    """Memory of at least `nbytes` in this process's arena. Raises MemoryError naming what there is."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // _PAGE) * _PAGE
        self.block = Host.here().arena.allocate(self.nbytes, True)
        self.offset: int = self.block.offset
        self.borrower: Any = None  # the arena of the rank that it is lent to: tells whether that rank lives
        self.used_in = 0  # the step that used it last
        self._state = memoryview(self.block)[:4].cast("I")

    @property
    def returned(self) -> bool:
        return self._state[0] == _RETURNED

    @property
    def taken(self) -> bool:
        """Whether the receiver has come for it."""
        return self._state[0] != _LENT

    def fill(self, tensors: Sequence[torch.Tensor], offsets: Sequence[int], borrower: Any) -> None:
        """Copies the tensors in. The caller then tells the receiver, which orders the copy before its reads."""
        with torch.no_grad():
            for tensor, offset in zip(tensors, offsets, strict=True):
                if tensor.numel():
                    _at(self.block, offset, tensor).copy_(tensor)
        self.borrower = borrower
        self._state[0] = _LENT


class SlotPool:
    """The slots of this rank for one pipeline: as many as were lent at once, whomever to."""

    def __init__(self) -> None:
        _drop_returned()
        self._free: list[Slot] = []
        self._lent: list[Slot] = []
        self._step = 0
        weakref.finalize(self, _outlive, self._lent).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory held."""
        return sum(slot.nbytes for slot in (*self._free, *self._lent))

    def __len__(self) -> int:
        return len(self._free) + len(self._lent)

    def fill(self, tensors: Sequence[torch.Tensor], borrower: Any) -> Slot:
        """Copies CPU tensors, of any strides, into a slot for a rank of this host. Raises MemoryError."""
        offsets, nbytes = layout([tensor.nbytes for tensor in tensors])
        slot = self._take(nbytes)
        slot.used_in = self._step
        slot.fill(tensors, offsets, borrower)
        self._lent.append(slot)
        return slot

    def _take(self, nbytes: int) -> Slot:
        """The smallest free slot that fits and is not twice too large; of equals, the one used last."""
        self._collect()
        fitting = [slot for slot in self._free if nbytes <= slot.nbytes <= 2 * max(nbytes, _PAGE)]
        if not fitting:
            return Slot(nbytes)
        slot = min(fitting, key=lambda slot: (slot.nbytes, -slot.used_in))
        self._free.remove(slot)
        return slot

    def _collect(self) -> None:
        returned = [slot for slot in self._lent if slot.returned]
        self._free += returned
        for slot in returned:
            self._lent.remove(slot)

    def end_step(self) -> None:
        """Gives back what no step used for long: after a change of shapes, old slots do not stay."""
        self._collect()
        self._step += 1
        self._free = [slot for slot in self._free if self._step - slot.used_in <= _KEEP_STEPS]

    def close(self) -> None:
        """Frees all slots, those that others hold when they let go of them."""
        self._free.clear()
        _outlive(self._lent)
        _drop_returned()


def borrow(memory: Any, offset: int, specs: Sequence[Shaped]) -> tuple[torch.Tensor, ...]:
    """The tensors in a slot of another rank, in place: `specs` as they were filled in, `memory` that rank's arena.

    They are this rank's, to read and to write, for as long as anything holds their storage; then the slot goes back by
    itself. They are no views, and have no gradient.
    """
    offsets, nbytes = layout([spec.nbytes for spec in specs])
    # The storages hold `slot`; the flag must not, or it would never be let go of.
    slot, flag = memory.view(offset, nbytes), memoryview(memory.view(offset, 4)).cast("I")
    flag[0] = _TAKEN
    weakref.finalize(slot, _give_back, flag, os.getpid()).atexit = False
    return tuple(_at(slot, at, spec) for at, spec in zip(offsets, specs, strict=True))


def _at(memory: Any, offset: int, spec: Shaped) -> torch.Tensor:
    """The tensor at an offset: contiguous, with a storage of its own size."""
    if not spec.nbytes:
        return torch.empty(tuple(spec.shape), dtype=spec.dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=spec.nbytes, offset=offset)
    return torch.empty(0, dtype=spec.dtype).set_(flat.untyped_storage(), 0, tuple(spec.shape))


def _give_back(flag: memoryview, pid: int) -> None:
    """The last storage on a slot ended, in whatever thread."""
    if os.getpid() != pid:  # a forked child drops its copies; the slot is its parent's
        return
    # What was read from the slot must have been read before the flag says so. Processors that reorder loads and stores
    # (x86 does not) keep to that around a lock that is let go and taken again.
    fence = threading.Lock()
    with fence:
        pass
    with fence:
        flag[0] = _RETURNED


# Slots of pools that are gone, held by others still.
_outliving: list[Slot] = []


def _outlive(lent: list[Slot]) -> None:
    _outliving.extend(lent)
    lent.clear()


def _drop_returned() -> None:
    _outliving[:] = [slot for slot in _outliving if not slot.returned and slot.borrower.alive]

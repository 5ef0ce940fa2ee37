"""Slots: memory that one rank fills, and another of its host uses in place until it lets go of it.

    in the arena of the sender, mapped by the receiver

    | state | tensor 0 | tensor 1 | ...          state: written by the sender  RETURNED -> LENT
    0       64         (each on a cache line)           and by the receiver    LENT -> TAKEN -> RETURNED

The sender copies into a free slot, or into a new one: it never waits for a slot, so slots add no way to a deadlock. A
receiver's tensors have the slot as their storage. When the last storage ends, whoever held it (a user, autograd), the
receiver writes RETURNED into the slot; the sender reads that when it looks for a free one. No message is needed.

What is made in a slot needs no copy. The sender reserves one beforehand, and its operators write their results into its
rooms. It is lent as it is if nothing of the sender has a storage on it any more, and is then the receiver's as any
other. If something has (what autograd saved, a view that a module keeps), it stays the sender's, and another slot gets
a copy.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from distlib import settings
from distlib.comm.meeting import Host

_LINE, _PAGE = 64, 4096  # bytes of a cache line, and of a page: the arena gives whole ones
_RETURNED, _LENT, _TAKEN = 0, 1, 2
_LEAST_IN_ROOMS = 2048  # KiB
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


def least_in_rooms() -> int:
    """From how many bytes on a message is made in its slot, if that can be: the copy of a smaller one takes less."""
    return settings.integer("DISTLIB_ROOMS_KB", _LEAST_IN_ROOMS, 0, "KiB") << 10


class Room:
    """A place in a slot for one tensor of a message, which an operator of the sender may make there.

    used: whether it was asked for. kept: whether the sender still had a storage on the slot when it was sent.
    """

    def __init__(self, memory: memoryview, offset: int, nbytes: int) -> None:
        self._memory: memoryview | None = memory
        self._offset, self._nbytes, self._address = offset, nbytes, 0
        self.used = self.kept = False

    def fits(self, dtype: torch.dtype, shape: Sequence[int]) -> bool:
        """Whether such a tensor fills the room."""
        return math.prod(shape) * dtype.itemsize == self._nbytes

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A new tensor that fills the room, contiguous and not initialised. To be asked for once."""
        assert self._memory is not None and not self.used and self.fits(dtype, shape)
        self.used = True
        made = _on(self._memory, self._offset, self._nbytes, dtype, shape)
        self._address = made.data_ptr()
        return made

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies where one was made here, and as a receiver would find it. Until the message is sent."""
        assert self._memory is not None
        same = self.used and tensor.data_ptr() == self._address
        return same and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())

    def close(self) -> None:
        """Nothing is made here any more, and it holds no memory."""
        self._memory = None


class Slot:
    """Memory of at least `nbytes` in this process's arena. Raises MemoryError naming what there is."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // _PAGE) * _PAGE
        self.block = Host.here().arena.allocate(self.nbytes, True)
        self.offset: int = self.block.offset
        self.lendings = 0  # how often it was lent
        self.borrower: Any = None  # the arena of the rank that it is lent to: tells whether that rank lives
        self.used_in = 0  # the step that used it last
        self.rooms: tuple[Room, ...] = ()  # from when it is reserved until it is lent
        self._here: weakref.ref[memoryview] | None = None  # alive while this process has a storage on the slot
        self._state = memoryview(self.block)[:4].cast("I")

    @property
    def returned(self) -> bool:
        """Whether no receiver has it."""
        return self._state[0] == _RETURNED

    @property
    def free(self) -> bool:
        """Whether nobody has it, this process included."""
        return self.returned and (self._here is None or self._here() is None)

    def was_taken(self, lending: int) -> bool:
        """Whether the receiver of that lending has come for it. It may since have been lent again, to another."""
        return self.lendings != lending or self._state[0] != _LENT

    def reserve(self, specs: Sequence[Shaped]) -> None:
        """Makes a room for each tensor of a message."""
        memory = memoryview(self.block)
        self._here = weakref.ref(memory)
        offsets, _ = layout([spec.nbytes for spec in specs])
        self.rooms = tuple(Room(memory, at, spec.nbytes) for at, spec in zip(offsets, specs, strict=True))

    def is_as_made(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether whatever was made in a room is the tensor that the room is for."""
        return all(not room.used or room.holds(t) for t, room in zip(tensors, self.rooms, strict=True))

    def fill(self, tensors: Sequence[torch.Tensor], offsets: Sequence[int]) -> None:
        """Copies in the tensors that were not made there."""
        made = [room.used for room in self.rooms] or [False] * len(tensors)
        with torch.no_grad():
            for tensor, offset, is_there in zip(tensors, offsets, made, strict=True):
                if tensor.numel() and not is_there:
                    _at(self.block, offset, tensor).copy_(tensor)

    def close_rooms(self) -> bool:
        """The sender's tensors are gone, as far as they were its. Returns whether nobody of this process has one."""
        rooms, self.rooms = self.rooms, ()
        for room in rooms:
            room.close()
        mine = self._here is not None and self._here() is not None
        for room in rooms:
            room.kept = mine
        return not mine

    def lend(self, borrower: Any) -> None:
        """The caller then tells the receiver, which orders all writes before its reads."""
        self.borrower = borrower
        self.lendings += 1
        self._state[0] = _LENT


class SlotPool:
    """The slots of this rank for one pipeline: as many as were in use at once, whomever they were lent to."""

    def __init__(self) -> None:
        _drop_returned()
        self._free: list[Slot] = []
        self._taken: list[Slot] = []
        self._step = 0
        weakref.finalize(self, _outlive, self._taken).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory held."""
        return sum(slot.nbytes for slot in (*self._free, *self._taken))

    def __len__(self) -> int:
        return len(self._free) + len(self._taken)

    def fill(self, tensors: list[torch.Tensor], borrower: Any, reserved: Slot | None = None) -> Slot:
        """Lends CPU tensors, of any strides, to a rank of this host. Raises MemoryError.

        reserved: a slot with rooms for these tensors; the list is then emptied, and should be all that holds them.
        """
        offsets, nbytes = layout([tensor.nbytes for tensor in tensors])
        if reserved is not None and reserved.is_as_made(tensors):
            reserved.fill(tensors, offsets)
            tensors.clear()
            slot = reserved if reserved.close_rooms() else self._copy_of(reserved, nbytes)
        else:
            if reserved is not None:
                reserved.close_rooms()
            slot = self._take(nbytes)
            slot.fill(tensors, offsets)
        slot.lend(borrower)
        return slot

    def _copy_of(self, kept: Slot, nbytes: int) -> Slot:
        """Another slot with what is in one that the sender keeps, but its state."""
        slot = self._take(nbytes)
        memoryview(slot.block)[_LINE:nbytes] = memoryview(kept.block)[_LINE:nbytes]
        return slot

    def reserve(self, specs: Sequence[Shaped]) -> Slot:
        """A slot with rooms for tensors that are to be sent together; to be given to `fill`. Raises MemoryError."""
        slot = self._take(layout([spec.nbytes for spec in specs])[1])
        slot.reserve(specs)
        return slot

    def _take(self, nbytes: int) -> Slot:
        """The smallest free slot that fits and is not twice too large; of equals, the one used last; else a new one."""
        self._collect()
        fitting = [slot for slot in self._free if nbytes <= slot.nbytes <= 2 * max(nbytes, _PAGE)]
        slot = min(fitting, key=lambda slot: (slot.nbytes, -slot.used_in)) if fitting else Slot(nbytes)
        if fitting:
            self._free.remove(slot)
        slot.used_in = self._step
        self._taken.append(slot)
        return slot

    def _collect(self) -> None:
        free = [slot for slot in self._taken if slot.free]
        self._free += free
        for slot in free:
            self._taken.remove(slot)

    def end_step(self) -> None:
        """Gives back what no step used for long: after a change of shapes, old slots do not stay."""
        self._collect()
        self._step += 1
        self._free = [slot for slot in self._free if self._step - slot.used_in <= _KEEP_STEPS]

    def close(self) -> None:
        """Frees all slots, those that others hold when they let go of them."""
        self._free.clear()
        _outlive(self._taken)
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
    return _on(memory, offset, spec.nbytes, spec.dtype, spec.shape)


def _on(memory: Any, offset: int, nbytes: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset)
    return torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), 0, tuple(shape))


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


def _outlive(taken: list[Slot]) -> None:
    _outliving.extend(slot for slot in taken if not slot.returned)  # storages of this process hold their memory alone
    taken.clear()


def _drop_returned() -> None:
    _outliving[:] = [slot for slot in _outliving if not slot.returned and slot.borrower.alive]

"""Saved tensors move out of the way in forward and come back in backward, just before they are needed.

    forward    pack a   pack b   pack c           copies run behind; at most `window` bytes wait for theirs
    store      [ a ][ b ][ c ]
    backward   need c   need b   need a           while c is used, b and a are on their way: at most `window` bytes

Both may be more by what blocks that keep their tensors do not need at the moment (lending.py). The order of need is
recorded in one step and prefetched in those after it; it is a hint, another order works too. Memory that several saved
tensors look at moves once.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distlib.activations.counting import Standing, come_back, require_version, stay
from distlib.activations.lending import Held, Lending, Loan, Stay
from distlib.activations.live import has_storage, storage_key
from distlib.activations.stores import FileStore, PinnedStore, Store, Transfer

SMALLEST = 64 << 10  # bytes: what is smaller stays
MOSTLY = 16  # a tensor that is less than this part of the memory it looks at stays


class Moved:
    """Memory that moved, or is about to. The slab's piece goes back when the last who may need it is gone.

    waiting, ahead: bytes of those whose memory is still here, and of those whose memory is back; until they are asked
    for.
    """

    def __init__(
        self,
        store: Store,
        source: torch.Tensor,
        device: torch.device,
        index: int,
        tensor: torch.Tensor,
        waiting: Held,
        ahead: Held,
    ) -> None:
        self.nbytes = source.numel()
        self.device = device
        self.index = index
        self.process = os.getpid()
        self.version = tensor._version
        # Shares the tensor's version counter without its memory: changes in place are noticed as if it were here.
        self.counter = tensor.detach()
        self.counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self.source: torch.Tensor | None = source
        self.back: tuple[torch.Tensor, Transfer] | None = None
        self.uses = 0  # saved tensors that look at it
        self.asked = 0
        self._store = store
        self._offset = store.reserve(self.nbytes)
        weakref.finalize(self, store.slab.give, self._offset, self.nbytes).atexit = False
        self.waits, self.is_ahead = Loan(waiting, self.nbytes), Loan(ahead, self.nbytes)
        for loan in (self.waits, self.is_ahead):
            weakref.finalize(self, loan.give).atexit = False
        self.waits.take()
        me = weakref.ref(self)  # a copy under way does not keep alive what nobody needs any more
        self.write: Transfer = store.write(source, self._offset, lambda: _forget_source(me))

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether it is what this tensor, which looks at the same memory, holds now. One that counts changes of its own
        tells nothing of those that others made."""
        return self.version == tensor._version and _count_together(tensor, self.counter)

    def fetch(self) -> None:
        """Begins to come back, unless it is under way or still here."""
        if self.back is None and self.source is None:
            self.back = self._store.read(self._offset, self.nbytes, self.device)
            self.is_ahead.take()

    def drop(self) -> None:
        """What came back too early goes again; it comes once more when it is needed."""
        if self.back is not None and not self.asked:
            self.back = None
            self.is_ahead.give()

    def get(self) -> torch.Tensor:
        """Its bytes. Those of a tensor never moved, if its turn had not come."""
        source = self.source
        self.asked += 1
        self.waits.give()  # from here on it is the backward's
        if source is not None:
            if not self.write.cancel():
                self.write.wait()  # under way: it ends soon, and tells if it failed
                self.source = source if self.asked % self.uses else None  # others look at it, too
            return source
        self.write.wait()
        self.fetch()
        assert self.back is not None
        self.is_ahead.give()
        memory, transfer = self.back
        transfer.wait()
        if self.asked % self.uses == 0:  # the last who looks at it; with retain_graph it is asked for again later
            self.back = None
        return memory


def _forget_source(reference: weakref.ref[Moved]) -> None:
    moved = reference()
    if moved is not None:
        moved.source = None
        moved.waits.give()


class _Ticket:
    """What autograd holds in place of a saved tensor."""

    def __init__(self, tensor: torch.Tensor, moved: Moved) -> None:
        self.moved = moved
        self.like = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())


def _count_together(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both tensors have one version counter."""
    before = other._version
    with torch.autograd._unsafe_preserve_version_counter(one):
        torch.autograd.graph.increment_version(one)
        return other._version != before


class Offloader:
    """Hooks for saved tensors: use `hooks(block)` around a block's forward.

    folder: where the file of CPU tensors lies; those of a GPU go to pinned host memory. window: bytes that may wait for
    being written, and that may be back ahead of need; None: those of the largest block so far. lends: whether blocks
    that stay lend what they do not need meanwhile.
    """

    def __init__(self, folder: Path | None, window: int | None = None, lends: bool = False) -> None:
        self.folder = folder
        self.window = window
        self.lends = lends
        self.moved_bytes = 0  # since the last step began
        self.prefetched = 0  # times that memory was on its way when it was needed
        self.waited = 0  # times that it was not
        self._stores: dict[torch.device, Store] = {}
        self._here: dict[int, tuple[Any, weakref.ref[Moved]]] = {}  # storage -> (weak storage, its Moved)
        self._writing: deque[weakref.ref[Moved]] = deque()
        self._waiting, self._ahead = Held(), Held()
        self._tape: list[weakref.ref[Moved]] = []  # of this step, in order of packing
        self._alive = 0
        self._needed: list[int] = []  # indices in order of first need: of this step
        self._order: list[int] = []  # and of the last
        self._place: dict[int, int] = {}
        self._backward_ran = False  # since the last forward began
        self._since = 0  # place in the tape where the first forward after the last backward began
        self._process = os.getpid()
        self._largest_block = 8 << 20
        self._lending = Lending()

    def __reduce__(self) -> tuple:
        return Offloader, (self.folder, self.window, self.lends)  # a copy has files and threads of its own

    def prepare(self, device: torch.device) -> None:
        """Opens the store of a device, with its errors. Called with the devices of the blocks before the first step."""
        if device in self._stores:
            return
        if device.type != "cpu":
            self._stores[device] = PinnedStore(device)
        elif self.folder is None:
            raise ValueError(
                'policy="offload" of modules on the CPU needs a folder on a disk to move tensors to: pass folder='
            )
        else:
            self._stores[device] = FileStore(self.folder)

    def hooks(self, block: nn.Module) -> _BlockHooks:
        """A context for one forward of `block`. Its `kept` and `moved` are bytes by storage afterwards."""
        self._in_this_process()
        return _BlockHooks(self, block)

    def _in_this_process(self) -> None:
        """One that was forked has files and threads of its own, too."""
        if self._process != os.getpid():
            self.__init__(self.folder, self.window, self.lends)  # type: ignore[misc]

    def settle(self) -> None:
        """Returns when nothing waits to be written."""
        self._drain(0)

    @property
    def _own(self) -> int:
        """Bytes that may wait for being written, and that may be back ahead of need, whoever stays."""
        return self.window or self._largest_block

    def _lent(self, room: int, held: Held) -> int:
        """Bytes of `room` that one of both may take, as the other holds so many."""
        return max(0, room - max(0, held.nbytes - self._own))

    # ------------------------------------------------------------ blocks that stay

    def make_room(self, nbytes: int) -> None:
        """A block is about to keep so many bytes: what was lent of them comes back."""
        self._in_this_process()
        room = self._lending.room - nbytes
        self._drain(self._own + self._lent(room, self._ahead))
        self._reclaim(self._own + self._lent(room, self._waiting))

    def _reclaim(self, left: int) -> None:
        """At most so many bytes are back ahead of need: what is needed last goes again."""
        for index in reversed(self._order):
            if self._ahead.nbytes <= left:
                return
            moved = self._tape[index]() if index < len(self._tape) else None
            if moved is not None:
                moved.drop()

    def stay(self, nbytes: int) -> Stay:
        """It has kept them."""
        return self._lending.stay(nbytes)

    def left(self, stay: Stay) -> None:
        """Its backward has run: there is room for what is needed next, beside what still waits to be written."""
        if stay.end():
            self._prefetch(0, self._own + self._lending.room - self._waiting.nbytes)

    # ------------------------------------------------------------ forward

    def pack(self, tensor: torch.Tensor) -> _Ticket:
        storage = tensor.untyped_storage()
        known = self._here.get(storage._cdata)
        moved = known[1]() if known is not None and not known[0].expired() else None
        if moved is None or not moved.is_of(tensor):
            moved = self._move(tensor)
        moved.uses += 1
        return _Ticket(tensor, moved)

    def _move(self, tensor: torch.Tensor) -> Moved:
        self.prepare(tensor.device)
        if self._step_is_over():
            self._begin_step()
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        self._drain(max(0, self._own + self._lent(self._lending.room, self._ahead) - nbytes))
        with torch.no_grad():
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        store, index = self._stores[tensor.device], len(self._tape)
        moved = Moved(store, source, tensor.device, index, tensor, self._waiting, self._ahead)
        self._alive += 1
        weakref.finalize(moved, self._died, moved.process).atexit = False
        self._tape.append(weakref.ref(moved))
        self._here[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), weakref.ref(moved))
        self._writing.append(weakref.ref(moved))
        self.moved_bytes += nbytes
        return moved

    def _step_is_over(self) -> bool:
        """Nothing of it is alive any more; or at least nothing that was moved since some backward before the last one:
        then what is, somebody holds who runs no backward, as a loss of validation."""
        if not self._alive:
            return True
        if not self._backward_ran:
            return False
        self._backward_ran = False
        since, self._since = self._since, len(self._tape)
        return all(moved() is None for moved in self._tape[since:])

    def _begin_step(self) -> None:
        self._backward_ran, self._since = False, 0
        self._lending.begin_step()
        self._order = self._needed or self._order
        self._place = {index: place for place, index in enumerate(self._order)}
        self._needed = []
        self._tape = []
        self._writing.clear()
        self._here.clear()
        self.moved_bytes = 0

    def _died(self, process: int) -> None:
        self._alive -= process == self._process

    def _drain(self, left: int) -> None:
        """Waits until at most `left` bytes wait to be written. Raises what went wrong in the worker."""
        while self._writing:
            moved = self._writing[0]()
            if moved is not None and moved.source is not None and not moved.asked:
                if self._waiting.nbytes <= left:
                    return
                try:
                    moved.write.wait()
                except RuntimeError:  # told once here; whatever else failed tells when it is needed
                    self._writing.clear()
                    raise
            self._writing.popleft()

    def ran(self, nbytes: int) -> None:
        """A block's forward moved so many bytes."""
        self._largest_block = max(self._largest_block, nbytes)

    # ------------------------------------------------------------ backward

    def unpack(self, ticket: _Ticket) -> torch.Tensor:
        moved = ticket.moved
        if moved.process != os.getpid():
            raise RuntimeError(
                f"a saved tensor was moved by process {moved.process}, which has forked since: run backward where the "
                "forward ran"
            )
        require_version(moved.counter, moved.version, ticket.like[0], ticket.like[2])
        self._backward_ran = True
        mine = moved.index < len(self._tape) and self._tape[moved.index]() is moved  # not of a step long ago
        if moved.asked == 0 and mine:
            self._needed.append(moved.index)
        if moved.source is None:
            self.prefetched += moved.back is not None
            self.waited += moved.back is None
        moved.fetch()
        place = self._place.get(moved.index) if mine else None
        if place is not None:
            now = moved.nbytes if moved.back is not None and moved.asked == 0 else 0  # it is not ahead any more
            self._prefetch(place + 1, now + self._own + max(0, self._lending.room - self._waiting.nbytes))
        memory = moved.get()
        dtype, offset, size, stride = ticket.like
        with torch.no_grad():
            return torch.empty(0, dtype=dtype, device=memory.device).set_(
                memory.untyped_storage(), offset, size, stride
            )

    def _prefetch(self, place: int, most: int) -> None:
        """Begins to bring back what is needed from this place in the order on, until `most` bytes are ahead of need."""
        for after in self._order[place:]:
            moved = self._tape[after]() if after < len(self._tape) else None
            if moved is None or moved.source is not None or moved.back is not None or moved.asked:
                continue
            if self._ahead.nbytes + moved.nbytes > most:
                return
            moved.fetch()


class _BlockHooks(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors of one forward of a block: parameters, their views and small tensors stay, others move."""

    def __init__(self, offloader: Offloader, block: nn.Module) -> None:
        self._offloader = offloader
        self._own = storages_of(block)
        self.kept: dict[int, int] = {}
        self.moved: dict[int, int] = {}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return tensor
        nbytes = tensor.untyped_storage().nbytes()
        key = storage_key(tensor)
        if key in self._own or _is_of_leaf(tensor):
            return Standing(tensor)
        odd = tensor.is_conj() or tensor.is_neg() or tensor.is_meta or tensor._is_zerotensor()
        if odd or nbytes < SMALLEST or tensor.nbytes * MOSTLY < nbytes:
            self.kept[key] = nbytes
            return stay(tensor)
        self.moved[key] = nbytes
        return self._offloader.pack(tensor)

    def _unpack(self, packed: Any) -> torch.Tensor:
        return self._offloader.unpack(packed) if isinstance(packed, _Ticket) else come_back(packed)

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._offloader.ran(sum(self.moved.values()))


def storages_of(block: nn.Module) -> frozenset[int]:
    """The memory of a block's parameters and buffers, as `storage_key` names it."""
    tensors: list[Iterable[torch.Tensor]] = [block.parameters(), block.buffers()]
    return frozenset(storage_key(t) for some in tensors for t in some if has_storage(t) or t.is_meta)


def _is_of_leaf(tensor: torch.Tensor) -> bool:
    """A parameter of another block, or a view of one: somebody else holds it, and may free and fill it again."""
    base = tensor._base if tensor._base is not None else tensor
    return base.is_leaf and base.requires_grad

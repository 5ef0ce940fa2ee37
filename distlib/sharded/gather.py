"""How whole parameters come about: from memory that all ranks of the partition group share, or by gathers.

    forward     need(0)      need(1)      need(2)
    gathers     0  1  2 ---> 3 ---------> 4 ...        `prefetch` = 2 units ahead, in the order of the step before
    freed              0 --------> 1 ...

A `Source` is asked for units; it never decides which ones are used when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from distlib.comm.group import Group
from distlib.comm.work import CollectiveError, Work
from distlib.sharded import quantize
from distlib.sharded.flat import Flat
from distlib.sharded.groups import Grid
from distlib.sharded.options import Options

_SAME_FORWARDS = (
    "Every rank must run the same forwards of ShardedDataParallel; for one rank alone enter summon_full_params() on all"
)
_REMEMBERED = 4096  # gathers, for the check that ranks agree: an evaluation may go on without end


@dataclass(eq=False)
class UnitState:
    """A unit at run time: its flats, and whether its parameters are whole now."""

    name: str
    flats: list[Flat]
    is_root: bool
    whole: bool = False
    coming: list[tuple[Work | None, Flat, torch.Tensor | None]] | None = None  # gathers under way
    secondary: list[torch.Tensor] = field(default_factory=list)  # kept for the backward gather: one per flat


class Source(Protocol):
    """Where whole parameters come from."""

    frees: bool  # whether `release` gives memory back: else nobody need call it
    held: bool  # `release` does nothing: units stay whole until it is False again

    def begin(self, written: bool) -> None:
        """A forward of the whole model begins; `written`: the optimizer may have written since the last."""
        ...

    def end(self) -> None:
        """A forward without a backward to follow is over."""
        ...

    def rest(self) -> None:
        """A forward is over, or raised, and an optimizer may be next: what comes now runs after gathers under way. They
        read what it writes, and in stages 1 and 2 write it. No host waits for a device."""
        ...

    def need(self, unit: UnitState) -> None:
        """Returns when the unit's parameters are whole."""
        ...

    def ahead(self, units: Iterable[UnitState]) -> None:
        """These units will be needed next."""
        ...

    def release(self, unit: UnitState, for_backward: bool = False) -> None:
        """The unit is not needed until it is asked for again; `for_backward`: its backward will ask."""
        ...

    def asked(self) -> list[str]:
        """The units whose gathers were started since the last call, in order: ranks of a partition group must agree."""
        ...


def refresh(flats: Sequence[Flat], replication: Group | None) -> None:
    """What optimizers wrote goes into the compute copies, and from the replica that wrote it to the others."""
    works = []
    for flat in flats:
        flat.write_compute()
        if flat.subparts > 1 and replication is not None:
            works.append(replication.all_gather(flat.shard, flat.own, async_op=True))
    for work in works:
        assert work is not None
        work.wait()


class SharedMapping:
    """One mapping for all ranks of the partition group: a gather is a barrier, and moves nothing."""

    frees = False
    held = False

    def __init__(self, flats: Sequence[Flat], grid: Grid) -> None:
        self._flats = flats
        self._grid = grid

    def begin(self, written: bool) -> None:
        if written:
            refresh(self._flats, self._grid.replication)
            self._barrier()

    def end(self) -> None:
        self._barrier()  # nobody writes while another still reads

    def rest(self) -> None:
        """Nothing is under way."""

    def _barrier(self) -> None:
        if self._grid.gather is None:
            return
        try:
            self._grid.gather.barrier()
        except CollectiveError as error:
            raise CollectiveError(f"{error}. {_SAME_FORWARDS}", error.code) from error

    def need(self, unit: UnitState) -> None:
        unit.whole = True

    def ahead(self, units: Iterable[UnitState]) -> None:
        """Nothing is under way, ever."""

    def release(self, unit: UnitState, for_backward: bool = False) -> None:
        """Nothing to give back."""

    def asked(self) -> list[str]:
        """There are no gathers that could go wrong."""
        return []


class Gathers:
    """All-gathers in the partition group. keep: parameters stay whole until the optimizer writes (stages 1 and 2)."""

    def __init__(
        self, units: Sequence[UnitState], grid: Grid, options: Options, keep: bool, secondary: Group | None
    ) -> None:
        self._units = units
        self._grid = grid
        self._keep = keep
        self.frees = not keep
        self.held = False
        self._hierarchical = None if options.hierarchical == "auto" else bool(options.hierarchical)
        self._quantized = options.gather_dtype is torch.int8
        self._secondary = secondary
        self._asked: deque[str] = deque(maxlen=_REMEMBERED)

    def begin(self, written: bool) -> None:
        if not written:
            return
        for unit in self._units:
            self._settle(unit)  # started in vain before: its values are old, and it reads what is written now
            unit.whole = False
            unit.secondary = []  # of a forward that had no backward
        refresh([flat for unit in self._units for flat in unit.flats], self._grid.replication)
        if self._keep:  # memory for all is there, and all ranks gather the same whatever they then use
            self.ahead(self._units)

    def end(self) -> None:
        for unit in self._units:
            self.release(unit)

    def rest(self) -> None:
        for unit in self._units:
            for work, flat, _ in unit.coming or ():
                if work is not None and (self._keep or flat.device.type != "cpu"):
                    work.wait()

    def need(self, unit: UnitState) -> None:
        if unit.whole:
            return
        if unit.coming is None:
            self._start(unit)
        self._settle(unit)
        unit.whole = True

    def ahead(self, units: Iterable[UnitState]) -> None:
        for unit in units:
            if not unit.whole and unit.coming is None:
                self._start(unit)

    def release(self, unit: UnitState, for_backward: bool = False) -> None:
        if self._keep or self.held:
            return
        self._settle(unit)
        if unit.whole and for_backward and self._secondary is not None and not unit.is_root:
            unit.secondary = [self._slice(flat).clone() for flat in unit.flats]
        elif not for_backward:
            unit.secondary = []
        unit.whole = False
        for flat in unit.flats:
            flat.whole.untyped_storage().resize_(0)

    def asked(self) -> list[str]:
        asked = list(self._asked)
        self._asked.clear()
        return asked

    # ------------------------------------------------------------ inside

    def _start(self, unit: UnitState) -> None:
        """Starts the unit's gathers, each into memory that its parameters look at."""
        self._asked.append(unit.name or "root")
        unit.coming = []
        secondary, unit.secondary = unit.secondary, []
        for i, flat in enumerate(unit.flats):
            nbytes = flat.whole.numel() * flat.whole.element_size()
            if flat.whole.untyped_storage().nbytes() != nbytes:
                flat.whole.untyped_storage().resize_(nbytes)
            unit.coming.append(self._gather(flat, secondary[i] if secondary else None))

    def _gather(self, flat: Flat, secondary: torch.Tensor | None) -> tuple[Work | None, Flat, torch.Tensor | None]:
        group = self._grid.gather
        # Saved activations refer to the parameters: gathering the same values again is no change to them.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(flat.whole):
            if group is None:
                flat.whole.copy_(flat.shard)
                return None, flat, None
            if secondary is not None and self._secondary is not None:
                return self._secondary.all_gather(flat.whole, secondary, async_op=True), flat, None
            if self._quantized and flat.compute.is_floating_point:
                mine = quantize.pack(flat.shard)
                packed = torch.empty(group.size * mine.numel(), dtype=torch.uint8, device=flat.device)
                work = group.all_gather(packed, mine, async_op=True, hierarchical=self._hierarchical)
                return work, flat, packed
            return (
                group.all_gather(flat.whole, flat.shard, async_op=True, hierarchical=self._hierarchical),
                flat,
                None,
            )

    def _settle(self, unit: UnitState) -> None:
        """Waits for gathers under way; then their values are there."""
        coming, unit.coming = unit.coming, None
        for work, flat, packed in coming or ():
            if work is not None:
                work.wait()
            if packed is not None:
                rows = packed.view(flat.layout.parts, -1)
                with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(flat.whole):
                    quantize.unpack_rows(rows, flat.whole.view(flat.layout.parts, -1))
        if coming is not None:
            unit.whole = True

    def _slice(self, flat: Flat) -> torch.Tensor:
        """This rank's slice of a whole buffer among the ranks of its secondary partition."""
        assert self._secondary is not None
        size = flat.whole.numel() // self._secondary.size
        return flat.whole[self._secondary.rank * size : (self._secondary.rank + 1) * size]


class Order:
    """The order in which units were used: a hint for what comes next, never a requirement."""

    def __init__(self, units: Sequence[UnitState], prefetch: int) -> None:
        self._last = list(units)
        self._seen: list[UnitState] = []
        self._at = 0
        self._prefetch = prefetch

    def begin_forward(self) -> None:
        """A forward of the whole model begins."""
        self._seen = []
        self._at = 0

    def end_forward(self) -> None:
        """It ended: its order is the hint for the next."""
        if self._seen:
            self._last = self._seen

    def visit(self, unit: UnitState) -> Sequence[UnitState]:
        """A unit's forward begins. Returns those that are expected next."""
        if unit not in self._seen:
            self._seen.append(unit)
        if unit in self._last:
            self._at = self._last.index(unit) + 1
        return self._last[self._at : self._at + self._prefetch]

    def before(self, unit: UnitState) -> Sequence[UnitState]:
        """A unit's backward begins. Returns those that are expected next: the ones used before it in forward."""
        if unit not in self._last:
            return []
        at = self._last.index(unit)
        return self._last[max(0, at - self._prefetch) : at][::-1]

"""The ledger: calls and bytes per operation, group and link, counted where they move, and what they should be beside
it.

Bytes are those of this rank: on "same host" what it reads from and writes to other ranks' memory, "between hosts"
what it sends. The count comes from the core's copy loops and from the sizes given to the network; `expected` from
the formulas.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distlib.shown import Shown

if TYPE_CHECKING:
    from rich.console import RenderableType

    from distlib.comm.group import Group


@dataclass(frozen=True)
class Row:
    """What one operation of one group moved over one kind of link, on this rank."""

    op: str
    group: str
    link: str
    calls: int
    bytes: int


@dataclass
class _Count:
    calls: int = 0
    bytes: int = 0
    expected: int = 0


@dataclass
class Ledger(Shown):
    """Counts since the start, or since `reset()`. Any rank may look at its own; nothing is communicated."""

    _counts: dict[tuple[str, str, str], _Count] = field(default_factory=dict)
    _arrivals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _groups: weakref.WeakSet[Group] = field(default_factory=weakref.WeakSet)
    _waited_ns: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # ---- written by comm

    def add(self, op: str, group: str, link: str, bytes: int, expected: int) -> None:
        """One call."""
        with self._lock:
            count = self._counts.setdefault((op, group, link), _Count())
            count.calls += 1
            count.bytes += bytes
            count.expected += expected

    def add_wait(self, nanoseconds: int) -> None:
        """Time that this rank spent waiting for others inside collectives."""
        with self._lock:
            self._waited_ns += nanoseconds

    # ---- read by users

    @property
    def rows(self) -> list[Row]:
        """What was counted."""
        return [Row(*key, calls=c.calls, bytes=c.bytes) for key, c in self._settled().items()]

    def expected(self) -> list[Row]:
        """The same rows, with the bytes that the formulas give."""
        return [Row(*key, calls=c.calls, bytes=c.expected) for key, c in self._settled().items()]

    def total_bytes(self, link: str | None = None) -> int:
        """Bytes counted, on one link ("same host", "between hosts") or on both."""
        return sum(row.bytes for row in self.rows if link in (None, row.link))

    @property
    def seconds(self) -> float:
        """Seconds in collectives as their callers saw them: time in `wait()` and in synchronous calls."""
        self._settled()
        return self._waited_ns * 1e-9

    @property
    def lateness(self) -> dict[int, float]:
        """Mean seconds by which each rank (global) entered collectives after the first one of its group did."""
        return self._mean_lateness(None).get("", {})

    @property
    def arrivals(self) -> dict[str, dict[int, float]]:
        """The same by label, such as "bucket 3" of `DataParallel`."""
        return {label: late for label, late in self._mean_lateness("by label").items() if label}

    def _mean_lateness(self, by: str | None) -> dict[str, dict[int, float]]:
        sums: dict[str, dict[int, tuple[float, int]]] = {}
        for group in self._alive():
            for label, late in group.lateness().items():
                into = sums.setdefault(label if by else "", {})
                for rank, (seconds, calls) in late.items():
                    before = into.get(rank, (0.0, 0))
                    into[rank] = (before[0] + seconds, before[1] + calls)
        return {label: {r: s / c for r, (s, c) in sorted(late.items())} for label, late in sums.items()}

    @property
    def slowest_rank(self) -> int | None:
        """The rank that the others wait for most: the latest to arrive. None before any collective of two ranks."""
        late = self.lateness
        return max(late, key=lambda r: late[r]) if len(late) > 1 else None

    def reset(self) -> None:
        """Starts again from zero."""
        self._settled()
        with self._lock:
            self._counts.clear()
            self._waited_ns = 0
        for group in self._alive():
            group.reset_lateness()

    def _alive(self) -> Iterator[Group]:
        return iter([group for group in self._groups if not group.closed])

    def _settled(self) -> dict[tuple[str, str, str], _Count]:
        for group in self._alive():
            group.sweep()
        with self._lock:
            return dict(sorted(self._counts.items()))

    def __rich__(self) -> RenderableType:
        from rich.table import Table

        slow = self.slowest_rank
        caption = f"{self.seconds:.2f} s in collectives" + ("" if slow is None else f"; slowest rank: {slow}")
        table = Table(title="Communication of this rank", caption=caption)
        for column in ("operation", "group", "link"):
            table.add_column(column)
        for column in ("calls", "bytes", "expected"):
            table.add_column(column, justify="right")
        for row, expected in zip(self.rows, self.expected(), strict=True):
            table.add_row(row.op, row.group, row.link, f"{row.calls:,}", f"{row.bytes:,}", f"{expected.bytes:,}")
        return table


_ledger = Ledger()


def ledger() -> Ledger:
    """This process's ledger."""
    return _ledger


def expected_bytes(kind: str, n: int, me: int, root: int, sent: int, received: int, sliced: bool) -> int:
    """Bytes that rank `me` of `n` on one host reads from and writes to others, by formula.

    sent, received: bytes of this rank's input and output. sliced: an all-reduce or reduce in which each rank sums one
    slice (2 M (n-1)/n on average; slices are whole cache lines, so ranks differ a little), else each sums all.
    """
    others = n - 1
    if kind in ("send", "recv"):
        return 0 if me == root else sent + received
    if kind in ("barrier",) or n == 1:
        return 0
    if kind == "all_reduce":
        return 2 * sent * others // n if sliced else sent * others
    if kind == "reduce":
        return sent * others // n + (sent * others // n if me == root else 0)
    if kind == "reduce_scatter":
        return received * others
    if kind in ("all_gather", "all_to_all"):
        return received * others // n
    if kind == "gather":
        return received * others // n if me == root else 0
    return 0 if me == root else received  # broadcast, scatter

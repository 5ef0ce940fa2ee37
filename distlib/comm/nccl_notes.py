"""Ranks compare notes, through the store, about a collective that is late: who has reached which."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

ASK_EVERY = 2.0  # seconds between looks into the store
PATIENCE = 6.0  # seconds in which every rank that lives has looked and answered


@dataclass(frozen=True)
class Note:
    """How far a rank is: what it started last, and the oldest that is not done (number 0: none)."""

    started: int
    started_what: str
    waits_in: int
    waits_what: str


class Notes:
    """One rank's view of a group's notes. `prefix` is the same on all its ranks; labels: their global ranks.

    Nothing here waits: `look` is called again and again by the watch.
    """

    def __init__(self, store: dist.Store, group: str, rank: int, labels: Sequence[int]) -> None:
        self._store = dist.PrefixStore("late/", store)
        self._group, self._rank, self._labels = group, rank, labels
        self._looked = 0.0
        self._asked = 0.0
        self._answered = False

    def look(self, mine: Note, late_after: float | None) -> str | None:
        """Answers who asks; asks where `late_after` (seconds) says that this rank's oldest collective is late. Returns
        the verdict, the same on all ranks, once there is one."""
        now = time.monotonic()
        if late_after is None and now < self._looked + ASK_EVERY:
            return None
        self._looked = now
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        if late_after is not None and not self._asked:
            self._asked = now
            self._store.set("ask", "1")
        if not self._answered and (self._asked or self._store.check(["ask"])):
            self._answered = True
            self._store.set(f"note/{self._rank}", json.dumps(asdict(mine)))
        if not self._asked or late_after is None:
            return None
        keys = [f"note/{r}" for r in range(len(self._labels))]
        if not self._store.check(keys) and now < self._asked + PATIENCE:
            return None
        notes = [
            Note(**json.loads(self._store.get(key))) if self._store.check([key]) else None for key in keys
        ]
        return self.settle(verdict(self._group, self._labels, notes, mine, late_after))

    def settle(self, text: str) -> str:
        """The verdict is `text`, unless there is one: that is returned. Every rank's next look finds it."""
        return self._store.compare_set("verdict", "", text).decode()


def verdict(group: str, labels: Sequence[int], notes: Sequence[Note | None], mine: Note, seconds: float) -> str:
    """One sentence on a late collective, which `mine` waits in: its name, its number, and the ranks at fault."""
    number = mine.waits_in
    where = f"{mine.waits_what} #{number} of group '{group}' was not done within {seconds:.1f} s"
    silent, behind, other, within = [], [], [], []
    for label, note in zip(labels, notes, strict=True):
        if note is None:
            silent.append(f"rank {label}")
        elif note.started < number:
            last = f"its last was {note.started_what} #{note.started}" if note.started else "it has started none"
            behind.append(f"rank {label} ({last})")
        elif note.waits_in == number and note.waits_what != mine.waits_what:
            other.append(f"rank {label} called {note.waits_what}")
        elif note.waits_in == number:
            within.append(f"rank {label}")
    said = []
    if behind:
        said.append(f"not started by {', '.join(behind)}")
    if silent:
        said.append(f"no answer from {', '.join(silent)}: ended, or stopped")
    if other:
        said.append(f"ranks disagree: {', '.join(within)} called {mine.waits_what}, {', '.join(other)}")
    if not said:
        said.append(f"started by all ranks, not done on {', '.join(within)}: a device or the network hangs")
    return f"{where}; {'; '.join(said)}"

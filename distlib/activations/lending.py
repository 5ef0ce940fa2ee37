"""Memory of blocks that keep their tensors, lent to copies for as long as they do not need it.

    forward    blocks 0, 1, 2 move           blocks 3 ... 7 stay
    memory     [ what waits to be written  ][ stays ]              together no more than all that stays, and a window
    backward                                 blocks 7 ... 3        blocks 2, 1, 0
    memory                                  [ stays ][ what is back ahead of need ]

Each of both, what waits and what is back, has a window of its own; what they take beyond their windows is lent, by both
together. How much stays is known from the last step: in the first there is nothing to lend.
"""

from __future__ import annotations

import threading
import weakref


class Held:
    """Bytes, counted from several threads."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.lock = threading.RLock()  # loans end when their owners die, in any thread, also while it is held


class Loan:
    """So many bytes that count in `held`, or do not."""

    def __init__(self, held: Held, nbytes: int) -> None:
        self._held, self._nbytes = held, nbytes
        self._taken = False

    def take(self) -> None:
        self._set(True)

    def give(self) -> None:
        self._set(False)

    def _set(self, taken: bool) -> None:
        with self._held.lock:
            self._held.nbytes += self._nbytes * (taken - self._taken)
            self._taken = taken


class Lending:
    """Bytes that stay: now, and at the peak of the last step."""

    def __init__(self) -> None:
        self._now = 0
        self._peak = 0  # of this step
        self._known = 0  # of the last
        self._largest = 0

    @property
    def room(self) -> int:
        """Bytes that nobody needs yet, or any more; but for those of two blocks: one at work has its own memory, and
        takes about as much beside it, for gradients."""
        return max(0, self._known - self._now - 2 * self._largest)

    def begin_step(self) -> None:
        self._known = self._peak
        self._peak = self._now

    def stay(self, nbytes: int) -> Stay:
        """A block has kept so many bytes."""
        self._now += nbytes
        self._largest = max(self._largest, nbytes)
        self._peak = max(self._peak, self._now)
        return Stay(self, nbytes)

    def _gone(self, nbytes: int) -> None:
        self._now -= nbytes


class Stay:
    """The bytes of one forward, until its backward has run, or its graph is gone: then nobody holds this any more."""

    def __init__(self, lending: Lending, nbytes: int) -> None:
        self._leave = weakref.finalize(self, lending._gone, nbytes)
        self._leave.atexit = False

    def end(self) -> bool:
        """The backward has run. Returns whether it is the first: a graph that is retained may have another."""
        first = self._leave.alive
        self._leave()
        return first

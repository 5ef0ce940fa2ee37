"""One range of bytes from which pieces are lent: offsets only, whatever lies behind them (a file, pinned memory)."""

from __future__ import annotations

import bisect
import threading

ALIGNMENT = 4096  # a page: pieces of a file are read and written in whole pages


class Slab:
    """Lends the first free piece that is large enough; neighbours that come back are joined. Safe in threads."""

    def __init__(self) -> None:
        self.size = 0
        self.used = 0
        self._free: list[tuple[int, int]] = []  # (offset, length), ascending, never adjacent
        self._lock = threading.RLock()  # pieces come back when their owners die, in any thread, at any moment

    @staticmethod
    def rounded(nbytes: int) -> int:
        return -(-nbytes // ALIGNMENT) * ALIGNMENT

    def take(self, nbytes: int) -> int | None:
        """Offset of a piece of `nbytes`; None where there is none: then the slab has to grow."""
        needed = self.rounded(nbytes)
        with self._lock:
            for index, (offset, length) in enumerate(self._free):
                if length >= needed:
                    if length == needed:
                        del self._free[index]
                    else:
                        self._free[index] = (offset + needed, length - needed)
                    self.used += needed
                    return offset
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """The piece taken at `offset` comes back."""
        with self._lock:
            self.used -= self.rounded(nbytes)
            self._insert(offset, self.rounded(nbytes))

    def grow(self, nbytes: int) -> None:
        """`nbytes`, a multiple of ALIGNMENT, more at the end."""
        with self._lock:
            self._insert(self.size, nbytes)
            self.size += nbytes

    def _insert(self, offset: int, length: int) -> None:
        at = bisect.bisect(self._free, (offset, 0))
        if at < len(self._free) and offset + length == self._free[at][0]:
            length += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == offset:
            before, its_length = self._free.pop(at - 1)
            offset, length = before, its_length + length
            at -= 1
        self._free.insert(at, (offset, length))

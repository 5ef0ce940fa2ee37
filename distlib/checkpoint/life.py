"""Signs of life: a rank whose disk is slow is waited for, one that hangs or never comes is not.

While a rank works on a disk, or waits for the others here, a thread of it counts in the group's store. Whoever waits
looks at the next rank's count, and ends the wait for all when that has stood still for the timeout of collectives.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from distlib.comm.bounded_store import BoundedStore
from distlib.comm.group import Group

_LEAST = 5.0  # seconds: threads of a busy process may be late by so much


class SignsOfLife:
    """Those of the ranks of `group`, which has a store. One method call at a time on each rank."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._limit = max(_LEAST, group.timeout)
        self._store = None if group.store is None else BoundedStore(group.store, own=True)
        self._count = 0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Shows that this rank lives, as long as this lasts."""
        ended = threading.Event()
        thread = threading.Thread(target=self._show, args=(ended,), name="distlib-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()

    def meet(self, what: str, patience: timedelta) -> None:
        """Until all ranks have called it. Raises CollectiveError on all of them if one has ended, or if one neither
        comes nor shows that it lives.

        what: what the ranks are at, for the message. patience: how long one that lives may take.
        """
        group = self._group
        if group.size == 1:
            return
        came = threading.Event()
        work = group.barrier(async_op=True, timeout=patience)
        assert work is not None
        work.get_future().add_done_callback(lambda _: came.set())
        other = (group.rank + 1) % group.size
        with self.shown():
            seen, since = "", time.monotonic()
            while not came.wait(self._limit / 8):
                if (count := self._count_of(other)) != seen:
                    seen, since = count, time.monotonic()
                elif time.monotonic() - since > self._limit:
                    group.abort(
                        f"{what}: rank {group.ranks[other]} did not come, and has shown no sign of life for "
                        f"{self._limit:.0f} s: it hangs, or is at something else. Every rank must call it"
                    )
                    break
        work.wait()

    def _show(self, ended: threading.Event) -> None:
        while True:
            self._count += 1
            with contextlib.suppress(RuntimeError):  # the store does not answer; it may the next time
                if self._store is not None:
                    self._store.set(f"life/{self._group.rank}", str(self._count))
            if ended.wait(self._limit / 8):
                return

    def _count_of(self, rank: int) -> str:
        with contextlib.suppress(RuntimeError):
            return "" if self._store is None else self._store.get(f"life/{rank}")
        return ""

"""Threads that look after what is under way, one per process for each kind: a host that waits for a stream, or inside
gloo, cannot look itself."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from typing import Protocol

import torch

from distlib import streams

log = logging.getLogger("distlib")
TICK = 0.05  # seconds between looks while something is under way
IDLE = 1.0


class Watched(Protocol):
    """A channel whose operations end without the host."""

    device: torch.device

    def look(self) -> bool:
        """Sees after everything. Whether it wants to be looked at again soon. It must not block where others of its
        kind depend on being looked at."""
        ...

    def abort(self, text: str) -> None:
        """Ends the channel for all ranks."""
        ...


class Watch:
    """The thread. It starts with the first channel; a forked child starts its own."""

    def __init__(self, name: str = "watch") -> None:
        self._name = name
        self._watched: weakref.WeakSet[Watched] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._dozing = False
        self._pid = 0

    def add(self, watched: Watched) -> None:
        """From now on `watched` is looked at."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._watched, self._changed = os.getpid(), weakref.WeakSet(), threading.Event()
                self._ended = False
                thread = threading.Thread(target=self._run, name=f"distlib-{self._name}", daemon=True)
                thread.start()
                atexit.register(self._end, thread)
            self._watched.add(watched)
        self._changed.set()

    def wake(self) -> None:
        """Something has been started."""
        if self._dozing:
            self._changed.set()

    def _end(self, thread: threading.Thread) -> None:
        if self._pid == os.getpid():
            self._ended = True
            self._changed.set()
            thread.join(5.0)

    def _run(self) -> None:
        while not self._ended:
            self._changed.clear()
            with self._lock:
                watched = list(self._watched)
            busy = [self._look(one) for one in watched]
            del watched
            self._dozing = not any(busy)
            self._changed.wait(IDLE if self._dozing else TICK)

    @staticmethod
    def _look(one: Watched) -> bool:
        try:
            streams.attend(one.device)
            return one.look()
        except Exception as error:
            log.exception("the watch over a group's collectives failed")
            one.abort(f"the watch of pid {os.getpid()} over this group's collectives failed: {error!r}")
            return False


watch = Watch()  # over GPUs; its channels never block it
lookout = Watch("lookout")  # over gloo

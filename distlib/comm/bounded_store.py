"""A rendezvous store that is asked for a bounded time: the process that keeps it may have been stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from distlib.comm.threads import Step, waiters


class NoAnswer(RuntimeError):
    """Whoever keeps the store may be there all the same; or another thread of this process has the store's client."""


class BoundedStore:
    """Questions to a store. RuntimeError: whoever keeps it has gone; NoAnswer: none came within `seconds`."""

    def __init__(self, store: dist.Store, seconds: float = 2.0, own: bool = False) -> None:
        """own: over a connection of its own. A client asks one question at a time, and `wait` is a long one."""
        self._store, self._seconds = store.clone() if own else store, seconds
        self._lock = threading.Lock()
        self._asked: Step | None = None

    def set(self, key: str, value: str) -> None:
        """As the store's."""
        self._ask(lambda: self._store.set(key, value))

    def set_once(self, key: str, value: str) -> None:
        """Sets a key that nobody has set; when it returns, all can see it."""
        self._ask(lambda: self._store.compare_set(key, "", value))

    def has(self, key: str) -> bool:
        """Whether somebody has set a key."""
        return self._ask(lambda: self._store.check([key]))

    def get(self, key: str) -> str:
        """The value of a key; "" where nobody has set it."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else "")

    def _ask(self, question: Callable[[], Any]) -> Any:
        with self._lock:
            if self._asked is not None and not self._asked.done:
                raise NoAnswer("the store does not answer")
            step = Step(question)
            waiters.start(step)
            self._asked = step
            if not step.wait(self._seconds):
                raise NoAnswer(f"the store has not answered within {self._seconds:.0f} s")
        if step.code:
            raise RuntimeError(step.text) from step.cause
        return step.result

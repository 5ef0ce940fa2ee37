"""Operations that are a few steps of Python: run in order on one thread per group, seen like those of the core."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from distlib import native
from distlib.comm.work import CollectiveError, completions

_PATIENCE = 5.0  # seconds


@dataclass
class Step:
    """A function to run, and what became of it."""

    run: Callable[[], object]
    result: object = None
    cause: BaseException | None = None
    code: int = 0
    text: str = ""
    sequence: int = 0
    peer_bytes: int = 0
    waited_ns: int = 0
    source: int = -1
    done: bool = False
    _event: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _notify: int = 0

    def execute(self) -> None:
        """Runs it; an error becomes the operation's."""
        try:
            self.result = self.run()
        except CollectiveError as error:
            self.code, self.text = native.CODES.index(error.code), str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the work is waited for
            self.code, self.text = native.CODES.index("aborted"), f"{type(error).__name__}: {error}"
            self.cause = error
        with self._lock:
            self.done = True
            id = self._notify
        self._event.set()
        if id:
            completions.push(id)

    def wait(self, seconds: float) -> bool:
        return self._event.wait(min(seconds, threading.TIMEOUT_MAX))

    def notify(self, id: int) -> bool:
        with self._lock:
            if self.done:
                return False
            self._notify = id
            return True


class Runner:
    """One thread that executes steps in the order they were given. Starts with the first, ends with `close`, or with
    the interpreter: a thread that is still inside gloo then would take the process down with it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._abandon = threading.Event()
        self._thread: threading.Thread | None = None
        self._sequence = 0

    def start(self, run: Callable[[], object]) -> Step:
        step = Step(run)
        self._sequence += 1
        step.sequence = self._sequence
        if self._thread is None:
            arguments = (self._queue, self._abandon)
            self._thread = threading.Thread(target=_work, args=arguments, name=f"distlib-{self._name}", daemon=True)
            self._thread.start()
            weakref.finalize(self, _abandon, *arguments, self._thread)
        self._queue.put(step)
        return step

    def close(self) -> None:
        """Runs what is queued, then ends the thread."""
        if self._thread is not None:
            self._queue.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None


def _work(steps: queue.SimpleQueue[Step | None], abandon: threading.Event) -> None:
    while (step := steps.get()) is not None and not abandon.is_set():
        step.execute()


def _abandon(steps: queue.SimpleQueue[Step | None], abandon: threading.Event, thread: threading.Thread) -> None:
    """Ends the thread after the step that it is in; waits for that a while."""
    abandon.set()
    steps.put(None)
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)

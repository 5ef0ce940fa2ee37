"""Operations that are a few steps of Python: run in order on one thread per group, seen like those of the core."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

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
        result, code, text, cause = None, 0, "", None
        try:
            result = self.run()
        except CollectiveError as error:
            code, text = native.CODES.index(error.code), str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the work is waited for
            code, text, cause = native.CODES.index("aborted"), f"{type(error).__name__}: {error}", error
        self._end(result, code, text, cause)

    def fail(self, error: CollectiveError) -> None:
        """Ends it from outside: the thread that it is on does not come back. Nothing, if it is done."""
        self._end(None, native.CODES.index(error.code), str(error), None)

    def _end(self, result: object, code: int, text: str, cause: BaseException | None) -> None:
        with self._lock:
            if self.done:
                return
            self.result, self.code, self.text, self.cause = result, code, text, cause
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
        self._at_exit: weakref.finalize[..., Runner] | None = None
        self._sequence = 0

    def start(self, run: Callable[[], object]) -> Step:
        step = Step(run)
        self._sequence += 1
        step.sequence = self._sequence
        if self._thread is None:
            arguments = (self._queue, self._abandon)
            self._thread = threading.Thread(target=_work, args=arguments, name=f"distlib-{self._name}", daemon=True)
            self._thread.start()
            self._at_exit = weakref.finalize(self, _abandon, *arguments, self._thread)
        self._queue.put(step)
        return step

    def abandon(self, error: CollectiveError) -> None:
        """Gives up a thread that does not come back from the step it is in: nobody waits for it, what is queued fails
        with `error`, and what comes next gets a new thread."""
        self._abandon.set()
        if self._at_exit is not None:
            self._at_exit.detach()
        with contextlib.suppress(queue.Empty):
            while (step := self._queue.get_nowait()) is not None:
                step.fail(error)
        self._queue.put(None)
        self._queue, self._abandon, self._thread = queue.SimpleQueue(), threading.Event(), None

    def close(self) -> None:
        """Runs what is queued, then ends the thread."""
        if self._thread is not None:
            self._queue.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None


class Waiters:
    """Threads for calls that nothing can interrupt, one for each that is under way; kept for the next ones."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = self._pid = 0

    def start(self, step: Step) -> None:
        """Executes it on a thread that does nothing else meanwhile."""
        with self._lock:
            if self._pid != os.getpid():  # the first one, here or in a forked child
                self._pid, self._idle, self._steps = os.getpid(), 0, queue.SimpleQueue()
            if self._idle:
                self._idle -= 1
                self._steps.put(step)
                return
        threading.Thread(target=self._run, args=(step, self._steps), name="distlib-waiter", daemon=True).start()

    def _run(self, step: Step | None, steps: queue.SimpleQueue[Step]) -> None:
        torch.set_grad_enabled(False)
        while True:
            assert step is not None
            step.execute()
            step = None  # its memory is not this thread's to keep
            with self._lock:
                self._idle += 1
            step = steps.get()


waiters = Waiters()


def _work(steps: queue.SimpleQueue[Step | None], abandon: threading.Event) -> None:
    torch.set_grad_enabled(False)  # of this thread: tensors may be in a graph, such as those that a Function reduces
    while (step := steps.get()) is not None and not abandon.is_set():
        step.execute()
        del step  # what it holds is not this thread's to keep: neither memory, nor this thread's owner


def _abandon(steps: queue.SimpleQueue[Step | None], abandon: threading.Event, thread: threading.Thread) -> None:
    """Ends the thread after the step that it is in; waits for that a while."""
    abandon.set()
    steps.put(None)
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)

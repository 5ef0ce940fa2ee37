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

    run: Callable[[], object] | None  # None once it is over: what it holds is let go
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
        run = self.run
        if run is None:  # it was ended before it began
            return
        try:
            result = run()
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
            self.run = None
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
        self._lock = threading.Lock()
        self._line = _Line()
        self._thread: threading.Thread | None = None
        self._at_exit: weakref.finalize[..., Runner] | None = None
        self._sequence = 0

    def start(self, run: Callable[[], object]) -> Step:
        step = Step(run)
        with self._lock:
            self._sequence += 1
            step.sequence = self._sequence
            if self._line.closing:
                self._line, self._thread = _Line(), None
            if self._thread is None:
                name = f"distlib-{self._name}"
                self._thread = threading.Thread(target=_work, args=(self._line,), name=name, daemon=True)
                self._thread.start()
                self._at_exit = weakref.finalize(self, _abandon, self._line, self._thread)
            self._line.steps.put(step)
        return step

    def abandon(self, error: CollectiveError) -> None:
        """Gives up a thread that does not come back from the step it is in: nobody waits for it, what is queued fails
        with `error`, and what comes next gets a new thread."""
        with self._lock:
            line, self._line, self._thread = self._line, _Line(), None
            if self._at_exit is not None:
                self._at_exit.detach()
        line.error = error
        line.left.set()
        with contextlib.suppress(queue.Empty):
            while (step := line.steps.get_nowait()) is not None:
                step.fail(error)
        line.steps.put(None)
        line.ended.set()

    def close(self) -> None:
        """Runs what is queued, then ends the thread; or until the thread is given up."""
        with self._lock:
            line, thread = self._line, self._thread
            line.closing = True
        if thread is not None:
            line.steps.put(None)
            if thread is not threading.current_thread():
                line.ended.wait()
                if not line.left.is_set():
                    thread.join()


class _Line:
    """Steps for one thread. closing: it takes no more. left: it is given up, with this error for what was not begun.
    ended: nobody need wait for it any more."""

    def __init__(self) -> None:
        self.steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self.left, self.ended = threading.Event(), threading.Event()
        self.closing = False
        self.error = CollectiveError("the process ends")


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


def _work(line: _Line) -> None:
    torch.set_grad_enabled(False)  # of this thread: tensors may be in a graph, such as those that a Function reduces
    try:
        while (step := line.steps.get()) is not None:
            if line.left.is_set():
                step.fail(line.error)
            else:
                step.execute()
            del step  # what it holds is not this thread's to keep: neither memory, nor this thread's owner
    finally:
        line.ended.set()


def _abandon(line: _Line, thread: threading.Thread) -> None:
    """Ends the thread after the step that it is in; waits for that a while."""
    line.left.set()
    line.steps.put(None)
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)

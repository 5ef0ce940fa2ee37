"""`Work`: what a started collective returns; wait for it, look at it, or take a future."""

from __future__ import annotations

import atexit
import itertools
import os
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from distlib import native

_STOP = 0  # not the id of any work
_FOREVER = 1e9  # seconds; operations carry their own timeout


class CollectiveError(dist.DistBackendError):
    """A collective that could not complete. The message names the operation, its number and the ranks at fault.

    `code` is one of native.CODES: "timeout", "dead", "mismatch", "aborted", "memory", "forked", "interrupted",
    "invalid".
    """

    def __init__(self, text: str, code: str = "aborted") -> None:
        super().__init__(text)
        self.code = code


class Operation(Protocol):
    """What carries a collective out: an object of the core, or one of threads.py."""

    @property
    def done(self) -> bool: ...
    @property
    def code(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def sequence(self) -> int: ...
    @property
    def peer_bytes(self) -> int: ...
    @property
    def waited_ns(self) -> int: ...
    @property
    def source(self) -> int: ...
    def wait(self, seconds: float) -> bool: ...
    def notify(self, id: int) -> bool: ...


class Owner(Protocol):
    """Whose collectives works are: a Group."""

    def abort(self, message: str) -> None:
        """Ends it for all ranks."""
        ...

    def failed(self, error: CollectiveError) -> None:
        """One of its collectives failed on this rank."""
        ...


class _Queue:
    """The core's queue of completions, where there is no core."""

    def __init__(self) -> None:
        self._ids: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.push_completion = self._ids.put

    def next_completion(self, seconds: float) -> int | None:
        try:
            return self._ids.get(timeout=seconds)
        except queue.Empty:
            return None


class _Completions:
    """Tells works that hold a future when their operation is done.

    Callbacks of a future run on the thread that tells, and may wait for other futures. So while one thread runs
    callbacks, another waits for what completes next: there is always one more than there are busy ones.
    """

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._works: dict[int, Work] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._pid = 0
        self._lock = threading.Lock()
        self._queue: Any = None  # the core's, or a _Queue; from the first future on: no import loads the core

    def watch(self, work: Work) -> bool:
        """True if `work` will be told; False if its operation is done already."""
        id = next(self._ids)
        self._works[id] = work
        if self._pid != os.getpid():  # the first future, here or in a forked child
            with self._lock:
                if self._pid != os.getpid():
                    # A thread that is still in the core when the interpreter ends would take the process with it.
                    atexit.register(self._stop)
                    self._queue = self._queue or native.core() or _Queue()
                    self._pid, self._threads, self._idle = os.getpid(), [], 0
                    self._start()
        if work.operation.notify(id):
            return True
        self._works.pop(id)
        return False

    def push(self, id: int) -> None:
        """An operation that is not the core's is done, and was asked to notify."""
        self._queue.push_completion(id)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="distlib-futures", daemon=True)
        self._threads.append(thread)
        self._idle += 1
        thread.start()

    def _run(self) -> None:
        while (id := self._queue.next_completion(60.0)) != _STOP:
            if id is None:
                continue
            with self._lock:
                self._idle -= 1
                if not self._idle:
                    self._start()
            self._works.pop(id).complete()
            with self._lock:
                self._idle += 1
        self.push(_STOP)  # for the next thread

    def _stop(self) -> None:
        if self._pid == os.getpid():
            self.push(_STOP)
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()


completions = _Completions()


# Memory of failed operations. A rank that was stopped inside one may wake and still write into it: nobody else may
# get it. The group is of no further use then, so this does not grow.
_quarantine: list[object] = []


class Work(dist.Work):
    """A started collective. `wait()` blocks, then raises CollectiveError if it failed on any rank.

    result: the tensors it fills. finish: copies results home (non-contiguous outputs); run once, on success.
    account: told the operation once it is done, for the ledger. owner: the group, which hears of failures.
    """

    def __init__(
        self,
        operation: Operation,
        result: list[torch.Tensor],
        keep: object = None,
        finish: Callable[[], None] | None = None,
        account: Callable[[Operation], None] | None = None,
        owner: Owner | None = None,
        what: str = "operation",
    ) -> None:
        super().__init__()
        self.operation = operation
        self._result = result
        self._keep = keep  # memory that the operation reads or writes
        self._finish = finish
        self._account = account
        self._owner = owner
        self._what = what
        self._error: BaseException | None = None
        self._completed = False
        self._trigger: torch.futures.Future[Any] | None = None
        self._future: torch.futures.Future[Any] | None = None
        self._lock = threading.Lock()

    def complete(self) -> None:
        """Called when the operation is done, by whoever sees it first."""
        with self._lock:
            if self._completed:
                return
            code = self.operation.code
            if code:
                self._error = error = CollectiveError(self.operation.text, native.CODES[code])
                error.__cause__ = getattr(self.operation, "cause", None)
                _quarantine.append(self._keep)
                if self._owner is not None:
                    self._owner.failed(error)
            else:
                if self._finish is not None:
                    self._finish()
                if self._account is not None:
                    self._account(self.operation)
            self._completed = True
            self._keep = self._finish = self._account = None
            trigger = self._trigger
        if trigger is not None:
            trigger.set_result(None)

    def _value(self, _: object) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._result

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until done. True, or raises CollectiveError. An own `timeout` (none, or zero: the group's) that runs
        out ends the group for every rank: a collective never completes on some ranks only."""
        if not self._completed:
            seconds = timeout.total_seconds() if timeout else 0.0
            if not self.operation.wait(seconds or _FOREVER):
                text = f"{self._what} was not done within {seconds:.1f} s of wait()"
                if self._owner is not None:
                    self._owner.abort(text)
                raise CollectiveError(text, "timeout")
            self.complete()
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether it is over, well or not. Never blocks."""
        if not self._completed and self.operation.done:
            self.complete()
        return self._completed

    def is_success(self) -> bool:
        """Whether it is over and went well."""
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        """Its error, if it is over and failed."""
        return self._error if self.is_completed() else None

    def synchronize(self) -> None:
        """The same as wait(): results lie in host memory."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """The tensors it fills; complete ones only after wait()."""
        return self._result

    def source_rank(self) -> int:
        """For a receive: the group rank that the message came from."""
        return self.operation.source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of `result()`; fails with the CollectiveError."""
        with self._lock:
            if self._future is not None:
                return self._future
            # A failure must come out of a callback: C++ users of the future (DDP's reducer) see only those.
            trigger: torch.futures.Future[Any] = torch.futures.Future()
            self._future = future = trigger.then(self._value)
            if not self._completed:
                self._trigger = trigger
        if self._trigger is None:
            trigger.set_result(None)
        elif not completions.watch(self):
            self.complete()
        return future


class _Done:
    """An operation that was over before it began."""

    done, code, text, sequence, peer_bytes, waited_ns, source = True, 0, "", 0, 0, 0, -1

    def wait(self, seconds: float) -> bool:
        return True

    def notify(self, id: int) -> bool:
        return False


def finished(result: list[torch.Tensor]) -> Work:
    """A work that is done."""
    work = Work(_Done(), result)
    work.complete()
    return work

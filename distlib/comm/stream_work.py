"""Works of collectives on a device: ordered by streams and events, without making the host wait."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any, Protocol

import torch

from distlib import native, streams
from distlib.comm.work import CollectiveError, Operation, Work

_LOOK_SECONDS = 0.001  # between looks of a host that was asked to wait


def require_no_capture(group: str, device: torch.device) -> None:
    """Raises RuntimeError where a CUDA graph is captured: ranks compare the number of each collective, and a graph that
    runs again would repeat its own."""
    if streams.is_captured(device):
        raise RuntimeError(
            f"a collective of group '{group}' on {device} was called while a CUDA graph is captured. Each has its "
            "number, by which ranks find that they disagree, so it cannot be run again: end the capture before it"
        )


class StreamOperation(Operation, Protocol):
    """An operation whose results are there when a stream has come as far."""

    def follow(self) -> None:
        """What the current stream is given from now on runs after it. Does not block the host."""
        ...

    @property
    def stream(self) -> streams.Stream: ...

    @property
    def failed(self) -> bool:
        """Whether its group has failed, and it with it. Asks no event: that would be a step of the host."""
        ...


class Judged(ABC):
    """What operations on a device share: whether they are over and how they ended, asked of their channel until it is
    known."""

    channel: Any  # its verdict(operation, passed): the error of an operation, or None
    keep: Any  # memory that it reads and writes
    begun_on: streams.Stream  # the stream that was current when it was started
    _over = False
    _failed: CollectiveError | None = None

    @property
    @abstractmethod
    def passed(self) -> bool:
        """Whether the device is done with it, well or not."""

    @property
    def done(self) -> bool:
        """Whether it is over, well or not. Never blocks."""
        if not self._over:
            passed = self.passed  # before the look: what it reports was written before it passed
            self._failed = self.channel.verdict(self, passed)
            self._over = passed or self._failed is not None
            if passed:
                self.keep = None
        return self._over

    def let_go(self, anyway: bool) -> None:
        """The current stream waits for it. Where its memory is that stream's, whoever is lent it next comes later, and
        it need not be kept until the host sees that the device is as far. anyway: the caller looks after that."""
        if anyway or streams.current(self.channel.device) == self.begun_on:
            self.keep = None

    @property
    def failed(self) -> bool:
        """Whether its group has failed, and it with it. Asks the device only then."""
        if self._over:
            return self._failed is not None
        self.channel.check()
        return self.channel.aborted() is not None and self.done and self._failed is not None

    def wait(self, seconds: float) -> bool:
        """Keeps the host until it is over, at most so long."""
        until = time.monotonic() + seconds
        while not self.done:
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def notify(self, id: int) -> bool:
        """Futures of works on a device are told by streams (StreamWork): here the host waits."""
        self.wait(float("inf"))
        return False

    @property
    def code(self) -> int:
        return native.CODES.index(self._failed.code) if self.done and self._failed is not None else 0

    @property
    def text(self) -> str:
        return "" if self._failed is None else str(self._failed)


def devices_of(operation: Any) -> list[torch.device]:
    """The devices whose streams a future of an operation's results has to know."""
    device = operation.channel.device
    return [] if device.type == "cpu" else [device]


class StreamWork(Work):
    """A started collective on a device. `wait()` orders the stream that is current then, as torch's NCCL works do;
    what goes wrong later is raised by whatever asks next: a wait, `is_completed()`, or the next start."""

    operation: Any
    lets_go = False  # whoever waits sees to it that memory is not lent again too early, as with torch's NCCL works

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Makes the current stream wait. With a `timeout` the host waits too, and one that runs out ends the group."""
        if timeout and not self._wait_here(timeout.total_seconds()):
            text = f"{self._what} was not done within {timeout.total_seconds():.1f} s of wait()"
            if self._owner is not None:
                self._owner.abort(text)
            raise CollectiveError(text, "timeout")
        if self._error is None:
            self.operation.follow()  # also where it is done: not every stream knows that
            self.operation.let_go(self.lets_go)
            if not self._completed and self.operation.failed:
                self.complete()
        if self._error is not None:
            raise self._error
        return True

    def _wait_here(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.is_completed():
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of `result()` that knows streams: whoever waits for it waits as `wait()` does."""
        with self._lock:
            if self._future is not None:
                return self._future
        stream = self.operation.stream
        start: torch.futures.Future[Any] = torch.futures.Future(devices=devices_of(self.operation))
        # A failure must come out of a callback, as in Work.get_future.
        self._future = start.then(self._value_on_stream)
        with streams.on(stream):
            self.operation.follow()
            start.set_result(self._result)  # the tensors: a future keeps events of those devices that they are on
        return self._future

    def _value_on_stream(self, _: object) -> list[torch.Tensor]:
        if self.operation.failed:
            raise CollectiveError(self.operation.text, native.CODES[self.operation.code])
        return self._result

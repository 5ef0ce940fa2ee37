"""Several works of a group as one: what torch's calls for lists of tensors return."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from distlib.comm.stream_work import StreamWork, devices_of
from distlib.comm.work import Work, finished


class _All(Work):
    """Several works as one."""

    def __init__(self, works: list[Work], result: list[torch.Tensor]) -> None:
        super().__init__(works[-1].operation, result)
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait(timeout)
        return super().wait(timeout)

    def complete(self) -> None:
        """A group's operations end in order: when the last is done, all are."""
        for work in self._works:
            work.complete()
        super().complete()


class _AllOnStreams(StreamWork):
    """The same on a device, where works of different sizes may be on different streams."""

    def __init__(self, works: list[Work], result: list[torch.Tensor]) -> None:
        super().__init__(works[-1].operation, result)
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        return all(work.wait(timeout) for work in self._works)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def exception(self) -> BaseException | None:
        return next((error for work in self._works if (error := work.exception()) is not None), None)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def get_future(self) -> torch.futures.Future[Any]:
        """The current stream waits for all: whoever waits for the future waits for that stream."""
        self.wait()
        future: torch.futures.Future[Any] = torch.futures.Future(devices=devices_of(self.operation))
        future.set_result(self._result)
        return future


def joined(works: list[Work], result: list[torch.Tensor]) -> Work:
    """One work for `works` of one group, with this result."""
    if not works:
        return finished(list(result))
    return (_AllOnStreams if isinstance(works[-1], StreamWork) else _All)(works, list(result))

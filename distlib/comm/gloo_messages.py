"""Messages over gloo, seen as operations."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch

from distlib.comm.gloo_faults import Account, Waiting
from distlib.comm.tensors import bytes_of
from distlib.comm.threads import Step, waiters
from distlib.comm.work import CollectiveError


class GlooMessage(Step):
    """A message that gloo has been given. The first who waits sends a thread inside for it (gloo_faults.py).

    work: gloo's. peer: the other rank; None: any. nbytes: those that leave this rank. seconds: from the first wait.
    looked_after: where to be while a thread is inside. account: what was said, if it fails.
    """

    def __init__(
        self,
        work: Any,
        what: str,
        seconds: float,
        peer: int | None,
        nbytes: int,
        looked_after: set[Waiting],
        account: Account,
    ) -> None:
        super().__init__(None)
        self.what, self.nbytes = what, nbytes
        self.peer = -1 if peer is None else peer
        self._work, self._seconds = work, min(seconds, 1e8)
        self._account = account
        self._looked_after = looked_after
        self._entered = False

    def wait(self, seconds: float) -> bool:
        self._enter()
        return super().wait(seconds)

    def notify(self, id: int) -> bool:
        self._enter()
        return super().notify(id)

    def _enter(self) -> None:
        with self._lock:
            if self._entered:
                return
            self._entered = True
            self.run = self._inside  # not before: who nobody waits for is no circle of references
        waiters.start(self)

    def _inside(self) -> dict[int, int]:
        """Returns the bytes that left this rank, by destination."""
        work, self._work = self._work, None
        begin = time.monotonic()
        with Waiting(peer=self.peer, step=self).inside(self._looked_after):
            try:
                work.wait(timedelta(seconds=self._seconds))
            except RuntimeError as error:
                if told := self._account.aborted():
                    raise CollectiveError(told) from error
                code = "timeout" if "imed out" in str(error) else "dead"
                text = f"{self.what} failed after {time.monotonic() - begin:.1f} s. gloo says: {error}"
                raise CollectiveError(text, code) from error
        if self.what.startswith("recv"):
            self.source = work._source_rank()
        return {self.peer: self.nbytes}


def message_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor; gloo knows no message of none, so an empty tensor travels as one."""
    return bytes_of(tensor) if tensor.numel() else torch.zeros(1, dtype=torch.uint8)

"""What a collective is, before it is known how it travels; and what every way of travelling offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch

from distlib.comm.work import Operation

Timeout = timedelta | float | None


def seconds_of(timeout: Timeout, default: float) -> float:
    """A timeout in seconds; None, zero and torch's "unset" (negative) mean the group's own."""
    if timeout is None:
        return default
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    return seconds if seconds > 0 else default


@dataclass
class Collective:
    """One collective as this rank sees it. All tensors are contiguous.

    | kind           | send                          | recv                            |
    |----------------|-------------------------------|---------------------------------|
    | all_reduce     | [tensor]                      | [the same tensor]               |
    | reduce         | [tensor]                      | [the same tensor], root's counts |
    | broadcast      | [tensor]                      | [the same tensor]               |
    | all_gather     | [input]                       | one per rank                    |
    | reduce_scatter | one per rank                  | [output]                        |
    | gather         | [input]                       | one per rank on root, else []   |
    | scatter        | one per rank on root, else [] | [output]                        |
    | all_to_all     | one per rank                  | one per rank                    |
    | barrier        | []                            | []                              |
    """

    kind: str
    send: list[torch.Tensor] = field(default_factory=list)
    recv: list[torch.Tensor] = field(default_factory=list)
    op: str = "sum"
    root: int = 0
    label: str = ""  # lateness is kept by label
    hierarchical: bool = False  # all_gather, reduce_scatter: in levels, inside hosts and between them
    arrived_ns: int = 0  # when this rank was ready for it (native.now_ns()); 0: now
    finish: Callable[[], None] | None = None  # on a device: what is to be done on its stream afterwards

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ranks must agree on."""
        return (self.send or self.recv)[0].dtype if self.send or self.recv else torch.uint8

    @property
    def count(self) -> int:
        """The number of elements that ranks must agree on; 0 where sizes may differ (all_to_all) or there are none."""
        if self.kind in ("reduce_scatter", "scatter"):
            return self.recv[0].numel()
        return 0 if self.kind in ("all_to_all", "barrier") else self.send[0].numel()

    def describe(self) -> str:
        """As error messages name it."""
        if self.kind == "barrier":
            return self.kind
        return f"{self.kind}({str(self.dtype).removeprefix('torch.')}, {self.count} elements)"


@dataclass(frozen=True)
class Message:
    """One of several messages that start together. peer: the group rank at its other end."""

    tensor: torch.Tensor
    peer: int
    tag: int
    sending: bool


@dataclass(frozen=True)
class Traffic:
    """Bytes of this rank in one collective over one kind of link: as counted, and as the formula says."""

    link: str
    bytes: int
    expected: int


SAME_HOST, BETWEEN_HOSTS = "same host", "between hosts"


class Channel(Protocol):
    """A way for a group's ranks to talk. Ranks are group ranks; timeouts are seconds.

    by_streams: its operations are ordered by streams, and are StreamOperations. has_levels: gathers and scatters may go
    between hosts in levels, where the topology allows it.
    """

    @property
    def by_streams(self) -> bool: ...
    @property
    def has_levels(self) -> bool: ...

    def start(self, collective: Collective, timeout: float, sync: bool) -> Operation:
        """Starts a collective; every rank of the group must, in the same order. `sync`: the caller waits at once."""
        ...

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout: float) -> Operation:
        """Starts a message to rank `dst`."""
        ...

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout: float) -> Operation:
        """Starts the receipt of a message from rank `src`; None: from whichever rank sent one with this tag."""
        ...

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Operation) -> list[Traffic]:
        """What a finished collective moved; `sent` and `received` are the bytes of its tensors."""
        ...

    def lateness(self) -> dict[str, tuple[list[float], int]]:
        """By label ("": without): seconds by which each rank came after the first, summed, and the number of calls."""
        ...

    def abort(self, text: str) -> None:
        """Ends the channel for all ranks: pending and later calls fail with `text`."""
        ...

    def aborted(self) -> str | None:
        """Why the channel was ended, or None."""
        ...

    def ended(self) -> list[int]:
        """Ranks whose processes are known to have ended. Never blocks."""
        ...

    def close(self) -> None:
        """Leaves."""
        ...

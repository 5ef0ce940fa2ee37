"""A line: messages between this rank and one other of a group, by the host's memory where the two share a host.

Three things that `Group.send` and `Group.recv` do not do: in a group over several hosts, neighbours on one host need no
network; the ledger keeps what is not payload under a name of its own; and a message is let go of when its owner has
waited for it, not when all that the group started before it is over.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from distlib.comm.channel import SAME_HOST, Channel
from distlib.comm.group import Group
from distlib.comm.host import HostChannel
from distlib.comm.ledger import ledger
from distlib.comm.spanning import SpanningChannel
from distlib.comm.work import CollectiveError, Work

_GRACE = 1.0  # seconds that a way with a timeout of its own has to say in its own words that it ran out

# Memory of messages whose wait was interrupted: it is still being read or written.
_unfinished: list[Work] = []


class Line:
    """Messages between this rank of `group` and `peer` (a group rank). Making it communicates nothing.

    timeout: seconds, of each wait. Order is kept per tag and direction.
    """

    def __init__(self, group: Group, peer: int, timeout: float) -> None:
        self.group, self.peer, self.timeout = group, peer, timeout
        self.memory: Any = None  # the peer's mapped arena, where it is of this host
        self._channel: Channel = group._channel
        self._at = peer
        inside = _inside(group)
        if inside is not None and group.topology.same_host(group.rank, peer):
            self._channel, self._at = inside, group.topology.local_ranks(group.rank).index(peer)
            self.memory = inside.peer(self._at)

    def send(self, tensor: torch.Tensor, tag: int, name: str = "send") -> Work:
        """Starts a message of a contiguous tensor, which must not change before it is waited for. name: the ledger's
        for it. Raises CollectiveError where the line is known to be broken."""
        return self._start("send", tensor, tag, name)

    def recv(self, tensor: torch.Tensor, tag: int, name: str = "recv") -> Work:
        """Starts the receipt of a message into a contiguous tensor."""
        return self._start("recv", tensor, tag, name)

    def wait(self, work: Work) -> None:
        """Until a message of this line is over. Raises CollectiveError if it failed, or after the timeout."""
        try:
            work.wait(timedelta(seconds=self.timeout + _GRACE))
        except BaseException:
            if not work.is_completed():
                _unfinished.append(work)
            raise

    def count(self, name: str, nbytes: int) -> None:
        """For the ledger: so many bytes of payload went over this line by memory that both ranks see."""
        ledger().add(name, self.group.name, SAME_HOST, nbytes, nbytes)

    def _start(self, kind: str, tensor: torch.Tensor, tag: int, name: str) -> Work:
        if self.group.closed:
            raise CollectiveError(f"group '{self.group.name}' was closed on this rank")
        start = self._channel.send if kind == "send" else self._channel.recv
        what = f"{kind} {'to' if kind == 'send' else 'from'} rank {self.group.ranks[self.peer]} (tag {tag})"
        try:
            operation = start(tensor, self._at, tag, self.timeout)
        except CollectiveError:
            raise
        except RuntimeError as error:  # gloo knows already that the other end is gone
            raise CollectiveError(f"{what} cannot start: {error}", "dead") from error
        sent, received = (tensor.nbytes, 0) if kind == "send" else (0, tensor.nbytes)

        def account(done: Any) -> None:
            for row in self._channel.traffic(kind, self._at, sent, received, done):
                ledger().add(name, self.group.name, row.link, row.bytes, row.expected)

        return Work(operation, [], keep=tensor, account=account, owner=self.group, what=what)


def _inside(group: Group) -> HostChannel | None:
    """The channel between the group's ranks on this host, if there is one."""
    channel = group._channel
    if isinstance(channel, SpanningChannel):
        return channel._inside
    return channel if isinstance(channel, HostChannel) else None

"""What gloo does not tell: that the other end has gone while a transfer was under way.

gloo wakes whoever waits for a transfer that has not begun. One that has begun is in none of the lists that it goes
through when a connection closes (tcp/pair.cc, signalException), so its waiter sleeps until the timeout, whichever end
it is. Therefore nobody who can be interrupted waits inside gloo, and somebody looks:

    a group's runner, a waiter      inside gloo (threads.py)
    the lookout (watch.py)          each second: has what waits for more than one second still anything to wait for?
    whoever called                  waits for an event, which the transfer sets, or the lookout

What is asked, cheapest first: has another rank said that this collective failed; have ranks of this host ended
(spanning.py); does the connection still stand? A rank whose connection is closed may have left in good order, with all
that it had to send sent: it says so in the store.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.util
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from distlib.comm.bounded_store import BoundedStore, NoAnswer
from distlib.comm.channel import Collective
from distlib.comm.threads import Step

PATIENCE = 1.0  # seconds inside gloo before anybody looks
SUSPICION = 2.0  # seconds for which it must have been in vain: the last bytes may just have come
WITHOUT_STORE = 60.0  # seconds inside until a rank that cannot say that it left in good order has not
_MOST_BETWEEN = 30.0  # seconds between two questions to the same connections
_TAG = 2**31 - 2  # no user's message has it


class Gone(RuntimeError):
    """There is nothing to wait for."""


@dataclass(eq=False)
class Waiting:
    """A step that may be inside gloo. call: its collective, #`sequence` of the group; None: it is a message.
    peer: the rank that a message goes to or comes from; -1: from any."""

    call: Collective | None = None
    sequence: int = 0
    peer: int = -1
    step: Step | None = None
    begun: float = 0.0  # time.monotonic() when it went in; so are the others
    asked: float = 0.0  # when the connections were asked last
    why: str = ""  # what the last look found
    suspected: float = 0.0  # since when that has been a reason to give it up; 0: it is none

    @contextlib.contextmanager
    def inside(self, of: set[Waiting]) -> Iterator[None]:
        """One of those that are looked after, as long as this lasts."""
        self.begun = time.monotonic()
        of.add(self)
        try:
            yield
        finally:
            of.discard(self)

    def may_ask(self, now: float) -> bool:
        """Whether the connections may be asked: seldom if all was well the last times, as questions are messages."""
        if not self.suspected and now - self.asked < min(self.asked - self.begun, _MOST_BETWEEN):
            return False
        self.asked = now
        return True

    def judge(self, why: str, now: float) -> bool:
        """Takes down what was found, "" for nothing. Whether it has been in vain for long enough."""
        self.why = why
        if not why:
            self.suspected = 0.0
        elif not self.suspected:
            self.suspected = now
        return bool(why) and now - self.suspected >= SUSPICION


@dataclass(eq=False)
class Account:
    """How far this rank has come in a group, and what ranks tell each other of it beside gloo, in the store."""

    store: BoundedStore
    rank: int
    sequence: int = 0  # the number of the collective that runs, or ran last
    finished: int = 0  # of the last that ended well
    left: set[int] = field(default_factory=set)  # others that are known to have left in good order
    _pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        if multiprocessing.parent_process() is not None:  # such a process ends without what is done at exit
            multiprocessing.util.Finalize(self, Account.leave, args=(self,), exitpriority=0)

    def leave(self) -> None:
        """What the others have still to do for the last collective that ended well here does not need this rank."""
        if self._pid == os.getpid():  # not a forked child that ends
            with contextlib.suppress(RuntimeError):  # the store may have gone
                self.store.set(f"left/{self.rank}", str(self.finished))

    def has_left(self, rank: int, sequence: int, seconds: float) -> bool:
        """Whether a rank whose connection is closed may owe nothing to collective `sequence`, inside of which this rank
        has been for so many seconds. Where there is no store any more nobody can tell, and slow ends are waited for."""
        if rank in self.left:
            return True
        try:
            if int(self.store.get(f"left/{rank}") or -1) < sequence:
                return False
        except NoAnswer:
            return True
        except RuntimeError:
            return seconds < WITHOUT_STORE
        self.left.add(rank)
        return True

    def fail(self, text: str) -> None:
        """Tells the others that the collective that runs has failed here, and in which words."""
        self.store.set(f"failed/{self.sequence}/{self.rank}", "1")
        self.store.set_once(f"failed/{self.sequence}/text", text)

    def has_failed(self, rank: int) -> bool:
        """Whether it has failed on another rank, too."""
        return self.store.has(f"failed/{self.sequence}/{rank}")

    def failed(self, sequence: int) -> str:
        """What another rank said about a collective that failed there; "" if none did, or none can be asked."""
        return self._read(f"failed/{sequence}/text")

    def abort(self, text: str) -> None:
        """Tells the others why they will find this rank's connections closed."""
        with contextlib.suppress(RuntimeError):
            self.store.set_once("aborted", text)

    def aborted(self) -> str:
        """Why a rank ended the group for all; "" if none did, or none can be asked."""
        return self._read("aborted")

    def _read(self, key: str) -> str:
        with contextlib.suppress(RuntimeError):
            return self.store.get(key)
        return ""


def why_closed(connection: Any, rank: int) -> str:
    """Why gloo's connection to a rank is closed; "" while it stands. Costs a small message to that rank."""
    try:
        _ask(connection, rank)
    except RuntimeError as error:
        return str(error)
    return ""


def close(connection: Any) -> None:
    """Closes gloo's connections to all ranks at once, though threads may be inside.

    A receipt that runs out of time does that. The object is kept for good: letting go of it waits for its threads, and
    those may be in a transfer that nothing ends before its timeout.
    """
    for rank in range(connection.size()):
        if rank != connection.rank():
            with contextlib.suppress(RuntimeError):
                _ask(connection, rank).wait(timedelta(milliseconds=1))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _ask(connection: Any, rank: int) -> Any:
    return connection.recv([torch.zeros(1, dtype=torch.uint8)], rank, _TAG)

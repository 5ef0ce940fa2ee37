"""Groups of one owner: where one fails on a rank, the others end on that rank too, in the same words.

    partition groups      {0 1} {2 3}       rank 1 is killed: rank 0 hears of it in its partition group, and raises
    replication groups    {0 2} {1 3}       rank 2 waits for rank 0: it hears what rank 0 heard, not that rank 0 ended

Ranks that are in only one of two groups would otherwise see no more than the end of who is in both.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distlib.comm.group import Group

_tied: weakref.WeakKeyDictionary[Group, weakref.WeakSet[Group]] = weakref.WeakKeyDictionary()  # keeps no group alive


def tie(groups: Iterable[Group]) -> None:
    """Ties groups of this rank to each other, and to what they are tied to already. No collective."""
    together: weakref.WeakSet[Group] = weakref.WeakSet()
    for group in groups:
        together |= _tied.get(group, weakref.WeakSet()) | {group}
    for group in together:
        _tied[group] = together


def tied_to(group: Group) -> list[Group]:
    """The other groups that end with it and have not ended: those that this rank left go on without it."""
    others = [other for other in _tied.get(group, ()) if other is not group]
    return [other for other in others if not other.closed and other.cpu_channel.aborted() is None]

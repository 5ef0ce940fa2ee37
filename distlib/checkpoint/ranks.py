"""Ranks agree: a step that fails on one rank raises on all of them, naming it.

Saving has a process group of its own, made once: its collectives come from a background thread and must never mix
with those of training.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from distlib.checkpoint.life import SignsOfLife
from distlib.comm.group import Group
from distlib.comm.work import CollectiveError
from distlib.words import ranks_text, words_of

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # the slowest rank's disk may take so long, if the rank shows that it lives


@dataclass(frozen=True)
class Problem:
    """What went wrong on a rank, in words that travel."""

    kind: type[ValueError] | type[RuntimeError]
    text: str

    @staticmethod
    def of(error: BaseException) -> Problem:
        kind: type[ValueError] | type[RuntimeError] = ValueError if isinstance(error, ValueError) else RuntimeError
        plain = type(error) in (ValueError, RuntimeError) or isinstance(error, OSError)
        return Problem(kind, words_of(error) if plain else f"{type(error).__name__}: {words_of(error)}")


def attempt(step: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """The step's value, or the exception that it raised: the rank must still tell the others before it raises."""
    try:
        return step(), None
    except BaseException as error:  # noqa: BLE001 - every kind of failure must reach the other ranks, interrupts too
        return None, error


class Ranks:
    """The ranks that save or load together, and what they keep from one save to the next.

    rank, size: in the group. All methods must be called by every rank, in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.kept: dict[str, Any] = {}
        self._life = None if group is None else SignsOfLife(Group.of(group))
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="distlib-save")

    @staticmethod
    def of(process_group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a process group (None: of the world; without one, this process alone)."""
        if not (dist.is_available() and dist.is_initialized()):
            if process_group is not None:
                raise RuntimeError(
                    "process_group is given, but torch.distributed is not initialized: call distlib.init()"
                )
            return _alone
        key = process_group if process_group is not None else dist.group.WORLD
        assert key is not None
        found = _known.get(key)
        if found is None:
            members = dist.get_process_group_ranks(key)
            world = len(members) == dist.get_world_size()
            of_key = getattr(key, "distlib_group", None)  # another backend's would first have to be made a Group
            limit = dist.default_pg_timeout if of_key is None else timedelta(seconds=of_key.timeout)
            own = dist.new_group(members, timeout=limit, backend="distlib", use_local_synchronization=not world)
            found = _known[key] = Ranks(own, dist.get_rank(own), len(members))
        return found

    def forget(self) -> None:
        """A collective failed: the group is of no further use, so the next save or load makes another."""
        for key, ranks in list(_known.items()):
            if ranks is self:
                del _known[key]

    def agree(self, note: Any, error: BaseException | None, decide: Callable[[list[Any]], T], what: str) -> T:
        """Rank 0 makes one decision of all ranks' notes, and all ranks get it. A rank that failed passes its error.

        Raises:
            ValueError, RuntimeError: on all ranks, naming those that failed and why.
        """
        try:
            self._meet(what)
            notes = self._gather(Problem.of(error) if error is not None else note)
            decision: Any = None
            if notes is not None:
                problem = _first_problem(notes, what)
                if problem is None:
                    decision, error = self.patiently(lambda: decide(notes))
                    problem = Problem(Problem.of(error).kind, f"{what}: {Problem.of(error).text}") if error else None
                decision = problem if problem is not None else decision
            self._meet(what)
            decision = self._broadcast(decision)
        except BaseException as broken:
            self.forget()
            if self.group is not None and not isinstance(broken, CollectiveError):  # such as an interrupt of the wait
                Group.of(self.group).abort(f"{what}: rank {dist.get_rank()}: {type(broken).__name__} while it waited")
            raise
        if error is not None and not isinstance(error, Exception):
            raise error
        if isinstance(decision, Problem):
            raise decision.kind(decision.text) from error
        return decision

    def patiently(self, step: Callable[[], T]) -> tuple[T | None, BaseException | None]:
        """`attempt` for a step that the others wait for as long as it takes: it works on a disk."""
        if self._life is None:
            return attempt(step)
        with self._life.shown():
            return attempt(step)

    def _meet(self, what: str) -> None:
        """Until all ranks have come here. CollectiveError on all of them if one ends, or shows no sign of life."""
        if self._life is not None:
            self._life.meet(what, PATIENCE)

    def together(self, step: Callable[[], T], what: str) -> T:
        """Runs the step, which works on a disk, on every rank; where it fails on one, it raises on all."""
        value, error = self.patiently(step)
        self.agree(None, error, lambda notes: None, what)
        return value  # type: ignore[return-value]

    def _gather(self, item: Any) -> list[Any] | None:
        """All ranks' items, on rank 0."""
        if self.group is None:
            return [item]
        items: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(item, items, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return items

    def _broadcast(self, item: Any) -> Any:
        """Rank 0's item, on all ranks."""
        if self.group is None:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=dist.get_global_rank(self.group, 0), group=self.group)
        return items[0]


def _first_problem(notes: list[Any], what: str) -> Problem | None:
    """The problem of the lowest rank that has one, and who else has the same."""
    ranks = [rank for rank, note in enumerate(notes) if isinstance(note, Problem)]
    if not ranks:
        return None
    first = notes[ranks[0]]
    same = [rank for rank in ranks if notes[rank] == first]
    more = "" if len(same) == len(ranks) else f" ({ranks_text(sorted(set(ranks) - set(same)))} failed in other ways)"
    return Problem(first.kind, f"{what}: {ranks_text(same)}: {first.text}{more}")


_known: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()
_alone = Ranks(None, 0, 1)

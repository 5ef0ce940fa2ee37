"""What went wrong in one backward: noticed on one rank, told on all.

Every reduction carries a short report from each rank in the tail of its last bucket: one number per parameter
("received no gradient here"), one for "I start anew after a backward that raised", one for everything else.
It costs no message of its own, and a rank that found something still takes part in every collective of the
backward with zeros in the gaps. So all ranks learn in that very backward that something is wrong, none waits
in vain, and the group stays usable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from distlib.comm.group import Group
from distlib.data_parallel.agreement import exchange
from distlib.words import ranks_text

_SHOWN = 20  # parameter names listed per complaint

_WORDS = {
    "missing": (
        "received no gradient in this backward",
        "If that is intended, give find_unused_parameters=True, to DataParallel or to the Plan (or DataParallel "
        "static_graph=True, if it is the same in every step); otherwise make the loss depend on them.",
    ),
    "surplus": (
        "received a gradient more often than once in this backward (a module shared between re-entrant "
        "checkpoints, or used by a nested backward)",
        "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or wrap with static_graph=True.",
    ),
    "changed": (
        "received another number of gradients than in the first step, though static_graph=True",
        "Wrap with static_graph=False, and find_unused_parameters=True if parameters are sometimes unused.",
    ),
    "sparse": (
        "have sparse gradients, which buckets cannot hold",
        "Build the embedding with sparse=False.",
    ),
    "taken": (
        "had .grad set to None by another hook before it was averaged",
        "Step and clear gradients after backward(), not inside it.",
    ),
}


class Report:
    """The complaints of this rank about the current backward, and the numbers that carry them.

    `restarted`: the last backward on this rank raised before any bucket was launched.
    """

    def __init__(self, group: Group, names: Sequence[str], device: torch.device) -> None:
        self._group = group
        self._names = names
        self._device = device
        self._found: dict[str, set[int]] = {}
        self.restarted = False

    @staticmethod
    def numbers(parameters: int) -> int:
        """How many numbers a report takes."""
        return parameters + 2

    def note(self, kind: str, parameter: int) -> None:
        self._found.setdefault(kind, set()).add(parameter)

    def clear(self) -> None:
        """Forget the complaints, of one backward."""
        self._found.clear()

    def __bool__(self) -> bool:
        return bool(self._found) or self.restarted

    def write(self, numbers: torch.Tensor, missing: Sequence[int]) -> None:
        """Put this rank's report into `numbers`, which are zero before."""
        if missing:
            numbers[torch.tensor(missing, device=numbers.device)] = 1
        if self.restarted:
            numbers[-2] = 1
        if self._found:
            numbers[-1] = 1

    def read(self, averages: torch.Tensor) -> list[int] | None:
        """How many ranks set each number, from their average; None if nobody set any. Clears the numbers."""
        if not bool(averages.any()):
            return None
        counts = (averages.double() * self._group.size).round().long().tolist()
        averages.zero_()
        return counts

    def complains(self, counts: Sequence[int], missing_allowed: bool) -> bool:
        """Whether the backward failed: the same answer on every rank."""
        *missing, restarted, others = counts
        return bool(others) or restarted not in (0, self._group.size) or not missing_allowed and any(missing)

    def fail(self) -> None:
        """Exchange complaints and raise on all ranks. Every rank of the group must call it.

        Raises:
            RuntimeError: always, with the parameters by name, the ranks, and the fix.
        """
        mine = {"restarted": self.restarted, **{kind: sorted(found) for kind, found in self._found.items()}}
        encoded = json.dumps(mine).encode()
        received = exchange(self._group, encoded, self._device) if self._group.size > 1 else [encoded]
        notes = [json.loads(note) for note in received]
        self._found.clear()
        self.restarted = False
        lines = []
        restarted = [rank for rank, note in enumerate(notes) if note["restarted"]]
        if restarted and len(restarted) < len(notes):
            lines.append(
                f"  The backward before this one raised on {ranks_text(restarted)} alone, so that the ranks are "
                "one backward apart. Let the exception end the process, or skip the step on all ranks."
            )
        for kind, (what, fix) in _WORDS.items():
            ranks_of: dict[int, list[int]] = {}
            for rank, note in enumerate(notes):
                for parameter in note.get(kind, []):
                    ranks_of.setdefault(parameter, []).append(rank)
            if ranks_of:
                lines.append(f"  Parameters that {what}: {self._listed(ranks_of)}. {fix}")
        raise RuntimeError(
            f"rank {self._group.rank}: gradients were not averaged correctly in this backward; discard "
            "them.\n" + "\n".join(lines)
        )

    def _listed(self, ranks_of: dict[int, list[int]]) -> str:
        groups: dict[tuple[int, ...], list[str]] = {}
        for parameter in sorted(ranks_of):
            groups.setdefault(tuple(ranks_of[parameter]), []).append(self._names[parameter])
        parts = []
        for ranks, names in groups.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            everywhere = "all ranks" if len(ranks) == self._group.size > 1 else ranks_text(ranks)
            parts.append(", ".join(names[:_SHOWN]) + f"{more} (on {everywhere})")
        return "; ".join(parts)

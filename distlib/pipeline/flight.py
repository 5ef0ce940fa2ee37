"""What a rank holds at each moment of its line: micro-batches in flight, by stage. Pure; bytes come in elsewhere.

    1f1b, rank 0 of 3      F0    F1    F2    BW0   F3    BW1   BW2   BW3
    held besides           -     0     0,1   1,2   1,2   2,3   3     -         most: two besides the one at work

Where a backward is divided, a micro-batch is held whole from F to B, and from B to W what its weights' gradients need.
Between two stages of one rank nothing is sent: an output waits there until the next stage takes it, and a gradient
likewise on its way back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from distlib.pipeline.actions import COMPUTE, Kind, Schedule


@dataclass(frozen=True)
class Moment:
    """A computation of a rank, and what is held besides it.

    kind, stage: what runs. whole, late: by stage, micro-batches between F and the end of B (or BW), and between B and
    the end of W, but for the one that runs. waiting: by (from stage, to stage), both of this rank, outputs (or, to an
    earlier stage, gradients) that were made and not yet taken.
    """

    kind: Kind
    stage: int
    whole: tuple[tuple[int, int], ...] = ()
    late: tuple[tuple[int, int], ...] = ()
    waiting: tuple[tuple[tuple[int, int], int], ...] = ()

    def within(self, other: Moment) -> bool:
        """Whether `other` is the same computation and holds no less of anything."""
        return (self.kind, self.stage) == (other.kind, other.stage) and all(
            all(dict(theirs).get(key, 0) >= count for key, count in own)
            for own, theirs in ((self.whole, other.whole), (self.late, other.late), (self.waiting, other.waiting))
        )


def moments(schedule: Schedule, rank: int) -> list[Moment]:
    """The moments of a rank at which it may hold most: of equal computations those that hold less are left out.

    schedule: with the edges between stages, and B and W fused as they will run.
    """
    whole: Counter[int] = Counter()
    late: Counter[int] = Counter()
    waiting: Counter[tuple[int, int]] = Counter()
    here = set(schedule.stages_of(rank))
    own = [edge for edge in schedule.edges if set(edge) <= here]
    found: list[Moment] = []
    for stage, kind, _, _ in schedule.actions[rank]:
        if kind not in COMPUTE:
            continue
        forward, backward = kind is Kind.F, kind in (Kind.B, Kind.FULL)
        for source, target in own:  # what it takes is its own from now on
            waiting[source, target] -= forward and target == stage
            waiting[target, source] -= backward and source == stage
        whole[stage] -= backward
        late[stage] -= kind is Kind.W
        _add(found, Moment(kind, stage, _positive(whole), _positive(late), _positive(waiting)))
        whole[stage] += forward
        late[stage] += kind is Kind.B
        for source, target in own:
            waiting[source, target] += forward and source == stage
            waiting[target, source] += backward and target == stage
    return found


def _positive(counts: Counter) -> tuple:
    return tuple(sorted((key, count) for key, count in counts.items() if count > 0))


def _add(found: list[Moment], moment: Moment) -> None:
    if any(moment.within(other) for other in found):
        return
    found[:] = [other for other in found if not other.within(moment)]
    found.append(moment)


def most_in_flight(schedule: Schedule, rank: int) -> dict[int, int]:
    """Of each stage of a rank, the most micro-batches between F and the end of their last backward pass at once."""
    most = dict.fromkeys(schedule.stages_of(rank), 0)
    for moment in moments(schedule, rank):
        held = Counter(dict(moment.whole)) + Counter(dict(moment.late))
        held[moment.stage] += 1
        for stage, count in held.items():
            most[stage] = max(most[stage], count)
    return most

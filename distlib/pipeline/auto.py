"""A zero-bubble schedule from costs and a memory limit, by greedy scheduling (arXiv 2401.10241, section 3).

All ranks are played forward in time together. A rank that falls free takes the first of these that it can:

    B   if its gradient is there
    F   if its input is there, the activations fit the limit, and no B would be kept waiting for long
    W   if the gap until the next input is long enough for it, or the limit forbids every F
    else it waits

What "for long" and "long enough" should be depends on the costs, so a small grid of answers is tried, beside the fixed
schedules; the simulator picks the best.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distlib.pipeline.actions import Action, Kind, Schedule
from distlib.pipeline.schedules import one_f_one_b, zb_h1, zb_h2
from distlib.pipeline.simulate import Costs, StageCosts, peaks, simulate

_NEVER = float("inf")
_KINDS = (Kind.F, Kind.B, Kind.W)


@dataclass(frozen=True)
class Policy:
    """How a rank chooses.

    patience: an F does not start if a B is due in less than this part of the F's time.
    filling: a W starts if the gap until the next input is at least this part of the W's time.
    forwards_first: after a B, an F goes before the next B if both are ready.
    """

    patience: float
    filling: float
    forwards_first: bool


GRID = tuple(
    Policy(*choice)
    for choice in itertools.product((0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.85, 1.0), (0.1, 0.5, 1.0), (True, False))
)


def auto(
    ranks: int,
    micro_batches: int,
    costs: Costs | None = None,
    limit: float | None = None,
    *,
    limit_bytes: float | Sequence[float] | None = None,
) -> Schedule:
    """The schedule with the smallest bubble (then step time) that was found within a memory limit, one stage per rank.

    costs: of F, B, W and communication, and activation bytes, see `Costs`; default: F = B = W = 1.
    limit: the activations that a rank may hold at once, in micro-batches; default 2p, twice what 1F1B holds. What is
        left of a micro-batch after its B counts `costs.kept / costs.activations`.
    limit_bytes: instead, in the unit of `costs.activations`, for all ranks or for each.

    Pure and deterministic: every rank that calls it with the same arguments gets the same schedule. 32 ranks and 96
    micro-batches take a few seconds. Raises ValueError for a limit that does not fit one micro-batch.
    """
    costs = Costs() if costs is None else costs
    base = one_f_one_b(ranks, micro_batches)
    by_stage = costs.of_stages(base)
    if limit is not None and limit_bytes is not None:
        raise ValueError("schedule 'auto': give limit (in micro-batches) or limit_bytes, not both")
    if limit_bytes is None:
        if not any(by_stage.activations):
            costs = replace(costs, activations=1.0, kept=None)
            by_stage = costs.of_stages(base)
        limits = [(2 * ranks if limit is None else limit) * size for size in by_stage.activations]
    else:
        limits = list(limit_bytes) if isinstance(limit_bytes, Sequence) else [limit_bytes] * ranks
    if len(limits) != ranks:
        raise ValueError(f"schedule 'auto': limit_bytes has {len(limits)} values; give one, or one for each rank")
    for rank, (most, size) in enumerate(zip(limits, by_stage.activations, strict=True)):
        if not most >= size:
            raise ValueError(
                f"schedule 'auto': the limit of rank {rank} is {most}, but one micro-batch holds {size}; raise the "
                "limit, or make micro-batches smaller"
            )
    plays = (_Play(micro_batches, by_stage, limits, policy) for policy in GRID)
    best = min(plays, key=_Play.rating)
    found = replace(base, name="auto", actions=tuple(map(tuple, best.lines)))
    fitting = [found]
    for make in (one_f_one_b, zb_h1, zb_h2):
        fixed = replace(make(ranks, micro_batches), name="auto")
        held = peaks(fixed, costs)[1]
        if all(size <= most for size, most in zip(held, limits, strict=True)):
            fitting.append(fixed)

    def rating(schedule: Schedule) -> tuple[float, float]:
        played = simulate(schedule, costs)
        return played.bubble, played.step_time

    return min(fitting, key=rating)


class _Play:
    """One greedy schedule, one stage per rank. limits: per rank, what `costs.activations` may add up to."""

    def __init__(self, micro_batches: int, costs: StageCosts, limits: Sequence[float], policy: Policy) -> None:
        ranks = len(limits)
        self.m, self.costs, self.policy = micro_batches, costs, policy
        self.last = ranks - 1
        self.room = list(limits)
        self.lines: list[list[Action]] = [[] for _ in limits]
        self.done = [[0, 0, 0] for _ in limits]  # per rank, how many F, B, W
        # When the input of each F and the gradient of each B is there; not known before its producer has started.
        self.inputs = [[0.0 if rank == 0 else _NEVER] * micro_batches for rank in range(ranks)]
        self.gradients = [[_NEVER] * micro_batches for _ in limits]
        self.free = [0.0] * ranks
        self.begun = [_NEVER] * ranks
        self.events = [(0.0, rank) for rank in range(ranks)]
        self.finish()

    def rating(self) -> tuple[float, float]:
        """The longest span of a rank, and the last end: the smaller the better."""
        return max(end - begun for end, begun in zip(self.free, self.begun, strict=True)), max(self.free)

    def finish(self) -> None:
        while self.events:
            now, rank = heapq.heappop(self.events)
            if now < self.free[rank]:
                continue  # it is at work; the end of that is an event too
            kind, wake = self.choose(rank, now)
            if kind is not None:
                self.start(rank, now, kind)
            elif wake < _NEVER:
                heapq.heappush(self.events, (wake, rank))
        assert all(done == [self.m] * 3 for done in self.done)

    def choose(self, rank: int, now: float) -> tuple[int | None, float]:
        """(0, 1, 2 for F, B, W, or None to wait; when to look again at the latest)."""
        f, b, w = self.done[rank]
        policy = self.policy
        forward, _, weight = (self.costs.times[kind][rank] for kind in _KINDS)
        # Bytes go up and down as floats: what fits exactly must not fail by a rounding error.
        fits = self.room[rank] >= self.costs.activations[rank] * (1 - 1e-9)
        next_f = self.inputs[rank][f] if f < self.m and fits else _NEVER
        next_b = self.gradients[rank][b] if b < self.m else _NEVER
        if next_b <= now:
            turn = policy.forwards_first and self.lines[rank][-1].kind is not Kind.F
            return (0, now) if turn and next_f <= now else (1, now)
        if next_f <= now and next_b - now >= policy.patience * forward:
            return 0, now
        soonest = min(next_b, next_f if next_f > now else _NEVER)
        if b > w:
            blocked = f < self.m and not fits
            if blocked or soonest - now >= policy.filling * weight:
                return 2, now
        return None, soonest

    def start(self, rank: int, now: float, kind: int) -> None:
        costs = self.costs
        number = self.done[rank][kind]
        self.done[rank][kind] += 1
        self.lines[rank].append(Action(rank, _KINDS[kind], number))
        self.begun[rank] = min(self.begun[rank], now)
        end = self.free[rank] = now + costs.times[_KINDS[kind]][rank]
        heapq.heappush(self.events, (end, rank))
        whole, kept = costs.activations[rank], costs.kept[rank]
        if kind == 0:
            self.room[rank] -= whole
            if rank < self.last:
                self.inputs[rank + 1][number] = end + costs.comm[rank][rank + 1]
                self.wake(rank + 1, now)
            else:
                self.gradients[rank][number] = end
        elif kind == 1:
            self.room[rank] += whole - kept
            if rank:
                self.gradients[rank - 1][number] = end + costs.comm[rank][rank - 1]
                self.wake(rank - 1, now)
        else:
            self.room[rank] += kept

    def wake(self, rank: int, now: float) -> None:
        """A time that was not known is now: an idle rank looks again."""
        if self.free[rank] <= now:
            heapq.heappush(self.events, (now, rank))

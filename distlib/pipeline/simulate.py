"""Plays a schedule against costs: when every action runs, the step time, the bubble, the peak activations.

Each rank runs its actions in order, one compute at a time. A compute starts when its rank is free and its inputs are
there: of another rank, `comm` after they were sent (links are never full). For as long as `send` and `post` say, a rank
is busy with a message and does not compute (the overhead of LogP, Culler et al. 1993).

    rank 0  F0 F1 .. .. BW0-- F2 BW1-- ...      span of rank 0: first start to last end
    rank 1  .. F0 BW0-- F1 BW1-- ...            cost = the longest span of a rank
                                                bubble = 1 - m (F + B + W) / cost        (arXiv 2401.10241)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from distlib.pipeline.actions import COMPUTE, Action, Kind, Schedule, ScheduleError

PerStage = float | Sequence[float]
CHANNELS = ("buffered", "posted", "blocking")


@dataclass(frozen=True)
class Costs:
    """What actions cost. Times in any one unit; one number for all stages, or one per stage.

    forward, backward, weight: time of F, B (input gradient) and W. full: of BW; default: B + W.
    comm: time between a send and its arrival on another rank; one number, or a matrix [from rank][to rank].
    send, post: time of SEND, which is a part of `comm`, and of RECV, on their own ranks; of no account to schedules
    without messages, and to blocking channels.
    gather, reduce: time of GATHER and REDUCE of a stage, which run beside compute, one after the other on each rank.
    activations: bytes that a micro-batch holds in a stage from its F on.
    kept: of these, the bytes held until its W; default: all. The rest is released after its B.
    """

    forward: PerStage = 1.0
    backward: PerStage = 1.0
    weight: PerStage = 1.0
    comm: float | Sequence[Sequence[float]] = 0.0
    send: PerStage = 0.0
    post: PerStage = 0.0
    full: PerStage | None = None
    gather: PerStage = 0.0
    reduce: PerStage = 0.0
    activations: PerStage = 0.0
    kept: PerStage | None = None

    def of_stages(self, schedule: Schedule) -> StageCosts:
        """The same as lists over the stages of `schedule`. Raises ValueError for a wrong length or a negative value."""
        stages, ranks = schedule.stages, schedule.ranks

        def spread(what: str, value: PerStage) -> list[float]:
            values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * stages
            if len(values) != stages:
                raise ValueError(
                    f"costs: {what} has {len(values)} values; give one, or one for each of {stages} stages"
                )
            for stage, v in enumerate(values):
                if not v >= 0 or v == float("inf"):
                    raise ValueError(f"costs: {what} of stage {stage} is {v}; give a finite number of at least 0")
            return values

        backward, weight = spread("backward", self.backward), spread("weight", self.weight)
        activations = spread("activations", self.activations)
        kept = activations if self.kept is None else spread("kept", self.kept)
        for stage in range(stages):
            if kept[stage] > activations[stage]:
                raise ValueError(
                    f"costs: stage {stage} keeps {kept[stage]} bytes after B, but held only {activations[stage]} before"
                )
        if isinstance(self.comm, Sequence):
            comm = [[float(v) for v in row] for row in self.comm]
            if len(comm) != ranks or any(len(row) != ranks for row in comm):
                raise ValueError(f"costs: comm is no {ranks} x {ranks} matrix; give a number, or [from rank][to rank]")
        else:
            comm = [[float(self.comm)] * ranks for _ in range(ranks)]
        for rank in range(ranks):
            comm[rank][rank] = 0.0
            if not all(0 <= v < float("inf") for v in comm[rank]):
                raise ValueError(f"costs: comm from rank {rank} is {comm[rank]}; give finite numbers of at least 0")
        times = {
            Kind.F: spread("forward", self.forward),
            Kind.B: backward,
            Kind.W: weight,
            Kind.FULL: [b + w for b, w in zip(backward, weight, strict=True)]
            if self.full is None
            else spread("full", self.full),
            Kind.GATHER: spread("gather", self.gather),
            Kind.REDUCE: spread("reduce", self.reduce),
            Kind.SEND: spread("send", self.send),
            Kind.RECV: spread("post", self.post),
        }
        return StageCosts(times, comm, activations, kept)


@dataclass(frozen=True)
class StageCosts:
    """Costs as lists. times: per kind, per stage. comm: [from rank][to rank]. activations, kept: bytes per stage."""

    times: dict[Kind, list[float]]
    comm: list[list[float]]
    activations: list[float]
    kept: list[float]


@dataclass(frozen=True)
class Simulation:
    """What became of a schedule.

    lines: per rank, (action, start, end) of every action, in order.
    step_time: from 0 to the last end of anything. bubble: see the top of this file; with stages of different costs,
    m (F + B + W) is the mean over ranks. busy: per rank, the time in compute. spans: per rank, first start to last
    end of its compute. peak: per rank, the most activations held at once, in micro-batches of the whole rank (a stage
    of a rank that holds v counts 1/v). peak_bytes: per rank, the same in bytes.
    """

    schedule: Schedule
    lines: tuple[tuple[tuple[Action, float, float], ...], ...]
    step_time: float
    busy: tuple[float, ...]
    spans: tuple[float, ...]
    peak: tuple[float, ...]
    peak_bytes: tuple[float, ...]

    @property
    def cost(self) -> float:
        """The longest span of a rank."""
        return max(self.spans)

    @property
    def bubble(self) -> float:
        """The idle part of the cost; 0 if nothing costs any time."""
        return 1 - sum(self.busy) / len(self.busy) / self.cost if self.cost else 0.0

    @cached_property
    def times(self) -> dict[Action, tuple[float, float]]:
        """(start, end) of each action."""
        return {action: (start, end) for line in self.lines for action, start, end in line}

    def __str__(self) -> str:
        return (
            f"{self.schedule.name}: step time {self.step_time:.6g}, bubble {self.bubble:.4f}, peak activations "
            f"{max(self.peak):.6g} micro-batches, {max(self.peak_bytes):.6g} bytes"
        )


def simulate(schedule: Schedule, costs: Costs | None = None, *, channels: str = "buffered") -> Simulation:
    """Runs `schedule` against `costs` (default: F = B = W = 1 and no communication time).

    channels: what a SEND and a RECV wait for.
        "buffered": neither waits; the compute that needs a message does. As in the runtime.
        "posted": a SEND waits until its RECV was reached; a RECV does not wait.
        "blocking": both wait for each other, and until the message has arrived.
    A schedule without messages is always as buffered: data flows along the edges.

    Raises ScheduleError if the schedule comes to a stop, naming the actions that wait for each other.
    """
    if channels not in CHANNELS:
        raise ValueError(f"channels is {channels!r}; give one of {', '.join(CHANNELS)}")
    costs = Costs() if costs is None else costs
    lines = _Run(schedule, costs.of_stages(schedule), channels).finish()
    return played(schedule, lines, costs)


def played(
    schedule: Schedule, lines: Sequence[Sequence[tuple[Action, float, float]]], costs: Costs | None = None
) -> Simulation:
    """The account of a run, simulated or measured. lines: per rank, (action, start, end), on one clock."""
    busy, spans = [], []
    for line in lines:
        computes = [(start, end) for action, start, end in line if action.kind in COMPUTE]
        busy.append(sum(end - start for start, end in computes))
        spans.append(computes[-1][1] - computes[0][0] if computes else 0.0)
    last = max((end for line in lines for _, _, end in line), default=0.0)
    peak, peak_bytes = peaks(schedule, Costs() if costs is None else costs)
    return Simulation(
        schedule, tuple(map(tuple, lines)), last, tuple(busy), tuple(spans), tuple(peak), tuple(peak_bytes)
    )


def peaks(schedule: Schedule, costs: Costs) -> tuple[list[float], list[float]]:
    """Per rank, the most activations held at once: in micro-batches of the whole rank, and in bytes.

    Needs no times: a rank's own order decides. A micro-batch without a backward (evaluation) is held during its F.
    """
    by_stage = costs.of_stages(schedule)
    counts, sizes = [], []
    for rank, line in enumerate(schedule.actions):
        share = len(schedule.stages_of(rank)) or 1
        returning = {(a.stage, a.micro_batch) for a in line if a.kind in (Kind.W, Kind.FULL)}
        held = most = 0
        size = largest = 0.0
        for stage, kind, micro_batch, _ in line:
            whole, kept = by_stage.activations[stage], by_stage.kept[stage]
            if kind is Kind.F:
                most, largest = max(most, held + 1), max(largest, size + whole)
                if (stage, micro_batch) in returning:
                    held, size = held + 1, size + whole
            elif kind is Kind.B:
                size -= whole - kept
            elif kind is Kind.W:
                held, size = held - 1, size - kept
            elif kind is Kind.FULL:
                held, size = held - 1, size - whole
        counts.append(most / share)
        sizes.append(largest)
    return counts, sizes


# What others may wait for: ("F" or "B", stage, micro-batch) was computed; ("sent" or "posted" or "arrived", message);
# ("whole", stage) parameters are there.
Fact = tuple


class _Run:
    """One play of a schedule. A rank runs until it waits for a fact that is not yet there; the fact wakes it."""

    def __init__(self, schedule: Schedule, costs: StageCosts, channels: str) -> None:
        self.schedule, self.costs, self.channels = schedule, costs, channels
        self.messages = schedule.has_messages
        self.facts: dict[Fact, float] = {}
        self.waiting: dict[Fact, list[int]] = defaultdict(list)
        self.missing: dict[int, Fact] = {}  # rank: what it waits for
        self.lines: list[list[tuple[Action, float, float]]] = [[] for _ in schedule.actions]
        self.free = [0.0] * schedule.ranks  # when the rank's compute is free
        self.side = [0.0] * schedule.ranks  # when its gathers and reduces are done
        self.gathered = {a.stage for line in schedule.actions for a in line if a.kind is Kind.GATHER}
        self.runnable = deque(range(schedule.ranks))

    def finish(self) -> list[list[tuple[Action, float, float]]]:
        while self.runnable:
            rank = self.runnable.popleft()
            line, done = self.schedule.actions[rank], self.lines[rank]
            while len(done) < len(line):
                missing = self.step(rank, line[len(done)])
                if missing is not None:
                    self.waiting[missing].append(rank)
                    self.missing[rank] = missing
                    break
        if self.missing:
            raise ScheduleError(self.stopped())
        return self.lines

    def know(self, fact: Fact, time: float) -> None:
        self.facts[fact] = time
        for rank in self.waiting.pop(fact, ()):
            del self.missing[rank]
            self.runnable.append(rank)

    def step(self, rank: int, action: Action) -> Fact | None:
        """Runs the rank's next action; or returns the fact that it waits for."""
        kind, free, side = action.kind, self.free[rank], self.side[rank]
        if kind in COMPUTE:
            start = free
            for fact, delay in self.needs(rank, action):
                at = self.facts.get(fact)
                if at is None:
                    return fact
                start = max(start, at + delay)
            end = self.free[rank] = start + self.costs.times[kind][action.stage]
            if kind is not Kind.W:
                self.know(("F" if kind is Kind.F else "B", action.stage, action.micro_batch), end)
        elif kind is Kind.SEND or kind is Kind.RECV:
            return self.step_message(rank, action)
        elif kind is Kind.FREE:
            start = end = free
            self.facts.pop(("whole", action.stage), None)
        else:
            start = max(free, side)
            end = self.side[rank] = start + self.costs.times[kind][action.stage]
            if kind is Kind.GATHER:
                self.know(("whole", action.stage), end)
        self.lines[rank].append((action, start, end))
        return None

    def step_message(self, rank: int, action: Action) -> Fact | None:
        sends, message, free = action.kind is Kind.SEND, action.message, self.free[rank]
        reached, other = ("sent", "posted") if sends else ("posted", "sent")
        if (reached, message) not in self.facts:
            self.know((reached, message), free)
        waits = self.channels == "blocking" or (self.channels == "posted" and sends)
        if waits and (other, message) not in self.facts:
            return other, message
        start = max(free, self.facts[other, message]) if waits else free
        end = start + self.costs.times[action.kind][action.stage]
        source, target, _ = message
        delay = self.costs.comm[self.schedule.placement[source]][self.schedule.placement[target]]
        if self.channels == "blocking":
            end = start + delay
        if sends:
            self.know(("arrived", message), start + delay)
        self.free[rank] = end
        self.lines[rank].append((action, start, end))
        return None

    def needs(self, rank: int, action: Action) -> list[tuple[Fact, float]]:
        """What a compute waits for, and how long after it that is there."""
        stage, kind, micro_batch, _ = action
        placement = self.schedule.placement
        found: list[tuple[Fact, float]] = []
        if stage in self.gathered:
            found.append((("whole", stage), 0.0))
        if kind is Kind.W:
            return found
        forward = kind is Kind.F
        for other in self.schedule.producers[stage] if forward else self.schedule.consumers[stage]:
            if self.messages and placement[other] != rank:
                found.append((("arrived", (other, stage, micro_batch)), 0.0))
            else:
                found.append((("F" if forward else "B", other, micro_batch), self.costs.comm[placement[other]][rank]))
        if not forward:
            found.append((("F", stage, micro_batch), 0.0))
        return found

    def stopped(self) -> str:
        """Which ranks wait for what: the circle among them if there is one."""
        rank = min(self.missing)
        seen: list[int] = []
        while rank in self.missing and rank not in seen:
            seen.append(rank)
            rank = self.schedule.placement[self.maker(self.missing[rank])]
        circle = seen[seen.index(rank) :] if rank in seen else seen
        told = []
        for at in circle:
            place = len(self.lines[at])
            action, fact = self.schedule.actions[at][place], self.missing[at]
            told.append(
                f"rank {at} at action {place}, {action}, waits for {self.told(fact)} of rank "
                f"{self.schedule.placement[self.maker(fact)]}"
            )
        return f"schedule {self.schedule.name!r} comes to a stop ({self.channels} channels): {'; '.join(told)}"

    def maker(self, fact: Fact) -> int:
        """The stage whose action makes a fact true."""
        kind, what = fact[:2]
        if kind in ("F", "B", "whole"):
            return what
        return what[1] if kind == "posted" else what[0]

    def told(self, fact: Fact) -> str:
        """The token of the action that makes a fact true."""
        kind, what = fact[:2]
        if kind == "whole":
            return str(Action(what, Kind.GATHER))
        if kind in ("F", "B"):
            return str(Action(what, Kind.F if kind == "F" else Kind.B, fact[2]))
        source, target, micro_batch = what
        if kind == "posted":
            return str(Action(target, Kind.RECV, micro_batch, source))
        return str(Action(source, Kind.SEND, micro_batch, target))

"""Checks a schedule before the first step: everything once, in order, with matching messages, no deadlock, in memory.

A table that passes here runs: every rank reaches its end, whatever the costs of its actions are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from distlib.pipeline.actions import COMPUTE, Action, Kind, Schedule, ScheduleError
from distlib.pipeline.simulate import Costs, peaks, simulate

_BACKWARD = (Kind.B, Kind.W, Kind.FULL)


def verify(
    schedule: Schedule,
    *,
    training: bool = True,
    channels: str = "blocking",
    limit: float | Sequence[float] | None = None,
    limit_bytes: float | Sequence[float] | None = None,
    costs: Costs | None = None,
) -> None:
    """Raises ScheduleError, naming rank, stage, micro-batch and action, unless `schedule` is sound.

    training: every stage has F and B and W (or BW) of every micro-batch once; otherwise F once, and no backward.
    channels: the weakest that it must run on, see `simulate`. "blocking" covers all others.
    limit: most activations held at once, in micro-batches of a whole rank; for all ranks, or one each.
    limit_bytes: the same in bytes, with `costs.activations` and `costs.kept`.
    """
    _places(schedule)
    _coverage(schedule, training)
    for rank in range(schedule.ranks):
        _order(schedule, rank)
        _parameters(schedule, rank)
        _reductions(schedule, rank)
    if schedule.has_messages:
        _messages(schedule)
        _channels(schedule)
    simulate(schedule, channels=channels)  # raises where it comes to a stop
    _memory(schedule, limit, limit_bytes, costs)


def _fail(schedule: Schedule, rank: int, why: str) -> None:
    raise ScheduleError(f"schedule {schedule.name!r}, rank {rank}: {why}")


def _places(schedule: Schedule) -> None:
    """Every action is of a stage that its rank holds, and of a micro-batch that there is."""
    for rank, line in enumerate(schedule.actions):
        for place, action in enumerate(line):
            at = f"action {place}, {action},"
            if not 0 <= action.stage < schedule.stages:
                _fail(schedule, rank, f"{at} is of stage {action.stage}; there are {schedule.stages} stages")
            if schedule.placement[action.stage] != rank:
                _fail(schedule, rank, f"{at} is of a stage that rank {schedule.placement[action.stage]} holds")
            if action.micro_batch is None:
                if action.kind not in (Kind.GATHER, Kind.FREE, Kind.REDUCE):
                    _fail(schedule, rank, f"{at} has no micro-batch")
            elif not 0 <= action.micro_batch < schedule.micro_batches:
                _fail(
                    schedule, rank, f"{at} is of micro-batch {action.micro_batch} of {schedule.micro_batches}, from 0"
                )
            if (action.peer is not None) != (action.kind in (Kind.SEND, Kind.RECV)):
                _fail(schedule, rank, f"{at} {'has' if action.peer is not None else 'lacks'} a peer stage")


def _coverage(schedule: Schedule, training: bool) -> None:
    """Every stage computes every micro-batch once."""
    seen = Counter(action for line in schedule.actions for action in line if action.kind in COMPUTE)
    for stage, rank in enumerate(schedule.placement):
        for k in range(schedule.micro_batches):
            f, b, w, full = (seen[Action(stage, kind, k)] for kind in (Kind.F, *_BACKWARD))
            who = f"stage {stage} has micro-batch {k}"
            if f != 1:
                _fail(schedule, rank, f"{who} forward (F) {f} times; once is right")
            if not training and (b or w or full):
                _fail(schedule, rank, f"{who} backward, in a schedule without training")
            if training and (b, w, full) not in ((1, 1, 0), (0, 0, 1)):
                _fail(
                    schedule,
                    rank,
                    f"{who} backward as {b} B, {w} W and {full} BW; right is one B and one W, or one BW",
                )


def _order(schedule: Schedule, rank: int) -> None:
    """On its own rank, F comes before B, B before W; across ranks it is the simulation that decides."""
    done: set[Action] = set()
    for place, action in enumerate(schedule.actions[rank]):
        if action.kind in _BACKWARD:
            needed = action._replace(kind=Kind.B if action.kind is Kind.W else Kind.F)
            if needed not in done:
                _fail(schedule, rank, f"action {place}, {action}, comes before {needed}")
        done.add(action)


def _parameters(schedule: Schedule, rank: int) -> None:
    """A stage that is gathered is whole whenever it is used, and free in the end."""
    line = schedule.actions[rank]
    gathered = {action.stage for action in line if action.kind in (Kind.GATHER, Kind.FREE)}
    whole: set[int] = set()
    for place, action in enumerate(line):
        at, stage = f"action {place}, {action}", action.stage
        if action.kind is Kind.GATHER:
            if stage in whole:
                _fail(schedule, rank, f"{at}: stage {stage} is whole already")
            whole.add(stage)
        elif action.kind is Kind.FREE:
            if stage not in whole:
                _fail(schedule, rank, f"{at}: stage {stage} is not whole")
            whole.remove(stage)
        elif action.kind in COMPUTE and stage in gathered and stage not in whole:
            _fail(schedule, rank, f"{at}: stage {stage} is not whole; add {stage}GATHER before it")
    if whole:
        _fail(schedule, rank, f"stage {min(whole)} is never freed; add {min(whole)}FREE at the end")


def _reductions(schedule: Schedule, rank: int) -> None:
    """REDUCE comes after the weight gradients that it is of; once per stage, or once per stage and micro-batch."""
    ready: dict[int, set[int | None]] = defaultdict(set)
    reduced: dict[int, set[int | None]] = defaultdict(set)
    everything = set(range(schedule.micro_batches))
    for place, action in enumerate(schedule.actions[rank]):
        stage, at = action.stage, f"action {place}, {action}"
        if action.kind in (Kind.W, Kind.FULL):
            ready[stage].add(action.micro_batch)
        if action.kind is not Kind.REDUCE:
            continue
        if action.micro_batch in reduced[stage]:
            _fail(schedule, rank, f"{at} was done before")
        needed = everything if action.micro_batch is None else {action.micro_batch}
        missing = sorted(needed - ready[stage])
        if missing:
            _fail(schedule, rank, f"{at} comes before {stage}W{missing[0]} (or {stage}BW{missing[0]})")
        reduced[stage].add(action.micro_batch)
    for stage, numbers in reduced.items():
        if numbers not in ({None}, everything):
            missing = sorted(everything - numbers)
            if None in numbers:
                _fail(schedule, rank, f"stage {stage} has a REDUCE of all micro-batches and others of single ones")
            _fail(schedule, rank, f"stage {stage} lacks {stage}REDUCE{missing[0]}")


def _messages(schedule: Schedule) -> None:
    """Everything that crosses ranks is sent once after it was computed, and received once before it is used."""
    places = {action: (rank, place) for rank, line in enumerate(schedule.actions) for place, action in enumerate(line)}
    count = Counter(action for line in schedule.actions for action in line)
    has_backward = any(action.kind in _BACKWARD for action in places)
    expected = set()
    crossing = [(a, b) for a, b in schedule.edges if schedule.placement[a] != schedule.placement[b]]
    for producer, consumer in crossing:
        for k in range(schedule.micro_batches):
            expected.add((producer, consumer, k))
            if has_backward:
                expected.add((consumer, producer, k))
    for rank, line in enumerate(schedule.actions):
        for place, action in enumerate(line):
            if action.kind in (Kind.SEND, Kind.RECV) and action.message not in expected:
                _fail(
                    schedule,
                    rank,
                    f"action {place}, {action}: nothing goes from stage {action.message[0]} to stage "
                    f"{action.message[1]}; the edges between ranks are "
                    f"{', '.join(f'{a}>{b}' for a, b in crossing) or 'none'}",
                )
    for source, target, k in sorted(expected):
        send, receive = Action(source, Kind.SEND, k, target), Action(target, Kind.RECV, k, source)
        for action, other in ((send, receive), (receive, send)):
            if count[action] != 1:
                rank = schedule.placement[action.stage]
                _fail(
                    schedule,
                    rank,
                    f"{action} is there {count[action]} times; once is right, for {other} of rank "
                    f"{schedule.placement[other.stage]}",
                )
        forward = source < target
        made = _computed(source, k, forward, places)
        used = _computed(target, k, forward, places)
        if places[send] < places[made]:
            _fail(schedule, schedule.placement[source], f"{send} comes before {made}, which makes what it sends")
        if places[used] < places[receive]:
            _fail(schedule, schedule.placement[target], f"{used} comes before {receive}, which it needs")


def _computed(stage: int, k: int, forward: bool, places: dict[Action, tuple[int, int]]) -> Action:
    if forward:
        return Action(stage, Kind.F, k)
    full = Action(stage, Kind.FULL, k)
    return full if full in places else Action(stage, Kind.B, k)


def _channels(schedule: Schedule) -> None:
    """Two ranks see the messages from one to the other in the same order."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for line in schedule.actions:
        for action in line:
            if action.kind in (Kind.SEND, Kind.RECV):
                source, target, _ = action.message
                channel = schedule.placement[source], schedule.placement[target]
                (sent if action.kind is Kind.SEND else received)[channel].append(action)
    for (source, target), sends in sent.items():
        for number, (send, receive) in enumerate(zip(sends, received[source, target], strict=True)):
            if send.message != receive.message:
                _fail(
                    schedule,
                    target,
                    f"message {number} from rank {source} is {send}, but rank {target} expects {receive} then; the "
                    "order of the receives must be that of the sends",
                )


def _memory(
    schedule: Schedule,
    limit: float | Sequence[float] | None,
    limit_bytes: float | Sequence[float] | None,
    costs: Costs | None,
) -> None:
    if limit_bytes is not None and costs is None:
        raise ValueError("verify: limit_bytes needs costs with the bytes of activations")
    counts, sizes = peaks(schedule, Costs() if costs is None else costs)
    for held, most, unit in ((counts, limit, "micro-batches"), (sizes, limit_bytes, "bytes")):
        if most is None:
            continue
        limits = list(most) if isinstance(most, Sequence) else [most] * schedule.ranks
        if len(limits) != schedule.ranks:
            raise ValueError(
                f"verify: {len(limits)} limits in {unit}; give one, or one for each of {schedule.ranks} ranks"
            )
        for rank, (peak, top) in enumerate(zip(held, limits, strict=True)):
            if peak > top * (1 + 1e-9):
                _fail(
                    schedule,
                    rank,
                    f"holds activations of {peak:.6g} {unit} at once; the limit is {top:.6g}. Take a schedule with "
                    "fewer forwards ahead, smaller micro-batches, or activation checkpointing",
                )

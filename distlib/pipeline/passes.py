"""Passes: a schedule in, a schedule out. From compute only to everything that the runtime does.

    generate      0F0 0F1 0F2 ...                              compute only
    fuse          0B3 0W3            -> 0BW3                   where no other rank waits for the B
    gather        0F0 ...            -> 0GATHER 0F0 ... 0FREE  sharded stages
    reduce        0W3                -> 0W3 0REDUCE3           weight gradients are ready
    lower         0F0                -> 0F0 0SEND0>1           messages between ranks, last
                  1F0                -> 1RECV0<0 1F0

`prepare` applies them in this order.
"""

from __future__ import annotations

from collections.abc import Collection

from distlib.pipeline.actions import COMPUTE, Action, Kind, Schedule, ScheduleError
from distlib.pipeline.simulate import Costs, simulate

_ENDS = (Kind.W, Kind.FULL)  # after which a stage's weight gradients of a micro-batch are there


def prepare(
    schedule: Schedule,
    *,
    sharded: Collection[int] = (),
    whole: int = 2,
    reduced: str | None = None,
    costs: Costs | None = None,
) -> Schedule:
    """All passes over a compute-only schedule: `fuse`, `gather`, `reduce`, `lower`, with their arguments."""
    schedule = fuse(schedule)
    if sharded:
        schedule = gather(schedule, sharded, whole)
    if reduced is not None:
        schedule = reduce(schedule, reduced)
    return lower(schedule, costs)


def fuse(schedule: Schedule, *, sent: bool = False) -> Schedule:
    """A B that is followed at once by the W of the same stage and micro-batch becomes one full backward.

    sent: also where the gradient goes to another rank, which then waits for W too. By default only where it does not.
    Not for schedules with messages: the gradient would be sent before it exists.
    """
    _compute_only(schedule, "fuse")
    lines = []
    for rank, actions in enumerate(schedule.actions):
        line: list[Action] = []
        for action in actions:
            before = action._replace(kind=Kind.B)
            if (
                action.kind is Kind.W
                and line
                and line[-1] == before
                and (sent or not _messages(schedule, rank, before))
            ):
                line[-1] = action._replace(kind=Kind.FULL)
            else:
                line.append(action)
        lines.append(line)
    return schedule.with_actions(lines)


def unfuse(schedule: Schedule) -> Schedule:
    """The opposite of `fuse`: each full backward becomes B and W, so that input gradients leave before W starts."""
    _compute_only(schedule, "unfuse")
    return schedule.with_actions(
        [
            part
            for action in line
            for part in (
                (action._replace(kind=Kind.B), action._replace(kind=Kind.W)) if action.kind is Kind.FULL else (action,)
            )
        ]
        for line in schedule.actions
    )


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of a compute-only schedule in their order: for evaluation."""
    _compute_only(schedule, "forward_only")
    return schedule.with_actions([a for a in line if a.kind is Kind.F] for line in schedule.actions)


def gather(schedule: Schedule, sharded: Collection[int], whole: int = 2) -> Schedule:
    """Adds a GATHER before, and a FREE after, the uses of the parameters of sharded stages (ZeRO stage 3, MiCS).

    sharded: these stages. whole: most of them that are whole on a rank at once, at least 1. At any time these are the
    stage at work and those needed soonest after it, so the next GATHER starts while the stage before it computes; what
    is needed latest is freed first. 1 gathers a stage only when the one before it is free.

    F, B, W and BW all count as uses. Ranks that hold the same stages of other replicas must use the same schedule, as
    a GATHER is a collective of the partition group.
    """
    _compute_only(schedule, "gather")
    if whole < 1:
        raise ValueError(f"gather: whole is {whole}; give at least 1")
    unknown = sorted(set(sharded) - set(range(schedule.stages)))
    if unknown:
        raise ValueError(f"gather: stage {unknown[0]} is not one of the {schedule.stages} stages")
    lines = []
    for actions in schedule.actions:
        soon = _soonest(actions, frozenset(sharded), whole)
        line: list[Action] = []
        held: list[int] = []
        for action, wanted in zip(actions, soon, strict=True):
            line += [Action(stage, Kind.FREE) for stage in held if stage not in wanted]
            line += [Action(stage, Kind.GATHER) for stage in wanted if stage not in held]
            held = [stage for stage in held if stage in wanted] + [stage for stage in wanted if stage not in held]
            line.append(action)
        lines.append(line + [Action(stage, Kind.FREE) for stage in held])
    return schedule.with_actions(lines)


def _soonest(actions: tuple[Action, ...], sharded: frozenset[int], whole: int) -> list[tuple[int, ...]]:
    """For each action, the up to `whole` different sharded stages that it and the actions after it use first."""
    found: list[tuple[int, ...]] = []
    upcoming: tuple[int, ...] = ()
    for action in reversed(actions):
        if action.kind in COMPUTE and action.stage in sharded:
            upcoming = (action.stage, *(stage for stage in upcoming if stage != action.stage))
        # All are remembered, only the first are wanted: a stage that drops out may come back in before its use.
        found.append(upcoming[:whole])
    return found[::-1]


def reduce(schedule: Schedule, every: str = "step") -> Schedule:
    """Adds a REDUCE where weight gradients are ready.

    every: "step": one per stage, after its last weight gradient, for what is reduced once per optimizer step.
        "micro_batch": one after each, for hop 1 of sharded gradients.
    """
    if every not in ("step", "micro_batch"):
        raise ValueError(f"reduce: every is {every!r}; give 'step' or 'micro_batch'")
    lines = []
    for actions in schedule.actions:
        last = {a.stage: a for a in actions if a.kind in _ENDS}
        line: list[Action] = []
        for action in actions:
            line.append(action)
            if action.kind in _ENDS and every == "micro_batch":
                line.append(Action(action.stage, Kind.REDUCE, action.micro_batch))
            elif action.kind in _ENDS and last[action.stage] == action:
                line.append(Action(action.stage, Kind.REDUCE))
        lines.append(line)
    return schedule.with_actions(lines)


def lower(schedule: Schedule, costs: Costs | None = None) -> Schedule:
    """Adds a SEND and a RECV for everything that crosses ranks.

    costs: decide the order in which ranks expect messages (default: F = B = W = 1, communication 1/8); any costs give
    a schedule that runs.

        rank 0   F0  SEND0>1  F1  SEND1>1  ..............  RECV0<1  BW0
        rank 1                RECV0<0  F0  BW0  SEND0>0 ...

    A SEND comes right after what it sends was computed. Its RECV stands before the first action that the other rank
    starts after that, in the simulated time line: the message travels while the actions in between compute. All
    messages so have one order in time, which every rank follows: it cannot deadlock, not even where a send and a
    receive wait for each other, and two ranks see their common messages in one order.
    """
    _compute_only(schedule, "lower")
    costs = Costs(comm=0.125) if costs is None else costs
    by_stage = costs.of_stages(schedule)
    for kind in (Kind.F, Kind.B, Kind.FULL):
        for stage, time in enumerate(by_stage.times[kind]):
            if time <= 0:
                raise ValueError(
                    f"lower: {kind.name} of stage {stage} takes {time}; messages are ordered by times above 0"
                )
    # Per rank: (time, 0 for messages and 1 for what starts then, place, message order, action). A message's time is
    # the end of what produced it.
    keyed: list[list[tuple[float, int, int, tuple[int, ...], Action]]] = [[] for _ in schedule.actions]
    for rank, line in enumerate(simulate(schedule, costs).lines):
        free = 0.0  # gathers and reduces may start late, beside compute; they keep their place in the list
        for place, (action, start, end) in enumerate(line):
            keyed[rank].append((start if action.kind in COMPUTE else free, 1, place, (), action))
            free = end if action.kind in COMPUTE else free
            for message in _messages(schedule, rank, action):
                source, target, micro_batch = message
                send = Action(source, Kind.SEND, micro_batch, target)
                receive = Action(target, Kind.RECV, micro_batch, source)
                keyed[rank].append((end, 0, 0, message, send))
                keyed[schedule.placement[target]].append((end, 0, 0, message, receive))
    return schedule.with_actions([entry[-1] for entry in sorted(line, key=lambda e: e[:-1])] for line in keyed)


def _messages(schedule: Schedule, rank: int, action: Action) -> list[tuple[int, int, int]]:
    """(from stage, to stage, micro-batch) of what other ranks get from an action."""
    if action.kind not in (Kind.F, Kind.B, Kind.FULL) or action.micro_batch is None:
        return []
    targets = schedule.consumers if action.kind is Kind.F else schedule.producers
    return [
        (action.stage, target, action.micro_batch)
        for target in targets[action.stage]
        if schedule.placement[target] != rank
    ]


def _compute_only(schedule: Schedule, what: str) -> None:
    if schedule.has_messages:
        raise ScheduleError(f"{what}: schedule {schedule.name!r} already has messages; apply it before `lower`")

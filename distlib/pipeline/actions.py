"""A pipeline schedule as data: typed actions per rank, their text form, and schedules as CSV.

    token       action
    0F3         stage 0: forward of micro-batch 3
    0B3         stage 0: gradient with respect to the stage's input (and no weight gradient)
    0W3         stage 0: weight gradients, from what 0B3 left
    0BW3        stage 0: full backward, B and W in one
    0SEND3>1    stage 0 sends micro-batch 3 to stage 1: activations, as 1 comes after 0
    1RECV3<0    stage 1 receives it
    1SEND3>0    stage 1 sends micro-batch 3 to stage 0: gradients, as 0 comes before 1
    0GATHER     stage 0: make the parameters whole       0FREE: keep only this rank's shards again
    0REDUCE3    stage 0: the gradients of micro-batch 3 are ready for hop 1
    0REDUCE     stage 0: the gradients of all micro-batches are ready to be reduced

Stages are numbered in the order in which data flows forward; micro-batches from 0. One rank may hold several stages.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple


class ScheduleError(ValueError):
    """A schedule that cannot be run. The message names the rank, stage, micro-batch or action."""


class Kind(Enum):
    """What an action does. The value is its text in a token."""

    F = "F"
    B = "B"
    W = "W"
    FULL = "BW"
    SEND = "SEND"
    RECV = "RECV"
    GATHER = "GATHER"
    FREE = "FREE"
    REDUCE = "REDUCE"

    # Members are single objects: hashing them by identity makes simulations twice as fast.
    __hash__ = object.__hash__


COMPUTE = frozenset((Kind.F, Kind.B, Kind.W, Kind.FULL))
_PAIRED = frozenset((Kind.SEND, Kind.RECV))
_WHOLE_STAGE = frozenset((Kind.GATHER, Kind.FREE))
_TOKEN = re.compile(r"(\d+)(SEND|RECV|GATHER|FREE|REDUCE|BW|F|B|W)(\d+)?(?:([<>])(\d+))?\Z")


class Action(NamedTuple):
    """One step of one rank.

    micro_batch: None for GATHER, FREE and a REDUCE of all micro-batches.
    peer: the other stage of a SEND or RECV; None for the others.
    """

    stage: int
    kind: Kind
    micro_batch: int | None = None
    peer: int | None = None

    @property
    def message(self) -> tuple[int, int, int]:
        """(from stage, to stage, micro-batch) of a SEND or RECV; equal for the two that belong together."""
        assert self.peer is not None and self.micro_batch is not None
        if self.kind is Kind.SEND:
            return self.stage, self.peer, self.micro_batch
        return self.peer, self.stage, self.micro_batch

    @property
    def carries_gradients(self) -> bool:
        """Whether a SEND or RECV carries gradients (towards earlier stages), not activations."""
        source, target, _ = self.message
        return target < source

    def __str__(self) -> str:
        arrow = "" if self.peer is None else f"{'>' if self.kind is Kind.SEND else '<'}{self.peer}"
        return f"{self.stage}{self.kind.value}{'' if self.micro_batch is None else self.micro_batch}{arrow}"


def parse(token: str) -> Action:
    """The action of a token such as "0F3". Raises ScheduleError for anything else."""
    match = _TOKEN.match(token.strip())
    if match is None:
        raise ScheduleError(f"{token!r} is not an action; write one like 0F3, 0BW3, 0SEND3>1, 1RECV3<0, 0GATHER")
    stage, kind, micro_batch, arrow, peer = match.groups()
    action = Action(
        int(stage),
        Kind(kind),
        None if micro_batch is None else int(micro_batch),
        None if peer is None else int(peer),
    )
    arrows = {Kind.SEND: ">", Kind.RECV: "<"}
    if arrows.get(action.kind) != arrow:
        raise ScheduleError(
            f"{token!r}: a SEND names its peer stage with '>', a RECV with '<', other actions have none"
        )
    if action.kind in _WHOLE_STAGE and micro_batch is not None:
        raise ScheduleError(f"{token!r}: {kind} is of a whole stage and has no micro-batch")
    if micro_batch is None and action.kind is not Kind.REDUCE and action.kind not in _WHOLE_STAGE:
        raise ScheduleError(f"{token!r}: {kind} needs a micro-batch, as in 0{kind}3")
    if action.peer == action.stage:
        raise ScheduleError(f"{token!r}: a stage does not send to itself")
    return action


def chain(stages: int) -> tuple[tuple[int, int], ...]:
    """The edges of stages that each feed the next."""
    return tuple((s, s + 1) for s in range(stages - 1))


@dataclass(frozen=True)
class Schedule:
    """What every rank of a pipeline does in one optimizer step, in order.

    name: of the generator, or of the file.
    actions: per rank, its actions in order.
    placement: per stage, the rank that holds it.
    micro_batches: of the step, all stages see every one.
    edges: (producer stage, consumer stage) of activations, gradients flow back; default: each stage feeds the next.
        A skip connection is one more edge. Producers come before their consumers.

    A schedule may hold compute actions only (data then flows by itself along the edges), or every message as a SEND
    and a RECV (after `distlib.pipeline.passes.lower`). Whether it can run is the question of `verify`.
    """

    name: str
    actions: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]
    micro_batches: int
    edges: tuple[tuple[int, int], ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(tuple(line) for line in self.actions))
        object.__setattr__(self, "placement", tuple(self.placement))
        if not self.actions or not self.placement:
            raise ScheduleError(f"schedule {self.name!r} has no {'stages' if self.actions else 'ranks'}")
        if self.micro_batches < 1:
            raise ScheduleError(f"schedule {self.name!r}: micro_batches is {self.micro_batches}; give at least 1")
        for stage, rank in enumerate(self.placement):
            if not 0 <= rank < self.ranks:
                raise ScheduleError(
                    f"schedule {self.name!r}: stage {stage} is placed on rank {rank}, but there are {self.ranks} ranks"
                )
        edges = tuple(sorted(set(self.edges) | set(chain(self.stages))))
        for producer, consumer in edges:
            if not 0 <= producer < consumer < self.stages:
                raise ScheduleError(
                    f"schedule {self.name!r}: edge {producer}>{consumer} must go from an earlier to a later one of the "
                    f"{self.stages} stages"
                )
        object.__setattr__(self, "edges", edges)

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.placement)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds, ascending."""
        return tuple(stage for stage, at in enumerate(self.placement) if at == rank)

    @cached_property
    def producers(self) -> tuple[tuple[int, ...], ...]:
        """Per stage, the stages whose activations it takes."""
        return tuple(tuple(a for a, b in self.edges if b == stage) for stage in range(self.stages))

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """Per stage, the stages that take its activations."""
        return tuple(tuple(b for a, b in self.edges if a == stage) for stage in range(self.stages))

    @cached_property
    def has_messages(self) -> bool:
        """Whether messages are actions here; if not, data flows by itself along the edges."""
        return any(action.kind in _PAIRED for line in self.actions for action in line)

    def with_actions(self, actions: Iterable[Iterable[Action]]) -> Schedule:
        """This schedule with other actions per rank."""
        return replace(self, actions=tuple(tuple(line) for line in actions))

    def with_edges(self, edges: Iterable[tuple[int, int]]) -> Schedule:
        """This schedule with further edges, such as skip connections; compute-only schedules only."""
        if self.has_messages:
            raise ScheduleError(f"schedule {self.name!r} already has messages; add edges before `lower`")
        return replace(self, edges=(*self.edges, *edges))

    def __str__(self) -> str:
        return "\n".join(f"rank {rank}: {' '.join(map(str, line))}" for rank, line in enumerate(self.actions))


def to_csv(schedule: Schedule) -> str:
    """A schedule as CSV text; `from_csv` makes an equal one of it.

    Rows: `schedule,<name>`; `micro_batches,<number>`; `stages,<rank of stage 0>,...`; `edges,<a>><b>,...`; and for
    each rank, in order, `rank <number>,<token>,...`.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["schedule", schedule.name])
    rows.writerow(["micro_batches", schedule.micro_batches])
    rows.writerow(["stages", *schedule.placement])
    rows.writerow(["edges", *(f"{a}>{b}" for a, b in schedule.edges)])
    for rank, line in enumerate(schedule.actions):
        rows.writerow([f"rank {rank}", *map(str, line)])
    return text.getvalue()


def from_csv(text: str, name: str = "csv") -> Schedule:
    """The schedule of CSV text (see `to_csv`).

    Only the rows of ranks are needed. Without the others, the name is `name`, a stage belongs to the rank whose row
    names it, the micro-batches are as many as appear, and each stage feeds the next. Empty cells are idle slots, and
    left out. Raises ScheduleError with the row of what cannot be read.
    """
    head: dict[str, list[str]] = {}
    lines: list[list[Action]] = []
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        title, values = cells[0], [cell for cell in cells[1:] if cell]
        try:
            if title == f"rank {len(lines)}":
                lines.append([parse(token) for token in values])
            elif title in ("schedule", "micro_batches", "stages", "edges") and title not in head:
                head[title] = values
            else:
                raise ScheduleError(
                    f"{title!r} begins no row here; expected 'rank {len(lines)}', or once each 'schedule', "
                    "'micro_batches', 'stages', 'edges'"
                )
        except ScheduleError as error:
            raise ScheduleError(f"schedule {name!r}, row {number}: {error}") from None
    try:
        placement = [int(rank) for rank in head["stages"]] if "stages" in head else _placement(lines, name)
        pairs = [edge.split(">") for edge in head.get("edges", [])]
        edges = tuple((int(a), int(b)) for a, b in pairs)
        seen = [a.micro_batch for line in lines for a in line if a.micro_batch is not None]
        micro_batches = int(head["micro_batches"][0]) if "micro_batches" in head else max(seen, default=-1) + 1
    except (IndexError, ValueError) as error:
        if isinstance(error, ScheduleError):
            raise
        raise ScheduleError(f"schedule {name!r}: a header row cannot be read: {error}") from None
    title = " ".join(head.get("schedule", [])) or name
    return Schedule(title, tuple(map(tuple, lines)), tuple(placement), micro_batches, edges)


def _placement(lines: Sequence[Sequence[Action]], name: str) -> list[int]:
    holder: dict[int, int] = {}
    for rank, line in enumerate(lines):
        for action in line:
            if holder.setdefault(action.stage, rank) != rank:
                raise ScheduleError(
                    f"schedule {name!r}: {action} is an action of rank {rank}, but stage {action.stage} belongs to "
                    f"rank {holder[action.stage]}"
                )
    missing = [stage for stage in range(max(holder, default=-1) + 1) if stage not in holder]
    if missing:
        raise ScheduleError(f"schedule {name!r}: no rank has an action of stage {missing[0]}")
    return [holder[stage] for stage in range(len(holder))]


def save_csv(schedule: Schedule, path: str | Path) -> None:
    """Writes a schedule to a CSV file (see `to_csv`)."""
    Path(path).write_text(to_csv(schedule))


def load_csv(path: str | Path) -> Schedule:
    """Reads a schedule from a CSV file (see `from_csv`)."""
    return from_csv(Path(path).read_text(), Path(path).stem)

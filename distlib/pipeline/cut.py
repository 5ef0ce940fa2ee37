"""A program cut into stages: which calls each stage makes, and which values travel between them.

    program   embedding  +pos  block 0  block 1  mask  head          stage 0   embedding, + pos, block 0
    leaves        0               0        1             1           stage 1   mask, block 1, head
                                        x ------------------>        edge (0, 1): x

Every call is made on one stage (placing.py says on which), repeated glue on each that needs it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from distlib.pipeline.leaves import nearest
from distlib.pipeline.placing import Placing
from distlib.pipeline.program import Call, Program, Read, Spec, refs


@dataclass(frozen=True)
class Port:
    """What travels from one stage to another for a micro-batch: tensors in a fixed order."""

    source: int
    target: int
    specs: tuple[Spec, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Load:
    """A value comes in: tensor `item` of receive port `port`, or from where the program has it (port None).

    copy: the stage writes into it, so it takes a copy.
    """

    value: int
    port: int | None
    item: int
    copy: bool


@dataclass(frozen=True, eq=False)
class Part:
    """One stage of a program: pure data.

    receives: ports by source; sends: by target; sent: per port, the values that go. steps: in order.
    leaves: names, in order of their first call. state: full names of the parameters and buffers that its glue uses.
    random: whether anything in it draws random numbers. last: it makes the model's output.
    """

    program: Program
    stage: int
    last: bool
    steps: tuple[Load | Call, ...]
    receives: tuple[Port, ...]
    sends: tuple[Port, ...]
    sent: tuple[tuple[int, ...], ...]
    leaves: tuple[str, ...]
    state: tuple[str, ...]
    random: bool

    @cached_property
    def inputs(self) -> frozenset[int]:
        """Numbers of the model's inputs, leaves of (args, kwargs), that it reads."""
        loads = (step for step in self.steps if isinstance(step, Load) and step.port is None)
        origins = (self.program.values[load.value].origin for load in loads)
        return frozenset(origin for origin in origins if isinstance(origin, int))


def edges(parts: Iterable[Part]) -> tuple[tuple[int, int], ...]:
    """(source, target) of all that travels, ascending. Neighbours with nothing to say to each other have none."""
    return tuple(sorted((port.source, port.target) for part in parts for port in part.sends))


# ---------------------------------------------------------------- leaves to stages


def assign(program: Program, split: Sequence[int] | Sequence[str]) -> tuple[int, ...]:
    """The stage of each leaf call.

    split: bounds, stage j being the leaf calls bounds[j] to bounds[j+1] - 1; or the names of the leaves that begin the
    stages after the first one, each with its first call.

    Raises ValueError for a name that is no leaf or is never called, names in another order than that of the calls, and
    for a stage without a leaf.
    """
    calls = program.leaf_calls
    if split and isinstance(split[0], int):
        bounds = [int(b) for b in split]
        if bounds[0] != 0 or bounds[-1] != len(calls):
            raise ValueError(f"pipeline: bounds {bounds} must go from 0 to {len(calls)}, the number of leaf calls")
    else:
        first: dict[str, int] = {}
        for call in calls:
            first.setdefault(call.name, call.number)
        for name in split:
            if name not in first:
                raise ValueError(
                    f"pipeline: split names {name!r}, which the recorded run never calls{nearest(str(name), first)}. "
                    "A stage begins with the first call of its module"
                )
        bounds = [0, *(first[str(name)] for name in split), len(calls)]
    for stage, (a, b) in enumerate(pairwise(bounds)):
        if a < b:
            continue
        names = [call.name for call in calls]
        at = f"before {names[b]}" if b < len(names) else "at the end"
        raise ValueError(
            f"pipeline: stage {stage} would hold no leaf ({at}). {len(names)} leaf calls, in this order: "
            f"{', '.join(names)}. Name other modules, in the order of their calls, or fewer stages"
        )
    return tuple(stage for stage, (a, b) in enumerate(pairwise(bounds)) for _ in range(a, b))


def _per_call(program: Program, stage_of_leaf: Mapping[str, int] | Sequence[int], stages: int) -> list[int]:
    """The stage of each leaf call, checked. A leaf by name that is called again later runs where the run is then."""
    calls = program.leaf_calls
    if isinstance(stage_of_leaf, Mapping):
        found: list[int] = []
        for call in calls:
            if call.name not in stage_of_leaf:
                raise ValueError(f"pipeline: leaf {call.name} has no stage; the stages hold {', '.join(stage_of_leaf)}")
            found.append(max(stage_of_leaf[call.name], found[-1] if found else 0))
    else:
        found = [int(stage) for stage in stage_of_leaf]
    if len(found) != len(calls):
        raise ValueError(f"pipeline: {len(found)} stages are given for {len(calls)} leaf calls")
    for call, (a, b) in zip(calls[1:], pairwise(found), strict=True):
        if b < a:
            raise ValueError(f"pipeline: {call.name} is on stage {b}, but is called after leaves of stage {a}")
    missing = sorted(set(range(stages)) - set(found))
    if missing or not set(found) <= set(range(stages)):
        raise ValueError(f"pipeline: of {stages} stages, {missing or sorted(set(found))} would hold no leaf")
    return found


# ---------------------------------------------------------------- stages to parts


def cut(program: Program, stage_of_leaf: Mapping[str, int] | Sequence[int], stages: int) -> tuple[Part, ...]:
    """The parts of a program, one per stage. Every leaf call is in exactly one.

    stage_of_leaf: per leaf call (see `assign`), or by name for a run whose calls may differ from the one that was
    assigned: a leaf that is called again later runs, with its weights, on the stage that runs then.

    Raises ValueError for a leaf without a stage, stages that fall in the order of calls, a stage without a leaf, and
    for writes in place that separate copies of a value would not all see.
    """
    placing = Placing(program, _per_call(program, stage_of_leaf, stages))
    if placing.conflict is not None:
        raise ValueError(placing.conflict)
    gathered = [_Gathered(placing, stage, stage == stages - 1) for stage in range(stages)]
    for one in gathered:
        one.check_copies()
    wanted: defaultdict[tuple[int, int], list[Read]] = defaultdict(list)
    for one in gathered:
        for source, reads in one.received.items():
            wanted[source, one.stage] = reads
    trained = _trained(gathered, wanted)
    ports = {
        (a, b): Port(
            a,
            b,
            tuple(
                program.specs[read]._replace(requires_grad=program.specs[read].requires_grad and (b, read) in trained)
                for read in reads
            ),
        )
        for (a, b), reads in wanted.items()
    }
    parts = tuple(one.part(ports, wanted) for one in gathered)
    seen = sorted(step.index for part in parts for step in part.steps if isinstance(step, Call) and step.is_leaf)
    assert seen == [call.index for call in program.leaf_calls]
    return parts


class _Gathered:
    """What one stage needs. received: source -> versions, in order."""

    def __init__(self, placing: Placing, stage: int, last: bool) -> None:
        self.placing = placing
        self.program = placing.program
        self.stage = stage
        self.last = last
        self._made = {index for index, where in placing.stage.items() if where == stage}
        self._repeat(lambda call: placing.stage[call.index] is None)
        self._written = {memory for index in self._made for memory in self.program.calls[index].writes}
        self._repeat(self._is_view_of_written)
        self.calls = [self.program.calls[index] for index in sorted(self._made)]
        self.received: dict[int, list[Read]] = {}
        for read in self._reads():
            source = self._source(read)
            if source is not None:
                self.received.setdefault(source, []).append(read)
        self.received = {source: self.received[source] for source in sorted(self.received)}

    def _repeat(self, chosen: Callable[[Call], bool]) -> None:
        """Add the chosen ones of the calls that this stage's calls need."""
        calls = self.program.calls
        waiting = [read for index in self._made for read in calls[index].reads]
        waiting += self.program.ends if self.last else ()
        while waiting:
            _, writer = waiting.pop()
            if writer is not None and writer not in self._made and chosen(calls[writer]):
                self._made.add(writer)
                waiting += calls[writer].reads

    def _is_view_of_written(self, call: Call) -> bool:
        """A view of memory that this stage writes is made here again, of the copy of what it is a view of."""
        values = self.program.values
        made = list(refs(call.result))
        if call.is_leaf or call.writes or call.random or len(call.reads) != 1:
            return False
        memory = values[call.reads[0][0]].memory
        return memory in self._written and all(values[v].memory == memory for v in made)

    def _reads(self) -> list[Read]:
        """All versions that are read, in the order of the first read."""
        reads = [read for call in self.calls for read in call.reads]
        return list(dict.fromkeys([*reads, *(self.program.ends if self.last else ())]))

    def _source(self, read: Read) -> int | None:
        """The stage that sends a version; None: it is at hand here."""
        value, writer = read
        home = self.placing.home.get(value) if writer is None else self.placing.stage[writer]
        if home is None or home == self.stage or writer in self._made:
            return None
        assert home < self.stage, (read, home, self.stage)
        return home

    def check_copies(self) -> None:
        """Values that share memory and come in one by one share it no longer: a write would reach only one."""
        values = self.program.values
        shared: defaultdict[int, set[int]] = defaultdict(set)
        for value, writer in self._reads():
            if writer not in self._made and values[value].memory in self._written:
                shared[values[value].memory].add(value)
        for memory, members in shared.items():
            if len(members) > 1:
                call = next(call for call in self.calls if memory in call.writes)
                raise ValueError(
                    f"pipeline: {call} writes in place, on stage {self.stage}, into memory of which {len(members)} "
                    "tensors come from an earlier stage, one by one: the others would not see it. Write "
                    "`x = x + y` instead of `x += y`, or clone before"
                )

    def part(self, ports: Mapping[tuple[int, int], Port], wanted: Mapping[tuple[int, int], Sequence[Read]]) -> Part:
        values = self.program.values
        item = {read: (port, k) for port, reads in enumerate(self.received.values()) for k, read in enumerate(reads)}
        state: list[str] = []
        steps: list[Load | Call] = []
        here: set[Read] = set()

        def load(reads: Iterable[Read]) -> None:
            for read in reads:
                value, writer = read
                if read in here or writer in self._made:
                    continue
                here.add(read)
                port, k = item.get(read, (None, 0))
                origin = values[value].origin
                is_state = port is None and isinstance(origin, str)
                if is_state:
                    assert isinstance(origin, str)
                    state.append(origin)
                steps.append(Load(value, port, k, values[value].memory in self._written and not is_state))

        for call in self.calls:
            load(call.reads)
            steps.append(call)
        sends = {target: reads for (source, target), reads in sorted(wanted.items()) if source == self.stage}
        for reads in sends.values():
            load(reads)
        if self.last:
            load(self.program.ends)
        names = [call.target for call in self.calls if isinstance(call.target, str)]
        return Part(
            program=self.program,
            stage=self.stage,
            last=self.last,
            steps=tuple(steps),
            receives=tuple(ports[source, self.stage] for source in self.received),
            sends=tuple(ports[self.stage, target] for target in sends),
            sent=tuple(tuple(value for value, _ in reads) for reads in sends.values()),
            leaves=tuple(dict.fromkeys(names)),
            state=tuple(dict.fromkeys(state)),
            random=any(call.random for call in self.calls),
        )


def _trained(gathered: Sequence[_Gathered], wanted: Mapping[tuple[int, int], Sequence[Read]]) -> set[tuple[int, Read]]:
    """(stage, version) for which a gradient comes back on that stage."""
    found: set[tuple[int, Read]] = set()
    for one in reversed(gathered):
        program, stage = one.program, one.stage
        if one.last:
            found |= {(stage, read) for read in program.ends if program.specs[read].requires_grad}
        for (source, target), reads in wanted.items():
            if source == stage:
                found |= {(stage, read) for read in reads if (target, read) in found}
        for call in reversed(one.calls):
            before = dict(call.reads)
            for value, arguments in call.flows.items():
                if (stage, (value, call.index)) in found:
                    found |= {(stage, (v, before[v])) for v in arguments}
    return found


def crossing_bytes(program: Program) -> list[int]:
    """Per leaf call but the last: the bytes that travel, once each, over a cut behind it."""
    count = len(program.leaf_calls)
    placing = Placing(program, range(count))
    furthest: dict[Read, tuple[int, int]] = {}
    for stage in range(count):
        for source, reads in _Gathered(placing, stage, stage == count - 1).received.items():
            for read in reads:
                furthest[read] = (source, stage)
    sizes = [0] * max(count - 1, 0)
    for read, (source, target) in furthest.items():
        for k in range(source, target):
            sizes[k] += program.specs[read].nbytes
    return sizes

"""Which stage makes which call of a program, given the stages of its leaves.

- A leaf's call is on the stage that it is assigned to; stages rise in the order of calls.
- Glue is on the stage of its latest producer; or later, with its readers, where less travels then (a `cat`, a cast).
- Glue of nothing but inputs, constants and unchanged buffers is repeated where it is needed: it is never sent.
- Glue of parameters only is on the stage of its first reader.
- Glue that draws random numbers is on no earlier stage than a leaf that is called before it.
- A write in place is on no earlier stage than anything that reads the value before it.
- What is made on stage a and read on stage b goes from a to b, whatever lies between.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from distlib.pipeline.program import Call, Program, Read, refs


class Placing:
    """The stage of every call. stage[index]: None for glue that is repeated where it is needed. home: the stage of
    parameters and buffers as they came in, where one stage must have them alone (they are written). conflict: what a
    cut here would get wrong."""

    def __init__(self, program: Program, stage_of_leaf: Sequence[int]) -> None:
        self.program = program
        self.stage: dict[int, int | None] = {}
        self.home: dict[int, int] = {}
        self.conflict: str | None = None
        self._floating: set[int] = set()
        values = program.values
        self._written = {memory for call in program.calls for memory in call.writes}
        self._touched: defaultdict[int, int] = defaultdict(int)  # memory -> latest stage that read it
        running = 0
        for call in program.calls:
            if call.number is not None:
                running = stage_of_leaf[call.number]
                self._put(call, running)
                continue
            producers = [self._stage_of(read) for read in call.reads]
            made_on = max((p for p in producers if p is not None), default=None)
            if self._is_repeatable(call):
                self.stage[call.index] = None
            elif made_on is not None:
                drawn = running if call.random else made_on  # after all that draws before it
                self._put(call, max([made_on, drawn, *(self._touched[memory] for memory in call.writes)]))
            elif call.random or any(values[v].memory in self._written for v, _ in call.reads):
                self._put(call, running)
            else:
                self._floating.add(call.index)
        for call in reversed(program.calls):  # read by nobody who has a stage
            if call.index in self._floating:
                self._put(call, running)
        for read in program.ends:
            self._pull(read, running)
        self._sink(running)
        self.conflict = self.conflict or self._state_in_two_places()

    def _state_in_two_places(self) -> str | None:
        """What is wrong if a parameter or buffer inside of a leaf changes, and another stage has a copy of it."""
        program = self.program
        named = [(v.memory, v.origin) for v in program.values if isinstance(v.origin, str)]
        stages: defaultdict[str, set[str]] = defaultdict(set)
        writers: dict[str, str] = {}
        for leaf in program.leaf_calls:
            for name in program.inside[leaf.name]:
                stages[name].add(str(self.stage[leaf.index]))
            writers |= dict.fromkeys(leaf.changed, leaf.name)
        for call in program.calls:
            for name in (origin for memory, origin in named if memory in call.writes and not call.is_leaf):
                stages[name].add(str(self.stage[call.index]))
                writers[name] = str(call)
        for name, writer in writers.items():
            if len(stages[name]) > 1:
                return (
                    f"pipeline: {name} is changed in forward by {writer}, and stages "
                    f"{', '.join(sorted(stages[name]))} would each have a copy of their own. Use it in one "
                    "module, or cut the model elsewhere"
                )
        return None

    def _sink(self, last: int) -> None:
        """Glue goes on to the one stage that reads its result, where its arguments are fewer bytes than that."""
        program, values = self.program, self.program.values
        readers: defaultdict[Read, Counter[int]] = defaultdict(Counter)  # version -> how many on each stage
        for call in program.calls:
            where = self.stage[call.index]
            if where is not None:
                for read in call.reads:
                    readers[read][where] += 1
        for read in program.ends:
            readers[read][last] += 1
        for call in reversed(program.calls):
            here = self.stage[call.index]
            touched = {*(v for v, _ in call.reads), *refs(call.result)}
            if call.is_leaf or call.random or here is None or any(values[v].memory in self._written for v in touched):
                continue
            results = [(v, call.index) for v in dict.fromkeys(refs(call.result)) if readers[v, call.index]]
            targets = {stage for read in results for stage in readers[read]}
            if len(targets) != 1 or here in targets:
                continue
            (target,) = targets
            sources = {read: self._stage_of(read) for read in call.reads}
            arguments = [read for read, source in sources.items() if source is not None]
            alone = [read for read in arguments if sources[read] != here and readers[read][here] == 1]
            new = [read for read in arguments if not readers[read][target]]
            if self._bytes(new) < self._bytes(results) + self._bytes(alone):
                self.stage[call.index] = target
                for read in call.reads:
                    readers[read][target] += 1
                    readers[read] -= Counter([here])  # counts of 0 are dropped

    def _bytes(self, reads: Iterable[Read]) -> int:
        return sum(self.program.specs[read].nbytes for read in reads)

    def _stage_of(self, read: Read) -> int | None:
        """Where a version is made; None: anywhere, or not settled."""
        value, writer = read
        return self.home.get(value) if writer is None else self.stage.get(writer)

    def _is_repeatable(self, call: Call) -> bool:
        if call.random:
            return False
        for value, writer in call.reads:
            if writer is None:
                origin = self.program.values[value]
                if origin.trained or (isinstance(origin.origin, str) and origin.memory in self._written):
                    return False
            elif writer in self._floating or self.stage[writer] is not None:
                return False
        return True

    def _put(self, call: Call, stage: int) -> None:
        self.stage[call.index] = stage
        self._floating.discard(call.index)
        for read in call.reads:
            self._pull(read, stage)
        for value in call.changes:
            origin = self.program.values[value].origin
            if isinstance(origin, str) and self.home.get(value, stage) != stage:
                self.conflict = (
                    f"pipeline: {origin} is read on stage {self.home[value]} and written on stage {stage} ({call}). "
                    "Use it in one module, or cut the model elsewhere"
                )

    def _pull(self, read: Read, stage: int) -> None:
        """A stage reads a version: what has no stage yet gets this one."""
        value, writer = read
        origin = self.program.values[value]
        self._touched[origin.memory] = max(self._touched[origin.memory], stage)
        if writer is None:
            if isinstance(origin.origin, str) and origin.memory in self._written:
                self.home.setdefault(value, stage)
        elif writer in self._floating:
            self._put(self.program.calls[writer], stage)

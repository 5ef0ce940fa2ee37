"""What the blocks of a pipeline's rank do with their activations, so that its steps are fastest within one budget.

A rank holds micro-batches in flight, of one stage or of several. So a byte that a block keeps counts as often as its
stage is held at the fullest moment, and a budget is shared by all of them:

    rank 0 of 1f1b, 4 ranks          | F: peak of stage 0's forward   |
                                     | stage 0, micro-batch 2, held   |   <= budget, at each moment of the table
                                     | stage 0, micro-batch 1, held   |
                                     | stage 0, micro-batch 0, held   |

`StageChain` says what a stage takes for any choice of its blocks; `Moment` what runs, and what is held besides. The
choices of a stage become `Load`s, of which those are dropped that take no less of anything than another and are no
faster; then the stages of the rank are combined likewise. Exact, up to MOST loads; beyond, of those that are alike only
the fastest. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distlib.activations.budget import Choice

MOST = 2_000  # loads of a stage, or of stages together, that are followed


@dataclass(frozen=True)
class Pass:
    """Bytes of a pass through the blocks besides what these keep. fixed: by block, where it begins. outer: the peak
    behind the last block (of a forward) or before its backward. inner: the peak before the first block (of a forward)
    or behind its backward."""

    fixed: Sequence[int]
    outer: int
    inner: int


@dataclass(frozen=True)
class StageChain:
    """What one micro-batch takes in a stage, by the choices of its blocks, in the order of their forward.

    forward, backward, split: F, BW and B; those that the table does not have are None. held: bytes between F and its
    backward besides what the blocks keep; late: between B and W besides what they defer. weights: the peak of W
    besides what they defer. seconds: of F, B and W outside of the blocks. always: bytes that are there in a whole step.
    """

    choices: Sequence[Sequence[Choice]]
    forward: Pass
    backward: Pass | None
    split: Pass | None
    held: int
    late: int = 0
    weights: int = 0
    seconds: float = 0.0
    always: int = 0

    def __post_init__(self) -> None:
        for one in (self.forward, self.backward, self.split):
            if one is not None and len(one.fixed) != len(self.choices):
                raise ValueError(f"{len(self.choices)} blocks have {len(one.fixed)} fixed bytes: one each is needed")


@dataclass(frozen=True)
class Load:
    """What a stage takes with one choice for each block. Peaks of F, BW, B and W, with all of the micro-batch that
    runs; bytes held between F and its backward, and between B and W; seconds of a micro-batch."""

    plan: tuple[int, ...]
    forward: int
    backward: int
    split: int
    weights: int
    held: int
    late: int
    seconds: float

    def peak(self, kind: str) -> int:
        """Of F, BW, B or W."""
        return {"F": self.forward, "BW": self.backward, "B": self.split, "W": self.weights}[kind]


@dataclass(frozen=True)
class Moment:
    """kind ("F", "BW", "B" or "W") of a stage runs. whole, late: by stage, micro-batches that are held besides, between
    F and their backward, and between B and W. besides: bytes of what else is held."""

    kind: str
    stage: int
    whole: Mapping[int, int]
    late: Mapping[int, int]
    besides: int = 0

    def takes(self, stage: int, load: Load) -> int:
        """Bytes of a stage at this moment."""
        held = self.whole.get(stage, 0) * load.held + self.late.get(stage, 0) * load.late
        return held + (load.peak(self.kind) if stage == self.stage else 0)


@dataclass(frozen=True)
class Together:
    """What all stages of a rank take: bytes at each moment; seconds of a micro-batch through all of them."""

    loads: dict[int, Load]
    moments: tuple[int, ...]
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return max(self.moments)


def load(chain: StageChain, plan: Sequence[int]) -> Load:
    """What the stage takes where block i does choices[i][plan[i]]."""
    state = _State((), 0, 0, 0, 0, 0, 0.0)
    for i, taken in enumerate(plan):
        state = _after(chain, i, state, taken)
    return _finished(chain, state)


def loads(chain: StageChain) -> list[Load]:
    """All that can be best within some budget, under some table."""
    states = [_State((), 0, 0, 0, 0, 0, 0.0)]
    for i, of_block in enumerate(chain.choices):
        grown = [_after(chain, i, state, taken) for state in states for taken in range(len(of_block))]
        states = _best(grown, [state.bytes for state in grown], [state.seconds for state in grown])
    return [_finished(chain, state) for state in states]


def combine(of_stages: Mapping[int, Sequence[Load]], moments: Sequence[Moment]) -> list[Together]:
    """All choices of one load per stage that can be best within some budget, the fastest first."""
    found = [Together({}, tuple(moment.besides for moment in moments), 0.0)]
    for stage, its in of_stages.items():
        takes = [tuple(moment.takes(stage, one) for moment in moments) for one in its]
        seconds = [one.seconds for one in its]
        at = _best(list(range(len(its))), takes, seconds)
        while len(at) * len(found) > 20 * MOST:  # the longer list is thinned: what is dropped was close to something
            if len(at) >= len(found):
                at = _thinned(at, [takes[i] for i in at], [seconds[i] for i in at], len(at) // 2)
            else:
                columns = [one.moments for one in found], [one.seconds for one in found]
                found = _thinned(found, *columns, len(found) // 2)
        grown = [
            Together(
                {**one.loads, stage: its[i]},
                tuple(a + b for a, b in zip(one.moments, takes[i], strict=True)),
                one.seconds + seconds[i],
            )
            for one in found
            for i in at
        ]
        found = _best(grown, [one.moments for one in grown], [one.seconds for one in grown])
    return sorted(found, key=lambda one: (one.seconds, one.peak))


def solve(found: Sequence[Together], budget: int) -> Together:
    """The fastest that fits. found: of `combine`.

    Raises:
        ValueError: none does; the message names the smallest peak that can be had.
    """
    for one in found:
        if one.peak <= budget:
            return one
    least = min(one.peak for one in found)
    raise ValueError(
        f"budget={budget} bytes ({budget / 2**20:.1f} MiB) cannot be met: the smallest possible peak is {least} bytes "
        f"({least / 2**20:.1f} MiB)"
    )


# ---------------------------------------------------------------- a stage, block by block


@dataclass(frozen=True)
class _State:
    """The blocks so far: what they keep and defer, and the peaks of F, BW and B within them. What later blocks defer is
    there already when an earlier one's B runs."""

    plan: tuple[int, ...]
    kept: int
    deferred: int
    forward: int
    backward: int
    split: int
    seconds: float

    @property
    def bytes(self) -> tuple[int, ...]:
        return self.kept, self.deferred, self.forward, self.backward, self.split


def _after(chain: StageChain, i: int, state: _State, taken: int) -> _State:
    choice = chain.choices[i][taken]
    backward, split = state.backward, state.split
    if chain.backward is not None:
        backward = max(backward, chain.backward.fixed[i] + state.kept + choice.backward)
    if chain.split is not None:
        split = max(split + choice.deferred, chain.split.fixed[i] + state.kept + choice.split)
    return _State(
        (*state.plan, taken),
        state.kept + choice.kept,
        state.deferred + choice.deferred,
        max(state.forward, chain.forward.fixed[i] + state.kept + choice.forward),
        backward,
        split,
        state.seconds + choice.seconds,
    )


def _finished(chain: StageChain, state: _State) -> Load:
    kept, deferred = state.kept, state.deferred
    forward = max(state.forward, chain.forward.inner, chain.forward.outer + kept)
    backward = split = 0
    if chain.backward is not None:
        backward = max(state.backward, chain.backward.outer + kept, chain.backward.inner)
    if chain.split is not None:
        split = max(state.split, chain.split.outer + kept, chain.split.inner + deferred)
    return Load(
        state.plan,
        forward,
        backward,
        split,
        chain.weights + deferred,
        chain.held + kept,
        chain.late + deferred,
        chain.seconds + state.seconds,
    )


# ---------------------------------------------------------------- what can be best


def _best(items: list, takes: Sequence[tuple[int, ...]], seconds: Sequence[float]) -> list:
    """Without those that take no less of anything than another and are no faster; at most MOST of them."""
    order = sorted(range(len(items)), key=lambda i: (seconds[i], takes[i]))
    rows = torch.tensor([takes[i] for i in order], dtype=torch.int64)
    left = torch.empty_like(rows)
    at: list[int] = []
    for row, i in zip(rows, order, strict=True):
        if not at or not bool((left[: len(at)] <= row).all(dim=1).any()):
            left[len(at)] = row
            at.append(i)
    found = [items[i] for i in at]
    if len(found) <= MOST:
        return found
    return _thinned(found, [takes[i] for i in at], [seconds[i] for i in at], MOST)


def _thinned(items: list, takes: Sequence[tuple[int, ...]], seconds: Sequence[float], most: int) -> list:
    """At most about so many: of those whose bytes are alike, rounded to a unit, the fastest; and those that take least
    of something, so that what fits at all still does."""
    columns = list(zip(*takes, strict=True))
    spread = max(max(column) - min(column) for column in columns)
    least = {min(range(len(items)), key=lambda i, c=column: (c[i], takes[i])) for column in columns}  # type: ignore[misc]
    least.add(min(range(len(items)), key=lambda i: (max(takes[i]), takes[i])))
    cells = 4096
    while True:
        unit = max(1, spread // cells)
        fastest: dict[tuple[int, ...], int] = {}
        for i in sorted(range(len(items)), key=lambda i: (seconds[i], takes[i])):
            fastest.setdefault(tuple(value // unit for value in takes[i]), i)
        at = sorted({*fastest.values(), *least})
        if len(at) <= most + len(least) or cells == 1:
            return [items[i] for i in at]
        cells //= 2

"""What each block does with its activations, so that the step is fastest within a budget of bytes. Pure arithmetic.

    bytes                       block 2's backward: its kept bytes and what it works with
      ^                            |
      |            +------+     ___v___
      |     +------+ kept |    |       |          every block i, in forward and in backward:
      |-----+ kept |  1   |    |       |              fixed_i + kept by blocks before i + its own peak  <= budget
      |  0  |      |      |    |       |          and behind the last:
      +-----+------+------+----+-------+--> time      outside + kept by all blocks                      <= budget

It is a knapsack in which one choice of each block is taken, along a chain: what block i may use depends on what the
blocks before it keep, and on nothing else of them. So, going along the chain, of two beginnings that keep alike only
the faster can be part of the best plan (dynamic programming over the bytes kept).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_STATES = 20_000  # beginnings that are remembered exactly; above it bytes are rounded up to a unit


@dataclass(frozen=True)
class Choice:
    """What one block may do. Bytes above what is there when its forward begins; seconds of its forward and backward.

    kept: from its forward to its backward. forward, backward: the peaks within them; backward includes `kept`. Where a
    pipeline divides the backward: split: the peak of the input pass; deferred: from then to the weight pass.
    """

    name: str
    kept: int
    forward: int
    backward: int
    seconds: float
    split: int = 0
    deferred: int = 0

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class Chain:
    """Blocks in the order of their forward. choices[i]: what block i may do. fixed[i]: bytes that are there besides
    when it runs, whatever the blocks before it keep. outside: peak before the first and behind the last block, besides
    what the blocks keep. floor: peak at times when the blocks keep nothing."""

    choices: Sequence[Sequence[Choice]]
    fixed: Sequence[int]
    outside: int
    floor: int = 0

    def __post_init__(self) -> None:
        if len(self.choices) != len(self.fixed):
            raise ValueError(f"{len(self.choices)} blocks have {len(self.fixed)} fixed bytes: one each is needed")
        for i, of_block in enumerate(self.choices):
            if not of_block:
                raise ValueError(f"block {i} has no choice")

    def peak(self, plan: Sequence[int]) -> int:
        """Bytes at the peak of a step in which block i does choices[i][plan[i]]."""
        kept, highest = 0, self.floor
        for of_block, fixed, taken in zip(self.choices, self.fixed, plan, strict=True):
            choice = of_block[taken]
            highest = max(highest, fixed + kept + choice.peak)
            kept += choice.kept
        return max(highest, self.outside + kept)

    def seconds(self, plan: Sequence[int]) -> float:
        """Of the blocks' forwards and backwards."""
        return math.fsum(of_block[taken].seconds for of_block, taken in zip(self.choices, plan, strict=True))


def solve(chain: Chain, budget: int) -> list[int]:
    """The fastest plan whose peak is at most `budget` bytes: the choice of each block. Exact up to MOST_STATES distinct
    sums of kept bytes; beyond, of beginnings that keep alike to a 4,096th of the budget only the fastest is followed:
    the plan still keeps within the budget.

    Raises:
        ValueError: no plan does; the message names the smallest peak that can be had.
    """
    try:
        plan = _solve(chain, budget, unit=1)
    except _TooMany:
        plan = _solve(chain, budget, unit=max(1, budget // 4096)) or _least(chain, budget)
    if plan is None:
        least = smallest(chain)
        raise ValueError(
            f"budget={budget} bytes ({budget / 2**20:.1f} MiB) cannot be met: the smallest possible peak is {least} "
            f"bytes ({least / 2**20:.1f} MiB)"
        )
    return plan


class _TooMany(Exception):
    """More states than are remembered exactly."""


def smallest(chain: Chain) -> int:
    """The smallest peak that any plan has, in bytes."""
    low, high = 0, chain.peak([0] * len(chain.choices))
    while low < high:
        middle = (low + high) // 2
        if _least(chain, middle) is not None:
            high = middle
        else:
            low = middle + 1
    return low


def _least(chain: Chain, budget: int) -> list[int] | None:
    """The plan within the budget that keeps least, None if there is none. Keeping least in a block never takes
    anything from those behind it."""
    if chain.floor > budget:
        return None
    kept, plan = 0, []
    for of_block, fixed in zip(chain.choices, chain.fixed, strict=True):
        fitting = [index for index, choice in enumerate(of_block) if fixed + kept + choice.peak <= budget]
        if not fitting:
            return None
        plan.append(min(fitting, key=lambda index: of_block[index].kept))
        kept += of_block[plan[-1]].kept
    return plan if chain.outside + kept <= budget else None


def _solve(chain: Chain, budget: int, unit: int) -> list[int] | None:
    """The best plan, None if none fits. In units of 1 it is exact, and raises _TooMany beyond MOST_STATES."""
    if chain.floor > budget:
        return None
    # kept bytes, seconds, and how it came about: (the beginning before, choice)
    frontier: list[tuple[int, float, tuple | None]] = [(0, 0.0, None)]
    for of_block, fixed in zip(chain.choices, chain.fixed, strict=True):
        reached: dict[int, tuple[int, float, tuple | None]] = {}
        for kept, seconds, path in frontier:
            for index, choice in enumerate(of_block):
                if fixed + kept + choice.peak > budget:
                    continue
                after, total = kept + choice.kept, seconds + choice.seconds
                if after // unit not in reached or total < reached[after // unit][1]:
                    reached[after // unit] = (after, total, (path, index))
        frontier = _undominated(list(reached.values()))
        if unit == 1 and len(frontier) > MOST_STATES:
            raise _TooMany
    fitting = [state for state in frontier if chain.outside + state[0] <= budget]
    if not fitting:
        return None
    path, plan = min(fitting, key=lambda state: (state[1], state[0]))[2], []
    while path is not None:
        path, index = path
        plan.append(index)
    return plan[::-1]


def _undominated(states: list[tuple[int, float, tuple | None]]) -> list[tuple[int, float, tuple | None]]:
    """Without those that keep no less than another and are no faster."""
    best, left = math.inf, []
    for state in sorted(states, key=lambda state: (state[0], state[1])):
        if state[1] < best:
            best = state[1]
            left.append(state)
    return left

"""Divides a chain of layers into contiguous stages so that the slowest stage is as fast as can be: exactly.

layers   3 1 4 1 5 9 2 6          stages   [3 1 4 1] [5 9] [2 6]     the slowest: 14
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Sums of floats differ in their last bits by the order of adding; differences below this part are ties.
_TIE = 1e-12


@dataclass(frozen=True)
class Split:
    """Contiguous stages. bounds: stage j is the layers bounds[j] to bounds[j+1] - 1. costs: of each stage, with its
    communication. memory: of each stage, if it was given."""

    bounds: tuple[int, ...]
    costs: tuple[float, ...]
    memory: tuple[float, ...] | None = None

    @property
    def stages(self) -> tuple[range, ...]:
        """The layers of each stage."""
        return tuple(range(a, b) for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def slowest(self) -> float:
        """The cost of the slowest stage."""
        return max(self.costs)

    def __str__(self) -> str:
        lines = [
            f"stage {j}: layers {layers[0]} to {layers[-1]}, cost {self.costs[j]:.6g}"
            + ("" if self.memory is None else f", memory {self.memory[j]:.6g}")
            for j, layers in enumerate(self.stages)
        ]
        return "\n".join([*lines, f"slowest {self.slowest:.6g}, mean {sum(self.costs) / len(self.costs):.6g}"])


def split_layers(
    costs: Sequence[float],
    stages: int,
    *,
    communication: Sequence[float] | None = None,
    memory: Sequence[float] | Sequence[Sequence[float]] | None = None,
    limit: float | Sequence[float] | None = None,
) -> Split:
    """The split of a chain of layers into `stages` contiguous stages whose most expensive stage is cheapest.

    costs: per layer, at least 0; time of forward and backward of a micro-batch, say.
    stages: how many; k ranks with v stages each need k * v.
    communication: per cut, one less than layers; a cut after layer i adds communication[i] to the stages on both of
        its sides.
    memory: per layer; or per stage a list over the layers, where a layer needs more in some stages than in others (as
        activations do under 1F1B). limit: most memory of a stage; one number, or one per stage.

    Exact dynamic programming over all splits: O(stages * layers^2), 1,000 layers in 64 stages in less than a second.
    Of equally good splits it is the most balanced (the smallest sum of squared costs), then the one with the earliest
    cuts, from the last one on. Every layer is in exactly one stage and every stage has a layer.

    Raises ValueError for fewer layers than stages, a negative or infinite value, a wrong length, or if no split keeps
    the limit, with the amount that is missing.
    """
    layers = len(costs)
    if stages < 1 or layers < stages:
        raise ValueError(f"split: {layers} layers do not make {stages} stages with at least one layer each")
    cost = _spans(_numbers("costs", costs, layers))
    if communication is not None:
        cuts = _numbers("communication", communication, layers - 1)
        cost[:, 1:] += cuts[None, :]  # the stage begins behind this cut
        cost[:-1, :] += cuts[:, None]  # the stage ends before this one
    cost[np.triu_indices(layers, 1)] = np.inf  # a stage has a layer
    held, limits = _memory(memory, limit, layers, stages)
    slowest, _ = _best(cost, stages, held, limits, np.maximum)
    if not np.isfinite(slowest):
        raise ValueError(
            f"split: no split of {layers} layers into {stages} stages keeps the memory limit; the best one is "
            f"{_missing(cost, held, limits):.6g} over it in some stage. Raise the limit, or use more stages"
        )
    squares = np.where(cost <= slowest * (1 + _TIE), np.square(cost), np.inf)
    _, bounds = _best(squares, stages, held, limits, np.add)
    assert bounds[0] == 0 and bounds[-1] == layers and all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
    pieces = list(zip(bounds, bounds[1:], strict=False))
    return Split(
        tuple(bounds),
        tuple(float(cost[b - 1, a]) for a, b in pieces),
        tuple(float(np.sum(row[a:b])) for row, (a, b) in zip(held, pieces, strict=True)) if held else None,
    )


def _numbers(what: str, values: Sequence[float], count: int) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (count,):
        raise ValueError(f"split: {what} has {len(values)} values; {count} are needed")
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(bad):
        raise ValueError(f"split: {what}[{bad[0]}] is {values[int(bad[0])]}; give finite numbers of at least 0")
    return found


def _spans(values: np.ndarray) -> np.ndarray:
    """[e, t]: the sum of the values t to e. The begin t is the dimension that is searched, hence the inner one."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return sums[1:, None] - sums[None, :-1]


def _memory(
    memory: Sequence[float] | Sequence[Sequence[float]] | None,
    limit: float | Sequence[float] | None,
    layers: int,
    stages: int,
) -> tuple[list[np.ndarray], list[float]]:
    """Per stage, the memory of each layer and the limit; empty without a limit. Equal rows are one object."""
    if memory is None or limit is None:
        if memory is not None or limit is not None:
            raise ValueError("split: memory and limit belong together; give both or none")
        return [], []
    limits = [float(most) for most in limit] if isinstance(limit, Sequence) else [float(limit)] * stages
    if len(limits) != stages:
        raise ValueError(f"split: limit has {len(limits)} values; give one, or one for each of {stages} stages")
    rows: list = list(memory)
    if not isinstance(rows[0], Sequence):
        return [_numbers("memory", rows, layers)] * stages, limits
    if len(rows) != stages:
        raise ValueError(f"split: memory has {len(rows)} lists; {stages} are needed, one for each stage")
    return [_numbers(f"memory of stage {j}", row, layers) for j, row in enumerate(rows)], limits


def _best(
    value: np.ndarray, stages: int, held: list[np.ndarray], limits: list[float], join: np.ufunc
) -> tuple[float, list[int]]:
    """The smallest join (maximum or sum) of value[e, t] over all splits that fit, and the bounds of such a split."""
    layers = len(value)
    best = np.full(layers + 1, np.inf)  # best[t]: the stages so far take exactly the layers before t
    best[0] = 0.0
    begins: np.ndarray = np.zeros((stages, layers + 1), dtype=np.intp)
    room = np.empty_like(value)
    too_large: np.ndarray | None = None
    for j in range(stages):
        join(value, best[None, :layers], out=room)
        if held:
            if j == 0 or held[j] is not held[j - 1] or limits[j] != limits[j - 1]:
                too_large = _spans(held[j]) > limits[j] * (1 + _TIE)
            np.copyto(room, np.inf, where=too_large)
        begin = room.argmin(axis=1)
        best = np.concatenate([[np.inf], room[np.arange(layers), begin]])
        begins[j, 1:] = begin
    bounds = [layers]
    for j in reversed(range(stages)):
        bounds.append(int(begins[j, bounds[-1]]))
    return float(best[layers]), bounds[::-1]


def _missing(cost: np.ndarray, held: list[np.ndarray], limits: list[float]) -> float:
    """By how much the split that exceeds its limits least does so, in its worst stage."""
    layers = len(cost)
    best = np.full(layers + 1, np.inf)
    best[0] = -np.inf
    for row, most in zip(held, limits, strict=True):
        over = np.where(np.isfinite(cost), _spans(row) - most, np.inf)
        best = np.concatenate([[np.inf], np.maximum(over, best[None, :layers]).min(axis=1)])
    return float(best[layers])

"""Generators of pipeline schedules: which rank computes what in which order. No messages yet: `passes` adds them.

Pictures: one line per rank, time to the right, F and B and W one column each, BW two. p ranks, m micro-batches.
`peak_activations` gives each schedule's memory by formula; `distlib.pipeline.simulate` counts it.
"""

from __future__ import annotations

import difflib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from distlib.pipeline.actions import Action, Kind, Schedule

if TYPE_CHECKING:
    from distlib.pipeline.simulate import Costs

NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "auto")


def generate(
    name: str,
    ranks: int,
    micro_batches: int,
    *,
    virtual: int | None = None,
    costs: Costs | None = None,
    limit: float | None = None,
) -> Schedule:
    """The schedule called `name`, of compute actions only.

    name: one of `NAMES`. ranks: of the pipeline. micro_batches: per optimizer step, at least 1.
    virtual: stages per rank; "interleaved" takes any number (default 2), "zb-v" has 2, all others have 1.
    costs, limit: for "auto" only, see `distlib.pipeline.auto.auto`.

    Raises ValueError for an unknown name (with the nearest one), a number below 1, or an argument that the schedule
    does not take.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), NAMES, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"schedule {name!r} is unknown{hint} Known: {', '.join(NAMES)}")
    for what, value in (("ranks", ranks), ("micro_batches", micro_batches), ("virtual", virtual)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"schedule {name!r}: {what} is {value!r}; give a whole number of at least 1")
    if name == "auto":
        from distlib.pipeline.auto import auto
        from distlib.pipeline.simulate import Costs

        _fixed(name, virtual, 1)
        return auto(ranks, micro_batches, Costs() if costs is None else costs, limit)
    if costs is not None or limit is not None:
        raise ValueError(f"schedule {name!r} follows no {'costs' if costs is not None else 'limit'}; only 'auto' does")
    if name == "interleaved":
        return interleaved(ranks, micro_batches, 2 if virtual is None else virtual)
    _fixed(name, virtual, 2 if name == "zb-v" else 1)
    return _GENERATORS[name](ranks, micro_batches)


def _fixed(name: str, virtual: int | None, right: int) -> None:
    if virtual not in (None, right):
        raise ValueError(
            f"schedule {name!r} has {right} stage{'s' if right > 1 else ''} per rank, not virtual={virtual}; leave "
            "virtual out, or take 'interleaved'"
        )


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965). Peak: m micro-batches on every rank.

    p = 3, m = 4
        F0 F1 F2 F3 ................. BW0-- BW1-- BW2-- BW3--
        .. F0 F1 F2 F3 ........ BW0-- BW1-- BW2-- BW3--
        ..... F0 F1 F2 F3 BW0-- BW1-- BW2-- BW3--

    Backwards run in ascending order, as in all schedules here, so that gradients are summed in the same order.
    """
    lines = [
        [Action(rank, kind, k) for kind in (Kind.F, Kind.FULL) for k in range(micro_batches)] for rank in range(ranks)
    ]
    return _schedule("gpipe", lines, micro_batches)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """Rank i runs p-i-1 forwards ahead, then alternates (PipeDream-Flush, arXiv 2006.09503). Peak on rank i: p-i.

    p = 3, m = 4
        F0 F1 F2 ........... BW0-- F3 BW1-- .. BW2-- .. BW3--
        .. F0 F1 ..... BW0-- F2 BW1-- F3 BW2-- .. BW3--
        ..... F0 BW0-- F1 BW1-- F2 BW2-- F3 BW3--
    """
    lines = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, micro_batches)
        line = [Action(rank, Kind.F, k) for k in range(ahead)]
        for k in range(micro_batches):
            if ahead + k < micro_batches:
                line.append(Action(rank, Kind.F, ahead + k))
            line.append(Action(rank, Kind.FULL, k))
        lines.append(line)
    return _schedule("1f1b", lines, micro_batches)


def interleaved(ranks: int, micro_batches: int, virtual: int = 2) -> Schedule:
    """1F1B with v stages per rank, stage s on rank s mod p (arXiv 2104.04473): the bubble is a v-th.

    p = 2, v = 2, m = 4; stages 0 and 2 on rank 0, 1 and 3 on rank 1
        0F0 0F1 2F0 2F1 0F2 ... 2BW0--- 0F3 2BW1--- 2F2 0BW0--- 2F3 0BW1--- ...
        ... 1F0 1F1 3F0 3BW0--- 3F1 3BW1--- 1F2 1BW0--- 1F3 1BW1--- 3F2 3BW2--- ...

    A group of p micro-batches goes through one stage of a rank, then through its next. Where p does not divide m, the
    m // p groups (one, if m < p) are as equal as can be, larger ones first: groups below p would wait for each other.
    Any m is allowed.

    With g the size of the largest group, the peak on rank 0 is ((v-1) g + 2p-1) / v micro-batches, which is
    p (1 + (p-1)/(pv)) for g = p; at most m.
    """
    sizes = _group_sizes(ranks, micro_batches)
    forward: list[tuple[int, int]] = []  # (which stage of the rank, micro-batch), the same order on all ranks
    backward: list[tuple[int, int]] = []
    first = 0
    for size in sizes:
        group = range(first, first + size)
        forward += [(part, k) for part in range(virtual) for k in group]
        backward += [(part, k) for part in reversed(range(virtual)) for k in group]
        first += size
    lines = []
    for rank in range(ranks):
        ahead = min((virtual - 1) * sizes[0] + 2 * (ranks - rank - 1), len(forward))
        fs = [Action(part * ranks + rank, Kind.F, k) for part, k in forward]
        bs = [Action(part * ranks + rank, Kind.FULL, k) for part, k in backward]
        line = fs[:ahead]
        for k, b in enumerate(bs):
            line += [*fs[ahead + k : ahead + k + 1], b]
        lines.append(line)
    placement = tuple(stage % ranks for stage in range(ranks * virtual))
    return Schedule("interleaved", tuple(map(tuple, lines)), placement, micro_batches)


def _group_sizes(ranks: int, micro_batches: int) -> list[int]:
    groups = max(1, micro_batches // ranks)
    small, larger = divmod(micro_batches, groups)
    return [small + (number < larger) for number in range(groups)]


def zb_h1(ranks: int, micro_batches: int) -> Schedule:
    """1F1B with weight gradients put off into the bubble (arXiv 2401.10241, section 2). Peak: p on every rank.

    p = 3, m = 4
        F0 F1 F2 ..... B0 W0 F3 B1 W1 B2 W2 B3 W3
        .. F0 F1 .. B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
        ..... F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

    Rank i puts off up to i weight gradients: input gradients are sooner at rank 0, and the rest fills the end.
    """
    lines = [_deferring(rank, micro_batches, ranks - rank - 1, rank) for rank in range(ranks)]
    return _schedule("zb-h1", lines, micro_batches)


def zb_h2(ranks: int, micro_batches: int) -> Schedule:
    """As zb-h1 with twice the forwards ahead: no bubble if F = B = W and m >= 2p-1. Peak: 2p-1 on every rank.

    p = 3, m = 6
        F0 F1 F2 F3 F4 B0 W0 F5 B1 W1 B2 W2 B3 W3 B4 W4 B5 W5
        .. F0 F1 F2 B0 F3 B1 F4 B2 W0 F5 B3 W1 B4 W2 B5 W3 W4 W5
        ..... F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 F5 B5 W1 W2 W3 W4 W5

    A parallelogram: each rank starts and ends later than the one before it, and none is idle in between.
    """
    lines = [_deferring(rank, micro_batches, 2 * (ranks - rank - 1), 2 * rank) for rank in range(ranks)]
    return _schedule("zb-h2", lines, micro_batches)


def _deferring(stage: int, micro_batches: int, ahead: int, deferred: int) -> list[Action]:
    """`ahead` forwards, then one F, one B, and a W whenever more than `deferred` wait; the last Ws at the end."""
    ahead = min(ahead, micro_batches)
    line = [Action(stage, Kind.F, k) for k in range(ahead)]
    waiting: deque[int] = deque()
    for k in range(micro_batches):
        if ahead + k < micro_batches:
            line.append(Action(stage, Kind.F, ahead + k))
        line.append(Action(stage, Kind.B, k))
        waiting.append(k)
        if len(waiting) > deferred:
            line.append(Action(stage, Kind.W, waiting.popleft()))
    return line + [Action(stage, Kind.W, k) for k in waiting]


def zb_v(ranks: int, micro_batches: int) -> Schedule:
    """Two stages per rank in V shape: no bubble at 1F1B's memory if F = B = W (arXiv 2401.10241, section 5).

    rank r holds stage r (going down) and stage 2p-1-r (coming back up); p = 2
        0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 3W1 0F3 0B0 0W0 3F2 3B2 3W2 0B1 0W1 3F3 3B3 3W3 0B2 0W2 0B3 0W3
        ... 1F0 2F0 1F1 2F1 2B0 2W0 1F2 1B0 1W0 2F2 2B1 2W1 1F3 1B1 1W1 2F3 2B2 2W2 1B2 2B3 1B3 1W2 2W3 1W3

    The last stage is on rank 0, beside the first: backwards begin there, as soon as the first micro-batch is back.

    Peak: p micro-batches on every rank (2p of half the size); m >= 2p for no bubble.
    """
    # Laid out for at least 2p micro-batches; fewer are the same table with the later ones left out.
    laid_out = max(micro_batches, 2 * ranks)
    lines = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        f_down, b_down, w_down = ((down, kind) for kind in (Kind.F, Kind.B, Kind.W))
        f_up, b_up, w_up = ((up, kind) for kind in (Kind.F, Kind.B, Kind.W))
        one_down, one_up = [b_down, w_down], [f_up, b_up, w_up]
        ahead = 2 * (ranks - rank) - 1
        steps = (
            ahead * [f_down]  # until the first micro-batch is back up here
            + rank * [f_up, f_down]  # until its gradient comes down the upper stages
            + (ranks - rank) * one_up  # until its gradient has been at rank p-1 and is back here
            + (laid_out - ahead - rank) * [f_down, *one_down, *one_up]  # steady: every column is full
            + (ranks - rank - 1) * [*one_down, *one_up]  # no forward is left on the way down
            + rank * [b_down, b_up]  # none on the way up: only gradients hurry, their weights' wait
            + (ranks - rank) * one_down
            + rank * [w_up]
            + rank * [w_down]
        )
        lines.append([action for action in _numbered(steps) if action[2] < micro_batches])
    placement = tuple(min(stage, 2 * ranks - 1 - stage) for stage in range(2 * ranks))
    return Schedule("zb-v", tuple(tuple(Action(*a) for a in line) for line in lines), placement, micro_batches)


def _numbered(steps: Iterable[tuple[int, Kind]]) -> Iterator[tuple[int, Kind, int]]:
    """Each step with the next micro-batch of its stage and kind."""
    seen: Counter[tuple[int, Kind]] = Counter()
    for stage, kind in steps:
        yield stage, kind, seen[stage, kind]
        seen[stage, kind] += 1


def peak_activations(name: str, ranks: int, micro_batches: int, virtual: int = 2) -> float:
    """Activations that the fullest rank holds at once, in micro-batches of a whole rank, by formula.

    An activation is held from its F until the end of its W (or BW). `virtual` matters to "interleaved" only. For
    "zb-v" with m < 2p it is an upper bound; all others are exact.
    """
    p, m = ranks, micro_batches
    if name == "interleaved":
        group = _group_sizes(p, m)[0]
        return min(float(m), ((virtual - 1) * group + 2 * p - 1) / virtual)
    formulas = {"gpipe": m, "1f1b": p, "zb-h1": p, "zb-h2": 2 * p - 1, "zb-v": p}
    if name not in formulas:
        raise ValueError(f"schedule {name!r} has no formula of its peak; {', '.join(formulas)} and interleaved have")
    return float(min(m, formulas[name]))


_GENERATORS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
}


def _schedule(name: str, lines: list[list[Action]], micro_batches: int) -> Schedule:
    """One stage per rank, in order."""
    return Schedule(name, tuple(map(tuple, lines)), tuple(range(len(lines))), micro_batches)


def forwards(placement: Sequence[int], micro_batches: int) -> Schedule:
    """Only forwards, for evaluation, of stages that lie on ranks as `placement` says.

    As many micro-batches as there are ranks go through one stage of a rank, then through its next, as in interleaved.
    """
    ranks = max(placement) + 1
    lines = []
    for rank in range(ranks):
        own = [stage for stage, at in enumerate(placement) if at == rank]
        lines.append(
            [
                Action(stage, Kind.F, k)
                for first in range(0, micro_batches, ranks)
                for stage in own
                for k in range(first, min(first + ranks, micro_batches))
            ]
        )
    return Schedule("forwards", tuple(map(tuple, lines)), tuple(placement), micro_batches)

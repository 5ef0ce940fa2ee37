"""Values of `extra` that ranks have alike: they are saved once, and any number of ranks gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranks import process_group, run_ranks
from torch import nn

import distlib

LIST: list[Any] = [1]
LIST.append(LIST)


def values(rank: int) -> dict[str, Any]:
    """Equal on all ranks, but for the last; sets of small numbers whose order is that in which they came."""
    came = [0, 8, 16][:: 1 if rank == 0 else -1]
    assert list(set(came)) == came
    return {
        "seen": set(came),
        "frozen": {"at": [(frozenset(came), "text"), 2.5]},
        "sets of sets": {frozenset(came), frozenset([1])},
        "holds itself": LIST,
        "another": {rank, 100},
    }


def saved(rank: int, n: int, folder: Path) -> None:
    with process_group(rank, n):
        distlib.save(folder / "c", model=nn.Linear(2, 2), extra=values(rank))


def test_equal_sets_are_one_value_whatever_their_order(tmp_path: Path) -> None:
    run_ranks(2, saved, tmp_path)
    state = distlib.load(tmp_path / "c", model=nn.Linear(2, 2))
    assert state.extra_by_rank == {"another": [{0, 100}, {1, 100}]}
    itself = state.extra.pop("holds itself")
    assert itself[1] is itself
    assert state.extra == {key: value for key, value in values(0).items() if key not in ("another", "holds itself")}

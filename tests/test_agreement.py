"""One rank's error reaches all, also one that cannot be sent as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

import distlib
from distlib.data_parallel.agreement import all_or_none, from_first


class Unsendable(ValueError):
    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


def _errors(rank: int, n: int) -> list[tuple[str, str]]:
    def fail(kind: Callable[[str], Exception], at: int) -> None:
        if rank == at:
            raise kind("of rank 0" if at == 0 else "of rank 1")

    found = []
    with distlib.init():
        for kind in (ValueError, Unsendable):
            for run in (
                lambda kind=kind: from_first(None, lambda: fail(kind, 0)),
                lambda kind=kind: all_or_none(dist.group.WORLD, lambda: fail(kind, 1)),
            ):
                with pytest.raises(Exception) as raised:
                    run()
                found.append((type(raised.value).__name__, str(raised.value)))
    return found


def test_errors_of_one_rank_are_raised_on_all() -> None:
    first, second = run_ranks(2, _errors)
    words = "Unsendable: of rank "
    assert [kind for kind, _ in first] == ["ValueError", "ValueError", "RuntimeError", "RuntimeError"]
    assert [text for _, text in first] == ["of rank 0", "of rank 1", f"{words}0", f"{words}1"]
    assert [text for _, text in second] == ["of rank 0", "of rank 1", f"{words}0", "of rank 1"]

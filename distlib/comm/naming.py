"""What new groups are called in errors and in the ledger: torch's own names are numbers, or hashes of the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_chosen: ContextVar[str | None] = ContextVar("chosen", default=None)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Groups that this thread makes within are called `name`: the same on all of their ranks."""
    before = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(before)


def chosen_name() -> str | None:
    """The name that `named` gives; None outside of it."""
    return _chosen.get()

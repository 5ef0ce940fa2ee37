"""In hypothesis' place where it is not installed: its tests are skipped and say so, the others of their files run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


class _Anything:
    """A strategy, a health check or a profile, of which nothing is ever drawn."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: object, **options: object) -> _Anything:
        return self

    def __iter__(self) -> Iterator[_Anything]:
        return iter(())

    def __or__(self, other: object) -> _Anything:
        return self


strategies = HealthCheck = Phase = assume = note = event = _Anything()


def given(*strategies: object, **named: object) -> Callable[[Any], Any]:
    return pytest.mark.skip(reason="hypothesis is not installed")


class settings:
    """A decorator that changes nothing."""

    def __init__(self, *arguments: object, **options: object) -> None: ...

    def __call__(self, test: Any) -> Any:
        return test

    @staticmethod
    def register_profile(*arguments: object, **options: object) -> None: ...

    @staticmethod
    def load_profile(*arguments: object, **options: object) -> None: ...


example = seed = settings

"""How users give a model's inputs in one value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a forward: a tuple or list is all positional arguments, a mapping all keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}

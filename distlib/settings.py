"""Settings from the environment: read here, so that a value that makes no sense is refused in the same words."""

from __future__ import annotations

import os


def integer(name: str, default: int, lowest: int, unit: str) -> int:
    """The whole number in environment variable `name`, or `default`. ValueError naming the variable and the unit."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdigit() or int(text) < lowest:
        raise ValueError(f"{name}={text!r}: must be a whole number of {unit}, at least {lowest}")
    return int(text)


def switch(name: str, default: bool) -> bool:
    """The 0 or 1 in environment variable `name`, or `default`. ValueError naming the variable."""
    text = os.environ.get(name, "").strip()
    if text not in ("", "0", "1"):
        raise ValueError(f"{name}={text!r}: must be 0 or 1")
    return default if not text else text == "1"

"""Sizes in bytes, read from what people write and written as they read."""

from __future__ import annotations

import re
from numbers import Integral

_UNITS = {"B": 1, "": 1}
for _power, _prefix in enumerate("KMGT", 1):
    _UNITS[f"{_prefix}B"] = 1000**_power
    _UNITS[f"{_prefix}IB"] = _UNITS[_prefix] = 1024**_power


def parse_size(what: str, size: str | int) -> int:
    """Bytes of "2GiB" (1024s), "2GB" (1000s), "2G" (1024s) or an int. Raises ValueError naming `what`."""
    if isinstance(size, Integral) and not isinstance(size, bool):  # numpy's, too
        value = float(size)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f'{what}={size!r}: must be bytes as an int, or a text such as "512MiB" or "2GiB"')
        value = float(match[1]) * _UNITS[match[2].upper()]
    if value <= 0:
        raise ValueError(f"{what}={size!r}: must be more than 0 bytes")
    return int(value)


def show_size(nbytes: float) -> str:
    """As "1.5 MiB"."""
    sign, value = ("-" if nbytes < 0 else ""), abs(float(nbytes))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{sign}{value:.0f} {unit}" if unit == "B" else f"{sign}{value:.1f} {unit}"

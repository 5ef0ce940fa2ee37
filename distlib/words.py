"""Numbers and errors as people read them: sizes, times, versions, lists of ranks, what an error says."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def digits(value: float) -> str:
    """Three digits, never in exponents: 1234.5 -> "1234", 0.01234 -> "0.0123"."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes with a binary unit: 65536 -> "64 KiB"."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{digits(count)} {_UNITS[unit]}"


def parse_size(text: str) -> int:
    """Bytes: "64KiB", "64 kib", "64K", "4096" -> int. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+)\s*(?:([kmgt])(?:i?b)?|b)?", text.strip().lower())
    if not match or not int(match[1]):
        raise ValueError(f"size {text!r} is not a number of bytes such as 4096, 64KiB or 1MiB")
    return int(match[1]) << 10 * (" kmgt".index(match[2]) if match[2] else 0)


def gib(count: float) -> str:
    """Bytes in GiB, one digit after the point; small ones in their own unit."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else size(count)


def duration(seconds: float) -> str:
    """Seconds with a unit, three digits: 0.0000123 -> "12.3 µs"."""
    if seconds >= 1:
        return f"{digits(seconds)} s"
    return f"{digits(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{digits(seconds * 1e6)} µs"


def plural(count: int, word: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{count} {word}" + ("" if count == 1 else "s")


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 3", "ranks 0-3, 8"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def words_of(error: BaseException) -> str:
    """What an error says, in characters that can be sent: whatever it is, the other ranks must hear of it."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception as why:  # noqa: BLE001 - its __str__ may do anything
        return f"(its __str__ raises {type(why).__name__})"

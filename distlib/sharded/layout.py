"""Pure arithmetic of a flat buffer: parameters in, where each lies and what every rank holds of it out.

    parameters     a a a a a b b b c c c c c c c c
    flat           |aaaaa..|bbb.....|cccccccc|.......|        every parameter starts on a 64-byte line
    parts          |--- 0 ----|--- 1 ----|--- 2 ----|         equal, one per rank: a rank may hold pieces of many
                                                              parameters, or none

Elements are counted, never bytes. Parameters are laid out in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LINE = 64  # bytes


@dataclass(frozen=True)
class Entry:
    """One parameter of a flat buffer: its name, and its shape."""

    name: str
    shape: torch.Size

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """Elements [at, at + numel) of entry `entry`, which lie at `where` in the flat buffer."""

    entry: int
    at: int
    numel: int
    where: int


@dataclass(frozen=True)
class FlatLayout:
    """Where each parameter lies in a flat buffer of `numel` elements, divided into `parts` equal parts.

    Part i is divided again into `subparts` equal parts. Made by `lay_out`; a value.
    """

    entries: tuple[Entry, ...]
    offsets: tuple[int, ...]
    numel: int
    parts: int
    subparts: int

    @property
    def part(self) -> int:
        """Elements of a part."""
        return self.numel // self.parts

    @property
    def subpart(self) -> int:
        """Elements of a subpart."""
        return self.part // self.subparts

    def bounds(self, part: int, subpart: int | None = None) -> tuple[int, int]:
        """The elements (begin, end) of a part, or of one of its subparts."""
        begin = part * self.part
        if subpart is None:
            return begin, begin + self.part
        begin += subpart * self.subpart
        return begin, begin + self.subpart

    def pieces(self, begin: int, end: int) -> tuple[Piece, ...]:
        """What [begin, end) holds of each entry, one piece per entry in order; empty ones have numel 0."""
        found = []
        for i, (entry, offset) in enumerate(zip(self.entries, self.offsets, strict=True)):
            first, last = max(begin, offset), min(end, offset + entry.numel)
            if first < last:
                found.append(Piece(i, first - offset, last - first, first))
            else:
                found.append(Piece(i, 0, 0, begin))
        return tuple(found)

    def gaps(self) -> list[tuple[int, int]]:
        """The elements (begin, end) that belong to no parameter, in order."""
        found, end = [], 0
        for offset, entry in sorted(zip(self.offsets, self.entries, strict=True), key=lambda pair: pair[0]):
            if offset > end:
                found.append((end, offset))
            end = max(end, offset + entry.numel)
        if end < self.numel:
            found.append((end, self.numel))
        return found


def lay_out(entries: Sequence[Entry], itemsize: int, parts: int, subparts: int = 1, whole: bool = False) -> FlatLayout:
    """Lay parameters out one after the other, for `parts` ranks.

    Args:
        itemsize: bytes of an element in the narrowest dtype that a buffer of this layout has.
        whole: no parameter is cut: each part holds whole parameters, dealt so that the fullest part is small
            (longest first, to the part that holds least). Parts are as long as the fullest one.
    """
    step = max(1, LINE // itemsize)
    entries = tuple(entries)
    sizes = [_up(entry.numel, step) for entry in entries]
    offsets = [0] * len(entries)
    unit = step * subparts
    if not whole:
        end = 0
        for i, size in enumerate(sizes):
            offsets[i] = end
            end += size
        part = _up(-(-end // parts), unit)
        return FlatLayout(entries, tuple(offsets), part * parts, parts, subparts)
    loads = [0] * parts
    home = [0] * len(entries)
    for i in sorted(range(len(entries)), key=lambda i: (-sizes[i], i)):
        home[i] = min(range(parts), key=lambda r: (loads[r], r))
        loads[home[i]] += sizes[i]
    part = _up(max(loads, default=0), unit)
    ends = [r * part for r in range(parts)]
    for i, size in enumerate(sizes):
        offsets[i] = ends[home[i]]
        ends[home[i]] += size
    return FlatLayout(entries, tuple(offsets), part * parts, parts, subparts)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step

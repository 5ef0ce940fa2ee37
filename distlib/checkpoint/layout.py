"""Pure arithmetic: pieces of parameters in, the chunks that each rank writes out.

    piece of "mlp.weight", shape (6, 4): elements 6 .. 21      held by replicas 0 and 1
    replica 0 writes 6 .. 13                                   chunks (1, 2)+(1, 2)  (2, 0)+(1, 4)  (3, 0)+(1, 2)
    replica 1 writes 14 .. 21                                  ...

A chunk is a box of the whole tensor, as `torch.distributed.checkpoint` wants it: nothing in a checkpoint knows of the
ranks that wrote it. Chunks are at most CHUNK bytes, so that a rank that loads a small piece does not read a large one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from distlib.shards import boxes

CHUNK = 32 << 20  # bytes of a chunk at most
WHOLE = 1 << 20  # bytes: smaller pieces are written by one of the ranks that hold them


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + tensor.numel()) of a whole tensor, in row-major order, on this rank.

    name: in the checkpoint. shape: of the whole tensor. tensor: the elements, in any shape, on any device. replicas:
    so many ranks hold the same elements; this rank is the `replica`-th of them. spread: they write it together; else
    replica 0 does, whose elements count.
    """

    name: str
    shape: torch.Size
    offset: int
    tensor: torch.Tensor
    replica: int = 0
    replicas: int = 1
    spread: bool = True

    @property
    def numel(self) -> int:
        return self.tensor.numel()


@dataclass(frozen=True)
class Chunk:
    """A box of piece number `piece`: its elements [start, start + numel) counted from the piece's own first."""

    piece: int
    start: int
    numel: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def cut(shape: Iterable[int], begin: int, end: int, parts: int) -> list[int]:
    """Where [begin, end) is cut into `parts` of about equal size: parts + 1 places, not descending.

    A place is moved to the nearest begin of a row of the first dimension where that moves it by little, so that parts
    are few boxes.
    """
    row = math.prod(list(shape)[1:])
    places = []
    for part in range(parts + 1):
        place = begin + (end - begin) * part // parts
        if 0 < part < parts and row * parts * 4 <= end - begin:
            place = min(max((place + row // 2) // row * row, begin), end)
        places.append(place)
    return places


def chunks(pieces: Iterable[Piece], limit: int = CHUNK) -> Iterator[Chunk]:
    """The chunks that this rank writes. The replicas of a piece divide it among them without asking each other.

    A large piece is divided evenly; a small one goes to the replica that has the least so far. For that, ranks that
    hold replicas of the same pieces must pass them in the same order.
    """
    written: dict[int, list[int]] = {}  # bytes by replica, for each number of replicas
    for index, piece in enumerate(pieces):
        if 0 in piece.shape:  # nothing to write, but its name and shape
            if piece.replica == 0:
                yield Chunk(index, 0, 0, (0,) * len(piece.shape), tuple(piece.shape))
            continue
        begin, end, size = piece.offset, piece.offset + piece.numel, piece.tensor.element_size()
        if not piece.spread:
            if piece.replica:
                continue
        elif piece.replicas > 1 and piece.numel * size < WHOLE:
            bytes_of = written.setdefault(piece.replicas, [0] * piece.replicas)
            owner = bytes_of.index(min(bytes_of))
            bytes_of[owner] += piece.numel * size
            if owner != piece.replica:
                continue
        elif piece.replicas > 1:
            places = cut(piece.shape, begin, end, piece.replicas)
            begin, end = places[piece.replica], places[piece.replica + 1]
        parts = max(1, math.ceil((end - begin) * size / limit))
        places = cut(piece.shape, begin, end, parts)
        for first, last in zip(places, places[1:], strict=False):
            start = first - piece.offset
            for offsets, sizes in boxes(piece.shape, first, last - first):
                numel = math.prod(sizes)
                yield Chunk(index, start, numel, offsets, sizes)
                start += numel

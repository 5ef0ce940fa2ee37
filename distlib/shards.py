"""What a piece of a parameter is a piece of: the one thing that optimizers and checkpoints know of sharding.

    parameter "mlp.weight", shape (3, 4)     0 1 2 3 | 4 5 6 7 | 8 9 10 11       row-major order
    rank 0's piece                           offset 0, numel 6
    rank 1's piece                                     offset 6, numel 6

A sharded model's `parameters()` are such pieces: 1-D tensors (or whole tensors, under whole-parameter ownership),
empty on ranks that hold nothing of the parameter. `shard_of(parameter)` tells what each is. A parameter that is not
sharded has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from distlib.comm.group import Group


@dataclass
class Shard:
    """What a parameter of this rank is a piece of.

    name: of the whole parameter in the module. shape: of the whole parameter. offset, numel: the piece, in elements
    of the whole parameter's row-major order. group: the ranks whose pieces together are the whole, each element
    once; None: this rank holds all of it. replica, replicas: several groups hold the same pieces; this rank is in the
    `replica`-th of `replicas`. world: all ranks that train the model together.

    pipeline: where the model's parameters are divided over the stages of a pipeline, its ranks: a norm of all gradients
    is summed over them. counted: False for the copy of a tied weight that another stage counts.

    compute: where the model computes in another dtype than it is optimized in, the elements of the compute copy that
    belong to this piece, to be written with it; `wrote(parameter)` says that they were.
    offload: where the optimizer is to keep its state: a folder, or None for memory.
    """

    name: str
    shape: torch.Size
    offset: int
    numel: int
    group: Group | None
    world: Group
    replica: int = 0
    replicas: int = 1
    compute: torch.Tensor | None = None
    offload: Path | None = None
    pipeline: Group | None = None
    counted: bool = True
    _written: int = field(default=-1, repr=False)

    def wrote(self, parameter: torch.Tensor) -> None:
        """`compute` holds what `parameter` holds now. Call it after both were written and the version counted up."""
        self._written = parameter._version

    def may_be_written(self) -> None:
        """From now on `compute` may be behind, unless `wrote` says otherwise. Versions do not tell: torch's fused
        optimizers write without counting them up."""
        self._written = -1

    def is_written(self, parameter: torch.Tensor) -> bool:
        """Whether `compute` still holds what `parameter` holds."""
        return self._written == parameter._version


def shard_of(parameter: torch.Tensor) -> Shard | None:
    """The Shard of a piece; None for a tensor that is not a piece of a sharded parameter."""
    return getattr(parameter, "_distlib_shard", None)


def mark(parameter: torch.Tensor, shard: Shard) -> None:
    """Says what `parameter` is a piece of."""
    parameter._distlib_shard = shard


@dataclass(frozen=True)
class PartOfModel:
    """What a model is a part of whose other modules lie on other ranks (the stages of a pipeline).

    aliases: other names of tied parameters and buffers in the whole model, to the one that they are stored under.
    tensors: name, shape and dtype of all that the whole model stores, equal on all ranks. replica, replicas: so many
    ranks hold this part; this rank is the `replica`-th. elsewhere: names of buffers of this part that another part
    holds as well, and counts.
    """

    aliases: dict[str, str]
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    replica: int = 0
    replicas: int = 1
    elsewhere: frozenset[str] = frozenset()


def part_of(model: object) -> PartOfModel | None:
    """What a model is a part of; None for one that is whole on every rank, or divided by parameters only."""
    return getattr(model, "_distlib_part", None)


def boxes(shape: Iterable[int], offset: int, numel: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements [offset, offset + numel) of a row-major tensor, as (offsets, sizes) of boxes in ascending order.

    A range of rows is one box; a range that begins or ends inside a row needs boxes for its ends: at most
    2 * dimensions - 1 in all. Boxes are contiguous in memory and follow each other without gaps.
    """
    dims = tuple(shape)
    if numel == 0:
        return []
    if not dims:
        return [((), ())]
    inner = 1
    for size in dims[1:]:
        inner *= size
    first, last = offset // inner, (offset + numel) // inner
    head = -offset % inner  # elements up to the next whole row
    if first == last or (first + 1 == last and head and offset + numel == last * inner):
        # All inside one row (or its end): one level down.
        within = boxes(dims[1:], offset - first * inner, numel)
        return [((first, *at), (1, *size)) for at, size in within]
    found = []
    if head:
        within = boxes(dims[1:], offset - first * inner, head)
        found += [((first, *at), (1, *size)) for at, size in within]
        first += 1
    if last > first:
        found.append(((first, *[0] * (len(dims) - 1)), (last - first, *dims[1:])))
    tail = offset + numel - last * inner
    if tail:
        found += [((last, *at), (1, *size)) for at, size in boxes(dims[1:], 0, tail)]
    return found

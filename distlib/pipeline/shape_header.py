"""What a batch looks like, told by the rank of the first stage: the other ranks need not be given it.

    first stage's rank                                         every other rank
    batch -> micro-batches -> shapes, dtypes, other values ->  tensors of these shapes, with nothing in them
                              look up the step                 look up the step, the same
              what stages of other ranks read of the inputs,
              and the target of the loss                   ->  filled in; what no stage here reads stays empty

A batch that looks like one before takes 16 bytes, and what is read: a mask that all stages use, say. Of a model whose
first stage alone reads tokens, that is the target.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from distlib.comm.group import Group
from distlib.pipeline.micro_batches import MicroBatch, divide_target, moved
from distlib.pipeline.step import Step

_REFUSED = -1  # in place of a description's number: its bytes are the words of an error
_MOST = 1000  # descriptions that are remembered: where an input that is no tensor changes, each step has another
_ALIGNMENT = 16  # bytes, of each tensor among those that are sent together


@dataclass(frozen=True)
class Like:
    """A tensor without its values. same_as: the number of the leaf that is the same tensor, its own if it is first."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    same_as: int

    @staticmethod
    def of(tensor: Tensor, same_as: int) -> Like:
        if tensor.layout is not torch.strided:
            raise ValueError(f"shape_header: an input of layout {tensor.layout} cannot be described; make it dense")
        return Like(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, same_as)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device) -> Tensor:
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return made.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Looks:
    """All micro-batches of a step. spec, leaves: of their (args, kwargs, target), a Like for each tensor. counts: how
    many leaves of each micro-batch are inputs, how many are its target's. has_target: whether the first rank has it."""

    spec: TreeSpec
    leaves: tuple[Any, ...]
    counts: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    weighed: bool  # by something else than rows
    has_target: bool

    @staticmethod
    def of(batches: Sequence[MicroBatch]) -> Looks:
        leaves, spec = tree_flatten([(b.args, b.kwargs, b.target) for b in batches])
        first: dict[int, int] = {}
        described = tuple(
            Like.of(leaf, first.setdefault(id(leaf), k)) if isinstance(leaf, Tensor) else leaf
            for k, leaf in enumerate(leaves)
        )
        counts = tuple((len(tree_flatten((b.args, b.kwargs))[0]), len(tree_flatten(b.target)[0])) for b in batches)
        return Looks(
            spec,
            described,
            counts,
            tuple(b.rows for b in batches),
            any(b.weight != b.rows for b in batches),
            any(b.target is not None for b in batches),
        )

    def pack(self) -> bytes:
        """ValueError where one of the inputs cannot be told to other processes."""
        try:
            return pickle.dumps(self)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            kinds = sorted({type(leaf).__name__ for leaf in self.leaves if not isinstance(leaf, Like)})
            raise ValueError(
                f"shape_header: an input that is no tensor cannot be told to the other ranks ({error}); there are "
                f"{', '.join(kinds)}"
            ) from error

    def empty(self, weights: Sequence[float], device: torch.device) -> list[MicroBatch]:
        """Micro-batches that look so."""
        made: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, Like):
                leaf = made[leaf.same_as] if leaf.same_as < len(made) else leaf.empty(device)
            made.append(leaf)
        about = zip(tree_unflatten(made, self.spec), self.rows, weights, strict=True)
        total = sum(weights)
        return [
            MicroBatch(args, kwargs, target, rows, weight / total, weight)
            for (args, kwargs, target), rows, weight in about
        ]

    def read_elsewhere(self, step: Step, rank: int) -> list[int]:
        """Numbers of the leaves whose values stages of other ranks than `rank` read, each tensor once."""
        found: set[int] = set()
        begin = 0
        target_goes = self.has_target and step.schedule.placement[-1] != rank
        for (inputs, targets), reads in zip(self.counts, step.read_beyond(rank), strict=True):
            found.update(begin + number for number in reads)
            begin += inputs
            if target_goes:
                found.update(range(begin, begin + targets))
            begin += targets
        likes = (self.leaves[number] for number in found)
        return sorted({leaf.same_as for leaf in likes if isinstance(leaf, Like) and leaf.nbytes})


class ShapeHeader:
    """On one rank of a pipeline. group: its ranks. first, last: those of the first and of the last stage. device: where
    the model computes. All ranks call `share`, then `fill`, once a step."""

    def __init__(self, group: Group, first: int, last: int, device: torch.device) -> None:
        self._group, self._first, self._last, self._device = group, first, last, device
        self._told: dict[bytes, int] = {}  # descriptions, by the number that stands for one from then on
        self._heard: list[Looks] = []
        self._looks: Looks | None = None
        self._given: list[MicroBatch] = []

    def share(self, divide: Callable[[], list[MicroBatch]], target: Any) -> list[MicroBatch]:
        """The micro-batches of this step, where the model computes. On the first stage's rank those of `divide()`; on
        others tensors that look like them, with nothing in them but this rank's own `target`, if it has the last stage
        and the first stage's has none. ValueError of `divide` is raised on all ranks."""
        if self._group.rank == self._first:
            try:
                self._given = given = divide()
                looks = Looks.of(given)
                data = looks.pack()
            except ValueError as error:
                self._send(_REFUSED, str(error).encode())
                raise
            self._tell(data)
            if looks.weighed:
                self._broadcast(torch.tensor([batch.weight for batch in given], dtype=torch.float64))
            self._looks = looks
            return moved(given, self._device)
        self._looks = looks = self._hear()
        weights = torch.tensor(looks.rows, dtype=torch.float64)
        if looks.weighed:
            self._broadcast(weights)
        batches = looks.empty(weights.tolist(), self._device)
        if self._group.rank == self._last and not looks.has_target and target is not None:
            targets = moved(divide_target(batches, target), self._device)
            batches = [replace(batch, target=its.target) for batch, its in zip(batches, targets, strict=True)]
        self._given = batches
        return batches

    def fill(self, step: Step) -> None:
        """Values of all that stages of other ranks read go to them."""
        looks = self._looks
        assert looks is not None, "share() comes first"
        numbers = looks.read_elsewhere(step, self._first)
        batches, self._given, self._looks = self._given, [], None
        if not numbers:
            return
        leaves = tree_flatten([(b.args, b.kwargs, b.target) for b in batches])[0] if looks.has_target else None
        if leaves is None:  # a target that a rank has of its own is not among what was told
            leaves = tree_flatten([(b.args, b.kwargs, None) for b in batches])[0]
        places = list(_places([looks.leaves[number].nbytes for number in numbers]))
        packed = torch.zeros(places[-1][1], dtype=torch.uint8)
        if self._group.rank == self._first:
            for number, (begin, end) in zip(numbers, places, strict=True):
                packed[begin:end] = _bytes(leaves[number])
        self._broadcast(packed)
        if self._group.rank != self._first:
            with torch.no_grad():
                for number, (begin, end) in zip(numbers, places, strict=True):
                    like = looks.leaves[number]
                    leaves[number].copy_(packed[begin:end].view(like.dtype).view(like.shape))

    # ------------------------------------------------------------ descriptions

    def _tell(self, data: bytes) -> None:
        if len(self._told) == _MOST:
            self._told.clear()
        known = data in self._told
        number = self._told.setdefault(data, len(self._told))
        self._send(number, b"" if known else data)

    def _send(self, number: int, data: bytes) -> None:
        self._broadcast(torch.tensor([number, len(data)]))
        if data:
            self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _hear(self) -> Looks:
        heading = torch.zeros(2, dtype=torch.int64)
        self._broadcast(heading)
        number, size = heading.tolist()
        if size:
            packed = torch.zeros(size, dtype=torch.uint8)
            self._broadcast(packed)
            data = packed.numpy().tobytes()
            if number == _REFUSED:
                raise ValueError(f"rank {self._group.ranks[self._first]}: {data.decode()}")
            del self._heard[number:]
            self._heard.append(pickle.loads(data))
        return self._heard[number]

    def _broadcast(self, tensor: Tensor) -> None:
        self._group.broadcast(tensor, self._first)


def _places(sizes: Iterable[int]) -> Iterable[tuple[int, int]]:
    """(begin, end) of each, one after the other, aligned."""
    begin = 0
    for size in sizes:
        yield begin, begin + size
        begin += -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's values as uint8 on the CPU."""
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    start = plain.storage_offset() * plain.itemsize
    return torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage(), start, (plain.nbytes,))

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
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from distlib.comm.group import Group
from distlib.pipeline.micro_batches import Batch, MicroBatch, divide_target, moved
from distlib.pipeline.step import Step

_REFUSED = -1  # in place of a description's number: its bytes are the words of an error
_MOST = 1000  # descriptions that are remembered: where an input that is no tensor changes, each step has another
_ALIGNMENT = 16  # bytes, of each tensor among those that are sent together


@dataclass(frozen=True)
class Like:
    """A dense tensor without its values. same_as: the number of the leaf that is the same tensor, its own if it is
    first."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    same_as: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device) -> Tensor:
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return made.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Looks:
    """All micro-batches of a step. parts: (args, kwargs, target) of each, with a Like for each tensor. weighed: by
    something else than rows. has_target: whether the first rank has it."""

    parts: tuple[tuple[Any, Any, Any], ...]
    rows: tuple[int, ...]
    weighed: bool
    has_target: bool

    @staticmethod
    def of(batches: Sequence[MicroBatch]) -> Looks:
        """batches: with dense tensors, see `dense`."""
        first: dict[int, int] = {}
        count = 0

        def like(leaf: Any) -> Any:
            nonlocal count
            number, count = count, count + 1
            if not isinstance(leaf, Tensor):
                return leaf
            same_as = first.setdefault(id(leaf), number)
            return Like(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad, same_as)

        return Looks(
            tuple(tree_map(like, (b.args, b.kwargs, b.target)) for b in batches),
            tuple(b.rows for b in batches),
            any(b.weight != b.rows for b in batches),
            any(b.target is not None for b in batches),
        )

    def empty(self, weights: Sequence[float], device: torch.device) -> list[MicroBatch]:
        """Micro-batches that look so."""
        made: list[Any] = []

        def tensor(leaf: Any) -> Any:
            if isinstance(leaf, Like):
                leaf = made[leaf.same_as] if leaf.same_as < len(made) else leaf.empty(device)
            made.append(leaf)
            return leaf

        about = zip(tree_map(tensor, self.parts), self.rows, weights, strict=True)
        total = sum(weights)
        return [
            MicroBatch(args, kwargs, target, rows, weight / total if total else 0.0, weight)
            for (args, kwargs, target), rows, weight in about
        ]

    def read_elsewhere(self, step: Step, rank: int) -> list[tuple[int, Like]]:
        """Leaves whose values stages of other ranks than `rank` read, each tensor once, with their numbers."""
        found: dict[int, Like] = {}
        target_goes = self.has_target and step.schedule.placement[-1] != rank
        for (args, kwargs, target), reads in zip(self.parts, step.read_beyond(rank), strict=True):
            inputs, targets = tree_leaves((args, kwargs)), tree_leaves(target)
            read = [inputs[number] for number in reads] + (targets if target_goes else [])
            found.update({leaf.same_as: leaf for leaf in read if isinstance(leaf, Like) and leaf.nbytes})
        return sorted(found.items())


@dataclass(frozen=True)
class Told(Batch):
    """A batch that ranks have agreed on. looks: of it. given: what its values are taken from, or filled into: the
    leaves that `looks` describes."""

    looks: Looks
    given: tuple[Any, ...]


class ShapeHeader:
    """On one rank of a pipeline. group: its ranks. first, last: those of the first and of the last stage. device: where
    the model computes. timeout: seconds, of the wait for the first rank, and its data.

    All ranks call `share` for each batch, and `fill` before it is used, in the same order.
    """

    def __init__(self, group: Group, first: int, last: int, device: torch.device, timeout: float) -> None:
        self._group, self._first, self._last = group, first, last
        self._device, self._timeout = device, timeout
        self._told: dict[bytes, int] = {}  # descriptions, by the number that stands for one from then on
        self._heard: dict[int, Looks] = {}

    def share(self, divide: Callable[[], list[MicroBatch]], target: Any) -> Told:
        """The micro-batches of a step, where the model computes. On the first stage's rank those of `divide()`; on
        others tensors that look like them, with nothing in them but this rank's own `target`, if it has the last stage
        and the first stage's has none. What `divide` raises is raised on all ranks, there as ValueError."""
        if self._group.rank != self._first:
            return self._hear(target)
        try:
            given = dense(divide())
            looks = Looks.of(given)
            data = packed(looks)
        except Exception as error:  # whatever it is, the other ranks must be told
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._send(_REFUSED, f"{kind}{error}".encode())
            raise
        if len(self._told) == _MOST:
            self._told.clear()
        known = data in self._told
        self._send(self._told.setdefault(data, len(self._told)), b"" if known else data)
        if looks.weighed:
            self._broadcast(torch.tensor([batch.weight for batch in given], dtype=torch.float64))
        if not looks.has_target:
            self._agree("")
        return Told(moved(given, self._device), looks, _leaves(given))

    def _hear(self, target: Any) -> Told:
        heading = torch.zeros(2, dtype=torch.int64)
        self._broadcast(heading)
        number, size = heading.tolist()
        data = self._passed_on(b"", size, self._first)
        if number == _REFUSED:
            raise ValueError(f"rank {self._group.ranks[self._first]}: {data.decode()}")
        if data:
            try:
                self._heard[number] = pickle.loads(data)
            except Exception as error:
                me = self._group.ranks[self._group.rank]
                self._group.abort(f"rank {me} cannot read what a batch looks like: {type(error).__name__}: {error}")
                raise
        looks = self._heard[number]
        weights = torch.tensor(looks.rows, dtype=torch.float64)
        if looks.weighed:
            self._broadcast(weights)
        batches = looks.empty(weights.tolist(), self._device)
        given = _leaves(batches)
        if not looks.has_target:
            batches = self._with_target(batches, target)
        return Told(batches, looks, given)

    def _with_target(self, batches: list[MicroBatch], target: Any) -> list[MicroBatch]:
        """Where the first stage's rank has no target: that of the last stage's may have one."""
        if self._group.rank != self._last or target is None:
            self._agree("")
            return batches
        try:
            targets = moved(divide_target(batches, target), self._device)
        except Exception as error:
            self._agree(str(error))
            raise
        self._agree("")
        return [replace(batch, target=its.target) for batch, its in zip(batches, targets, strict=True)]

    def _agree(self, text: str) -> None:
        """Raises on all ranks but the last stage's if that one has not got a target that fits; `text` is its."""
        if self._last == self._first:
            return
        heading = torch.tensor([len(text.encode())])
        self._broadcast(heading, self._last)
        words = self._passed_on(text.encode(), int(heading), self._last)
        if words and self._group.rank != self._last:
            raise ValueError(f"rank {self._group.ranks[self._last]}: {words.decode()}")

    def fill(self, batch: Told, step: Step) -> None:
        """Values of all that stages of other ranks read go to them."""
        read = batch.looks.read_elsewhere(step, self._first)
        if not read:
            return
        places = list(_places(like.nbytes for _, like in read))
        values = torch.zeros(places[-1][1], dtype=torch.uint8)
        if self._group.rank == self._first:
            for (number, _), (begin, end) in zip(read, places, strict=True):
                values[begin:end] = _bytes(batch.given[number])
        self._broadcast(values)
        if self._group.rank != self._first:
            with torch.no_grad():
                for (number, like), (begin, end) in zip(read, places, strict=True):
                    batch.given[number].copy_(values[begin:end].view(like.dtype).view(like.shape))

    # ------------------------------------------------------------ messages

    def _send(self, number: int, data: bytes) -> None:
        self._broadcast(torch.tensor([number, len(data)]))
        self._passed_on(data, len(data), self._first)

    def _passed_on(self, data: bytes, size: int, root: int) -> bytes:
        """`data` of rank `root`, where all know its size; nothing is sent of nothing."""
        if not size:
            return b""
        passed = torch.zeros(size, dtype=torch.uint8)
        if self._group.rank == root:
            passed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._broadcast(passed, root)
        return passed.numpy().tobytes()

    def _broadcast(self, tensor: Tensor, root: int | None = None) -> None:
        self._group.broadcast(tensor, self._first if root is None else root, timeout=self._timeout)


def dense(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches with all tensors dense, as they are on a device that they are copied to: strides then say all
    about their memory. What is shared stays shared. ValueError for tensors without values, or of another layout."""
    copies: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.layout is not torch.strided or leaf.device.type == "meta":
            raise ValueError(f"shape_header: an input of layout {leaf.layout} on {leaf.device} cannot be sent")
        if id(leaf) not in copies:
            own = torch.empty_like(leaf, device="meta").stride()
            copies[id(leaf)] = leaf if own == leaf.stride() else leaf.clone()
        return copies[id(leaf)]

    return [
        replace(b, args=tree_map(copied, b.args), kwargs=tree_map(copied, b.kwargs), target=tree_map(copied, b.target))
        for b in batches
    ]


def packed(looks: Looks) -> bytes:
    """As bytes. ValueError where something in it cannot be told to other processes."""
    try:
        return pickle.dumps(looks)
    except Exception as error:
        raise ValueError(
            f"shape_header: an input that is no tensor, or what inputs or target are held in, cannot be pickled to be "
            f"told to the other ranks: {error}"
        ) from error


def _leaves(batches: Sequence[MicroBatch]) -> tuple[Any, ...]:
    """As Looks numbers them."""
    return tuple(tree_flatten([(b.args, b.kwargs, b.target) for b in batches])[0])


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

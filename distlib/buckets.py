"""Pure arithmetic of buckets: parameters in, layout of flat buffers out; no communication, no tensors.

    order      d c b a                       the order in which gradients are expected
    bucket 0   |dddd|..|                     small, so that communication starts early
    bucket 1   |cccccccc|.|bbbbb|...|        filled up to the cap; every slice starts on a 64-byte line
    bucket 2   |aaaaaaaaaaaaaaaaaaaa|tail|   a parameter above the cap is alone; the tail is the caller's

Elements are counted in elements of the bucket's dtype, never in bytes, unless a name says bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

MIB = 1 << 20


class DType(Protocol):
    """What a dtype must offer: `torch.dtype` does."""

    @property
    def itemsize(self) -> int: ...


@dataclass(frozen=True)
class Parameter:
    """A parameter as the layout sees it: its name (for messages), number of elements, dtype of its slice."""

    name: str
    numel: int
    dtype: DType


@dataclass(frozen=True)
class Member:
    """One parameter's slice of a bucket: elements `offset` to `offset + numel` of the bucket."""

    parameter: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Bucket:
    """One flat buffer: its members in order, and its length in elements (padding and tail included)."""

    index: int
    dtype: DType
    members: tuple[Member, ...]
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Which slice of which bucket holds which parameter. Made by `plan`; a value, never changed.

    Buckets are numbered in the order in which they are expected to be complete, which is the order in which
    they are communicated. `tail` elements at the end of the last bucket belong to no parameter.
    """

    parameters: tuple[Parameter, ...]
    buckets: tuple[Bucket, ...]
    order: tuple[int, ...]
    cap_bytes: int
    first_cap_bytes: int
    align_bytes: int
    tail: int

    @property
    def nbytes(self) -> int:
        """Bytes of all buckets together: what one reduction of all gradients communicates."""
        return sum(bucket.nbytes for bucket in self.buckets)

    def rebuild(self, order: Sequence[int]) -> Layout:
        """The same parameters and limits, laid out in another order.

        `order` may leave parameters out (those that never receive a gradient); it must not repeat any.
        """
        limits = (self.cap_bytes, self.first_cap_bytes, self.align_bytes, self.tail)
        return replace(self, buckets=_fill(self.parameters, order, *limits), order=tuple(order))


def plan(
    parameters: Iterable[Parameter],
    order: Sequence[int] | None = None,
    cap_bytes: int = 25 * MIB,
    first_cap_bytes: int = MIB,
    align_bytes: int = 64,
    tail: int = 0,
) -> Layout:
    """Lay parameters out in buckets.

    Args:
        parameters: all parameters, in registration order; `order` and `Member.parameter` index it.
        order: the order in which gradients are expected; by default reverse registration order, which is
            about the order of the backward pass.
        cap_bytes: no bucket with two members or more is larger (padding counted, tail not counted).
        first_cap_bytes: the same for the first bucket opened, if smaller than `cap_bytes`.
        align_bytes: every slice starts at a multiple of this; 1 packs without gaps.
        tail: elements added at the end of the last bucket for the caller's own use.

    Raises:
        ValueError: a limit that is not positive, or an order that repeats or names an unknown parameter.
    """
    parameters = tuple(parameters)
    if order is None:
        order = range(len(parameters) - 1, -1, -1)
    if cap_bytes <= 0 or first_cap_bytes <= 0 or align_bytes <= 0 or tail < 0:
        raise ValueError(
            f"bucket limits must be positive: cap_bytes={cap_bytes}, first_cap_bytes={first_cap_bytes}, "
            f"align_bytes={align_bytes}, tail={tail}"
        )
    buckets = _fill(parameters, order, cap_bytes, first_cap_bytes, align_bytes, tail)
    return Layout(parameters, buckets, tuple(order), cap_bytes, first_cap_bytes, align_bytes, tail)


def _fill(
    parameters: tuple[Parameter, ...],
    order: Sequence[int],
    cap_bytes: int,
    first_cap_bytes: int,
    align_bytes: int,
    tail: int,
) -> tuple[Bucket, ...]:
    if len(set(order)) != len(order) or not all(0 <= i < len(parameters) for i in order):
        raise ValueError(f"order must name each of {len(parameters)} parameters at most once, got {list(order)}")

    closed: list[_Open] = []
    filling: dict[DType, _Open] = {}
    cap = min(first_cap_bytes, cap_bytes)
    for position, index in enumerate(order):
        parameter = parameters[index]
        itemsize = parameter.dtype.itemsize
        step = max(1, align_bytes // itemsize)
        padded = -(-parameter.numel // step) * step
        bucket = filling.get(parameter.dtype)
        if bucket is None or (bucket.end + padded) * itemsize > bucket.cap_bytes:
            if bucket is not None:
                closed.append(bucket)
            bucket = filling[parameter.dtype] = _Open(parameter.dtype, cap)
            cap = cap_bytes
        bucket.members.append(Member(index, bucket.end, parameter.numel))
        bucket.end += padded
        bucket.complete_at = position

    closed += filling.values()
    closed.sort(key=lambda bucket: bucket.complete_at)
    if closed:
        closed[-1].end += tail
    return tuple(Bucket(i, b.dtype, tuple(b.members), b.end) for i, b in enumerate(closed))


@dataclass
class _Open:
    """A bucket being filled."""

    dtype: DType
    cap_bytes: int
    members: list[Member] = field(default_factory=list)
    end: int = 0
    complete_at: int = 0  # position in the order of the last member: when it lands, the bucket is complete

"""Memory of gradients: a small pool of buffers that they land in, and the flat accumulator of what this rank owns.

    accumulator   | flat 3 | flat 2 | flat 1 || flat 0 | root |      this rank's part of each, in order of reduction
                  '------- bucket 0 --------''--- bucket 1 ---'      what hop 2 sends at once: it crosses units

The accumulator is fp32 (fp64 for fp64 parameters). Where optimizer state is divided over replicas too, a bucket is laid
out by replica first, so that hop 2 is a reduce-scatter and each replica owns one row. Where the optimizer works in the
host's memory, `owned` lies there, pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from distlib import streams
from distlib.comm.group import Group
from distlib.comm.work import Work
from distlib.sharded.flat import Flat
from distlib.sharded.groups import Grid

BUCKET_BYTES = 32 << 20
BUFFERS = 3  # of one size: one landing, one or two being reduced
BUFFERS_ON_HOST = 1  # through memory a reduction is over before the next gradient of this size has landed
BUFFERS_ON_DEVICE = 2  # one landing, one being reduced on another stream


class BufferPool:
    """Buffers in registered memory, taken and given back. Where all are under way, `take` waits for the oldest.

    On a GPU a buffer is given back with an event of the stream that read it last: who takes it makes his stream wait.

    make_progress: finishes the oldest reduction and so gives its buffers back; False where none is under way: then one
    more buffer is made (gradients of an earlier unit are still missing).
    """

    def __init__(self, group: Group | None, device: torch.device, make_progress: Callable[[bool], bool]) -> None:
        self._group = group
        self._device = device
        self._make_progress = make_progress
        self._free: dict[tuple[int, torch.dtype], list[tuple[torch.Tensor, streams.Event]]] = {}
        self._most = BUFFERS_ON_HOST
        if group is not None:
            across = len(group.topology.nodes) > 1
            self._most = BUFFERS if across else BUFFERS_ON_HOST if device.type == "cpu" else BUFFERS_ON_DEVICE
        self._made: dict[tuple[int, torch.dtype], int] = {}

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D buffer for the current stream; its contents are undefined."""
        key = (numel, dtype)
        free = self._free.setdefault(key, [])
        while not free and self._made.get(key, 0) >= self._most and self._make_progress(True):
            pass
        if free:
            buffer, read = free.pop(0)  # the one whose last reader is the furthest back
            streams.wait(streams.current(self._device), read)
            return buffer
        self._made[key] = self._made.get(key, 0) + 1
        if self._group is None:
            return torch.empty(numel, dtype=dtype, device=self._device)
        return self._group.registered_empty(numel, dtype=dtype, device=self._device)

    def give(self, buffer: torch.Tensor) -> None:
        """Gives a buffer back that nothing uses any more but what the current stream holds; those beyond the bound are
        let go."""
        key = (buffer.numel(), buffer.dtype)
        stream = streams.current(self._device)
        if self._made[key] > self._most:
            self._made[key] -= 1
            streams.keep(buffer, stream)
        else:
            self._free[key].append((buffer, streams.record(stream)))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, free or taken."""
        return sum(numel * dtype.itemsize * made for (numel, dtype), made in self._made.items())


@dataclass(eq=False)
class _Bucket:
    """Parts of several flats, next to each other."""

    index: int
    rows: int  # 1, or the number of replicas that divide it
    width: int = 0  # elements of a row
    flats: list[Flat] = field(default_factory=list)
    left: int = 0  # flats that have not arrived in this window
    sums: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # rows x width, in the accumulator's dtype
    result: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # this rank's row, averaged over all ranks
    owned: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # the same in the parameters' dtype


class Accumulator:
    """See the file. Memory is made in the first backward: a model that is only evaluated has none."""

    def __init__(self, flats: Sequence[Flat], grid: Grid, device: torch.device, host: bool) -> None:
        self._grid = grid
        self._device = device
        self._host = host
        self._buckets: list[_Bucket] = []
        self._home: dict[Flat, tuple[_Bucket, int]] = {}  # the bucket, and the column where the flat begins
        self._grads: dict[Flat, list[torch.Tensor]] = {}
        filling: dict[torch.dtype, _Bucket] = {}
        for flat in flats:
            bucket = filling.get(flat.dtype)
            if bucket is None or bucket.width * bucket.rows * 4 >= BUCKET_BYTES:
                bucket = filling[flat.dtype] = _Bucket(len(self._buckets), flat.subparts)
                self._buckets.append(bucket)
            self._home[flat] = (bucket, bucket.width)
            bucket.flats.append(flat)
            bucket.width += flat.layout.subpart
        self._next = 0  # the first bucket that hop 2 has not begun with

    @property
    def nbytes(self) -> int:
        """Bytes of the accumulator, and of what is kept beside it."""
        tensors = {t.data_ptr(): t for b in self._buckets for t in (b.sums, b.result, b.owned)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def allocate(self) -> None:
        """Makes the memory, once, and begins a window."""
        self._next = 0
        for bucket in self._buckets:
            bucket.left = len(bucket.flats)
            if bucket.sums.dim() == 2:
                continue
            dtype = bucket.flats[0].dtype
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            rows, width, replication = bucket.rows, bucket.width, self._grid.replication
            empty = torch.empty if replication is None else replication.registered_empty
            bucket.sums = empty(rows * width, dtype=wide, device=self._device).zero_().view(rows, width)
            bucket.result = bucket.sums[0] if rows == 1 else torch.zeros(width, dtype=wide, device=self._device)
            if self._host:
                bucket.owned = streams.pinned(width, dtype, self._device, lasting=True).zero_()
            else:
                same = wide == dtype
                bucket.owned = bucket.result if same else torch.zeros(width, dtype=dtype, device=self._device)
        if not self._grads:
            self._grads = {flat: self._views(flat) for flat in self._home}

    def _views(self, flat: Flat) -> list[torch.Tensor]:
        bucket, column = self._home[flat]
        begin = flat.owned[0]
        return [
            # .data: a version counter of its own, which tells whether the user wrote to this gradient
            flat.shaped(p.entry, bucket.owned[column + p.where - begin : column + p.where - begin + p.numel]).data
            for p in flat.ranges
        ]

    def grads(self, flat: Flat) -> list[torch.Tensor]:
        """The gradients of this rank's pieces of a flat: views."""
        return self._grads[flat]

    def _part(self, flat: Flat) -> torch.Tensor:
        """Where a flat's part adds up: rows x subpart."""
        bucket, column = self._home[flat]
        return bucket.sums[:, column : column + flat.layout.subpart]

    def direct(self, flat: Flat) -> torch.Tensor | None:
        """The flat's part as one 1-D tensor, where it is that."""
        return self._part(flat)[0] if flat.subparts == 1 else None

    def add(self, flat: Flat, values: torch.Tensor, filled: bool) -> None:
        """Adds a part (1-D, any dtype); the first of a window replaces what is there."""
        part = self._part(flat)
        values = values.view(part.shape)
        if filled:
            part.add_(values)
        else:
            part.copy_(values)

    def clear(self, flat: Flat, entry: int) -> None:
        """Drops what one parameter has accumulated."""
        begin, end = flat.layout.bounds(self._grid.part)
        piece = flat.layout.pieces(begin, end)[entry]
        rows = self._part(flat)
        width = flat.layout.subpart
        for row in range(flat.subparts):
            first, last = piece.where - begin - row * width, piece.where - begin + piece.numel - row * width
            rows[row, max(0, first) : max(0, min(width, last))].zero_()

    def arrived(self, flat: Flat) -> list[Work]:
        """The flat's part of this window is complete. Starts hop 2 of buckets that thereby are, in order."""
        self._home[flat][0].left -= 1
        started = []
        while self._next < len(self._buckets) and self._buckets[self._next].left == 0:
            work = self._hop2(self._buckets[self._next])
            if work is not None:
                started.append(work)
            self._next += 1
        return started

    def _hop2(self, bucket: _Bucket) -> Work | None:
        group = self._grid.replication
        if group is None or not bucket.width:
            return None
        if bucket.rows == 1:
            return group.all_reduce(bucket.sums.view(-1), "avg", async_op=True, label=f"hop 2, bucket {bucket.index}")
        return group.reduce_scatter(bucket.result, bucket.sums.view(-1), "avg", async_op=True)

    def settle(self) -> None:
        """Hop 2 is over: gradients in the parameters' dtype, where the optimizer works."""
        for bucket in self._buckets:
            if bucket.owned is not bucket.result:
                bucket.owned.copy_(bucket.result.to(bucket.owned.dtype), non_blocking=True)
        if self._host:
            streams.finish(streams.current(self._device))

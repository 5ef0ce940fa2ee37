"""Optimizer state in a file: streamed through a small ring of buffers while the step computes.

    file      | exp_avg: a b c d ...        | exp_avg_sq: a b c d ...        |      4 MiB of each make a chunk

    time      read 2    read 3    read 4               a pool of threads reads ahead
              step 0    step 1    step 2               the caller computes
                        write 0   write 1              the pool writes behind

The file has no name, so nothing is left when the process ends, however it ends. Its pages are the
kernel's to cache or not; the process holds the ring alone. (ZeRO-Infinity, arXiv 2104.07857, section 5.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from distlib.nameless import NamelessFile
from distlib.optim.memory import flat, is_dense, layout_of

CHUNK = 4 << 20  # bytes of one kind of state in a chunk
SLOTS = 5  # chunks in memory: one in work, two read ahead, two written behind
AHEAD = 2


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + count) of parameter `index`, whose state lies in a chunk from byte `at` on."""

    index: int
    start: int
    count: int
    at: int


@dataclass
class Chunk:
    """Bytes [offset, offset + size) of every kind of state, and what they belong to."""

    offset: int
    size: int
    slices: list[Slice]


def chunks_of(
    offsets: Sequence[int], numels: Sequence[int], itemsizes: Sequence[int], chosen: Sequence[int], limit: int = CHUNK
) -> list[Chunk]:
    """The chosen parameters cut into chunks of at most `limit` bytes, each contiguous in the file. Pure.

    offsets: in bytes, of every parameter's state; chosen: indices, ascending.
    """
    found: list[Chunk] = []
    for index in chosen:
        size, start = itemsizes[index], 0
        while start < numels[index]:
            offset = offsets[index] + start * size
            last = found[-1] if found else None
            if (
                last is None
                or last.offset + last.size != offset
                or last.size + size > limit
                or itemsizes[last.slices[-1].index] != size  # else one of them might lie misaligned in the chunk
            ):
                last = Chunk(offset, 0, [])
                found.append(last)
            count = min(numels[index] - start, (limit - last.size) // size)
            last.slices.append(Slice(index, start, count, last.size))
            last.size += count * size
            start += count
    return found


class FileState:
    """The state of one parameter group in one file under `folder`.

    names: the kinds of state. has: which parameters have state. steps: (parameters,) fp32, in memory. Raises
    RuntimeError naming the folder where the file cannot be made or the disk is too small; ValueError for parameters
    with gaps.
    """

    def __init__(self, params: Sequence[torch.Tensor], names: Sequence[str], folder: Path) -> None:
        self.params = list(params)
        self.ids = tuple(map(id, params))
        self.names = tuple(names)
        self.steps = torch.zeros(len(params), dtype=torch.float32)
        self.step_views = list(self.steps.unbind())
        self.has = [False] * len(params)
        self._used: set[int] = set()  # whose part of the file may hold something else than zeros
        self.folder = folder
        self._offsets: list[int] = []
        end = 0
        for p in params:
            if not is_dense(p):
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} and strides {p.stride()} has gaps: its state "
                    "cannot be kept in a file; make it contiguous"
                )
            end = -(-end // p.itemsize) * p.itemsize
            self._offsets.append(end)
            end += p.numel() * p.itemsize
        self._region = -(-end // 8) * 8
        self.layouts = [layout_of(p) for p in params]
        self._numels, self._itemsizes = [p.numel() for p in params], [p.itemsize for p in params]
        self._ring: list[torch.Tensor] = []
        self._pool = ThreadPoolExecutor(AHEAD, "distlib-offload")
        self._file = self._open(self._region * len(self.names))

    def _open(self, size: int) -> NamelessFile:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return NamelessFile(self.folder, size)
        except OSError as error:
            raise RuntimeError(
                f"optimizer state of {size / 2**20:,.1f} MiB cannot be kept in {self.folder}: {error.strerror}; "
                "give `offload` a folder on a disk with room"
            ) from error

    # ------------------------------------------------------------ one parameter

    def read(self, index: int, name: str) -> torch.Tensor:
        """The state `name` of a parameter, in memory of its own: its shape and strides."""
        p = self.params[index]
        tensor = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype)
        self._transfer(os.preadv, flat(tensor), self._at(index, name))
        return tensor

    def write(self, index: int, name: str, value: torch.Tensor | None) -> None:
        """Puts `value` (None: zeros) there, piece by piece."""
        p = self.params[index]
        if value is not None:
            value = flat(torch.empty_strided(p.size(), p.stride(), dtype=p.dtype).copy_(value))
        step = CHUNK // p.itemsize
        for start in range(0, p.numel(), step):
            count = min(step, p.numel() - start)
            piece = torch.zeros(count, dtype=p.dtype) if value is None else value.narrow(0, start, count)
            self._transfer(os.pwritev, piece, self._at(index, name) + start * p.itemsize)

    def adopt(self, index: int, state: dict, names: Sequence[str]) -> bool:
        """Moves the values in `state` of parameter `index` to the file. True: there were none, here or there."""
        given = {name: state.pop(name) for name in names if state.get(name) is not None}
        if given:
            for name in names:
                self.write(index, name, given.get(name))
            self.has[index] = True
        fresh = not self.has[index]
        if fresh and index in self._used:
            for name in names:
                self.write(index, name, None)
        self.has[index] = True
        self._used.add(index)
        return fresh

    def forget(self) -> None:
        """All parameters are without state, until `adopt`."""
        self.has = [False] * len(self.has)

    def adopt_step(self, index: int, state: dict) -> None:
        """Keeps the number of steps in memory, as a view."""
        have, view = state.get("step"), self.step_views[index]
        if have is not view:
            view.fill_(0 if have is None else float(have))
            state["step"] = view

    # ------------------------------------------------------------ a step

    def stream(self, chosen: Sequence[int], step: Callable[[list[tuple[Slice, list[torch.Tensor]]]], None]) -> None:
        """Calls `step` with every chunk of the chosen parameters' state: slices, and for each its state by name, 1-D.

        What `step` leaves there is written back. Chunks come in order; all are written when this returns.
        """
        chunks = chunks_of(self._offsets, self._numels, self._itemsizes, chosen)
        while len(self._ring) < min(SLOTS, len(chunks)):
            self._ring.append(torch.empty(len(self.names), CHUNK, dtype=torch.uint8))
        reads: list[Future[None]] = []
        writes: list[Future[None]] = []
        try:
            for j, chunk in enumerate(chunks):
                while len(reads) < min(j + AHEAD + 1, len(chunks)):
                    k = len(reads)
                    if k >= SLOTS:
                        writes[k - SLOTS].result()
                    reads.append(self._pool.submit(self._move, os.preadv, chunks[k], k % SLOTS))
                reads[j].result()
                step(list(self._pieces(chunk, self._ring[j % SLOTS])))
                writes.append(self._pool.submit(self._move, os.pwritev, chunk, j % SLOTS))
        finally:  # the ring is free again, also after an error
            for future in (*reads, *writes):
                future.exception()
        for future in writes:
            future.result()

    def _pieces(self, chunk: Chunk, buffer: torch.Tensor) -> Iterator[tuple[Slice, list[torch.Tensor]]]:
        for s in chunk.slices:
            dtype = self.params[s.index].dtype
            end = s.at + s.count * dtype.itemsize
            yield s, [buffer[k, s.at : end].view(dtype) for k in range(len(self.names))]

    def _move(self, way: Callable[..., int], chunk: Chunk, slot: int) -> None:
        for k in range(len(self.names)):
            self._transfer(way, self._ring[slot][k, : chunk.size], k * self._region + chunk.offset)

    def _at(self, index: int, name: str) -> int:
        return self.names.index(name) * self._region + self._offsets[index]

    def _transfer(self, way: Callable[..., int], tensor: torch.Tensor, offset: int) -> None:
        """All bytes of a contiguous tensor, from or to the file; the system may move fewer at a time."""
        if tensor.numel() == 0:
            return
        view = memoryview(tensor.view(torch.uint8).numpy())
        done = 0
        while done < len(view):
            try:
                moved = way(self._file.fileno(), [view[done:]], offset + done)
            except OSError as error:
                raise RuntimeError(f"optimizer state in {self.folder}: {error}, at byte {offset + done:,}") from error
            if moved == 0:
                raise RuntimeError(f"optimizer state in {self.folder}: the file ends at byte {offset + done:,}")
            done += moved

"""Where saved tensors go: a file beside the memory of a CPU, or pinned host memory beside that of a GPU."""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from distlib import streams
from distlib.activations.size import show_size
from distlib.activations.slab import Slab
from distlib.nameless import NamelessFile

EXTENT = 64 << 20  # bytes by which a file grows at least
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")  # file systems that hold their files in memory


class Transfer(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Returns when its result can be used by what the caller runs next; raises what went wrong."""
        ...

    def cancel(self) -> bool:
        """Whether it had not begun, and now never will."""
        ...


class Store(Protocol):
    """Takes bytes and gives them back. Tensors are 1-D of uint8."""

    slab: Slab

    def reserve(self, nbytes: int) -> int:
        """Offset of a piece; `slab.give(offset, nbytes)` when it is no longer needed."""
        ...

    def write(self, source: torch.Tensor, offset: int, done: Callable[[], None]) -> Transfer:
        """Begins to copy `source`; `done()` when its memory may go."""
        ...

    def read(self, offset: int, nbytes: int, device: torch.device) -> tuple[torch.Tensor, Transfer]:
        """Begins to copy into new memory on `device`."""
        ...


class _Job:
    """A Transfer on the worker thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        error = None if self._future.cancelled() else self._future.exception()
        if error is not None:  # anew: its traceback would hold the graph, which holds it, for ever
            cause = error.__cause__ and error.__cause__.with_traceback(None)
            raise RuntimeError(str(error) if isinstance(error, RuntimeError) else repr(error)) from cause

    def cancel(self) -> bool:
        return self._future.cancel()


class FileStore:
    """A file in `folder` that has no name (it goes with the process), read and written by one thread.

    Raises:
        ValueError: `folder` is no folder that can be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slab = Slab()
        try:
            self._file = NamelessFile(folder)
        except OSError as error:
            raise ValueError(
                f"folder={str(folder)!r}: saved tensors cannot be written there: {error.strerror}"
            ) from error
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="distlib-activations")
        kind = file_system(folder)
        if kind in IN_MEMORY:
            warnings.warn(
                f"folder={str(folder)!r} is a {kind}, which holds its files in memory: moving activations there saves "
                "0 bytes. Give a folder on a disk",
                stacklevel=4,
            )

    def reserve(self, nbytes: int) -> int:
        offset = self.slab.take(nbytes)
        if offset is None:
            more = max(Slab.rounded(nbytes), EXTENT)
            try:
                self._file.grow(more)
            except OSError as error:
                raise RuntimeError(self._failed("grow by", more, error)) from error
            self.slab.grow(more)
            offset = self.slab.take(nbytes)
            assert offset is not None
        return offset

    def write(self, source: torch.Tensor, offset: int, done: Callable[[], None]) -> Transfer:
        return _Job(self._pool.submit(self._write, source, offset, done))

    def read(self, offset: int, nbytes: int, device: torch.device) -> tuple[torch.Tensor, Transfer]:
        into = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return into, _Job(self._pool.submit(self._read, into, offset))

    def _write(self, source: torch.Tensor, offset: int, done: Callable[[], None]) -> None:
        left = memoryview(source.numpy())
        while left:
            try:
                written = os.pwrite(self._file.fileno(), left, offset)
            except OSError as error:
                raise RuntimeError(self._failed("write", len(left), error)) from error
            left, offset = left[written:], offset + written
        done()

    def _read(self, into: torch.Tensor, offset: int) -> None:
        left = memoryview(into.numpy())
        while left:
            try:
                got = os.preadv(self._file.fileno(), [left], offset)
            except OSError as error:
                raise RuntimeError(self._failed("read", len(left), error)) from error
            if not got:
                raise RuntimeError(f"saved tensors in {self.folder}: the file ends {len(left)} bytes too early")
            left, offset = left[got:], offset + got

    def _failed(self, what: str, nbytes: int, error: OSError) -> str:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = (
            "it is full: free some space, give another folder, or offload fewer blocks (resident=)"
            if full
            else "see there"
        )
        return (
            f"saved tensors in folder {self.folder}: cannot {what} {nbytes} bytes, {show_size(self.slab.used)} are in "
            f"use: {error.strerror}; {fix}"
        )


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, "" where the system does not tell."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    best, kind = "", ""
    place = str(folder.resolve())
    for line in mounts.read_text().splitlines():
        _, point, its_kind = line.split()[:3]
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, its_kind
    return kind


class _Written:
    """A Transfer to the host on the copy stream. It holds its source until a stream was made to wait for the copy:
    memory freed then is lent again in that stream's order, however far the host is ahead of the device.

    Memory marked as in use by the copy stream, as it is here only if nobody waits, is lent again when the host sees the
    copy done: a host that is ahead would allocate a whole forward anew.
    """

    def __init__(self, stream: streams.Stream, source: torch.Tensor, done: Callable[[], None]) -> None:
        self._event = streams.record(stream)
        self._device = source.device
        self._done = done
        self._held = weakref.finalize(self, streams.keep, source, stream)
        self._held.atexit = False

    def wait(self) -> None:
        streams.wait(streams.current(self._device), self._event)
        self._held.detach()
        self._done()

    def cancel(self) -> bool:
        return False


class _Read:
    """A Transfer from the host on the copy stream: the stream that waits is the one current where `wait` is called.

    Its memory is that of the stream which computes, so that what is dropped after use is lent again in that stream's
    order, however far the host is ahead of the device. Where nobody waited, it is marked as in use by the copy stream.
    """

    def __init__(self, stream: streams.Stream, into: torch.Tensor, home: streams.Stream) -> None:
        self._event = streams.record(stream)
        self._into, self._home = into, home
        self._held = weakref.finalize(self, streams.keep, into, stream)
        self._held.atexit = False

    def wait(self) -> None:
        stream = streams.current(self._into.device)
        streams.wait(stream, self._event)
        if stream == self._home:
            self._held.detach()
        else:
            streams.keep(self._into, stream)

    def cancel(self) -> bool:
        return False


class PinnedStore:
    """Pinned host memory, allocated in extents of at least 256 MiB, and one copy stream per device.

    The stream that computes is read before the copy stream is entered: inside, it would be the copy stream itself, and
    a copy could begin before its source is computed.
    """

    EXTENT = 256 << 20

    def __init__(self, device: torch.device) -> None:
        if not streams.exists(device):
            raise ValueError(f"saved tensors on {device}: this torch finds no such device to copy them from")
        self.slab = Slab()
        self._device = device
        self._extents: list[tuple[int, torch.Tensor]] = []
        self._stream = streams.new(device)

    def reserve(self, nbytes: int) -> int:
        offset = self.slab.take(nbytes)
        if offset is None:
            more = max(Slab.rounded(nbytes), self.EXTENT)
            # A piece never crosses two extents: a page between them is never lent.
            self.slab.size += Slab.rounded(1)
            self._extents.append((self.slab.size, streams.pinned(more, torch.uint8, self._device, lasting=True)))
            self.slab.grow(more)
            offset = self.slab.take(nbytes)
            assert offset is not None
        return offset

    def write(self, source: torch.Tensor, offset: int, done: Callable[[], None]) -> Transfer:
        streams.follow(self._stream, streams.current(self._device))
        with streams.on(self._stream):
            self._piece(offset, source.numel()).copy_(source, non_blocking=True)
        return _Written(self._stream, source, done)

    def read(self, offset: int, nbytes: int, device: torch.device) -> tuple[torch.Tensor, Transfer]:
        home = streams.current(self._device)
        into = torch.empty(nbytes, dtype=torch.uint8, device=device)
        streams.follow(self._stream, home)  # which may still work on what had this memory before
        with streams.on(self._stream):  # also behind the write of the same piece: one stream has one order
            into.copy_(self._piece(offset, nbytes), non_blocking=True)
        return into, _Read(self._stream, into, home)

    def _piece(self, offset: int, nbytes: int) -> torch.Tensor:
        for start, memory in self._extents:
            if start <= offset < start + memory.numel():
                return memory[offset - start : offset - start + nbytes]
        raise AssertionError(f"offset {offset} was never lent")

"""Writing in DCP's format: a file per rank, one `torch.save` record per chunk, and the index of all of them.

Every rank plans and writes by itself. Rank 0 gets from each rank where its chunks lie and makes the index; what the
chunks are it gets only once, as long as a rank's plan does not change (planning for all ranks on rank 0 takes 90 s at
256 ranks: pytorch#149785).
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from distlib.checkpoint import folder

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """A record that a rank writes: a box of a tensor, or (shape is None) an object."""

    name: str
    path: Keys  # where DCP's tools put it in a nested state dict
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class RankFile:
    """What rank 0 must know of a rank's file. records: (bytes, crc32) in order of the file.

    plan: None where it is the same as in the save before.
    """

    records: list[tuple[int, int]]
    plan: list[Planned] | None


def file_name(rank: int) -> str:
    """The name DCP's own writer would give it."""
    return f"__{rank}_0.distcp"


def to_bytes(value: Any) -> bytes:
    """An object as DCP stores it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _Summed:
    """A file that counts and sums what is written to it."""

    def __init__(self, file: Any) -> None:
        self._file, self.bytes, self.crc = file, 0, 0
        self._error: OSError | None = None  # the first

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.crc = zlib.crc32(view, self.crc)
        self.bytes += view.nbytes
        try:
            self._file.write(view)
        except OSError as error:
            self._error = self._error or error
            raise
        return view.nbytes

    def write_tensor(self, tensor: torch.Tensor) -> None:
        """As `torch.save` does, which has words of its own for a full disk: what the file raised is raised instead."""
        try:
            torch.save(tensor, self)
        except RuntimeError as error:
            if self._error is not None:
                raise self._error from error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_rank_file(path: Path, contents: Iterable[torch.Tensor | bytes]) -> list[tuple[int, int]]:
    """Writes the records of one rank and waits until they are on disk. Returns each one's (bytes, crc32).

    contents: in the order of the plan; a tensor must be on the CPU. It may be made while it is asked for, so that no
    more than one of them need be in memory.
    """
    records = []
    with path.open("wb") as file:
        for number, content in enumerate(contents):
            summed = _Summed(file)
            if isinstance(content, bytes):
                summed.write(content)
            else:
                if content.untyped_storage().nbytes() != content.nbytes:
                    content = content.clone()  # torch.save writes whole storages
                summed.write_tensor(content)
            records.append((summed.bytes, summed.crc))
            if number == 0:
                file.flush()
                folder.on_phase("writing")
        file.flush()
        os.fsync(file.fileno())
    folder.on_phase("written")
    return records


class _IndexWriter(FileSystemWriter):
    """DCP's writer of `.metadata`, without the path of the folder in it: the folder is renamed."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_index(
    path: Path, plans: list[list[Planned]], records: list[list[tuple[int, int]]], aliases: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Writes `.metadata` of the ranks' files. Returns the manifest's `files`, with it. Rank 0 calls it.

    Raises RuntimeError, naming the tensor, where the chunks do not make up a whole tensor.
    """
    tensors: dict[str, Any] = {}
    where: dict[str, Keys] = {}
    results: list[WriteResult] = []
    files: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[tuple[Any, _StorageInfo]]] = {}
    for rank, (plan, written) in enumerate(zip(plans, records, strict=True)):
        place, chunks = 0, []
        for planned, (size, crc) in zip(plan, written, strict=True):
            info = _StorageInfo(file_name(rank), place, size)
            where[planned.name] = planned.path
            index = _add(tensors, planned, rank)
            results.append(WriteResult(index=index, size_in_bytes=size, storage_data=info))
            parts.setdefault(planned.name, []).append((index, info))
            chunks.append([place, size, crc])
            place += size
        files[file_name(rank)] = {"bytes": place, "chunks": chunks}
    for name, entry in tensors.items():
        if isinstance(entry, TensorStorageMetadata):
            covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if covered != math.prod(entry.size):
                raise RuntimeError(
                    f"{name} of shape {tuple(entry.size)} has {math.prod(entry.size)} elements, but the ranks hold "
                    f"{covered} of them, replicas left out: their pieces overlap or leave gaps"
                )
    for alias, name in aliases.items():  # DCP's tools find a tied parameter under all its names, stored once
        tensors[alias], where[alias] = tensors[name], ("model", alias.removeprefix("model."))
        for index, info in parts.get(name, []):
            again = dataclasses.replace(index, fqn=alias)
            results.append(WriteResult(index=again, size_in_bytes=0, storage_data=info))
    _IndexWriter(path).finish(Metadata(tensors, planner_data=where), [results])
    content = (path / folder.METADATA).read_bytes()
    files[folder.METADATA] = {"bytes": len(content), "chunks": [[0, len(content), zlib.crc32(content)]]}
    return files


def _add(tensors: dict[str, Any], planned: Planned, rank: int) -> MetadataIndex:
    """Enters a record into the index."""
    if planned.shape is None:
        tensors[planned.name] = BytesStorageMetadata()
        return MetadataIndex(planned.name)
    assert planned.dtype is not None
    entry = tensors.get(planned.name)
    if entry is None:
        properties = TensorProperties(dtype=planned.dtype)
        entry = tensors[planned.name] = TensorStorageMetadata(properties, torch.Size(planned.shape), [])
    elif (entry.properties.dtype, tuple(entry.size)) != (planned.dtype, planned.shape):
        raise RuntimeError(
            f"{planned.name} is {planned.dtype} of shape {planned.shape} on rank {rank}, but "
            f"{entry.properties.dtype} of shape {tuple(entry.size)} on a rank before it"
        )
    if math.prod(planned.sizes) == 0:
        return MetadataIndex(planned.name, planned.offsets)
    entry.chunks.append(ChunkStorageMetadata(torch.Size(planned.offsets), torch.Size(planned.sizes)))
    return MetadataIndex(planned.name, planned.offsets, len(entry.chunks) - 1)

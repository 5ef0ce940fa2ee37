"""Reading a checkpoint: everything that will be needed is checked before anything is given out.

Two passes over the chunks that this rank needs: the first sums them, the second, out of the page cache, copies them to
where they belong. No more than one chunk is in memory at a time.
"""

from __future__ import annotations

import io
import math
import pickle
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from distlib.checkpoint import folder
from distlib.checkpoint.manifest import Manifest
from distlib.shards import boxes


@dataclass(frozen=True)
class Target:
    """Where elements [offset, offset + flat.numel()) of the saved tensor `name` go: a contiguous 1-D tensor."""

    name: str
    offset: int
    flat: torch.Tensor


@dataclass(frozen=True)
class _Record:
    """One record of a file: what it holds, for messages, and where it lies."""

    name: str
    file: str
    offset: int
    size: int


class Checkpoint:
    """A checkpoint folder, opened: its manifest and index are read and checked, no tensor is.

    manifest: what was saved. tensors: shape and dtype by name ("model.<parameter>", ...). objects: names of the rest.

    Raises ValueError for what is no checkpoint or of another version, RuntimeError for a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.read(path)
        self._metadata = self._index()
        entries = self._metadata.state_dict_metadata
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }
        self.objects = {name for name in entries if name not in self.tensors}
        self._sums = {
            (name, offset): (size, crc)
            for name, facts in self.manifest.files.items()
            for offset, size, crc in facts["chunks"]
        }
        holds: dict[str, str] = {}
        for index, info in self._metadata.storage_data.items():
            holds.setdefault(info.relative_path, f"'{index.fqn}'")
        self.manifest.check_sizes(path, holds)
        for index, info in self._metadata.storage_data.items():
            if self._sums.get((info.relative_path, info.offset), (-1, 0))[0] != info.length:
                raise RuntimeError(f"{path}: manifest and {folder.METADATA} do not agree on where '{index.fqn}' lies")

    def _index(self) -> Metadata:
        path = self.path / folder.METADATA
        facts = self.manifest.files.get(folder.METADATA)
        if facts is None or not path.is_file():
            raise RuntimeError(f"{path}, the index of all tensors, is missing. Load another checkpoint")
        content = path.read_bytes()
        if len(content) != facts["bytes"] or zlib.crc32(content) != facts["chunks"][0][2]:
            raise RuntimeError(f"{path}, the index of all tensors, is damaged. Load another checkpoint")
        return _IndexReader(io.BytesIO(content)).load()

    # ------------------------------------------------------------ checking

    def verify(self, targets: Iterable[Target], objects: Iterable[str] = ()) -> None:
        """Sums every chunk that `targets` and `objects` need.

        Raises RuntimeError naming file, place and tensor where a sum is not the saved one.
        """
        needed = {record for record, _, _ in self._reads(targets)} | {self._record(MetadataIndex(n)) for n in objects}
        for record in sorted(needed, key=lambda record: (record.file, record.offset)):
            self._content(record)

    def _content(self, record: _Record, check: bool = True) -> bytes:
        """A record's bytes."""
        path = self.path / record.file
        with path.open("rb") as file:
            file.seek(record.offset)
            content = file.read(record.size)
        size, crc = self._sums[record.file, record.offset]
        if len(content) != size or (check and zlib.crc32(content) != crc):
            raise RuntimeError(
                f"{path}: bytes {record.offset} to {record.offset + record.size}, which hold '{record.name}', are "
                "damaged: their checksum is not the one that was saved. Load another checkpoint"
            )
        return content

    # ------------------------------------------------------------ reading

    def read(self, targets: Iterable[Target], check: bool = True) -> None:
        """Copies what was saved into the targets, whose version counters count up. check: sum the chunks, too."""
        current: tuple[_Record, torch.Tensor] | None = None
        reads = sorted(self._reads(targets), key=lambda read: (read[0].file, read[0].offset))
        with torch.no_grad():
            for record, item, into in reads:
                if current is None or current[0] != record:
                    current = record, torch.load(io.BytesIO(self._content(record, check)), weights_only=True)
                saved = current[1]
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    saved = saved.narrow(dim, start, length)
                for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                    into = into.narrow(dim, start, length)
                into.copy_(saved)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        entry = self.tensors[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.read([Target(name, 0, whole.view(-1))])
        return whole

    def object(self, name: str, trusted: bool = False) -> Any:
        """An object. trusted: it may be of any class, whose code runs (pickle); else only of plain types."""
        content = self._content(self._record(MetadataIndex(name)))
        return torch.load(io.BytesIO(content), weights_only=not trusted, map_location="cpu")

    # ------------------------------------------------------------ inside

    def _record(self, index: MetadataIndex) -> _Record:
        info = self._metadata.storage_data.get(index)
        if info is None:
            raise RuntimeError(f"{self.path / folder.METADATA} has no place for '{index.fqn}'. Load another checkpoint")
        return _Record(index.fqn, info.relative_path, info.offset, info.length)

    def _reads(self, targets: Iterable[Target]) -> list[tuple[_Record, Any, torch.Tensor]]:
        """What to read for the targets: the record, DCP's item, and the box of the target that gets it."""
        found = []
        for target in targets:
            entry = self.tensors[target.name]
            wanted = boxes(entry.size, target.offset, target.flat.numel())
            chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in wanted]
            views, place = [], 0
            for _, sizes in wanted:
                numel = math.prod(sizes)
                views.append(target.flat[place : place + numel].view(sizes))
                place += numel
            covered = 0
            for item in create_read_items_for_chunk_list(target.name, entry, chunks):
                covered += math.prod(item.lengths)
                found.append((self._record(item.storage_index), item, views[item.dest_index.index]))
            if covered != place:
                raise RuntimeError(
                    f"{self.path}: '{target.name}' is incomplete: {covered} of the {place} elements from "
                    f"{target.offset} on are there. Load another checkpoint"
                )
        return found


class _IndexReader(pickle.Unpickler):
    """Reads DCP's index, a pickle, and refuses classes that no index needs: their code could do anything."""

    def find_class(self, module: str, name: str) -> Any:
        known = (
            module == "torch.distributed.checkpoint.metadata"
            or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
            or (module, name) == ("torch.serialization", "_get_layout")
        )
        if not known:
            raise RuntimeError(f"{folder.METADATA} names {module}.{name}, which is no part of an index: not loaded")
        return super().find_class(module, name)

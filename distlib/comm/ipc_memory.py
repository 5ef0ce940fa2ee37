"""Staging memory of the ranks of one host, mapped by all of them: made, handed over, proved, and given back."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from typing import Any

import torch

from distlib import settings
from distlib.comm.links import Exchange, Links
from distlib.cuda import collectives, library
from distlib.cuda.segment import BY_DESCRIPTOR, BY_HANDLE, MappedSegment, Pinned, Segment, index_of

_NONCE = 32


@dataclass(frozen=True)
class Shape:
    """How large everything is; the same on all ranks of a group.

    blocks, threads: of a kernel, at most. slot_bytes: what one block stages in one step; it has two such slots.
    ring_bytes: one piece of a message. A rank of n holds 2 * blocks * slot_bytes + 16 * n * ring_bytes.
    """

    blocks: int = 32
    threads: int = 512
    slot_bytes: int = 64 << 10
    ring_bytes: int = 16 << 10

    @staticmethod
    def chosen(size: int) -> Shape:
        """By the settings; slots have room for a line of each rank."""
        blocks = min(collectives.BLOCKS, settings.integer("DISTLIB_DEVICE_BLOCKS", 32, 1, "blocks"))
        threads = min(512, settings.integer("DISTLIB_DEVICE_THREADS", 512, 32, "threads") // 32 * 32)
        slot = settings.integer("DISTLIB_DEVICE_STAGING_KB", 64, 1, "KiB") << 10
        line = collectives.LINE
        return Shape(blocks, threads, max(slot, size * line) // line * line, max(1 << 10, slot // 4))


class SharedMemory:
    """The segments of a group's ranks, as this rank reaches them: `members` is what kernels are given.

    All ranks make it together, and all raise the same RuntimeError where one of them cannot. links: between them.
    """

    def __init__(
        self, rank: int, labels: list[int], device: torch.device, links: Links, exchange: Exchange, start_at: int = 0
    ) -> None:
        self.members = collectives.Members(rank=rank, size=len(labels))
        self.status: Any = None
        self._pinned: Pinned | None = None
        self._own: Segment | None = None
        self._mapped: dict[int, MappedSegment] = {}
        self._labels = labels
        try:
            self._share(rank, device, links, exchange, start_at)
        except BaseException:
            self.unmap()
            self.free()
            raise

    def _share(self, rank: int, device: torch.device, links: Links, exchange: Exchange, start_at: int) -> None:
        shape = Shape.chosen(len(self._labels))
        for name in ("blocks", "threads", "slot_bytes", "ring_bytes"):
            setattr(self.members, name, getattr(shape, name))
        self._raise_together(exchange, self._pin(device), "pin memory of the host")
        error = self._make(device, BY_HANDLE)
        by_handle = not settings.switch("DISTLIB_DEVICE_DESCRIPTORS", False)
        told = self._agree(exchange, {"shape": repr(shape), "error": error, "by_handle": by_handle}, "shape")
        way = BY_HANDLE
        if any(t["error"] or not t["by_handle"] for t in told):
            way = BY_DESCRIPTOR
            self.free_segment()
            error = self._make(device, BY_DESCRIPTOR)
            self._raise_together(exchange, error, "make memory that other processes can map")
        assert self._own is not None
        nonce = secrets.token_bytes(_NONCE)
        self._own.write(self._own.bytes - _NONCE, nonce)  # the end of a ring, which nobody reads before it is written
        card = {"bytes": self._own.bytes, "handle": self._own.handle.hex(), "nonce": nonce.hex()}
        cards = [json.loads(text) for text in exchange(json.dumps(card))]
        error = self._map(rank, device, way, links, cards)
        self._raise_together(exchange, error, "map each other's memory")
        collectives.start_at(self.members, index_of(device), start_at)
        exchange("")  # nobody begins before all have set their counters

    def _pin(self, device: torch.device) -> str:
        """Memory for the kernels' status; why there is none, or nothing."""
        try:
            self._pinned = Pinned(device, collectives.Status)
        except library.CudaError as error:
            return str(error)
        self.status, self.members.status = self._pinned.value, self._pinned.address
        return ""

    def _make(self, device: torch.device, way: int) -> str:
        """This rank's segment; why there is none, or nothing."""
        try:
            self._own = Segment(device, way, collectives.group_bytes(self.members))
        except library.CudaError as error:
            return str(error)
        return ""

    def _map(self, rank: int, device: torch.device, way: int, links: Links, cards: list[dict[str, Any]]) -> str:
        """Every other rank's segment; why one cannot be mapped, or nothing."""
        assert self._own is not None
        fds = links.swap_descriptors(self._own.fd) if way == BY_DESCRIPTOR else {}
        try:
            for r, card in enumerate(cards):
                if r == rank:
                    self.members.segment[r] = self._own.address
                    continue
                handle = bytes.fromhex(card["handle"])
                self._mapped[r] = MappedSegment(device, way, card["bytes"], handle, fds.get(r, -1))
                self.members.segment[r] = self._mapped[r].address
                if self._mapped[r].read(card["bytes"] - _NONCE, _NONCE).hex() != card["nonce"]:
                    return f"rank {self._labels[r]}: what was mapped is other memory than it says"
        except library.CudaError as error:
            return str(error)
        finally:
            for fd in [*fds.values(), self._own.fd]:
                if fd >= 0:
                    os.close(fd)
            self._own.fd = -1
        return ""

    def _agree(self, exchange: Exchange, mine: dict[str, Any], same: str) -> list[dict[str, Any]]:
        """What every rank says; all must say the same of `same`."""
        told = [json.loads(text) for text in exchange(json.dumps(mine))]
        if len({t[same] for t in told}) > 1:
            said = "; ".join(f"rank {label}: {t[same]}" for label, t in zip(self._labels, told, strict=True))
            raise RuntimeError(f"the ranks' settings differ: {said}. Set DISTLIB_DEVICE_* alike on all ranks")
        return told

    def _raise_together(self, exchange: Exchange, error: str, what: str) -> None:
        errors = exchange(error)
        failed = [f"rank {label}: {text}" for label, text in zip(self._labels, errors, strict=True) if text]
        if failed:
            raise RuntimeError(f"the ranks of this host cannot {what}: {'; '.join(failed)}")

    def unmap(self) -> None:
        """Lets go of the others' segments: nothing of this rank may run any more."""
        while self._mapped:
            self._mapped.popitem()[1].close()

    def free_segment(self) -> None:
        """Gives back this rank's segment: no other rank may have it mapped."""
        if self._own is not None:
            if self._own.fd >= 0:
                os.close(self._own.fd)
            self._own.free()
            self._own = None

    def free(self) -> None:
        """Gives back all that is this rank's."""
        self.free_segment()
        if self._pinned is not None:
            self.status = None
            self._pinned.free()
            self._pinned = None


def text_exchange(group: Any) -> Exchange:
    """Texts of all ranks of a Group, by its collectives on the CPU."""

    def exchange(text: str) -> list[str]:
        data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        lengths = torch.empty(group.size, dtype=torch.int64)
        group.all_gather(lengths, torch.tensor([data.numel()]))
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: data.numel()] = data
        rows = torch.empty(group.size, padded.numel(), dtype=torch.uint8)
        group.all_gather(rows, padded)
        return [bytes(row[: n - 1].tolist()).decode() for row, n in zip(rows, lengths.tolist(), strict=True)]

    return exchange

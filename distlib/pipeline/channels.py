"""The two ways of a channel, by slots of shared memory or by messages. A channel is one edge in one direction.

                     sender                                   receiver
    by slots         send  copy into a slot (unless made      post  remember what is expected
                           there, in a room), header ->
                                                              take  -> header, compare, use the slot in place
    by messages      send  header ->, tensors ->,             post  -> header, -> tensors, expected header ->
                           <- expected header                 take  wait, compare
                     (a thread waits and compares)

A header comes before all else, so nothing is taken for what it is not: headers have the channel's tag, tensors a tag
made of their shapes and dtypes. Tensors of other shapes than expected never meet a receive, and gloo, which does not
survive a message of another size than expected, is not put to that test. Its receives can hence be posted early.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from distlib.comm.line import Line
from distlib.comm.slots import Room, Slot, SlotPool, borrow, least_in_rooms
from distlib.comm.threads import Runner
from distlib.comm.work import CollectiveError, Work
from distlib.pipeline.header import ABORT, HELLO, Header, disagreement, empty
from distlib.pipeline.program import Spec

Tensors = tuple[Tensor, ...]
_CONTROL = "control"  # the ledger's name of headers


def words(source: int, target: int, micro_batch: int) -> str:
    """How errors name a message between two stages."""
    carries = "activations" if source < target else "gradients"
    at = "opening the channel" if micro_batch < 0 else f"micro-batch {micro_batch}"
    return f"stage {source} -> {target}, {at} ({carries})"


def require_on(device: torch.device, tensors: Sequence[Tensor], what: str) -> None:
    """Raises ValueError for a tensor that is not where its stage computes: the receiver could not tell."""
    for tensor in tensors:
        if tensor.device != device or tensor.layout is not torch.strided:
            raise ValueError(
                f"{what}: a tensor on {tensor.device} of layout {tensor.layout} cannot be sent; make it dense and on "
                f"{device} at the end of the stage"
            )


@dataclass(frozen=True)
class Edge:
    """source, target: stages. number: among all channels, on every rank. line: to the rank that holds the other
    stage."""

    source: int
    target: int
    number: int
    line: Line

    def words(self, micro_batch: int) -> str:
        """How errors name a message."""
        return words(self.source, self.target, micro_batch)

    def naming(self, micro_batch: int) -> contextlib.AbstractContextManager[None]:
        """Errors inside are raised with the message's words before them."""
        return _Naming(self, micro_batch)

    @property
    def tag(self) -> int:
        """Of headers from the sender."""
        return 2 * self.number

    @property
    def answer_tag(self) -> int:
        """Of headers from the receiver."""
        return 2 * self.number + 1

    def tensor_tag(self, header: Header) -> int:
        """Of tensors with these shapes and dtypes."""
        return 1 << 30 | zlib.crc32(f"{self.number} {header.checksum}".encode()) & (1 << 30) - 1

    def send(self, header: Header, tag: int) -> Work:
        return self.line.send(header.pack(), tag, _CONTROL)

    def recv(self, packed: Tensor, tag: int) -> Work:
        return self.line.recv(packed, tag, _CONTROL)

    def compare(self, sent: Header, expected: Header, receiving: bool) -> None:
        """Raises CollectiveError if the two ends do not mean the same message; this rank is the receiver or not."""
        if not sent.agrees(expected):
            mine, other = self.line.group.ranks[self.line.group.rank], self.line.group.ranks[self.line.peer]
            ends = (other, mine) if receiving else (mine, other)
            raise CollectiveError(disagreement(sent, expected, *ends), "mismatch")


class _Naming:
    """Of `Edge.naming`. No generator: each message enters two of them."""

    __slots__ = ("_edge", "_micro_batch")

    def __init__(self, edge: Edge, micro_batch: int) -> None:
        self._edge, self._micro_batch = edge, micro_batch

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, CollectiveError):
            raise CollectiveError(f"{self._edge.words(self._micro_batch)}: {error}", error.code) from error


class Sender(Protocol):
    """The source's end of a channel."""

    edge: Edge

    def open(self) -> Work:
        """Starts to greet the receiver."""
        ...

    def rooms(self, micro_batch: int, specs: Sequence[Spec]) -> tuple[Room, ...]:
        """Where the tensors of a message may be made; none where that is no use."""
        ...

    def send(self, header: Header, tensors: Sequence[Tensor]) -> None:
        """Starts a message; never waits. A list with what was made in rooms is emptied."""
        ...

    def finish(self) -> None:
        """Until all that was sent is away. Names the message that is not."""
        ...

    def abort(self, text: str) -> None:
        """Tells the receiver."""
        ...


class Receiver(Protocol):
    """The target's end of a channel. `posted`: what was posted and not yet received, in that order."""

    edge: Edge
    posted: deque[Header]

    def open(self) -> None:
        """Waits for the sender's greeting."""
        ...

    def post(self, header: Header, specs: Sequence[Spec]) -> None:
        """A message with this header is expected after those posted before; never waits."""
        ...

    def take(self) -> Tensors:
        """Waits for the message that was posted first."""
        ...

    def abort(self, text: str) -> None:
        """Tells the sender."""
        ...


def _greeting(edge: Edge) -> None:
    """Waits for the first message of a channel."""
    packed = empty()
    edge.line.wait(edge.recv(packed, edge.tag))
    header = Header.unpack(packed)
    if header.kind != HELLO and not edge.line.group.counts_only:
        raise CollectiveError(f"the first message was no greeting but {header}", "mismatch")


# ---------------------------------------------------------------- by slots of shared memory


@dataclass
class SlotSender:
    """Copies into slots what was not made there; the host's memory has no other copy."""

    edge: Edge
    pool: SlotPool
    _least: int = field(default_factory=least_in_rooms)
    _reserved: dict[int, Slot] = field(default_factory=dict)  # by micro-batch
    # Header, micro-batch, slot, and the number of its lending.
    _under_way: list[tuple[Work, int, Slot | None, int]] = field(default_factory=list)

    def open(self) -> Work:
        return self.edge.send(Header(HELLO), self.edge.tag)

    def rooms(self, micro_batch: int, specs: Sequence[Spec]) -> tuple[Room, ...]:
        if sum(spec.nbytes for spec in specs) < self._least:
            return ()
        slot = self._reserved[micro_batch] = self.pool.reserve(specs)
        return slot.rooms

    def send(self, header: Header, tensors: Sequence[Tensor]) -> None:
        nbytes, slot = sum(tensor.nbytes for tensor in tensors), None
        if nbytes:
            given = tensors if isinstance(tensors, list) else list(tensors)
            slot = self.pool.fill(given, self.edge.line.memory, self._reserved.pop(header.micro_batch, None))
            header = header.in_slot(slot.offset)
        lending = 0 if slot is None else slot.lendings
        self._under_way.append((self.edge.send(header, self.edge.tag), header.micro_batch, slot, lending))
        self.edge.line.count("send", nbytes)

    def finish(self) -> None:
        under_way, self._under_way = self._under_way, []
        for work, micro_batch, _, _ in under_way:
            with self.edge.naming(micro_batch):
                self.edge.line.wait(work)

        def left() -> list[int]:
            return [k for _, k, slot, lending in under_way if slot is not None and not slot.was_taken(lending)]

        # Asked again after the look at the rank: it may have come for its slots, and then ended.
        if left() and not self.edge.line.memory.alive and (lost := left()):
            group = self.edge.line.group
            told = group.cpu_channel.aborted()  # by that rank, or by one that saw it end: then in these words
            with self.edge.naming(lost[0]):
                if told is not None:
                    raise CollectiveError(told, "aborted")
                rank = group.ranks[self.edge.line.peer]
                raise CollectiveError(f"rank {rank} ended before it took the message", "dead")

    def abort(self, text: str) -> None:
        """The group's own abort reaches every rank of the host."""


@dataclass
class SlotReceiver:
    """Uses slots in place. Nothing needs to be posted: a header waits in the mailbox."""

    edge: Edge
    posted: deque[Header] = field(default_factory=deque)
    _specs: deque[tuple[Spec, ...]] = field(default_factory=deque)

    def open(self) -> None:
        _greeting(self.edge)

    def post(self, header: Header, specs: Sequence[Spec]) -> None:
        self.posted.append(header)
        self._specs.append(tuple(specs))

    def take(self) -> Tensors:
        expected, specs, packed = self.posted.popleft(), self._specs.popleft(), empty()
        self.edge.line.wait(self.edge.recv(packed, self.edge.tag))
        sent = Header.unpack(packed)
        self.edge.compare(sent, expected, receiving=True)
        nbytes = sum(spec.nbytes for spec in specs)
        self.edge.line.count("recv", nbytes)
        if not nbytes:
            return tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in specs)
        return borrow(self.edge.line.memory, sent.slot, specs)

    def abort(self, text: str) -> None:
        """The group's own abort reaches every rank of the host."""


# ---------------------------------------------------------------- by messages


@dataclass
class MessageSender:
    """Sends from the tensors where they lie. Messages are waited for on `runner`, in order, so that the memory of each
    is let go of as soon as it is away."""

    edge: Edge
    runner: Runner
    _under_way: list[tuple[Work, int]] = field(default_factory=list)
    _notes: list[Work] = field(default_factory=list)
    _broken: CollectiveError | None = None

    def open(self) -> Work:
        return self.edge.send(Header(HELLO), self.edge.tag)

    def rooms(self, micro_batch: int, specs: Sequence[Spec]) -> tuple[Room, ...]:
        return ()

    def send(self, header: Header, tensors: Sequence[Tensor]) -> None:
        if self._broken is not None:
            raise CollectiveError(f"an earlier message failed: {self._broken}", self._broken.code) from self._broken
        edge, packed = self.edge, empty()
        answer = edge.recv(packed, edge.answer_tag)
        heading = edge.send(header, edge.tag)
        tag = edge.tensor_tag(header)
        full = [tensor.detach().contiguous().resolve_conj().resolve_neg() for tensor in tensors if tensor.numel()]
        works = [heading, answer, *(edge.line.send(tensor, tag) for tensor in full)]

        # What is on its way is in `works` alone, and leaves it message by message.
        step = self.runner.start(lambda: self._see_off(header, packed, works))
        self._under_way.append((Work(step, [], owner=edge.line.group, what="send"), header.micro_batch))
        self._under_way = [(work, k) for work, k in self._under_way if not work.is_success()]

    def _see_off(self, sent: Header, packed: Tensor, works: list[Work]) -> None:
        """On the runner's thread: waits for header, answer and tensors of a message."""
        if self._broken is not None:
            raise self._broken
        try:
            self.edge.line.wait(works.pop(1))  # the answer first: a receiver that has ended takes no more headers
            if not self.edge.line.group.counts_only:
                expected = Header.unpack(packed)
                if expected.kind == ABORT:
                    raise CollectiveError(expected.text)
                self.edge.compare(sent, expected, receiving=False)
            while works:
                self.edge.line.wait(works.pop(0))
        except CollectiveError as error:
            self._broken = error
            raise

    def finish(self) -> None:
        under_way, self._under_way = self._under_way, []
        for work, micro_batch in under_way:
            with self.edge.naming(micro_batch):
                work.wait()

    def abort(self, text: str) -> None:
        self._notes.append(self.edge.send(Header(ABORT, text=text), self.edge.tag))


@dataclass
class _Coming:
    """A message that was posted. answer: what the sender is told to be expected."""

    header: Work
    packed: Tensor
    tensors: Tensors
    works: list[Work]
    answer: Work


@dataclass
class MessageReceiver:
    """Receives into tensors of its own, while this rank computes."""

    edge: Edge
    posted: deque[Header] = field(default_factory=deque)
    _coming: deque[_Coming] = field(default_factory=deque)
    _notes: list[Work] = field(default_factory=list)

    def open(self) -> None:
        _greeting(self.edge)

    def post(self, header: Header, specs: Sequence[Spec]) -> None:
        edge, packed, tag = self.edge, empty(), self.edge.tensor_tag(header)
        make = torch.zeros if edge.line.group.counts_only else torch.empty  # where nothing comes, there is no garbage
        tensors = tuple(make(spec.shape, dtype=spec.dtype) for spec in specs)
        heading = edge.recv(packed, edge.tag)
        works = [edge.line.recv(tensor, tag) for tensor in tensors if tensor.numel()]
        self._coming.append(_Coming(heading, packed, tensors, works, edge.send(header, edge.answer_tag)))
        self.posted.append(header)

    def take(self) -> Tensors:
        expected, coming, line = self.posted.popleft(), self._coming.popleft(), self.edge.line
        line.wait(coming.header)
        if not line.group.counts_only:
            sent = Header.unpack(coming.packed)
            if sent.kind == ABORT:
                raise CollectiveError(sent.text)
            line.wait(coming.answer)  # the sender reads it, whatever it says
            self.edge.compare(sent, expected, receiving=True)
        for work in coming.works:
            line.wait(work)
        return coming.tensors

    def abort(self, text: str) -> None:
        self._notes.append(self.edge.send(Header(ABORT, text=text), self.edge.answer_tag))

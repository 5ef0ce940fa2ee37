"""How activations and gradients travel between the stages of a pipeline: one channel per edge and direction.

    placement [0, 1, 1, 0]                      edges (0,1) (1,2) (2,3) (0,3)

    stage 0 ------ 0 -> 1 activations -----> stage 1        stages 1 and 2 are on one rank, 0 and 3 too: no channels
    rank 0  <----- 1 -> 0 gradients -------- rank 1
    stage 3 <----- 2 -> 3 activations ------ stage 2
            ------ 3 -> 2 gradients ------->

All channels are opened before the first step. Between ranks of one host they are slots of shared memory, which the
receiver uses in place; elsewhere, messages (channels.py). Nothing is waited for but in `take` and `finish`.

Between GPUs, messages go from device to device (direct.py), or through host memory and then as here (staged.py).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from distlib.comm.channel import Timeout, seconds_of
from distlib.comm.group import Group
from distlib.comm.line import Line
from distlib.comm.slots import Room, SlotPool
from distlib.comm.threads import Runner
from distlib.comm.work import CollectiveError
from distlib.pipeline.channels import (
    Edge,
    MessageReceiver,
    MessageSender,
    Receiver,
    Sender,
    SlotReceiver,
    SlotSender,
    Tensors,
)
from distlib.pipeline.header import Header
from distlib.pipeline.program import Spec

End = TypeVar("End", Sender, Receiver)


class Transport:
    """The channels of one rank. Every rank of `group` must construct it, with the same arguments.

    group: the pipeline's ranks. placement: of each stage, its rank in the group. edges: pairs of stages between which
    anything flows, in either order; gradients flow back. Stages of one rank have no channel. timeout: of each wait, in
    seconds or as a timedelta; None: the group's.

    On a channel, messages arrive in the order they are sent, and must be posted in that order; channels do not depend
    on each other. Each message says what it is: micro-batch, and shapes and dtypes of its tensors.

    Raises:
        ValueError: stages or ranks that do not exist; on all ranks, if they were given different arguments.
        CollectiveError: a rank ended, was aborted, does not come within the timeout, or sends something else than is
            expected. The message names the stages and the micro-batch, `__cause__` is the error itself. The transport
            and its group are then of no further use, on any rank.
    """

    def __init__(
        self, group: Group, placement: Sequence[int], edges: Iterable[tuple[int, int]], timeout: Timeout = None
    ) -> None:
        self.direct = False  # what is on a device does not go from there
        self._group = group
        self._placement = tuple(placement)
        self._timeout = seconds_of(timeout, group.timeout)
        self._ended: CollectiveError | None = None
        self._closed = False
        self._step = 0
        self._pool = SlotPool()
        self._runner = Runner(f"pipeline-{group.name}")
        self._senders: dict[tuple[int, int], Sender] = {}
        self._receivers: dict[tuple[int, int], Receiver] = {}
        self._arrived: dict[tuple[int, int, int], Tensors] = {}
        pairs = _directed(self._placement, edges, group.size)
        _agree(group, self._placement, pairs)
        lines: dict[int, Line] = {}
        for number, (source, target) in enumerate(pairs):
            ranks = self._placement[source], self._placement[target]
            if group.rank not in ranks:
                continue
            peer = ranks[group.rank == ranks[0]]
            lines[peer] = lines.get(peer) or Line(group, peer, self._timeout)
            self._add(Edge(source, target, number, lines[peer]), sending=group.rank == ranks[0])
        self._open()

    def _add(self, edge: Edge, sending: bool) -> None:
        """Makes this rank's end of a channel."""
        pair, by_slots = (edge.source, edge.target), edge.line.memory is not None
        if sending:
            self._senders[pair] = SlotSender(edge, self._pool) if by_slots else MessageSender(edge, self._runner)
        else:
            self._receivers[pair] = SlotReceiver(edge) if by_slots else MessageReceiver(edge)

    def _open(self) -> None:
        """One message over each channel: what connects late connects now, on all ranks."""
        greetings = [(sender.edge, sender.open()) for sender in self._senders.values()]
        for receiver in self._receivers.values():
            with self._telling(), receiver.edge.naming(-1):
                receiver.open()
        for edge, work in greetings:
            with self._telling(), edge.naming(-1):
                edge.line.wait(work)

    # ------------------------------------------------------------ a step

    def begin(self, step: int) -> None:
        """A step begins, by this rank's count: messages are of equal steps at both ends."""
        self._step = step

    def rooms(self, source: int, target: int, micro_batch: int, specs: Sequence[Spec]) -> tuple[Room, ...]:
        """Where the tensors of a message that is to be sent may be made, so that they need not be copied: one room for
        each, or none at all (between hosts, and for small messages).

        It is not copied if nobody but the list that `send` is given holds it, or memory of it, by then; it is the
        receiver's from then on. Raises MemoryError.
        """
        with self._telling():
            return self._end(self._senders, source, target, "sends").rooms(micro_batch, specs)

    def send(self, source: int, target: int, micro_batch: int, tensors: Sequence[Tensor], on_host: int = 0) -> None:
        """Starts a message from stage `source`, of this rank, to stage `target`. Returns at once.

        tensors: on the CPU, of any shape, strides and dtype. They must not change until `finish`; the values that go
        are without gradient. A list with any that were made in rooms is emptied. on_host: how many of them, the first
        ones, stay in host memory where the pipeline computes on a GPU; here all do.
        """
        sender = self._end(self._senders, source, target, "sends")
        _require_on_host(tensors, sender.edge.words(micro_batch))
        with self._telling(), sender.edge.naming(micro_batch):
            sender.send(Header.of(micro_batch, map(Spec.of, tensors), self._step), tensors)

    def post(self, source: int, target: int, micro_batch: int, specs: Sequence[Spec], on_host: int = 0) -> None:
        """Says that stage `target`, of this rank, will want a message. Returns at once. on_host: as for `send`."""
        receiver = self._end(self._receivers, source, target, "receives")
        with self._telling(), receiver.edge.naming(micro_batch):
            receiver.post(Header.of(micro_batch, specs, self._step), specs)

    def take(self, source: int, target: int, micro_batch: int) -> Tensors:
        """Waits for a message that was posted.

        The tensors are contiguous and have no gradient; they are the caller's, to write to as well, for as long as he
        holds them, even when the transport is closed. Memory of the sender that they use is given back to it when the
        last of their storages ends.
        """
        receiver = self._end(self._receivers, source, target, "receives")
        message = (source, target, micro_batch)
        if message not in self._arrived and all(h.micro_batch != micro_batch for h in receiver.posted):
            raise RuntimeError(f"{receiver.edge.words(micro_batch)}: take() without a post() before it")
        while message not in self._arrived:
            first = receiver.posted[0].micro_batch
            with self._telling(), receiver.edge.naming(first):
                self._arrived[source, target, first] = receiver.take()
        return self._arrived.pop(message)

    def finish(self) -> None:
        """The end of a step: waits until all that was sent is away. Raises what failed, and RuntimeError if a message
        was posted or received and not taken."""
        self._check()
        with self._telling():
            for sender in self._senders.values():
                sender.finish()
        forgotten = [r.edge.words(h.micro_batch) for r in self._receivers.values() for h in r.posted]
        forgotten += [self._receivers[s, t].edge.words(k) for s, t, k in self._arrived]
        if forgotten:
            raise RuntimeError(f"the step ended before these messages were taken: {'; '.join(forgotten)}")
        self._pool.end_step()

    # ------------------------------------------------------------ the end

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory that this rank holds for what it sends: its slots, in use and free."""
        return self._pool.nbytes

    def abort(self, message: str) -> None:
        """Ends the transport and its group: what other ranks wait for, or call later, raises `message` (between hosts,
        those that wait for this rank; others hear that it left). Only the first message counts."""
        if self._closed or self._ended is not None:
            return
        self._ended = CollectiveError(message)
        ends: list[Sender | Receiver] = [*self._senders.values(), *self._receivers.values()]
        for end in ends:
            with contextlib.suppress(CollectiveError):  # whoever is gone needs no word
                end.abort(message)
        self._group.abort(message)

    def close(self) -> None:
        """Lets go of everything but what others still hold. Any rank may call it, alone, after `finish`."""
        if self._closed:
            return
        self._closed = True
        self._senders.clear()
        self._receivers.clear()
        self._arrived.clear()
        self._pool.close()
        if self._ended is None:  # else it may be in a wait until the timeout
            self._runner.close()

    def _telling(self) -> contextlib.AbstractContextManager[None]:
        """A message that fails inside ends the transport on all ranks: the first to see a fault says so."""
        return _Telling(self)

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("the pipeline's transport was closed on this rank")
        if self._ended is not None:
            raise CollectiveError(str(self._ended)) from self._ended

    def _end(self, ends: Mapping[tuple[int, int], End], source: int, target: int, does: str) -> End:
        """This rank's end of a channel."""
        self._check()
        if (source, target) not in ends:
            known = ", ".join(f"{a} -> {b}" for a, b in ends) or "none"
            raise ValueError(
                f"rank {self._group.rank} of the pipeline {does} nothing from stage {source} to stage {target}; its "
                f"channels are: {known}"
            )
        return ends[source, target]


class _Telling:
    """Of `Transport._telling`. No generator: each message enters several of them."""

    __slots__ = ("_transport",)

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, CollectiveError):
            self._transport.abort(str(error))


def _require_on_host(tensors: Sequence[Tensor], what: str) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            raise ValueError(
                f"{what}: a tensor on {tensor.device} of layout {tensor.layout} cannot be sent; make it dense and on "
                "the CPU at the end of the stage"
            )


def _directed(placement: Sequence[int], edges: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Edges between ranks in both directions, in the order in which every rank opens them."""
    for stage, rank in enumerate(placement):
        if not 0 <= rank < size:
            raise ValueError(f"placement: stage {stage} is on rank {rank}; the group has {size} ranks")
    pairs = set()
    for a, b in edges:
        if a == b or not (0 <= a < len(placement) and 0 <= b < len(placement)):
            raise ValueError(f"edges: ({a}, {b}) must join two of the {len(placement)} stages")
        if placement[a] != placement[b]:
            pairs |= {(a, b), (b, a)}
    return sorted(pairs)


def _agree(group: Group, placement: Sequence[int], pairs: Sequence[tuple[int, int]]) -> None:
    """All ranks compare what they were given. A collective."""
    if group.size == 1 or group.counts_only:
        return
    mine = torch.tensor([zlib.crc32(repr(placement).encode()), zlib.crc32(repr(pairs).encode())])
    all = torch.empty(group.size, 2, dtype=mine.dtype)
    group.all_gather(all.view(-1), mine)
    for column, name, value in ((0, "placement", placement), (1, "edges", pairs)):
        others = [group.ranks[r] for r in range(group.size) if all[r, column] != mine[column]]
        if others:
            raise ValueError(
                f"rank {group.ranks[group.rank]}: {name} of the pipeline is {value} here and something else on ranks "
                f"{others}; every rank must be given the same"
            )

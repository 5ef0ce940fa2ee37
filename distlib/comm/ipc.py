"""Ranks of one host whose devices map each other's memory, or that share a device: collectives by kernels.

Operations are ordered by streams: a collective runs on the group's own stream, after what the current stream held when
it was started; messages have a stream for each peer and direction. The host waits for nothing. Kernels that must give
up tell why in memory of the host; whoever looks first, the watch (watch.py) at the latest, ends the group for all.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from distlib import native, streams
from distlib.comm.channel import SAME_HOST, Channel, Collective, Traffic
from distlib.comm.ipc_faults import Place, collective_text, failure_text
from distlib.comm.ipc_memory import SharedMemory
from distlib.comm.ledger import expected_bytes
from distlib.comm.links import Links
from distlib.comm.stream_work import Judged, require_no_capture
from distlib.comm.watch import watch
from distlib.comm.work import CollectiveError
from distlib.cuda import collectives, library
from distlib.cuda.tables import extent

_GRACE = 0.3  # seconds in which what a rank did before it ended may still complete
_PATIENCE = 5.0  # seconds that close() gives to what is under way
_FOREVER_NS = 1 << 62


def sums_slices(nbytes: int, ranks: int) -> bool:
    """Whether an all-reduce of so many bytes goes in two steps, each rank summing a slice for all. Two ranks read no
    less that way; the more ranks, the sooner the bytes saved outweigh the second step."""
    return ranks > 2 and nbytes > (512 << 10) // (ranks // 2)


@dataclass
class DeviceOperation(Judged):
    """One started collective or message."""

    channel: IpcChannel
    sequence: int
    what: str
    is_message: bool
    stream: streams.Stream
    peers: tuple[int, ...]  # ranks without which it cannot complete
    keep: Any  # memory that it reads and writes
    seconds: float  # its timeout
    begun_on: streams.Stream
    source: int = -1
    peer_bytes: int = 0
    waited_ns: int = 0
    sending: bool = False
    launched: bool = False
    event: streams.Event = None

    @property
    def passed(self) -> bool:
        """Whether the device is done with it, well or not."""
        return self.launched and streams.has_passed(self.event)

    def follow(self) -> None:
        """The current stream waits for it."""
        streams.wait(streams.current(self.channel.device), self.event)


class IpcChannel:
    """Collectives and messages of a group over `memory`, which all its ranks map; all on one host.

    labels: what messages call the ranks (their global ranks). cpu: the group's channel between hosts' memory: an end of
    one is an end of the other. Closed, it stays until every rank has let go of its memory.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        labels: list[int],
        device: torch.device,
        memory: SharedMemory,
        links: Links,
        cpu: Channel,
    ) -> None:
        self.name, self.rank, self.size, self.device = name, rank, len(labels), device
        self._memory, self._links, self._cpu = memory, links, cpu
        self._stream = streams.new(device, urgent=True)
        self._message_streams: dict[tuple[int, bool], streams.Stream] = {}
        self._place = Place(name, rank, labels, {**links.pids, rank: os.getpid()})
        self._sequence = 0
        self._messages = {(r, sending): 0 for r in range(self.size) for sending in (False, True)}
        self._under_way: deque[DeviceOperation] = deque()
        self._broken: CollectiveError | None = None
        self._reported: tuple[bool, int] | None = None  # of the operation whose kernel failed: is it a message; number
        self._gone: dict[int, tuple[float, dict[str, Any] | None]] = {}  # rank -> when; what it had started, if it left
        self._lock = threading.RLock()
        self.closed = self._reaped = False
        watch.add(self)

    # ------------------------------------------------------------ operations

    def start(self, collective: Collective, timeout: float, sync: bool) -> DeviceOperation:
        c = collective
        current = streams.current(self.device)
        with self._lock:
            self._require_open()
            self._sequence += 1
            call = self._call(c, timeout)
            others = tuple(r for r in range(self.size) if r != self.rank)
            what = collective_text(call.what)
            operation = DeviceOperation(self, self._sequence, what, False, self._stream, others, c, timeout, current)
            self._under_way.append(operation)
        streams.follow(self._stream, current)
        with self._launching(operation), streams.on(self._stream):
            if library.observed():
                library.tell(what, [extent(t) for t in c.send], [extent(t) for t in c.recv])
            operation.peer_bytes = collectives.collective(self._memory.members, call, streams.raw(self._stream))
            if c.finish is not None:
                c.finish()
            operation.event = streams.record(self._stream)
        return operation

    @contextmanager
    def _launching(self, operation: DeviceOperation) -> Iterator[None]:
        """The watch sees after it from here on. What cannot be started ends the group: the others would wait for it."""
        watch.wake()
        try:
            yield
        except library.CudaError as error:
            what = f"{operation.what} #{operation.sequence} of group '{self.name}'"
            self._end(f"{what} could not be started on {self._place.rank_name(self.rank)}: {error}", "aborted")
            raise self._broken or error from error
        finally:
            operation.launched = True

    def _call(self, c: Collective, timeout: float) -> collectives.Call:
        dtype, name = native.dtype_codes(c.dtype)
        call = collectives.Call(
            what=collectives.What(
                self._sequence, c.count, native.KINDS.index(c.kind), name, native.OPS.index(c.op), c.root
            ),
            dtype=native.BYTES if dtype is None else dtype,
            element=c.dtype.itemsize,
            divisor=self.size,
            sliced=c.kind == "all_reduce" and sums_slices(c.send[0].nbytes, self.size),
            timeout_ns=_nanoseconds(timeout),
        )
        for r, tensor in enumerate(c.send):
            call.send[r], call.send_bytes[r] = tensor.data_ptr(), tensor.nbytes
        for r, tensor in enumerate(c.recv):
            call.recv[r], call.recv_bytes[r] = tensor.data_ptr(), tensor.nbytes
        return call

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout: float) -> DeviceOperation:
        return self._message(tensor, dst, tag, timeout, True)

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout: float) -> DeviceOperation:
        if src is None:
            raise ValueError(f"recv on {self.device}: name the rank that sends; only on the CPU it may be any")
        return self._message(tensor, src, tag, timeout, False)

    def _message(self, tensor: torch.Tensor, peer: int, tag: int, timeout: float, sending: bool) -> DeviceOperation:
        if peer == self.rank:
            raise ValueError(f"{'send' if sending else 'recv'} on {self.device}: rank {peer} is this rank itself")
        current = streams.current(self.device)
        with self._lock:
            self._require_open()
            self._messages[peer, sending] += 1
            number = self._messages[peer, sending]
            if (peer, sending) not in self._message_streams:
                self._message_streams[peer, sending] = streams.new(self.device, urgent=True)
            stream = self._message_streams[peer, sending]
            what = f"message {'to' if sending else 'from'} {self._place.rank_name(peer)}"
            operation = DeviceOperation(self, number, what, True, stream, (peer,), tensor, timeout, current)
            operation.sending = sending
            operation.source = -1 if sending else peer
            self._under_way.append(operation)
        message = collectives.Message(
            tensor.data_ptr(), tensor.nbytes, tag, number, _nanoseconds(timeout), peer, int(sending)
        )
        streams.follow(stream, current)
        with self._launching(operation), streams.on(stream):
            if library.observed():
                touched = [extent(tensor)]
                library.tell(what, touched if sending else [], [] if sending else touched)
            collectives.message(self._memory.members, message, streams.raw(stream))
            operation.event = streams.record(stream)
        operation.peer_bytes = 0 if sending else tensor.nbytes
        return operation

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Any) -> list[Traffic]:
        others, is_root = self.size - 1, self.rank == root
        if kind in ("send", "recv"):
            expected = received
        elif kind == "reduce":
            expected = sent * others if is_root else 0
        else:
            sliced = sums_slices(sent, self.size)
            expected = expected_bytes(kind, self.size, self.rank, root, sent, received, sliced)
        return [Traffic(SAME_HOST, operation.peer_bytes, expected)]

    def lateness(self) -> dict[str, tuple[list[float], int]]:
        """Not known: ranks meet on their devices."""
        return {}

    # ------------------------------------------------------------ faults

    def _require_open(self) -> None:
        if self.closed:
            raise CollectiveError(f"group '{self.name}' was closed on this rank")
        require_no_capture(self.name, self.device)
        self.check()
        if self._broken is not None:
            raise self._broken

    def check(self) -> None:
        """Looks whether a kernel or the group has failed. Any thread; never blocks."""
        if self._broken is not None or self._reaped:
            return
        status = self._memory.status
        if status.code:
            with self._lock:
                self._reported = (bool(status.is_message), status.sequence)
            self._end(*failure_text(self._place, status, self._what_of(*self._reported)))
        elif text := self._cpu.aborted():
            self._end(text, "aborted")

    def _what_of(self, is_message: bool, sequence: int) -> DeviceOperation | None:
        with self._lock:
            for operation in self._under_way:
                if (operation.is_message, operation.sequence) == (is_message, sequence):
                    return operation
        return None

    def verdict(self, operation: DeviceOperation, passed: bool) -> CollectiveError | None:
        """The error of an operation that was not seen complete before the group failed, unless it surely was."""
        self.check()
        if self._broken is None:
            return None
        if self._reported == (operation.is_message, operation.sequence):
            return self._broken
        before = self._reported is not None and self._reported[0] == operation.is_message
        earlier = before and self._reported is not None and operation.sequence < self._reported[1]
        if earlier and (passed or operation.passed):
            return None
        return CollectiveError(str(self._broken), "aborted")

    def _end(self, text: str, code: str) -> None:
        """Ends the group, here and for all. The first text wins: on the host's other ranks too, where they share it."""
        with self._lock:
            if self._broken is not None or self._reaped:
                return
            self._cpu.abort(text)
            first = self._cpu.aborted() or text
            self._broken = CollectiveError(first, code if first == text else "aborted")
            self._memory.status.abort = 1
            self._links.tell({"ended": first})

    def abort(self, text: str) -> None:
        self._end(text, "aborted")

    def aborted(self) -> str | None:
        """Why the channel was ended, or None."""
        return None if self._broken is None else str(self._broken)

    def ended(self) -> list[int]:
        return sorted(r for r, (_, left) in self._gone.items() if left is None)

    # ------------------------------------------------------------ the watch

    def look(self) -> bool:
        """Called by the watch: hears the other ranks, lets go of what is done, ends what cannot complete."""
        with self._lock:
            if self._reaped:
                return False
            for r, notice in self._links.hear():
                self._hear(r, notice)
            if self.closed:
                return not self._reap()
            self.check()
            while self._under_way and self._under_way[0].passed:
                self._under_way.popleft().done  # noqa: B018 - judged while it is known what had failed by then
            if self._broken is None:
                self._judge()
            return bool(self._under_way)

    def _hear(self, r: int, notice: dict[str, Any] | None) -> None:
        if notice is None:
            self._gone.setdefault(r, (time.monotonic(), None))
        elif "left" in notice:
            self._gone[r] = (time.monotonic(), notice)
        elif self._broken is None and not self.closed:
            self._end(str(notice["ended"]), "aborted")

    def _judge(self) -> None:
        """Whether something under way waits for a rank that will not come."""
        for operation in self._under_way:
            for r in operation.peers:
                if r not in self._gone or operation.passed:
                    continue
                when, left = self._gone[r]
                if time.monotonic() < when + _GRACE:
                    continue
                if left is None:
                    why = f"{self._place.rank_name(r)} ended (it exited, or was killed)"
                elif _had_started(left, operation, self.rank):
                    continue
                else:
                    why = f"{self._place.rank_name(r)} left the group"
                what = f"{operation.what} #{operation.sequence} of group '{self.name}'"
                return self._end(f"{what} cannot complete: {why}", "dead")

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Waits a moment for what is under way, then lets go of the others' memory and tells them."""
        if self.closed:
            return
        until = time.monotonic() + _PATIENCE
        while any(not operation.passed for operation in list(self._under_way)) and time.monotonic() < until:
            time.sleep(0.001)
        with self._lock:
            self.closed = True
            if any(not operation.passed for operation in self._under_way):
                self._memory.status.abort = 1  # a kernel still runs: its memory stays until the process ends
                _kept.append(self)
                return
            self._memory.unmap()
            sends = {str(r): count for (r, sending), count in self._messages.items() if sending}
            recvs = {str(r): count for (r, sending), count in self._messages.items() if not sending}
            self._links.tell({"left": self._sequence, "sends": sends, "recvs": recvs})
            self._under_way.clear()
            _closed.add(self)
        self.look()

    def _reap(self) -> bool:
        """Gives back this rank's memory once nobody else has it mapped; False while somebody has."""
        if self._under_way or len(self._gone) < self.size - 1:
            return False
        self._memory.free()
        self._links.close()
        self._reaped = True
        _closed.discard(self)
        return True


_closed: set[IpcChannel] = set()  # closed here, but maybe still read by others: the watch looks after them
_kept: list[IpcChannel] = []  # with kernels that did not end


def _had_started(left: dict[str, Any], operation: DeviceOperation, me: int) -> bool:
    """Whether a rank that left had done its part of an operation before."""
    if not operation.is_message:
        return bool(operation.sequence <= left["left"])
    return bool(operation.sequence <= left["recvs" if operation.sending else "sends"][str(me)])


def _nanoseconds(seconds: float) -> int:
    return min(int(seconds * 1e9), _FOREVER_NS)

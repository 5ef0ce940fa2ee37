"""A group's own NCCL communicator: works ordered by streams, not waited for by the host, ended when late.

Each Group has its own, so gathers and reductions of two groups pass each other. Between hosts, gathers and scatters may
go in levels (nccl_levels.py), with a communicator per rail and one inside each host. The class of process groups is a
parameter: tests put gloo's there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from distlib import streams
from distlib.comm.c10d import OPS, C10dChannel, method_of
from distlib.comm.channel import BETWEEN_HOSTS, SAME_HOST, Channel, Collective, Message, Traffic
from distlib.comm.gloo_bytes import expected_sent
from distlib.comm.hierarchical import expected_moved, why_flat
from distlib.comm.nccl_levels import DeviceLevels
from distlib.comm.nccl_notes import Note, Notes
from distlib.comm.stream_work import Judged, require_no_capture
from distlib.comm.tensors import as_bytes, as_one
from distlib.comm.watch import watch
from distlib.comm.work import CollectiveError
from distlib.topology import Topology

if TYPE_CHECKING:
    from distlib.comm.group import Group

# Makes a process group: store, rank, size, name, global ranks, timeout.
Maker = Callable[[dist.Store, int, int, str, list[int], timedelta], Any]
_GRACE = 1.0  # seconds
_SUCCESS = 0  # torch's WorkResult, as futures of works hold it
_LATER = timedelta(minutes=5)  # torch's own watchdog ends the process: after ours has ended the group with a reason


def nccl_process_group(
    store: dist.Store, rank: int, size: int, name: str, global_ranks: list[int], timeout: timedelta
) -> Any:
    """torch's NCCL group. It connects with its first collective."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout + _LATER
    options.global_ranks_in_group = global_ranks
    options.group_name = name
    return dist.ProcessGroupNCCL(store, rank, size, options)


@dataclass
class NcclOperation(Judged):
    """A started collective: one work of a backend, or what was put on a stream in levels."""

    channel: NcclChannel
    sequence: int
    what: str
    seconds: float  # its timeout
    keep: Any
    rows: list[Traffic]
    stream: streams.Stream
    begun_on: streams.Stream
    work: Any = None
    event: streams.Event = None
    launched: bool = False
    ended_well: bool = False  # seen done before its group failed
    source: int = -1
    peer_bytes: int = 0
    waited_ns: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def passed(self) -> bool:
        """Whether the device is done with it, well or not."""
        if not self.launched:
            return False
        return bool(self.work.is_completed()) if self.work is not None else streams.has_passed(self.event)

    @property
    def work_failed(self) -> bool:
        """Whether the backend says so of its work, or cannot say that it did not."""
        if self.work is None:
            return False
        try:
            return self.work.exception() is not None
        except TypeError:  # torch 2.11 and older cannot hand over an exception, nor say that there is none
            result = self.work.get_future_result()
            return not result.done() or result.value() != _SUCCESS

    def follow(self) -> None:
        """The current stream waits for it. A work's own wait() would take a timeout as an order to keep the host."""
        if self.work is None:
            streams.wait(streams.current(self.channel.device), self.event)
            return
        try:
            self.work.wait()
        except RuntimeError as error:
            self.channel.failed(self, error)


class NcclChannel(C10dChannel):
    """Collectives of one communicator; of more where they go in levels.

    pg: the communicator's process group. make, store: for those of the levels. cpu: the group's channel between hosts'
    memory, which ends with this one. Without `store`, as for a process group that the user made, nobody compares notes.
    """

    by_streams = True

    def __init__(
        self,
        pg: Any,
        name: str,
        rank: int,
        labels: Sequence[int],
        topology: Topology,
        device: torch.device,
        cpu: Channel | None = None,
        store: dist.Store | None = None,
        make: Maker = nccl_process_group,
        timeout: timedelta = timedelta(minutes=10),
        averages: bool = True,
    ) -> None:
        self.pg = pg
        self.name, self.rank, self.size = name, rank, len(labels)
        self.device, self._topology = device, topology
        self._labels, self._cpu, self._averages = list(labels), cpu, averages
        self._notes = None if store is None else Notes(store, name, rank, labels)
        self._patience = timeout.total_seconds()  # of the communicators' own watchdog, without what it gives to ours
        self._levels: DeviceLevels | None = None
        self.has_levels = store is not None and not why_flat(topology)
        if self.has_levels and store is not None:
            connect = lambda prefix, place, ranks: make(  # noqa: E731
                dist.PrefixStore(f"{prefix}/", store), place, len(ranks), f"{name}/{prefix}",
                [self._labels[r] for r in ranks], timedelta(seconds=self._patience),
            )  # fmt: skip
            self._levels = DeviceLevels(topology, rank, device, connect)
        self._sequence = 0
        self._started_what = ""
        self._under_way: deque[NcclOperation] = deque()
        self._broken: CollectiveError | None = None
        self._lock = threading.RLock()
        self._closed = self._ending = False
        self._ended_at = 0.0  # when a rank was first seen to have ended
        watch.add(self)

    @classmethod
    def over(cls, pg: dist.ProcessGroup, topology: Topology) -> NcclChannel:
        """A process group of backend nccl that the user made, and will destroy."""
        ranks = dist.get_process_group_ranks(pg)
        device = torch.device("cuda", torch.cuda.current_device())
        return cls(pg, str(getattr(pg, "group_name", "group")), pg.rank(), ranks, topology, device)

    # ------------------------------------------------------------ operations

    def start(self, collective: Collective, timeout: float, sync: bool) -> NcclOperation:
        c = collective
        in_levels = c.hierarchical and self._levels is not None
        stream = self._levels.stream if in_levels and self._levels is not None else None
        operation = self._begin(c.describe(), timeout, c, self._rows(c), stream)
        with self._launching(operation):
            if in_levels and self._levels is not None:
                streams.follow(stream, streams.current(self.device))
                with streams.on(stream):
                    self._levels.run(c)
                    if c.finish is not None:
                        c.finish()
                    operation.event = streams.record(stream)
                return operation
            operation.work = self._call(c)
            after = self._after(c)
            if after is not None:  # on the current stream: what follows there waits anyway
                operation.work.wait()
                after()
                operation.work, operation.event = None, streams.record(streams.current(self.device))
        return operation

    @contextmanager
    def _launching(self, operation: NcclOperation) -> Iterator[None]:
        """What cannot be started ends the group: the other ranks would wait for it."""
        try:
            yield
        except RuntimeError as error:
            self.failed(operation, error)
            raise self._broken or error from error
        finally:
            operation.launched = True

    def _begin(
        self, what: str, timeout: float, keep: Any, rows: list[Traffic], stream: streams.Stream
    ) -> NcclOperation:
        with self._lock:
            if self._closed:
                raise CollectiveError(f"group '{self.name}' was closed on this rank")
            require_no_capture(self.name, self.device)
            self.check()
            if self._broken is not None:
                raise self._broken
            if timeout > self._patience and self._notes is not None:
                self._be_patient(timeout)
            self._sequence += 1
            self._started_what = what
            current = streams.current(self.device)
            operation = NcclOperation(self, self._sequence, what, timeout, keep, rows, stream, current)
            self._under_way.append(operation)
        watch.wake()
        return operation

    def _be_patient(self, timeout: float) -> None:
        """A collective may take longer than those before: torch's watchdog must not end the process before ours."""
        self._patience = timeout
        for pg in self._process_groups():
            method_of(pg, "set_timeout", "_set_default_timeout")(timedelta(seconds=timeout) + _LATER)

    def _process_groups(self) -> list[Any]:
        return [self.pg, *([] if self._levels is None else self._levels.process_groups())]

    def _after(self, c: Collective) -> Callable[[], None] | None:
        """What is left to do once the backend is done: stand-ins go home, sums are divided where it has no average."""
        divide = c.op == "avg" and not self._averages and c.kind in ("all_reduce", "reduce", "reduce_scatter")
        if not divide:
            return c.finish

        def after() -> None:
            for t in c.recv:
                t.div_(self.size, rounding_mode=None if t.dtype.is_floating_point else "trunc")
            if c.finish is not None:
                c.finish()

        return after

    def _call(self, c: Collective) -> Any:
        """The backend's own call."""
        op = OPS[c.op] if self._averages or c.op != "avg" else dist.ReduceOp.SUM
        pg: Any = self.pg
        options: Any
        if c.kind == "barrier":
            options = c10d.BarrierOptions()
            options.device = self.device  # else the backend guesses by rank
            if self.device.index is not None and self.device.type != "cpu":
                options.device_ids = [self.device.index]
            return pg.barrier(options)
        if c.kind == "all_reduce":
            return pg.allreduce(c.send, op)
        if c.kind in ("reduce", "broadcast"):
            options = c10d.ReduceOptions() if c.kind == "reduce" else c10d.BroadcastOptions()
            options.rootRank = c.root
            if c.kind == "reduce":
                options.reduceOp = op
                return pg.reduce(c.send, options)
            return pg.broadcast([as_bytes(t) for t in c.send], options)
        if c.kind == "reduce_scatter":
            options = c10d.ReduceScatterOptions()
            options.reduceOp = op
            whole = as_one(c.send)
            if whole is not None:
                call = method_of(pg, "_reduce_scatter_base", "reduce_scatter_single")
                return call(c.recv[0].view(-1), whole, options)
            return pg.reduce_scatter(c.recv, [c.send], options)
        send, recv = [as_bytes(t) for t in c.send], [as_bytes(t) for t in c.recv]
        if c.kind == "all_gather":
            whole = as_one(recv)
            if whole is not None:  # else the backend copies once more
                return method_of(pg, "_allgather_base", "all_gather_single")(whole, send[0].view(-1))
            return pg.allgather([recv], send)
        if c.kind == "gather":
            options = c10d.GatherOptions()
            options.rootRank = c.root
            return pg.gather([recv] if recv else [], send, options)
        if c.kind == "scatter":
            options = c10d.ScatterOptions()
            options.rootRank = c.root
            return pg.scatter(recv, [send] if send else [], options)
        return pg.alltoall(recv, send)

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout: float) -> NcclOperation:
        self._require_no_tag(tag)
        rows = self._by_link({dst: tensor.nbytes})
        operation = self._begin(f"send to rank {self._labels[dst]}", timeout, tensor, rows, None)
        with self._launching(operation):
            operation.work = self.pg.send([as_bytes(tensor)], dst, tag)
        return operation

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout: float) -> NcclOperation:
        if src is None:
            raise ValueError(f"recv on {self.device}: name the rank that sends; only on the CPU it may be any")
        self._require_no_tag(tag)
        operation = self._begin(f"recv from rank {self._labels[src]}", timeout, tensor, self._by_link({}), None)
        operation.source = src  # NCCL's works do not say
        with self._launching(operation):
            operation.work = self.pg.recv([as_bytes(tensor)], src, tag)
        return operation

    def exchange(self, messages: Sequence[Message], timeout: float) -> NcclOperation:
        """Starts messages together, as one kernel: none of them waits until another was taken. If nothing else was
        started in the group before, all its ranks must call."""
        for message in messages:
            self._require_no_tag(message.tag)
        ways = [f"{'to' if m.sending else 'from'} rank {self._labels[m.peer]}" for m in messages]
        sent: dict[int, int] = {}
        for m in messages:
            sent[m.peer] = sent.get(m.peer, 0) + (m.tensor.nbytes if m.sending else 0)
        tensors = [m.tensor for m in messages]
        operation = self._begin(f"messages {', '.join(ways)}", timeout, tensors, self._by_link(sent), None)
        with self._launching(operation):
            self._bracket(True)
            try:
                for m in messages:
                    (self.pg.send if m.sending else self.pg.recv)([as_bytes(m.tensor)], m.peer, 0)
            finally:
                work = self._bracket(False)
            self._took(operation, work)
        return operation

    def ended_bracket(self, calls: Sequence[str], keep: Any, end: Callable[[], Any], timeout: float) -> NcclOperation:
        """Looks after what torch's callers put between start and end of a bracket. NCCL starts it all in `end`."""
        operation = self._begin(f"together: {', '.join(calls) or 'nothing'}", timeout, keep, [], None)
        with self._launching(operation):
            self._took(operation, end())
        return operation

    def _took(self, operation: NcclOperation, work: Any) -> None:
        """The work of a bracket; None: there was nothing in it, or it is on the current stream."""
        operation.work = work
        if work is None:
            operation.event = streams.record(streams.current(self.device))

    def _bracket(self, begin: bool) -> Any:
        """Begins or ends what goes as one kernel."""
        whose = (self.device,) if isinstance(self.pg, dist.ProcessGroup) else ()
        return (self.pg._start_coalescing if begin else self.pg._end_coalescing)(*whose)

    def _require_no_tag(self, tag: int) -> None:
        if tag:
            raise ValueError(
                f"a message of group '{self.name}' on {self.device} was given tag={tag}, which NCCL would ignore: it "
                "delivers messages between two ranks in the order in which they were started. Leave the tag out; or "
                "send copies on the CPU, where tags choose"
            )

    # ------------------------------------------------------------ accounts

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Any) -> list[Traffic]:
        """NCCL does not say what it moves: the formulas stand for the count."""
        rows: list[Traffic] = operation.rows
        return rows

    def _rows(self, c: Collective) -> list[Traffic]:
        sent, received = sum(t.nbytes for t in c.send), sum(t.nbytes for t in c.recv)
        if c.hierarchical and self._levels is not None:
            piece = sent if c.kind == "all_gather" else received
            between, inside = expected_moved(c.kind, c.dtype, piece, self._topology)
            return [Traffic(BETWEEN_HOSTS, between, between), Traffic(SAME_HOST, inside, inside)]
        return self._by_link(expected_sent(c.kind, self.size, self.rank, c.root, sent, received))

    def _by_link(self, sent: dict[int, int]) -> list[Traffic]:
        near = set(self._topology.local_ranks(self.rank))
        inside = sum(n for to, n in sent.items() if to in near and to != self.rank)
        between = sum(n for to, n in sent.items() if to not in near)
        rows = [Traffic(SAME_HOST, inside, inside)] if len(near) > 1 else []
        if len(near) < self.size:
            rows.append(Traffic(BETWEEN_HOSTS, between, between))
        return rows

    # ------------------------------------------------------------ faults

    def verdict(self, operation: NcclOperation, passed: bool) -> CollectiveError | None:
        """The error of an operation that was not seen complete before the group failed. Afterwards nobody can tell: an
        abort ends kernels early, and their works look as if they were done."""
        if not passed:
            self.check()
        if self._broken is None or (passed and operation.ended_well):
            return None
        return CollectiveError(str(self._broken), self._broken.code)

    def failed(self, operation: NcclOperation, error: RuntimeError) -> None:
        """The backend raised."""
        where = f"{operation.what} #{operation.sequence} of group '{self.name}'"
        self._end(f"{where} failed on rank {self._labels[self.rank]}: {error}", "aborted")

    def check(self) -> None:
        """Looks whether the group was ended. Never blocks."""
        if self._broken is None and self._cpu is not None and (text := self._cpu.aborted()):
            self._end(text, "aborted")

    def look(self) -> bool:
        """Called by the watch: lets go of what is done, and compares notes about what is late."""
        self.check()
        with self._lock:
            if self._closed or self._broken is not None:
                return False
            while self._under_way and self._under_way[0].done:
                self._under_way.popleft()
            oldest = self._under_way[0] if self._under_way else None
        if oldest is not None:
            self._judge(oldest)
        if self._notes is not None and self._broken is None:
            late = oldest is not None and time.monotonic() > oldest.began + oldest.seconds
            note = Note(
                self._sequence,
                self._started_what,
                0 if oldest is None else oldest.sequence,
                "" if oldest is None else oldest.what,
            )
            try:
                text = self._notes.look(note, oldest.seconds if oldest is not None and late else None)
            except RuntimeError as error:
                if oldest is None:  # all is done: ranks end in any order, and the store with one of them
                    return False
                what = f"{oldest.what} #{oldest.sequence} of group '{self.name}'"
                text = f"{what} cannot complete: the store is gone, so the rank that holds it has ended ({error})"
            if text is not None:
                self._end(text, "timeout")
        return oldest is not None

    def _judge(self, oldest: NcclOperation) -> None:
        """Whether what is under way waits for a rank of this host that has ended; what that rank did before it did may
        still complete, for a while."""
        ended = [] if self._cpu is None else self._cpu.ended()
        self._ended_at = self._ended_at if ended and self._ended_at else time.monotonic()
        if ended and time.monotonic() > self._ended_at + _GRACE:
            names = ", ".join(f"rank {self._labels[r]}" for r in ended)
            what = f"{oldest.what} #{oldest.sequence} of group '{self.name}'"
            self._end(f"{what} cannot complete: {names} ended (it exited, or was killed)", "dead")

    def _end(self, text: str, code: str) -> None:
        """Ends the group: first those that wait in its memory, with the reason, then the communicators, so that hosts
        which wait for a stream come back and raise it."""
        with self._lock:
            if self._broken is not None or self._closed or self._ending:
                return
            self._ending = True
        # Without the lock: a store whose host stands still answers late, and callers would wait with it.
        if self._notes is not None:  # the other hosts look there
            with suppress(RuntimeError):  # the store went with its rank: the others see that by themselves
                text = self._notes.settle(text)
        if self._cpu is not None:
            self._cpu.abort(text)
            text = self._cpu.aborted() or text
        with self._lock:
            for operation in self._under_way:
                operation.ended_well = operation.passed and not operation.work_failed
            self._broken = CollectiveError(text, code)
        for pg in self._process_groups():
            pg.abort()

    def abort(self, text: str) -> None:
        self._end(text, "aborted")

    def aborted(self) -> str | None:
        return None if self._broken is None else str(self._broken)

    def close(self) -> None:
        """Lets the communicators go. A process group that the user made is the user's to destroy."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._notes is not None:
            for pg in self._process_groups():
                pg.shutdown()
        self._under_way.clear()


def connect_nccl(group: Group, device: torch.device, make: Maker = nccl_process_group) -> NcclChannel:
    """The channel of a group's own communicators. Every rank calls."""
    store = group.store
    if store is None:
        raise RuntimeError(f"group '{group.name}' has no store of its own: NCCL cannot be started for it")
    limit = timedelta(seconds=group.timeout)
    labels = list(group.ranks)
    store = dist.PrefixStore(f"nccl/{device.type}/", store)
    pg = make(dist.PrefixStore("all/", store), group.rank, group.size, group.name, labels, limit)
    averages = "gloo" not in type(pg).__name__.lower()
    return NcclChannel(
        pg, group.name, group.rank, labels, group.topology, device, group.cpu_channel, store, make, limit, averages
    )

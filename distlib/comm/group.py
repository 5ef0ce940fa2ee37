"""`Group`: ranks that communicate, and the only place that starts a collective. It picks the way and keeps the
ledger."""

from __future__ import annotations

import contextlib
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distlib import native
from distlib.comm import hierarchical as levels
from distlib.comm import interfaces, membership
from distlib.comm.c10d import C10dChannel
from distlib.comm.channel import Channel, Collective
from distlib.comm.counting import CountingChannel, is_fake
from distlib.comm.gloo import GlooChannel, Seat
from distlib.comm.host import HostChannel, usable_cores
from distlib.comm.ledger import ledger
from distlib.comm.memory import arena_empty
from distlib.comm.spanning import SpanningChannel
from distlib.comm.work import CollectiveError, Operation, Work
from distlib.topology import Topology

Timeout = timedelta | float | None


def seconds_of(timeout: Timeout, default: float) -> float:
    """A timeout in seconds; None, zero and torch's "unset" (negative) mean the group's own."""
    if timeout is None:
        return default
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    return seconds if seconds > 0 else default


class Group:
    """The ranks of a c10d process group, as distlib drives them. Get one with `Group.of`.

    rank, size: of this process in the group, and of the group. ranks: global ranks, by group rank. topology: which
    ranks share a host, in group ranks. All methods that start a collective must be called by every rank of the
    group, in the same order, with tensors on the CPU of equal dtype and size (a mismatch raises on every rank,
    naming who differs). They return None when done, or with `async_op=True` a `Work`. `op` is one of native.OPS:
    sum, avg, min, max, product, band, bor, bxor. Ranks named in arguments are group ranks.

    Raises CollectiveError when a rank disagrees, ends, or does not come within the timeout; the group is then of no
    further use, on any rank. ValueError for arguments that cannot be right.
    """

    def __init__(
        self, name: str, rank: int, ranks: Sequence[int], topology: Topology, channel: Channel, timeout: float
    ) -> None:
        self.name = name
        self.rank = rank
        self.size = len(ranks)
        self.ranks = tuple(ranks)
        self.topology = topology
        self.timeout = timeout
        self.closed = False
        self._channel = channel
        self._why_flat = levels.why_flat(topology)
        if isinstance(channel, C10dChannel):
            self._why_flat = "its collectives are another backend's"
        self._in_flight: deque[Work] = deque()
        self._late_before: dict[str, tuple[list[float], int]] = {}
        ledger()._groups.add(self)

    # ------------------------------------------------------------ making

    @staticmethod
    def create(
        store: dist.Store, rank: int, size: int, timeout: timedelta, name: str, global_ranks: Sequence[int] = ()
    ) -> Group:
        """Brings the ranks of a new group together. Every one of them must call; `global_ranks` is empty for the
        world."""
        limit = timeout.total_seconds()
        if native.core() is None and rank == 0 and not global_ranks:
            warnings.warn(
                f"distlib's C++ core is not in use: {native.why_not()}. Collectives go over gloo: correct, but slower. "
                "`distlib doctor` says more",
                stacklevel=2,
            )
        ranks = tuple(global_ranks) or tuple(range(size))
        members = membership.gather(store, rank, size, ranks, not global_ranks, limit)
        topology = members.topology
        inside = None
        local = topology.local_ranks(rank)
        if all(members.cards[r].door for r in local) and (len(local) > 1 or size == 1):
            inside = _host_channel(store, name, rank, local, members, limit)
        channel: Channel
        if len(topology.nodes) == 1 and inside is not None:
            channel = inside
        else:
            one_network = len({(card.boot, card.network) for card in members.cards}) == 1
            master = "127.0.0.1" if one_network else interfaces.meeting_point(store)
            way = SpanningChannel if any(card.door for card in members.cards) else GlooChannel
            channel = way(Seat(store, name, rank, list(ranks), limit, master, topology))
            if isinstance(channel, SpanningChannel):
                channel.use_inside(inside)
        return Group(name, rank, ranks, topology, channel, limit)

    @staticmethod
    def of(process_group: dist.ProcessGroup | None = None) -> Group:
        """The Group behind a c10d process group (None: the world's). On a backend other than "distlib" its collectives
        go through that backend; then the first call for a group must be made by all its ranks. On torch's "fake"
        backend nothing moves, and the ledger counts what would (counting.py)."""
        pg = process_group if process_group is not None else dist.group.WORLD
        if pg is None:
            raise RuntimeError("there is no process group yet: call distlib.init() first")
        own = getattr(pg, "distlib_group", None)
        if own is not None:
            return own
        if pg not in _foreign:
            _foreign[pg] = _wrap_fake(pg) if is_fake(pg) else _wrap_foreign(pg)
        return _foreign[pg]

    @property
    def counts_only(self) -> bool:
        """Whether nothing moves in this group (torch's "fake" backend): ranks cannot compare notes."""
        return isinstance(self._channel, CountingChannel)

    # ------------------------------------------------------------ collectives

    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: str = "sum",
        async_op: bool = False,
        timeout: Timeout = None,
        label: str = "",
        arrived_ns: int = 0,
    ) -> Work | None:
        """Reduces `tensor` of all ranks, in rank order, into `tensor` of every rank. Half types add up in fp32.

        The ledger keeps the ranks' lateness by `label`, counted from `arrived_ns` (native.now_ns(); 0: now).
        """
        native.require_reducible("all_reduce", tensor.dtype, op)
        inner, finish = _writable([tensor])
        call = Collective("all_reduce", inner, inner, op, label=label, arrived_ns=arrived_ns)
        return self._start(call, [tensor], finish, async_op, timeout)

    def reduce(
        self, tensor: torch.Tensor, dst: int, op: str = "sum", async_op: bool = False, timeout: Timeout = None
    ) -> Work | None:
        """As all_reduce, but only `tensor` of rank `dst` gets the result; the others' contents are then undefined."""
        native.require_reducible("reduce", tensor.dtype, op)
        self._check_rank("reduce", "dst", dst)
        inner, finish = _writable([tensor])
        return self._start(Collective("reduce", inner, inner, op, dst), [tensor], finish, async_op, timeout)

    def broadcast(self, tensor: torch.Tensor, src: int, async_op: bool = False, timeout: Timeout = None) -> Work | None:
        """Copies `tensor` of rank `src` into `tensor` of every rank."""
        self._check_rank("broadcast", "src", src)
        inner, finish = _writable([tensor])
        return self._start(Collective("broadcast", inner, inner, root=src), [tensor], finish, async_op, timeout)

    def all_gather(
        self,
        output: torch.Tensor | Sequence[torch.Tensor],
        input: torch.Tensor,
        async_op: bool = False,
        timeout: Timeout = None,
        hierarchical: bool | None = None,
    ) -> Work | None:
        """Copies every rank's `input` to every rank: into one flat `output` in rank order, or a list of tensors.

        hierarchical: between hosts on one rail per local rank, then inside hosts (MiCS, arXiv 2205.00119); None: where
        the group has equally many ranks, at least 2, on each of several hosts, and the message is large enough. The
        same on all ranks.
        """
        pieces, finish = self._outputs("all_gather", output, input.numel())
        given = _readable([input])
        result = [output] if isinstance(output, torch.Tensor) else list(output)
        call = Collective("all_gather", given, pieces)
        call.hierarchical = self._goes_in_levels(call, input.nbytes, hierarchical)
        return self._start(call, result, finish, async_op, timeout)

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor | Sequence[torch.Tensor],
        op: str = "sum",
        async_op: bool = False,
        timeout: Timeout = None,
        hierarchical: bool | None = None,
    ) -> Work | None:
        """Reduces the r-th part of all ranks' `input` (one flat tensor, or a list) into `output` of rank r.

        hierarchical: as for all_gather, inside hosts first. It never changes a bit: a group that spans hosts always
        sums ranks in order inside hosts, then hosts in order.
        """
        native.require_reducible("reduce_scatter", output.dtype, op)
        given = self._inputs("reduce_scatter", input, output.numel())
        inner, finish = _writable([output])
        call = Collective("reduce_scatter", given, inner, op)
        call.hierarchical = self._goes_in_levels(call, output.nbytes, hierarchical)
        return self._start(call, [output], finish, async_op, timeout)

    def gather(
        self,
        output: torch.Tensor | Sequence[torch.Tensor] | None,
        input: torch.Tensor,
        dst: int,
        async_op: bool = False,
        timeout: Timeout = None,
    ) -> Work | None:
        """Copies every rank's `input` to rank `dst`; `output` counts only there."""
        self._check_rank("gather", "dst", dst)
        pieces: list[torch.Tensor] = []
        finish = None
        result: list[torch.Tensor] = []
        if self.rank == dst:
            if output is None:
                raise ValueError("gather: output is needed on rank dst")
            pieces, finish = self._outputs("gather", output, input.numel())
            result = [output] if isinstance(output, torch.Tensor) else list(output)
        call = Collective("gather", _readable([input]), pieces, root=dst)
        return self._start(call, result, finish, async_op, timeout)

    def scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor | Sequence[torch.Tensor] | None,
        src: int,
        async_op: bool = False,
        timeout: Timeout = None,
    ) -> Work | None:
        """Copies the r-th part of rank `src`'s `input` into `output` of rank r; `input` counts only on `src`."""
        self._check_rank("scatter", "src", src)
        given: list[torch.Tensor] = []
        if self.rank == src:
            if input is None:
                raise ValueError("scatter: input is needed on rank src")
            given = self._inputs("scatter", input, output.numel())
        inner, finish = _writable([output])
        return self._start(Collective("scatter", given, inner, root=src), [output], finish, async_op, timeout)

    def all_to_all(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        async_op: bool = False,
        timeout: Timeout = None,
    ) -> Work | None:
        """Copies `inputs[d]` of this rank into `outputs[this rank]` of rank d, for all pairs. Sizes may differ by
        pair."""
        for name, tensors in (("outputs", outputs), ("inputs", inputs)):
            if len(tensors) != self.size:
                raise ValueError(f"all_to_all: {len(tensors)} {name} given, the group has {self.size} ranks")
        pieces, finish = _writable(list(outputs))
        call = Collective("all_to_all", _readable(inputs), pieces)
        return self._start(call, list(outputs), finish, async_op, timeout)

    def barrier(self, async_op: bool = False, timeout: Timeout = None) -> Work | None:
        """Waits until every rank has come."""
        return self._start(Collective("barrier"), [], None, async_op, timeout)

    # ------------------------------------------------------------ messages

    def send(
        self, tensor: torch.Tensor, dst: int, tag: int = 0, async_op: bool = False, timeout: Timeout = None
    ) -> Work | None:
        """Sends `tensor` to rank `dst`, which must `recv` as many bytes with the same tag. Order is kept per tag."""
        self._check_rank("send", "dst", dst)
        given = _readable([tensor])[0]
        limit = seconds_of(timeout, self.timeout)
        operation = self._channel.send(given, dst, tag, limit)
        return self._track(Collective("send", [given], root=dst), operation, [tensor], None, async_op)

    def recv(
        self,
        tensor: torch.Tensor,
        src: int | None = None,
        tag: int = 0,
        async_op: bool = False,
        timeout: Timeout = None,
    ) -> Work | None:
        """Receives into `tensor` from rank `src`, or (None) from whichever rank sent one: `Work.source_rank()`
        tells."""
        if src is not None:
            self._check_rank("recv", "src", src)
        inner, finish = _writable([tensor])
        operation = self._channel.recv(inner[0], src, tag, seconds_of(timeout, self.timeout))
        return self._track(
            Collective("recv", [], inner, root=-1 if src is None else src), operation, [tensor], finish, async_op
        )

    # ------------------------------------------------------------ memory, faults, accounts

    def on_device(self, device: torch.device) -> bool:
        """Whether tensors on `device` can be communicated here."""
        return device.type == "cpu"

    def registered_empty(
        self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> torch.Tensor:
        """A tensor that collectives of this group read where it lies; an ordinary one where that cannot help. Any rank
        may call it, alone."""
        if device is not None and device.type != "cpu":
            return torch.empty(size, dtype=dtype, device=device)
        if native.core() is None or len(self.topology.local_ranks(self.rank)) == 1:
            return torch.empty(size, dtype=dtype)
        return arena_empty(size, dtype)

    def abort(self, message: str) -> None:
        """Ends the group: pending and later calls of all ranks raise CollectiveError with `message`."""
        self._channel.abort(message)

    def close(self) -> None:
        """Leaves the group. Other ranks that still wait for this one are told so."""
        if not self.closed:
            self.sweep()
            self.closed = True
            self._channel.close()

    def sweep(self) -> None:
        """Completes works that are done and that nobody waited for."""
        # Another thread may sweep too, and so may a callback of a work that completes here.
        with contextlib.suppress(IndexError, ValueError):
            while (oldest := self._in_flight[0]).is_completed():
                self._in_flight.remove(oldest)

    def lateness(self) -> dict[str, dict[int, tuple[float, int]]]:
        """By label, then global rank: seconds by which it was ready for collectives after the first, and their
        number."""
        found = {}
        for label, (late, calls) in self._channel.lateness().items():
            before, calls_before = self._late_before.get(label, ([0.0] * self.size, 0))
            if calls > calls_before and self.size > 1:
                found[label] = {rank: (late[i] - before[i], calls - calls_before) for i, rank in enumerate(self.ranks)}
        return found

    def reset_lateness(self) -> None:
        """Starts `lateness` again from zero."""
        self._late_before = self._channel.lateness()

    # ------------------------------------------------------------ inside

    def _start(
        self,
        call: Collective,
        result: list[torch.Tensor],
        finish: Callable[[], None] | None,
        async_op: bool,
        timeout: Timeout,
    ) -> Work | None:
        if self.closed:
            raise CollectiveError(f"group '{self.name}' was closed on this rank")
        begin = time.perf_counter_ns()
        operation = self._channel.start(call, seconds_of(timeout, self.timeout), not async_op)
        return self._track(call, operation, result, finish, async_op, begin)

    def _track(
        self,
        call: Collective,
        operation: Operation,
        result: list[torch.Tensor],
        finish: Callable[[], None] | None,
        async_op: bool,
        begin: int | None = None,
    ) -> Work | None:
        sent = sum(t.nbytes for t in call.send)
        received = sum(t.nbytes for t in call.recv)
        work = Work(
            operation,
            result,
            keep=call,
            finish=finish,
            account=lambda done: self._account(call.kind, call.root, sent, received, done),
            abort=self.abort,
            what=call.kind,
        )
        if async_op:
            self.sweep()
            self._in_flight.append(work)
            return work
        try:
            work.wait()
        except BaseException:
            if not work.is_completed():  # an interrupt: the tensors are still in use
                self._in_flight.append(work)
            raise
        if begin is not None:
            ledger().add_wait(time.perf_counter_ns() - begin)
        return None

    def _account(self, kind: str, root: int, sent: int, received: int, operation: Operation) -> None:
        """Writes a finished operation into the ledger."""
        for row in self._channel.traffic(kind, root, sent, received, operation):
            ledger().add(kind, self.name, row.link, row.bytes, row.expected)

    def _goes_in_levels(self, call: Collective, piece: int, asked: bool | None) -> bool:
        """Whether a gather or scatter of pieces of so many bytes goes in levels."""
        if asked is None:
            return not self._why_flat and levels.pays(call.kind, call.dtype, piece * self.size, self.topology)
        if asked and self._why_flat:
            raise ValueError(
                f"{call.kind}: hierarchical=True is not possible in group '{self.name}': {self._why_flat}. It needs "
                "several hosts with equally many of its ranks, at least 2; leave it None to choose by that"
            )
        return asked

    def _check_rank(self, what: str, argument: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{what}: {argument}={rank} is not a rank of group '{self.name}', which has {self.size}")

    def _outputs(
        self, what: str, output: torch.Tensor | Sequence[torch.Tensor], each: int
    ) -> tuple[list[torch.Tensor], Callable[[], None] | None]:
        """One contiguous tensor per rank to be filled, and what then copies them home."""
        if isinstance(output, torch.Tensor):
            self._check_flat(what, "output", output, each)
            inner, finish = _writable([output])
            return list(inner[0].view(self.size, each).unbind(0)), finish
        self._check_list(what, "output", output, each)
        return _writable(list(output))

    def _inputs(self, what: str, input: torch.Tensor | Sequence[torch.Tensor], each: int) -> list[torch.Tensor]:
        if isinstance(input, torch.Tensor):
            self._check_flat(what, "input", input, each)
            return list(_readable([input])[0].view(self.size, each).unbind(0))
        self._check_list(what, "input", input, each)
        return _readable(input)

    def _check_flat(self, what: str, name: str, tensor: torch.Tensor, each: int) -> None:
        if tensor.numel() != each * self.size:
            raise ValueError(
                f"{what}: {name} has {tensor.numel()} elements; {self.size} ranks of {each} need {each * self.size}"
            )

    def _check_list(self, what: str, name: str, tensors: Sequence[torch.Tensor], each: int) -> None:
        if len(tensors) != self.size:
            raise ValueError(f"{what}: {len(tensors)} {name} tensors given, the group has {self.size} ranks")
        for r, tensor in enumerate(tensors):
            if tensor.numel() != each:
                raise ValueError(f"{what}: {name}[{r}] has {tensor.numel()} elements, {each} are needed")


_foreign: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()


def _host_channel(
    store: dist.Store, name: str, rank: int, local: Sequence[int], members: membership.Members, timeout: float
) -> HostChannel:
    """The channel between the group's ranks on this host; its lowest rank provides the control block."""
    key, block = f"control/{local[0]}", None
    if rank == local[0]:
        block = HostChannel.allocate_control(len(local))
        store.set(key, str(block.offset))
    who = [f"rank {members.ranks[local[0]]}"]
    offset = int(membership.collect(store, [key], who, f"group '{name}'", timeout)[0])
    doors = [members.cards[r].door for r in local]
    labels = [members.ranks[r] for r in local]
    cores = usable_cores(members.cards[r].cores for r in local)
    return HostChannel(name, local.index(rank), doors, labels, 0, offset, cores, block)


def _wrap_foreign(pg: dist.ProcessGroup) -> Group:
    ranks = dist.get_process_group_ranks(pg)
    gathered: list[Any] = [None] * pg.size()
    from distlib.comm.meeting import Host

    dist.all_gather_object(gathered, Host.here().card(pg.rank(), pg.size()), group=pg)
    met = Host.here().meet(dict(enumerate(gathered)), pg.rank(), 60.0)
    dist.all_gather_object(gathered, sorted(met), group=pg)
    topology = Topology.from_colocation(dict(enumerate(gathered)))
    name = str(getattr(pg, "group_name", "group"))
    return Group(name, pg.rank(), ranks, topology, C10dChannel(pg), 1800.0)


def _wrap_fake(pg: dist.ProcessGroup) -> Group:
    channel = CountingChannel(pg)
    return Group(channel.name, channel.rank, channel.ranks, channel.topology, channel, 1800.0)


def _readable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous CPU tensors with the same values."""
    return [_on_cpu(t).contiguous().resolve_conj().resolve_neg() for t in tensors]


def _writable(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None] | None]:
    """Contiguous stand-ins for tensors that are not, and what copies them home; None where there are none."""
    if all(t.is_contiguous() and not t.is_conj() and not t.is_neg() for t in map(_on_cpu, tensors)):
        return tensors, None
    inner = _readable(tensors)

    def finish() -> None:
        with torch.no_grad():
            for home, stand_in in zip(tensors, inner, strict=True):
                if home is not stand_in:
                    home.copy_(stand_in)

    return inner, finish


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor on {tensor.device} was given; this group communicates on the CPU")
    if tensor.layout is not torch.strided:
        raise ValueError(f"a tensor of layout {tensor.layout} was given; only strided tensors can be communicated")
    return tensor

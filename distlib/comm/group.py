"""`Group`: ranks that communicate, and the only place that starts a collective. It picks the way and keeps the
ledger."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distlib import native, writes
from distlib.comm import hierarchical as levels
from distlib.comm import membership, naming
from distlib.comm.c10d import C10dChannel
from distlib.comm.channel import Channel, Collective, Timeout, seconds_of
from distlib.comm.counting import CountingChannel
from distlib.comm.device import DeviceChannel, connect, may_connect
from distlib.comm.ledger import ledger
from distlib.comm.making import make_channel
from distlib.comm.memory import arena_empty
from distlib.comm.stream_work import StreamWork
from distlib.comm.tensors import check_dtype, device_of, inputs, outputs, readable, writable
from distlib.comm.ties import tied_to
from distlib.comm.work import CollectiveError, Operation, Work
from distlib.topology import Topology


class Group:
    """The ranks of a c10d process group, as distlib drives them. Get one with `Group.of`.

    rank, size: of this process in the group, and of the group. ranks: global ranks, by group rank. topology: which
    ranks share a host, in group ranks. All methods that start a collective must be called by every rank of the
    group, in the same order, with tensors of equal dtype and size (a mismatch raises on every rank, naming who
    differs), all on the CPU, or on each rank's one device. They return None when done, or with `async_op=True` a
    `Work`; on a device "done" is in the order of its streams, and the host does not wait (stream_work.py). `op` is one
    of native.OPS: sum, avg, min, max, product, band, bor, bxor. Ranks named in arguments are group ranks.

    Numbers of every size and bool can be reduced, where the op is defined on them; complex numbers cannot (view them as
    real ones): ValueError.

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
        self.store: dist.Store | None = None  # of its own, where `create` made it
        self._channel = channel
        self._why_flat = levels.why_flat(topology)
        self._on_devices: dict[str, DeviceChannel] = {}  # by device type
        self._connecting = threading.RLock()
        if isinstance(channel, C10dChannel) and not channel.has_levels:
            self._why_flat = self._why_flat or "its collectives are another backend's"
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
        limit, name = timeout.total_seconds(), naming.chosen_name() or name
        if native.core() is None and rank == 0 and not global_ranks:
            warnings.warn(
                f"distlib's C++ core is not in use: {native.why_not()}. Collectives go over gloo: correct, but slower. "
                "`distlib doctor` says more",
                stacklevel=2,
            )
        ranks = tuple(global_ranks) or tuple(range(size))
        members = membership.gather(store, rank, size, ranks, not global_ranks, limit)
        channel = make_channel(store, name, rank, members, limit)
        group = Group(name, rank, ranks, members.topology, channel, limit)
        group.store = store
        return group

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
            from distlib.comm.foreign import wrap

            _foreign[pg] = wrap(pg)
        return _foreign[pg]

    @property
    def counts_only(self) -> bool:
        """Whether nothing moves in this group (torch's "fake" backend): ranks cannot compare notes."""
        return isinstance(self._channel, CountingChannel)

    # ------------------------------------------------------------ devices

    @property
    def cpu_channel(self) -> Channel:
        """How tensors on the CPU travel."""
        return self._channel

    def on_device(self, device: torch.device | str) -> bool:
        """Whether this group can communicate tensors on `device`. Any rank may ask, alone."""
        device = torch.device(device)
        if isinstance(self._channel, C10dChannel):
            return device.type == self._channel.device.type
        if device.type == "cpu" or self.counts_only or device.type in self._on_devices:
            return True
        return not self.closed and may_connect(device)

    def connect(self, device: torch.device | str) -> None:
        """Makes the way for tensors on `device`. The first collective with such a tensor does it by itself; before
        messages, in a group of more than two ranks, all ranks must call it. ValueError (naming ranks that share a GPU,
        and the fix) or RuntimeError on all ranks where there is no way."""
        self._device_channel(torch.empty(0, device=device).device)  # with its number

    def takes_tags(self, device: torch.device) -> bool:
        """Whether messages of tensors on `device` may have tags: over NCCL, which has none, they may not. To be asked
        once the way for such tensors is made."""
        channel = self._on_devices.get(device.type)
        return channel.nccl is None if channel is not None else not self._channel.by_streams

    def nccl_on(self, device: torch.device) -> Any:
        """This group's NcclChannel, where NCCL is used; every rank must call, as `connect` may be needed."""
        channel = self._device_channel(device)
        return channel.nccl if isinstance(channel, DeviceChannel) else None

    def _device_channel(self, device: torch.device) -> Channel:
        if device.type == "cpu" or self.counts_only or isinstance(self._channel, C10dChannel):
            return self._channel
        with self._connecting:
            channel = self._on_devices.get(device.type)
            if channel is None:
                if self.closed:
                    raise CollectiveError(f"group '{self.name}' was closed on this rank")
                channel = self._on_devices[device.type] = connect(self, device)
        if (channel.device.index or 0) != (device.index or 0):
            raise ValueError(
                f"group '{self.name}' communicates {channel.device} of rank {self.ranks[self.rank]}; a tensor on "
                f"{device} was given: move it, or choose the device before the first collective"
            )
        return channel

    def _channel_for(self, call: Collective, is_message: bool = False) -> Channel:
        device = device_of(call.kind, call.send + call.recv)
        if device is None:
            return self._channel
        if is_message and self.size > 2 and device.type != "cpu" and device.type not in self._on_devices:
            raise ValueError(
                f"{call.kind} in group '{self.name}': only two of its {self.size} ranks are here, and all must make "
                f"the way for tensors on {device}: call group.connect('{device}') on all ranks first, or any collective"
            )
        return self._device_channel(device)

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
        inner, finish = writable([tensor])
        call = Collective("all_reduce", inner, inner, op, label=label, arrived_ns=arrived_ns)
        return self._start(call, [tensor], finish, async_op, timeout)

    def reduce(
        self, tensor: torch.Tensor, dst: int, op: str = "sum", async_op: bool = False, timeout: Timeout = None
    ) -> Work | None:
        """As all_reduce, but only `tensor` of rank `dst` gets the result; the others' contents are then undefined."""
        native.require_reducible("reduce", tensor.dtype, op)
        self._check_rank("reduce", "dst", dst)
        inner, finish = writable([tensor])
        return self._start(Collective("reduce", inner, inner, op, dst), [tensor], finish, async_op, timeout)

    def broadcast(self, tensor: torch.Tensor, src: int, async_op: bool = False, timeout: Timeout = None) -> Work | None:
        """Copies `tensor` of rank `src` into `tensor` of every rank."""
        self._check_rank("broadcast", "src", src)
        inner, finish = writable([tensor])
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
        pieces, finish = outputs("all_gather", self.size, output, input.numel())
        given = readable([input])
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
        given = inputs("reduce_scatter", self.size, input, output.numel())
        inner, finish = writable([output])
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
            pieces, finish = outputs("gather", self.size, output, input.numel())
            result = [output] if isinstance(output, torch.Tensor) else list(output)
        call = Collective("gather", readable([input]), pieces, root=dst)
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
            given = inputs("scatter", self.size, input, output.numel())
        inner, finish = writable([output])
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
        pieces, finish = writable(list(outputs))
        call = Collective("all_to_all", readable(inputs), pieces)
        return self._start(call, list(outputs), finish, async_op, timeout)

    def barrier(self, async_op: bool = False, timeout: Timeout = None) -> Work | None:
        """Waits until every rank has come."""
        return self._start(Collective("barrier"), [], None, async_op, timeout)

    # ------------------------------------------------------------ messages

    def send(
        self, tensor: torch.Tensor, dst: int, tag: int = 0, async_op: bool = False, timeout: Timeout = None
    ) -> Work | None:
        """Sends `tensor` to rank `dst`, which must `recv` as many bytes with the same tag. Order is kept per tag. The
        timeout counts from when somebody waits, so it may be started early; so may a `recv`."""
        self._check_rank("send", "dst", dst)
        given = readable([tensor])[0]
        call = Collective("send", [given], root=dst)
        channel = self._channel_for(call, is_message=True)
        operation = channel.send(given, dst, tag, seconds_of(timeout, self.timeout))
        return self._track(channel, call, operation, [tensor], None, async_op)

    def recv(
        self,
        tensor: torch.Tensor,
        src: int | None = None,
        tag: int = 0,
        async_op: bool = False,
        timeout: Timeout = None,
    ) -> Work | None:
        """Receives into `tensor` from rank `src`, or (None) whichever rank sent one: `Work.source_rank()` tells.

        A message of another size raises on one host. Between hosts sizes are not compared: after a shorter one the rest
        of `tensor` is as it was, and a longer one ends this process, as gloo aborts it.
        """
        if src is not None:
            self._check_rank("recv", "src", src)
        inner, finish = writable([tensor])
        call = Collective("recv", [], inner, root=-1 if src is None else src)
        channel = self._channel_for(call, is_message=True)
        if channel.by_streams and finish is not None:
            raise ValueError(f"recv on {tensor.device}: the tensor must be contiguous")
        writes.tell([tensor])
        operation = channel.recv(inner[0], src, tag, seconds_of(timeout, self.timeout))
        return self._track(channel, call, operation, [tensor], finish, async_op)

    # ------------------------------------------------------------ memory, faults, accounts

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
        """Ends the group, and those that it is tied to (ties.py): pending and later calls of all ranks raise
        CollectiveError with `message`."""
        for group in (self, *tied_to(self)):
            group._end(message)

    def failed(self, error: CollectiveError) -> None:
        """A collective failed on this rank: what the group is tied to ends. But for who left, or is a forked child."""
        if not self.closed and error.code not in ("forked", "invalid"):
            for group in tied_to(self):
                group._end(str(error))

    def _end(self, message: str) -> None:
        for channel in [self._channel, *self._on_devices.values()]:
            channel.abort(message)

    def close(self) -> None:
        """Leaves the group. Other ranks that still wait for this one are told so."""
        if not self.closed:
            self.sweep()
            self.closed = True
            for channel in [*self._on_devices.values(), self._channel]:
                channel.close()

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
        check_dtype(call.kind, call.send + call.recv)
        begin = time.perf_counter_ns()
        writes.tell(result)
        channel = self._channel_for(call)
        if channel.by_streams:
            call.finish, finish = finish, None
        operation = channel.start(call, seconds_of(timeout, self.timeout), not async_op)
        return self._track(channel, call, operation, result, finish, async_op, begin)

    def _track(
        self,
        channel: Channel,
        call: Collective,
        operation: Operation,
        result: list[torch.Tensor],
        finish: Callable[[], None] | None,
        async_op: bool,
        begin: int | None = None,
    ) -> Work | None:
        kind, root = call.kind, call.root
        sent, received = sum(t.nbytes for t in call.send), sum(t.nbytes for t in call.recv)
        account = lambda done: self._account(channel, kind, root, sent, received, done)  # noqa: E731
        work: Work
        if channel.by_streams:  # the operation keeps what it needs; what is kept here for the accounts has no tensors
            work = StreamWork(operation, result, owner=self, what=kind)
            tracked: Work = StreamWork(operation, [], account=account, owner=self)
        else:
            work = tracked = Work(operation, result, call, finish, account, self, kind)
        if async_op:
            self.sweep()
            self._in_flight.append(tracked)
            return work
        try:
            work.wait()
        except BaseException:
            if not work.is_completed():  # an interrupt: the tensors are still in use
                self._in_flight.append(tracked)
            raise
        if begin is not None:
            ledger().add_wait(time.perf_counter_ns() - begin)
        if channel.by_streams:  # its stream goes on, and so do the accounts
            self.sweep()
            self._in_flight.append(tracked)
        return None

    def _account(self, channel: Channel, kind: str, root: int, sent: int, received: int, operation: Operation) -> None:
        """Writes a finished operation into the ledger."""
        for row in channel.traffic(kind, root, sent, received, operation):
            ledger().add(kind, self.name, row.link, row.bytes, row.expected)

    def _goes_in_levels(self, call: Collective, piece: int, asked: bool | None) -> bool:
        """Whether a gather or scatter of pieces of so many bytes goes in levels."""
        if asked is not False and not self._why_flat and not self._channel_for(call).has_levels:
            return False  # memory reaches all ranks at once, whatever nodes are pretended
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


_foreign: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()

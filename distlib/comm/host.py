"""A group whose ranks share one host: collectives and messages in the C++ core."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from distlib import native, settings
from distlib.comm.channel import SAME_HOST, Collective, Traffic
from distlib.comm.ledger import expected_bytes
from distlib.comm.meeting import Host
from distlib.comm.membership import Members, collect
from distlib.comm.work import Operation

Span = tuple[int, int]  # address, bytes
_NOTHING: Span = (0, 0)
_SPIN_NS = 20_000


def span(tensor: torch.Tensor) -> Span:
    """Where a contiguous tensor lies."""
    return (tensor.data_ptr(), tensor.numel() * tensor.element_size())


def usable_cores(masks: Iterable[str]) -> int:
    """Cores that ranks with these affinity masks (hexadecimal) may use together, less where a container has a quota."""
    together = 0
    for mask in masks:
        together |= int(mask, 16)
    cores = together.bit_count() or os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()
    except (OSError, ValueError):  # no cgroup v2 here, or its root: no quota
        return cores
    return cores if quota == "max" else min(cores, max(1, int(quota) // int(period)))


class HostChannel:
    """Collectives over shared memory between `doors`, one per rank, this process's own among them.

    leader: the rank in whose arena the control block lies, `control`: its offset there. labels: what messages call the
    ranks (their global ranks). cores: how many its ranks may use together. Waits spin briefly before they sleep, but
    never where ranks outnumber cores.
    """

    by_streams = has_levels = False
    _graveyard: deque[HostChannel] = deque()  # closed here, but maybe still read by others

    def __init__(
        self,
        name: str,
        rank: int,
        doors: list[str],
        labels: list[int],
        leader: int,
        control: int,
        cores: int,
        block: Any = None,
    ) -> None:
        host = Host.here()
        assert host.core is not None
        self.size = len(doors)
        self.rank = rank
        self._block = block  # the control block, where this rank is the leader
        self._doors = doors
        self._group = host.core.HostGroup(
            name=name,
            rank=rank,
            labels=labels,
            peers=[None if door == host.door else host.peers[door] for door in doors],
            arena=host.arena,
            leader=leader,
            control_offset=control,
            spin_ns=_SPIN_NS if self.size <= cores else 0,
            slot_bytes=settings.integer("DISTLIB_STAGING_KB", 1024, 64, "KiB") << 10,
        )
        self._mailbox: Any = None
        self._labels: dict[str, int] = {"": 0}
        HostChannel._bury()

    @staticmethod
    def allocate_control(size: int) -> Any:
        """A zeroed control block for a group of `size` ranks, in this process's arena; the leader calls this."""
        host = Host.here()
        assert host.core is not None
        return host.arena.allocate(host.core.control_bytes(size), False)

    def peer(self, rank: int) -> Any:
        """The mapped arena of another rank."""
        return Host.here().peers[self._doors[rank]]

    def start(self, collective: Collective, timeout: float, sync: bool) -> Operation:
        c = collective
        dtype, name = native.dtype_codes(c.dtype)
        send, recv = self._spans(c)
        return self._group.start(
            native.KINDS.index(c.kind),
            native.BYTES if dtype is None else dtype,
            name,
            native.OPS.index(c.op),
            c.root,
            c.count,
            self.size,
            timeout,
            send,
            recv,
            sync,
            self._labels.setdefault(c.label, len(self._labels)),
            c.arrived_ns,
        )

    def start_reduction(
        self, kind: str, send: list[Span], recv: list[Span], like: Collective, divisor: int, timeout: float
    ) -> Operation:
        """A reduction on given addresses, run on the calling thread: a part of a larger collective (spanning.py)."""
        dtype, name = native.dtype_codes(like.dtype)
        kind_code = native.KINDS.index(kind)
        op = native.OPS.index(like.op)
        return self._group.start(kind_code, dtype, name, op, 0, like.count, divisor, timeout, send, recv, True, 0, 0)

    def _spans(self, c: Collective) -> tuple[list[Span], list[Span]]:
        """What goes to each rank and what comes from each, as addresses."""
        n, me = self.size, self.rank
        send, recv = [span(t) for t in c.send], [span(t) for t in c.recv]
        if c.kind in ("all_reduce", "reduce", "all_to_all"):
            return send, recv
        if c.kind == "all_gather":
            return send * n, recv
        if c.kind == "reduce_scatter":
            return send, recv * n
        to, of = [_NOTHING] * n, [_NOTHING] * n
        if c.kind == "broadcast":
            if me == c.root:
                to = [_NOTHING if r == me else send[0] for r in range(n)]
            else:
                of[c.root] = recv[0]
        elif c.kind == "gather":
            to[c.root] = send[0]
            of = recv or of
        elif c.kind == "scatter":
            to = send or to
            of[c.root] = recv[0]
        return to, of

    # ------------------------------------------------------------ messages

    def _box(self) -> Any:
        if self._mailbox is None:
            self._mailbox = Host.here().core.Mailbox(self._group)
        return self._mailbox

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout: float) -> Operation:
        return self._box().start(True, dst, tag, *span(tensor), timeout)

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout: float) -> Operation:
        return self._box().start(False, -1 if src is None else src, tag, *span(tensor), timeout)

    # ------------------------------------------------------------ the end

    def abort(self, text: str) -> None:
        self._group.abort(text)

    def aborted(self) -> str | None:
        """Why the channel was ended, or None."""
        return self._group.aborted()

    def ended(self) -> list[int]:
        peers = Host.here().peers
        return [r for r, door in enumerate(self._doors) if r != self.rank and not peers[door].alive]

    def lateness(self) -> dict[str, tuple[list[float], int]]:
        by_code = self._group.lateness()
        return {
            label: ([ns * 1e-9 for ns in by_code[code][:-1]], by_code[code][-1])
            for label, code in self._labels.items()
            if code in by_code
        }

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Operation) -> list[Traffic]:
        sliced = sent * self.size > self._group.oneshot_to
        expected = expected_bytes(kind, self.size, self.rank, root, sent, received, sliced)
        return [Traffic(SAME_HOST, operation.peer_bytes, expected)]

    def close(self) -> None:
        if self._mailbox is not None:
            self._mailbox.close()
        self._group.close()
        HostChannel._graveyard.append(self)
        HostChannel._bury()

    @classmethod
    def _bury(cls) -> None:
        """Lets go of closed channels that no rank reads any more.

        When a channel is opened, each rank says of earlier ones that it reads them no more (GONE, in the core). When it
        is closed after a collective, all have said so: a rank keeps what is one channel's, whoever is quicker.
        """
        for _ in range(len(cls._graveyard)):
            try:
                channel = cls._graveyard.popleft()
            except IndexError:  # another thread is burying the rest
                return
            if not channel._reaped():
                cls._graveyard.append(channel)

    def _reaped(self) -> bool:
        if not self._group.reap():
            return False
        self._mailbox = self._block = None
        return True


def host_channel(
    store: dist.Store, name: str, rank: int, local: Sequence[int], members: Members, timeout: float
) -> HostChannel:
    """The channel between the group's ranks on this host; its lowest rank provides the control block."""
    key, block = f"control/{local[0]}", None
    if rank == local[0]:
        block = HostChannel.allocate_control(len(local))
        store.set(key, str(block.offset))
    who = [f"rank {members.ranks[local[0]]}"]
    offset = int(collect(store, [key], who, f"group '{name}'", timeout)[0])
    doors = [members.cards[r].door for r in local]
    labels = [members.ranks[r] for r in local]
    cores = usable_cores(members.cards[r].cores for r in local)
    return HostChannel(name, local.index(rank), doors, labels, 0, offset, cores, block)

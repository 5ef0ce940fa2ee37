"""A group over gloo (TCP): between hosts, and everywhere where the core is missing.

gloo only moves bytes here. What is summed is summed by ourselves, in rank order, so that all ranks hold the same bits
whichever way a group travels. Before each collective the ranks compare what they are about to do.
"""

from __future__ import annotations

import logging
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from distlib import native, settings
from distlib.comm import interfaces
from distlib.comm.arithmetic import reduce_in_order
from distlib.comm.bounded_store import BoundedStore
from distlib.comm.channel import BETWEEN_HOSTS, SAME_HOST, Collective, Traffic
from distlib.comm.gloo_bytes import Sent, broadcast_targets, expected_sent
from distlib.comm.gloo_faults import PATIENCE, Account, Gone, Waiting, close, why_closed
from distlib.comm.gloo_messages import GlooMessage, message_bytes
from distlib.comm.inherited import not_by_children
from distlib.comm.tensors import bytes_of, flat
from distlib.comm.threads import Runner, Step
from distlib.comm.watch import lookout
from distlib.comm.work import CollectiveError, Operation
from distlib.topology import Topology
from distlib.words import ranks_text

log = logging.getLogger("distlib")
_LOOK_SECONDS = 3.0  # how long a failed rank looks for others that failed in the same operation


@contextmanager
def _starting(what: str, account: Account) -> Iterator[None]:
    """gloo refuses a message to a rank that it knows to be gone."""
    try:
        yield
    except RuntimeError as error:
        if told := account.aborted():
            raise CollectiveError(told) from error
        raise CollectiveError(f"{what} cannot start: {error}", "dead") from error


def process_group(
    store: dist.Store, rank: int, size: int, timeout: float, master: str | None, labels: Sequence[int] = ()
) -> Any:
    """torch's gloo group, on the chosen interface. Every rank must call. CollectiveError if they do not meet, which
    calls ranks by their labels, if those are given."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout)
    interface = interfaces.choose(master)
    make = dist.ProcessGroupGloo
    options._devices = [make.create_device(interface=interface) if interface else make.create_default_device()]
    asked = BoundedStore(store)
    try:
        asked.set(f"here/{rank}", "1")
        with not_by_children():
            return make(store, rank, size, options)
    except RuntimeError as error:
        absent: list[int] = []
        with suppress(RuntimeError):  # the store has gone
            absent = [label for r, label in enumerate(labels) if not asked.has(f"here/{r}")]
        if absent:
            raise CollectiveError(
                f"{ranks_text(absent)} did not come within {timeout:.0f} s to make a group with rank {labels[rank]}: "
                "ended, hanging, or at something else; look at what it said",
                "timeout",
            ) from error
        raise CollectiveError(
            f"rank {rank} of {size} cannot reach the others over interface {interface or '(gloo chose)'}: {error}. "
            f"Set {interfaces.VARIABLE} to an interface that all hosts share, and look at the other ranks' output",
            "timeout",
        ) from error


@dataclass(frozen=True)
class Seat:
    """What a rank knows of a group that it joins.

    labels: what messages call the ranks (their global ranks). timeout: seconds to meet. master: an address that the
    others are reached by, which tells the network interface; None: gloo chooses.
    """

    store: dist.Store
    name: str
    rank: int
    labels: list[int]
    timeout: float
    master: str | None
    topology: Topology

    def connect(self, prefix: str, rank: int, size: int) -> Any:
        """gloo between some ranks of the group, this one being `rank` of `size`. All of them must call."""
        labels = self.labels if size == len(self.labels) else ()
        return process_group(dist.PrefixStore(prefix, self.store), rank, size, self.timeout, self.master, labels)


class GlooChannel:
    """Collectives by gloo between all ranks of a group. Steps run in order on one thread of the group."""

    by_streams, has_levels = False, True
    device = torch.device("cpu")  # for the lookout

    def __init__(self, seat: Seat) -> None:
        self.size = len(seat.labels)
        self.rank = seat.rank
        self.name = seat.name
        self._labels = seat.labels
        self._connections: dict[str, Any] = {}
        self._connections["all"] = seat.connect("gloo/", self.rank, self.size)
        self._runner = Runner(f"gloo-{self.name}")
        self._account = Account(BoundedStore(seat.store), seat.rank)
        self._waiting: set[Waiting] = set()
        self._ended = False  # by abort(), which does not wake who is in the middle of a transfer, either
        self._topology = seat.topology
        self._late: dict[str, tuple[list[float], int]] = {}
        self._broken: CollectiveError | None = None
        self._compare = settings.switch("DISTLIB_FINGERPRINT", True)
        # gloo's threads must not outlive the interpreter: what is still connected at exit is let go there.
        weakref.finalize(self, _leave, self._account, self._connections, self._waiting)
        lookout.add(self)

    @property
    def _sequence(self) -> int:
        """The number of the collective that runs, or ran last."""
        return self._account.sequence

    @property
    def _gloo(self) -> Any:
        return self._connected("all")

    def _connected(self, name: str) -> Any:
        """A connection that this rank has made. CollectiveError once it is closed."""
        if (connection := self._connections.get(name)) is None:
            raise self._broken or CollectiveError(f"group '{self.name}' was closed on this rank")
        return connection

    # ------------------------------------------------------------ collectives

    def start(self, collective: Collective, timeout: float, sync: bool) -> Operation:
        return self.start_step(collective, timeout, getattr(self, f"_{collective.kind}"))

    def start_step(
        self, collective: Collective, timeout: float, run: Callable[[Collective, timedelta], object]
    ) -> Step:
        """Queues `run`, with the checks that every collective gets before and after."""
        collective.arrived_ns = time.time_ns()
        waiting = Waiting(collective)

        def inside() -> object:
            if self._broken is not None:
                raise self._broken
            self._account.sequence = waiting.sequence = self._sequence + 1
            with waiting.inside(self._waiting):
                result = self._guarded(collective, timeout, run)
            if self._broken is not None:  # meanwhile, by another thread: some of it may not have been done
                raise self._broken
            self._account.finished = waiting.sequence
            return result

        waiting.step = self._runner.start(inside)
        return waiting.step

    def _guarded(self, c: Collective, timeout: float, run: Callable[[Collective, timedelta], object]) -> object:
        limit = timedelta(seconds=min(timeout, 1e8))
        begin = time.monotonic()
        try:
            if self._compare and self.size > 1:
                self._agree(c, limit)
            return run(c, limit)
        except CollectiveError as error:
            self._broken = self._broken or error
            raise
        except RuntimeError as error:
            if self._broken is None and (told := self._account.aborted()):
                self._broken = CollectiveError(told)
            elif self._broken is None:
                self._broken = self._explain(c, error, time.monotonic() - begin)
            raise self._broken from error

    def _agree(self, c: Collective, limit: timedelta) -> None:
        """All ranks compare {kind, dtype, op, root, count, chunk}: whoever differs is named, on every rank."""
        name, chunk = zlib.crc32(str(c.dtype).encode()), self.chunk_bytes(c)
        call = [native.KINDS.index(c.kind), name, native.OPS.index(c.op), c.root, c.count, chunk]
        mine = torch.tensor([*call, c.arrived_ns])
        all = torch.empty(self.size, mine.numel(), dtype=mine.dtype)
        self._gather_bytes(all, mine, limit)
        if bool((all[:, :-1] == mine[:-1]).all()):
            late, before = self._late.get(c.label, ([0.0] * self.size, 0))
            after = ((all[:, -1] - all[:, -1].min()) * 1e-9).tolist()
            self._late[c.label] = ([a + b for a, b in zip(late, after, strict=True)], before + 1)
            return
        calls = []
        for r, (kind, _, op, root, count, chunk, _) in enumerate(all.tolist()):
            mark = "" if all[r, 1] == mine[1] else ", another dtype"
            if bool((all[:, 5] != mine[5]).any()):
                mark += f", in two levels by {chunk >> 10} KiB" if chunk else ", flat"
            calls.append(
                f"rank {self._labels[r]} called {native.KINDS[kind]}"
                f"({count} elements, {native.OPS[op]}, root {root}{mark})"
            )
        raise CollectiveError(
            f"ranks disagree in call #{self._sequence} of group '{self.name}': {'; '.join(calls)}. "
            "Every rank must make the same calls in the same order",
            "mismatch",
        )

    def chunk_bytes(self, c: Collective) -> int:
        """Bytes of the chunks in which a collective goes in two levels (spanning.py); 0: it goes flat, and whole."""
        return 0

    def _explain(self, c: Collective, error: RuntimeError, seconds: float) -> CollectiveError:
        """Names the ranks that failed nowhere: those that ended, or hang."""
        missing = list(range(self.size))
        try:
            self._account.fail(f"{c.describe()} failed on rank {self._labels[self.rank]}: {error}")
            until = time.monotonic() + _LOOK_SECONDS
            while missing and time.monotonic() < until:
                missing = [r for r in missing if not self._account.has_failed(r)]
                time.sleep(0.05)
            names = ", ".join(f"rank {self._labels[r]}" for r in missing) or "none, who was late has come since"
        except RuntimeError as gone:  # the store went with rank 0
            names = f"unknown, as the store cannot be reached ({gone})"
        code = "timeout" if "imed out" in str(error) else "dead"
        why = str(error) if isinstance(error, Gone) else f"gloo says: {error}"
        return CollectiveError(
            f"{c.describe()} #{self._sequence} of group '{self.name}' failed on rank {self._labels[self.rank]} after "
            f"{seconds:.1f} s; ranks that ended or do not answer: {names}. {why}",
            code,
        )

    def _gather_bytes(self, out: torch.Tensor, mine: torch.Tensor, limit: timedelta) -> Sent:
        """Every rank's `mine` into the rows of `out`. gloo passes them on along a ring."""
        options = c10d.AllgatherOptions()
        options.timeout = limit
        rows = list(bytes_of(out).view(self.size, -1).unbind(0))
        self._gloo.allgather([rows], [bytes_of(mine)], options).wait()
        return {(self.rank + 1) % self.size: mine.nbytes * (self.size - 1)}

    def exchange(
        self, out: torch.Tensor, out_sizes: list[int], given: torch.Tensor, sizes: list[int], limit: timedelta
    ) -> Any:
        """Starts an all-to-all of byte ranges; returns gloo's work."""
        options = c10d.AllToAllOptions()
        options.timeout = limit
        return self._gloo.alltoall_base(out, given, out_sizes, sizes, options)

    def _agree_on_pieces(self, c: Collective, limit: timedelta) -> None:
        """All ranks compare what each sends to each with what that one expects: gloo would not survive a mismatch."""
        mine = torch.tensor([[t.nbytes for t in c.send], [t.nbytes for t in c.recv]])
        all = torch.empty(self.size, 2, self.size, dtype=mine.dtype)
        self._gather_bytes(all, mine, limit)
        sent, expected = all[:, 0], all[:, 1].t()
        for src, dst in (sent != expected).nonzero()[:1].tolist():
            raise CollectiveError(
                f"{c.describe()} #{self._sequence} of group '{self.name}': rank {self._labels[src]} sends "
                f"{sent[src, dst]} bytes to rank {self._labels[dst]}, which expects {expected[src, dst]}",
                "mismatch",
            )

    def _all_to_all(self, c: Collective, limit: timedelta) -> Sent:
        if self._compare and self.size > 1:
            self._agree_on_pieces(c, limit)
        return self._swap(c, limit)

    def _swap(self, c: Collective, limit: timedelta) -> Sent:
        given = [bytes_of(t) for t in c.send]
        sizes, out_sizes = [t.numel() for t in given], [t.numel() * t.element_size() for t in c.recv]
        out = torch.empty(sum(out_sizes), dtype=torch.uint8)
        self.exchange(out, out_sizes, torch.cat(given), sizes, limit).wait()
        for home, piece in zip(c.recv, out.split(out_sizes), strict=True):
            bytes_of(home).copy_(piece)
        return dict(enumerate(sizes))

    def _reduce_scatter(self, c: Collective, limit: timedelta) -> Sent:
        pieces = [torch.empty_like(t) for t in [c.recv[0]] * self.size]
        sent = self._swap(Collective("all_to_all", c.send, pieces), limit)
        reduce_in_order(c.recv[0], pieces, c.op, self.size)
        return sent

    def _all_reduce(self, c: Collective, limit: timedelta) -> Sent:
        """Reduce-scatter, then all-gather, in equal shares (the last padded)."""
        whole = flat(c.send[0])
        share = -(-whole.numel() // self.size)
        padded = whole if share * self.size == whole.numel() else torch.zeros(share * self.size, dtype=whole.dtype)
        if padded is not whole:
            padded[: whole.numel()] = whole
        mine = torch.empty(share, dtype=whole.dtype)
        send = list(padded.view(self.size, share).unbind(0))
        sent = self._reduce_scatter(Collective("reduce_scatter", send, [mine], c.op), limit)
        for to, bytes in self._gather_bytes(padded, mine, limit).items():
            sent[to] = sent.get(to, 0) + bytes
        if padded is not whole:
            whole.copy_(padded[: whole.numel()])
        return sent

    def _reduce(self, c: Collective, limit: timedelta) -> Sent:
        if self.rank != c.root:
            return self._gather(Collective("gather", c.send, [], root=c.root), limit)
        pieces = [torch.empty_like(c.send[0]) for _ in range(self.size)]
        self._gather(Collective("gather", c.send, pieces, root=c.root), limit)
        reduce_in_order(c.recv[0], pieces, c.op, self.size)
        return {}

    def _all_gather(self, c: Collective, limit: timedelta) -> Sent:
        out = torch.empty(self.size, c.send[0].numel(), dtype=c.dtype)
        sent = self._gather_bytes(out, c.send[0], limit)
        for home, piece in zip(c.recv, out, strict=True):
            home.copy_(piece.view_as(home))
        return sent

    def _broadcast(self, c: Collective, limit: timedelta) -> Sent:
        options = c10d.BroadcastOptions()
        options.rootRank, options.timeout = c.root, limit
        self._gloo.broadcast([bytes_of(c.send[0])], options).wait()
        return {to: c.send[0].nbytes for to in broadcast_targets(self.rank, c.root, self.size)}

    def _gather(self, c: Collective, limit: timedelta) -> Sent:
        options = c10d.GatherOptions()
        options.rootRank, options.timeout = c.root, limit
        outputs = [[bytes_of(t) for t in c.recv]] if self.rank == c.root else []
        self._gloo.gather(outputs, [bytes_of(c.send[0])], options).wait()
        return {c.root: c.send[0].nbytes}

    def _scatter(self, c: Collective, limit: timedelta) -> Sent:
        options = c10d.ScatterOptions()
        options.rootRank, options.timeout = c.root, limit
        inputs = [[bytes_of(t) for t in c.send]] if self.rank == c.root else []
        self._gloo.scatter([bytes_of(c.recv[0])], inputs, options).wait()
        return {to: t.nbytes for to, t in enumerate(c.send)}

    def _barrier(self, c: Collective, limit: timedelta) -> Sent:
        options = c10d.BarrierOptions()
        options.timeout = limit
        self._gloo.barrier(options).wait()
        return {}

    # ------------------------------------------------------------ messages

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout: float) -> Operation:
        if self._broken is not None:
            raise self._broken
        what = f"send to rank {self._labels[dst]} (tag {tag})"
        with _starting(what, self._account):
            work = self._gloo.send([message_bytes(tensor)], dst, tag)
        return GlooMessage(work, what, timeout, dst, tensor.nbytes, self._waiting, self._account)

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout: float) -> Operation:
        if self._broken is not None:
            raise self._broken
        what = f"recv from {'any rank' if src is None else f'rank {self._labels[src]}'} (tag {tag})"
        with _starting(what, self._account):
            if src is None:
                work = self._gloo.recv_anysource([message_bytes(tensor)], tag)
            else:
                work = self._gloo.recv([message_bytes(tensor)], src, tag)
        return GlooMessage(work, what, timeout, src, 0, self._waiting, self._account)

    # ------------------------------------------------------------ what waits in vain

    def look(self) -> bool:
        """Called by the lookout: ends what waits for a rank that has gone."""
        aborted: str | None = None
        for waiting in list(self._waiting):
            now = time.monotonic()
            if now - waiting.begun <= PATIENCE:
                continue
            ask = waiting.may_ask(now)  # each message seldom: there may be many
            if not (ask or self._ended or waiting.call is not None):
                continue
            if aborted is None:
                aborted = self._aborted_by_any()
            told = waiting.why = aborted or self._told(waiting)
            if told or (ask and waiting.judge(self._in_vain(waiting, now), now)):
                self._give_up(waiting, now - waiting.begun, aborted)
        return False

    def _aborted_by_any(self) -> str:
        """Why this rank or another ended the group; "" if none did, as far as can be seen."""
        if self._ended:
            return str(self._broken)
        return self._account.aborted()

    def _told(self, waiting: Waiting) -> str:
        """Why a collective has failed, as another rank has said; "" if none has."""
        return "" if waiting.call is None else self._account.failed(waiting.sequence)

    def _in_vain(self, waiting: Waiting, now: float) -> str:
        """Whose end there is no reason to wait for any more; "" if there is, as far as can be seen."""
        connection = self._connections.get("all")
        if connection is None:  # closed in good order: what is under way goes on
            return ""
        if waiting.call is None and waiting.peer >= 0:
            return why_closed(connection, waiting.peer)
        closed = {}
        for rank in set(range(self.size)) - {self.rank} - self._account.left:
            if why := why_closed(connection, rank):
                closed[rank] = why
                if waiting.call is not None and not self._account.has_left(rank, waiting.sequence, now - waiting.begun):
                    return f"rank {self._labels[rank]} has ended in the middle of it: {why}"
        if waiting.call is None and len(closed) == self.size - 1 - len(self._account.left):
            return next(iter(closed.values()), "all other ranks have left")
        return ""

    def _give_up(self, waiting: Waiting, seconds: float, aborted: str) -> None:
        """aborted: why a rank ended the group, if one did."""
        step = waiting.step
        if step is None or waiting not in self._waiting:  # it is over
            return
        self._waiting.discard(waiting)
        if isinstance(step, GlooMessage):
            text = f"{step.what} failed after {seconds:.1f} s: {waiting.why}"
            step.fail(CollectiveError(aborted) if aborted else CollectiveError(text, "dead"))
            return
        assert waiting.call is not None
        error = CollectiveError(aborted) if aborted else self._explain(waiting.call, Gone(waiting.why), seconds)
        self._broken = error
        self._part()
        step.fail(error)
        self._runner.abandon(error)

    def _part(self) -> None:
        """Closes all connections of this rank at once, whoever is inside. `_broken` says why."""
        with suppress(KeyError):  # another thread may do so, too
            while self._connections:
                close(self._connections.popitem()[1])

    # ------------------------------------------------------------ accounts

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Operation) -> list[Traffic]:
        counted = operation.result if isinstance(operation, Step) else {}
        assert isinstance(counted, dict)
        formula = expected_sent(kind, self.size, self.rank, root, sent, received)
        if isinstance(operation, GlooMessage):
            formula = counted
        return self._by_link(counted, formula)

    def _by_link(self, counted: Sent, formula: Sent) -> list[Traffic]:
        """Bytes by destination as bytes by link; what a rank keeps crosses none."""
        local = set(self._topology.local_ranks(self.rank))
        rows = []
        for link, ranks in ((SAME_HOST, local - {self.rank}), (BETWEEN_HOSTS, set(range(self.size)) - local)):
            bytes, expected = (sum(n for to, n in d.items() if to in ranks) for d in (counted, formula))
            if bytes or expected or link == BETWEEN_HOSTS:
                rows.append(Traffic(link, bytes, expected))
        return rows

    def lateness(self) -> dict[str, tuple[list[float], int]]:
        return dict(self._late)

    # ------------------------------------------------------------ the end

    def abort(self, text: str) -> None:
        """Later calls fail here; the others see this rank's connections close."""
        self._broken = self._broken or CollectiveError(text)
        self._account.abort(text)
        self._part()
        self._ended = True

    def aborted(self) -> str | None:
        return None if self._broken is None else str(self._broken)

    def ended(self) -> list[int]:
        return []

    def close(self) -> None:
        self._runner.close()
        _leave(self._account, self._connections, set())


def _leave(account: Account, connections: dict[str, Any], waiting: set[Waiting]) -> None:
    """Says good-bye, and lets go of the connections; once. At the end of the process those who still wait for a message
    are woken: inside gloo they would take the process down."""
    if connections:
        account.leave()
        if waiting:
            for connection in connections.values():
                close(connection)
        connections.clear()
        until = time.monotonic() + PATIENCE
        while waiting and time.monotonic() < until:
            time.sleep(0.01)

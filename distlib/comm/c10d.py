"""A group of another c10d backend (NCCL, say), seen as a channel: plain c10d calls, same interface."""

from __future__ import annotations

import threading
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from distlib import native
from distlib.comm.channel import BETWEEN_HOSTS, Collective, Traffic
from distlib.comm.gloo_bytes import expected_sent
from distlib.comm.work import CollectiveError, Operation

OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
}


def method_of(pg: Any, *names: str) -> Any:
    """A method of a process group that torch has renamed, by any of its names."""
    return next(getattr(pg, name) for name in names if hasattr(pg, name))


class _C10dOperation:
    """A c10d work, seen as an operation. `after` runs once on success (gloo has no average: the sum is divided
    here)."""

    peer_bytes = sequence = waited_ns = 0

    def __init__(self, work: Any, what: str, after: Any = None) -> None:
        self._work = work
        self._what = what
        self._after = after
        self._lock = threading.Lock()
        self._over = False
        self.code = 0
        self.text = ""
        self.source = -1

    @property
    def done(self) -> bool:
        """Asks the backend, as nobody may ever wait. (gloo ends messages only in their wait().)"""
        if not self._over and self._work.is_completed():
            self.wait(1e8)
        return self._over

    def wait(self, seconds: float) -> bool:
        with self._lock:
            if self._over:
                return True
            try:
                self._work.wait(timedelta(seconds=min(seconds, 1e8)))
                if self._after is not None:
                    self._after()
                self.source = self._work._source_rank() if self._what == "recv" else -1
            except RuntimeError as error:
                self.code, self.text = native.CODES.index("aborted"), f"{self._what}: {error}"
            self._over = True
            return True

    def notify(self, id: int) -> bool:
        self.wait(1e8)
        return False


class C10dChannel:
    """Collectives of an existing process group. What it promises (order of sums, errors) is that backend's."""

    by_streams = has_levels = False
    device = torch.device("cpu")  # where its tensors are

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._weak = weakref.ref(process_group)  # its maker destroys it, and with it what it runs
        self._averages = "gloo" not in str(dist.get_backend(process_group))

    @property
    def _pg(self) -> dist.ProcessGroup:
        pg = self._weak()
        if pg is None:
            raise CollectiveError("the process group was destroyed")
        return pg

    def start(self, c: Collective, timeout: float, sync: bool) -> Operation:
        pg, averages = self._pg, self._averages or c.op != "avg"
        op = OPS[c.op] if averages else dist.ReduceOp.SUM
        size = pg.size()
        work: Any
        options: Any
        if c.kind == "barrier":
            work = pg.barrier()
        elif c.kind == "all_reduce":
            work = pg.allreduce(c.send, op)
        elif c.kind == "reduce":
            work = pg.reduce(c.send[0], c.root, op)
        elif c.kind == "broadcast":
            work = pg.broadcast(c.send[0], c.root)
        elif c.kind == "all_gather":
            work = pg.allgather([c.recv], c.send)
        elif c.kind == "reduce_scatter":
            options = c10d.ReduceScatterOptions()
            options.reduceOp = op
            work = pg.reduce_scatter(c.recv, [c.send], options)
        elif c.kind == "gather":
            options = c10d.GatherOptions()
            options.rootRank = c.root
            work = pg.gather([c.recv] if c.recv else [], c.send, options)
        elif c.kind == "scatter":
            options = c10d.ScatterOptions()
            options.rootRank = c.root
            work = pg.scatter(c.recv, [c.send] if c.send else [], options)
        else:
            work = pg.alltoall(c.recv, c.send)
        after = None if averages else lambda: [t.div_(size) for t in c.recv]
        return _C10dOperation(work, c.kind, after)

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout: float) -> Operation:
        return _C10dOperation(self._pg.send([tensor], dst, tag), "send")

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout: float) -> Operation:
        work = self._pg.recv_anysource([tensor], tag) if src is None else self._pg.recv([tensor], src, tag)
        return _C10dOperation(work, "recv")

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Operation) -> list[Traffic]:
        """The backend does not say what it moves: the formula stands for the count."""
        bytes = expected_sent(kind, self._pg.size(), self._pg.rank(), root, sent, received)
        moved = sum(n for to, n in bytes.items() if to != self._pg.rank())
        return [Traffic(BETWEEN_HOSTS, moved, moved)]

    def lateness(self) -> dict[str, tuple[list[float], int]]:
        """Not known on other backends."""
        return {}

    def abort(self, text: str) -> None:
        self._pg.abort()

    def aborted(self) -> str | None:
        """Not known on other backends."""
        return None

    def ended(self) -> list[int]:
        """Not known here."""
        return []

    def close(self) -> None:
        """The process group is its maker's to destroy."""

"""Ranks for tests: `run_ranks(n, fn, *args)` runs fn(rank, n, *args) in n freshly forked processes.

    pytest process               fork server (rank_server.py)           ranks
    ------------------           --------------------------------      ------------------------
    run_ranks(4, fn) ----------> torch and distlib imported once,  --> fork: fn(0, 4) ... fn(3, 4)
    outcomes        <----------  one thread, so that fork is safe  <-- value, traceback or signal

A fork costs some 10 ms where a new process costs seconds. Each call has its own processes and rendezvous, so
a rank may be killed, stopped or left hanging: it ends with the call, and so does everything it started.

`fn` and its arguments are sent by pickle: `fn` is a top-level function of a test module. Ranks see the
caller's environment and what torchrun would set (RANK, WORLD_SIZE, MASTER_ADDR, ...), so that `env://` and
`distlib.init()` work in them; `process_group` and `store` below are for tests that want one at hand.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import psutil
import rank_server

SERVER = Path(rank_server.__file__)
LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_", "TORCHELASTIC_", "SM_", "GROUP_")


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    kind: "value" (it returned), "exception", "exit" (os._exit), "signal" (killed), "stopped" (by SIGSTOP, and
    no other rank was left), "timeout" (it had to be killed: `text` holds its stacks).
    """

    rank: int
    kind: str
    value: Any
    text: str  # traceback, stacks or what happened; "" for a value
    code: int | None  # the exit code or the signal's number
    seconds: float  # from fork to end
    output: str  # the end of its stdout and stderr

    @property
    def ok(self) -> bool:
        return self.kind == "value"

    def __str__(self) -> str:
        verb = "raised" if self.kind == "exception" else "ended"
        head = f"rank {self.rank} ({self.kind}, {self.seconds:.1f} s)"
        tail = f"\n--- its output:\n{self.output.rstrip()}" if self.output.strip() else ""
        return head + (f" {verb}: {self.text}" if self.text else "") + tail


class RankError(AssertionError):
    """Ranks failed. The message has every failing rank's traceback or stacks; `outcomes` has all ranks'."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        failed = [outcome for outcome in outcomes if not outcome.ok]
        title = f"{len(failed)} of {len(outcomes)} ranks failed"
        super().__init__("\n\n".join([title, *map(str, failed)]))
        self.outcomes = outcomes


def run_ranks(
    n: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60,
    env: Mapping[str, str | None] | None = None,
) -> list[Any]:
    """fn(rank, n, *args) in n processes. Returns the values by rank, or raises RankError.

    timeout: seconds; then every rank that still runs writes its stacks and is killed. That happens 10 s after
    a rank has failed, too.
    env: variables to set in the ranks, or to remove (None), on top of the caller's environment.
    """
    outcomes = pool.run(n, fn, args, timeout=timeout, env=env or {}, grace=10)
    if not all(outcome.ok for outcome in outcomes):
        raise RankError(outcomes)
    return [outcome.value for outcome in outcomes]


def run_ranks_raw(
    n: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60,
    env: Mapping[str, str | None] | None = None,
    grace: float | None = None,
) -> list[Outcome]:
    """Like `run_ranks`, for tests of faults: returns every rank's Outcome and raises for none.

    A rank may kill or stop itself (os.kill(os.getpid(), signal.SIGKILL)) or another. The call ends when all
    ranks have ended, when all that are left are stopped, after `timeout`, or `grace` seconds after the first
    failure.
    """
    return pool.run(n, fn, args, timeout=timeout, env=env or {}, grace=grace)


def shared_files() -> set[str]:
    """Names in /dev/shm, but those of Open MPI, CUDA's driver, OpenMP and multiprocessing: a test that runs beside this
    one may have started them."""
    others = ("sm_segment.", "ompi.", "cuda.shm.", "__KMP_REGISTERED_LIB_", "sem.mp-")
    return {name for name in os.listdir("/dev/shm") if not name.startswith(others)}


def store(timeout: float = 60) -> Any:
    """In a rank: a client of the call's own TCPStore. The test process holds it: it outlives every rank."""
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore("test", TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout)))


@contextlib.contextmanager
def process_group(rank: int, n: int, backend: str = "distlib", timeout: float = 30) -> Iterator[Any]:
    """In a rank: init_process_group on the call's store; destroyed at the end, unless the body raises.

    timeout: seconds, of the group's collectives; to meet, its ranks have 30 s at least. Groups and wrappers that are
    made of it have what it had when they were made. Yields the world group.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    to_meet = timedelta(seconds=max(timeout, 30))
    dist.init_process_group(backend, store=store(), rank=rank, world_size=n, timeout=to_meet)
    if timeout < 30:
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
    yield dist.group.WORLD
    dist.destroy_process_group()


class Pool:
    """The fork server as the test process sees it. It starts with the first call and ends with `close`."""

    def __init__(self) -> None:
        self.calls = 0
        self.strays: list[str] = []  # processes that the last call's ranks left behind though none was killed
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._log: IO[bytes] | None = None

    def run(
        self,
        n: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        timeout: float,
        env: Mapping[str, str | None],
        grace: float | None,
    ) -> list[Outcome]:
        """One call; see run_ranks. Interrupted (Ctrl-C, pytest-timeout), it prints the ranks' stacks."""
        import torch.distributed as dist

        function = _by_name(fn, args)
        with self._lock:
            self.calls += 1
            control = self._start()
            rendezvous = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            call = {
                "n": n,
                "function": function,
                "environ": _environment(n, rendezvous.port, env),
                "sys_path": sys.path,
                "cwd": os.getcwd(),
                "timeout": timeout,
                "grace": grace,
            }
            try:
                rank_server.send(control, call)
                reply = rank_server.receive(control)
            except (EOFError, OSError) as error:
                raise RuntimeError(f"the fork server died during the call: {self._end()}") from error
            except BaseException:
                self._cancel(control)
                raise
            finally:
                del rendezvous
        if "error" in reply:
            raise RuntimeError(reply["error"])
        outcomes = [_outcome(fields) for fields in reply["outcomes"]]
        self.strays = reply["strays"] if all(o.kind in ("value", "exception") for o in outcomes) else []
        return outcomes

    @property
    def server_pid(self) -> int | None:
        return self._server.pid if self._server else None

    def children(self) -> list[psutil.Process]:
        """Every process below the fork server. Between calls there is none."""
        if self._server is None or self._server.poll() is not None:
            return []
        return psutil.Process(self._server.pid).children(recursive=True)

    def close(self) -> None:
        """Ends the fork server; a later call starts another."""
        with self._lock:
            self._end()

    def _start(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, str(SERVER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, **threads},
                start_new_session=True,  # Ctrl-C is for pytest, which then tells the server
            )
        self._control = ours
        try:
            rank_server.send(ours, {"sys_path": sys.path, "cwd": os.getcwd()})
            answer = rank_server.receive(ours)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the fork server died at its start: {self._end()}") from error
        except BaseException:
            self._end()
            raise
        if "error" in answer:
            self._end()
            raise RuntimeError(f"the fork server could not start:\n{answer['error']}")
        return ours

    def _cancel(self, control: socket.socket) -> None:
        """Ends the running call, prints what its ranks were doing, and the server with it."""
        try:
            control.settimeout(10)
            control.send(b"!")
            for fields in rank_server.receive(control)["outcomes"]:
                print(_outcome(fields), file=sys.stderr)
        except (EOFError, OSError) as error:
            print(f"the fork server did not tell its ranks' stacks: {error!r}", file=sys.stderr)
        self._end()

    def _end(self) -> str:
        """Ends the server and whatever is below it. Returns what it had printed."""
        if self._server is None or self._control is None or self._log is None:
            return ""
        below = self.children()
        self._control.close()
        try:
            self._server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=10)
        self._log.seek(0)
        printed = self._log.read().decode(errors="replace")
        self._log.close()
        self._server = self._control = self._log = None
        return printed or "it printed nothing"


def _by_name(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """fn and its arguments as a pickle that another process can read."""
    where = f"{fn.__module__}.{fn.__qualname__}"
    if fn.__module__ == "__main__" or "<" in fn.__qualname__:
        raise TypeError(f"{where} cannot be sent to ranks: make it a top-level function of a test module")
    return pickle.dumps((fn, args))


def _environment(n: int, port: int, env: Mapping[str, str | None]) -> dict[str, str]:
    """The caller's environment without traces of a launcher, what torchrun would set, and `env`."""
    base: dict[str, str | None] = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    base |= {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is held by the test process, not by rank 0
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    return {name: value for name, value in base.items() if value is not None}


def _outcome(fields: dict[str, Any]) -> Outcome:
    payload = fields.pop("payload")
    return Outcome(value=pickle.loads(payload) if payload else None, **fields)


pool = Pool()
atexit.register(pool.close)

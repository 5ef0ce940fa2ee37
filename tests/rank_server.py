"""The fork server behind tests/ranks.py: forks the ranks of a call, watches them, and leaves nothing behind.

One thread, one call at a time. Messages on the control socket are pickles after an 8-byte length:

    in:  {"sys_path", "cwd"}                                                    once, at the start
    out: {"ready": pid} or {"error": traceback}
    in:  {"n", "function", "environ", "sys_path", "cwd", "timeout", "grace"}    a call
    out: {"outcomes": [dict per rank], "strays": [text]} or {"error": text}

A single byte during a call cancels it (the ranks' stacks still come back); end of file ends the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import pkgutil
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import IO, Any, NoReturn

import psutil

# Imported once here rather than by every rank. All of it leaves the process with one thread (checked).
WARM = (
    "numpy",
    "pytest",
    "hypothesis",
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.nn.parallel",
    "torch._dynamo",  # imported by the first optimizer
    "torch.utils.serialization",  # by the first torch.save
    "distlib",
)
OUTER = ("bench", "cli", "doctor", "integrations", "_")  # what of distlib no rank imports, or few do
TICK = 0.02  # seconds between looks at ranks that say nothing
OUTPUT_TAIL = 16_384  # bytes of a rank's stdout and stderr that are reported


def import_rooms() -> dict[str, str | None]:
    """Imports distlib's own modules, but for those that need a package that is not here, as where `make gpu` runs: a
    rank that asks for one tells. Returns the settings that were read on the way, with their values here."""
    import distlib
    from distlib import settings

    read: dict[str, str | None] = {}

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(name: str, *rest: Any) -> Any:
            read[name] = os.environ.get(name)
            return function(name, *rest)

        return noted

    readers = {name: getattr(settings, name) for name in ("integer", "switch")}
    for name, function in readers.items():
        setattr(settings, name, noting(function))
    try:
        for module in pkgutil.walk_packages(distlib.__path__, "distlib."):
            if not module.name.split(".")[1].startswith(OUTER):
                import_if_possible(module.name)
    finally:
        for name, function in readers.items():
            setattr(settings, name, function)
    if "distlib._native" in sys.modules:
        raise RuntimeError("a module of distlib loads the core when it is imported: ranks could no more choose it")
    return read


def import_if_possible(name: str) -> None:
    """Imports a module, unless a package of others is missing."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "distlib":
            raise


def send(channel: socket.socket, message: object) -> None:
    """One message, length first."""
    data = pickle.dumps(message)
    channel.sendall(len(data).to_bytes(8, "little") + data)


def receive(channel: socket.socket) -> Any:
    """One message; EOFError when the other side has closed."""
    return pickle.loads(_receive_bytes(channel, int.from_bytes(_receive_bytes(channel, 8), "little")))


def _receive_bytes(channel: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = channel.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError("the other side closed the control socket")
        data += part
    return bytes(data)


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the server alone looks after its ranks."""
    if sys.platform.startswith("linux") and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Rank:
    """One forked rank, seen from the server."""

    def __init__(self, number: int, call: dict[str, Any], control: socket.socket) -> None:
        self.number = number
        self.result = bytearray()
        self.outcome: dict[str, Any] | None = None
        self.stacks = tempfile.TemporaryFile()
        self.output = tempfile.TemporaryFile()
        self.started = time.monotonic()
        read_end, write_end = os.pipe()
        server = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            control.close()
            os.close(read_end)
            _rank_main(number, call, server, write_end, self.stacks, self.output)
        os.close(write_end)
        os.set_blocking(read_end, False)
        self.pipe = read_end

    @property
    def running(self) -> bool:
        return self.outcome is None

    def look(self) -> None:
        """Takes what the rank has written; sets `outcome` once it has ended, and ends what it started."""
        self._drain()
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
        self._drain()
        self._end_group()  # before the pid is given back, so that it cannot be another's
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status < 0:
            name = signal.Signals(-status).name
            self.settle("signal", text=f"killed by {name}", code=-status)
        elif status == 0 and self.result:
            kind, payload, text = pickle.loads(self.result)
            self.settle(kind, payload=payload, text=text)
        else:
            self.settle("exit", text=f"exited with code {status} without returning", code=status)

    def settle(self, kind: str, *, payload: bytes = b"", text: str = "", code: int | None = None) -> None:
        """Records how the rank ended. `payload` is the pickled value."""
        self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, self.output.tell() - OUTPUT_TAIL))
        self.outcome = {
            "rank": self.number,
            "kind": kind,
            "payload": payload,
            "text": text,
            "code": code,
            "seconds": time.monotonic() - self.started,
            "output": self.output.read().decode(errors="replace"),
        }

    def is_stopped(self) -> bool:
        """Whether the rank is halted by SIGSTOP or the like."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    def stack_text(self) -> str:
        self.stacks.seek(0)
        return self.stacks.read().decode(errors="replace")

    def kill(self, kind: str, text: str) -> None:
        """Ends a rank that has not ended by itself, and what it started."""
        self._drain()
        self._end_group()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.settle(kind, text=text)

    def close(self) -> None:
        os.close(self.pipe)
        self.stacks.close()
        self.output.close()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.pipe, 1 << 20):
                self.result += part

    def _end_group(self) -> None:
        """Kills the rank's process group: it leads one of its own, or is about to and is alone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _rank_main(
    number: int, call: dict[str, Any], server: int, result: int, stacks: IO[bytes], output: IO[bytes]
) -> NoReturn:
    """In the rank: sets the scene, runs the function, sends its value or traceback, and ends at once."""
    code = 70
    try:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it died before the line above
            os._exit(code)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.enable(file=2)
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        os.environ.clear()
        os.environ.update(call["environ"])
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
        sys.path[:] = call["sys_path"]
        os.chdir(call["cwd"])
        message = pickle.dumps(_run(number, call))
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(result, "wb") as pipe:
            pipe.write(message)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked child must never return into the server's code
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _run(number: int, call: dict[str, Any]) -> tuple[str, bytes, str]:
    """(kind, pickled value, text) of one rank's function."""
    try:
        function, args = pickle.loads(call["function"])
        value = pickle.dumps(function(number, call["n"], *args))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the test's result
        # The variables of a failed assertion, as pytest would show them; other errors explain themselves.
        show = isinstance(error, AssertionError)
        lines = "".join(traceback.TracebackException.from_exception(error, capture_locals=show).format())
        return "exception", b"", "\n".join(line[:1000] for line in lines.splitlines())
    multiprocessing = sys.modules.get("multiprocessing")
    for child in multiprocessing.active_children() if multiprocessing else []:
        child.terminate()  # what Python does with daemons at exit; this process skips its exit handlers
        child.join()
    return "value", value, ""


def _gather_stacks(ranks: list[Rank]) -> None:
    """Makes each of `ranks`, stopped ones too, write its Python stacks; waits for that 10 s at most."""
    for rank in ranks:
        os.kill(rank.pid, signal.SIGUSR1)
        os.kill(rank.pid, signal.SIGCONT)
    sizes: list[int] = []
    end = time.monotonic() + 10
    while time.monotonic() < end:
        time.sleep(2 * TICK)
        before, sizes = sizes, [os.fstat(rank.stacks.fileno()).st_size for rank in ranks]
        if before == sizes and all(sizes):
            return


def _watch(ranks: list[Rank], call: dict[str, Any], control: socket.socket) -> str:
    """Why watching ended: "done", "stopped", "timeout", "grace" or "cancelled"; EOFError if pytest died."""
    end = time.monotonic() + call["timeout"]
    end_of_grace: float | None = None
    while True:
        for rank in ranks:
            if rank.running:
                rank.look()
        waiting = [rank for rank in ranks if rank.running]
        if not waiting:
            return "done"
        failed = any(rank.outcome and rank.outcome["kind"] != "value" for rank in ranks)
        now = time.monotonic()
        if failed and call["grace"] is not None and end_of_grace is None:
            end_of_grace = now + call["grace"]
        if all(rank.is_stopped() for rank in waiting):
            return "stopped"
        if now > end:
            return "timeout"
        if end_of_grace is not None and now > end_of_grace:
            return "grace"
        sources: list[Any] = [control, *(rank.pipe for rank in waiting)]
        ready, _, _ = select.select(sources, [], [], TICK)
        if control in ready:
            if not control.recv(1):
                raise EOFError("the test process has gone")
            return "cancelled"
        if ready:  # a pipe that has ended stays readable until the process is reaped
            time.sleep(0.001)


def _end_strays() -> list[str]:
    """Kills and reaps every process that is left below the server. Returns their command lines."""
    strays: list[str] = []
    while children := psutil.Process().children():
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    strays.append(f"{child.pid}: {' '.join(child.cmdline()) or child.name()}")
                child.kill()
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
    return strays


def _call(call: dict[str, Any], control: socket.socket, read: dict[str, str | None]) -> dict[str, Any]:
    """Runs one call to its end. read: settings that can no more be others, see import_rooms."""
    for name, value in read.items():
        if call["environ"].get(name) != value:
            return {"error": f"{name} was read when distlib was imported, before the ranks were forked: read it later"}
    ranks: list[Rank] = []
    try:
        for number in range(call["n"]):
            ranks.append(Rank(number, call, control))
        why = _watch(ranks, call, control)
        late = [rank for rank in ranks if rank.running]
        reason = {
            "timeout": f"did not finish in {call['timeout']:g} s",
            "grace": f"was still running {call['grace']} s after another rank had failed",
            "cancelled": "was still running when the test was interrupted",
            "stopped": "is stopped, and no running rank is left to continue it",
        }
        stopped = {rank.number for rank in late if rank.is_stopped()}
        _gather_stacks(late)
        for rank in late:
            halted = " (it was stopped)" if rank.number in stopped and why != "stopped" else ""
            kind = "stopped" if why == "stopped" else "timeout"
            rank.kill(kind, f"{reason[why]}{halted}; its stacks:\n{rank.stack_text() or '(none came)'}")
    finally:
        for rank in ranks:
            if rank.running:
                rank.kill("signal", "killed with the server")
            rank.close()
        strays = _end_strays()
    return {"outcomes": [rank.outcome for rank in ranks], "strays": strays}


def serve(control: socket.socket) -> None:
    """Serves calls until the test process closes the socket."""
    setting = receive(control)
    sys.path[:] = setting["sys_path"]
    os.chdir(setting["cwd"])
    try:
        for name in WARM:
            import_if_possible(name)
        read = import_rooms()
        sys.modules["torch"].set_num_threads(1)
        threads = psutil.Process().num_threads()
        if threads != 1:
            raise RuntimeError(f"the fork server has {threads} threads after its imports; it must have one")
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    except BaseException:  # noqa: BLE001 - told to the test process, which raises
        send(control, {"error": traceback.format_exc()})
        return
    gc.collect()
    gc.freeze()  # shared pages stay shared in the ranks
    send(control, {"ready": os.getpid()})
    while True:
        try:
            send(control, _call(receive(control), control, read))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

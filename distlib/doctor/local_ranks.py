"""Ranks of our own on this host, for the self-test and the benchmark: started, waited for, and always ended.

    LocalRanks(2, "module:function", arguments)     the store of the rendezvous lives here
        rank 0: python -c ... module:function       answers with one JSON value
        rank 1: python -c ... module:function

A rank finds the environment that torchrun would give it. It ends with this process, however that ends: a rank
watches its standard input, which the kernel closes. One that runs too long shows its stacks and is killed.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from torch.distributed import TCPStore

_GRACE = 5.0  # seconds that the others get once a rank has failed: they notice by themselves and say how
_STACKS = 0.5  # seconds to write stacks in
# The path comes first: nothing is imported from the current folder that this process would not find. Then the
# watch, since to import torch takes seconds: standard input is a pipe that nothing is written to, so that it ends
# when the parent does.
_START = """
import sys
sys.path[:] = sys.argv[3:]
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
from distlib.doctor.local_ranks import be_rank
be_rank(sys.argv[1], sys.argv[2])
"""


@dataclass(frozen=True)
class Ending:
    """How a rank ended. code: its exit code, or a signal's number, negative; None: it had to be killed."""

    rank: int
    code: int | None
    value: Any  # what its function returned; None if it did not
    output: str  # what it printed, or its stacks

    @property
    def ok(self) -> bool:
        return self.code == 0


class LocalRanks:
    """`size` processes that run `function` ("module:name") with `arguments` (what JSON can say).

    As a context manager it kills, at the end of the block, those that are still there.
    """

    def __init__(self, size: int, function: str, *arguments: Any, env: Mapping[str, str | None] | None = None) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._answers: list[IO[bytes]] = []
        self._outputs: list[IO[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, "-c", _START, function, json.dumps(arguments), *sys.path]
        for rank in range(size):
            self._answers.append(tempfile.TemporaryFile())
            self._outputs.append(tempfile.TemporaryFile())
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=self._answers[rank],
                    stderr=self._outputs[rank],
                    env=_environment(rank, size, self._store.port, env or {}),
                )
            )

    def wait(self, timeout: float) -> list[Ending]:
        """Until all ranks have ended, `timeout` seconds from now at the most; less once one has failed."""
        until = time.monotonic() + timeout
        failed = False
        while None in (codes := [process.poll() for process in self._processes]) and time.monotonic() < until:
            if not failed and any(codes):
                failed, until = True, min(until, time.monotonic() + _GRACE)
            time.sleep(0.01)
        killed = self._kill()
        return [self._ending(rank, rank in killed) for rank in range(len(self._processes))]

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kill()
        for file in (*self._answers, *self._outputs):
            file.close()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()

    def _kill(self) -> set[int]:
        """Ends ranks that still run, which first write down what they are doing. Returns which ones."""
        running = {rank for rank, process in enumerate(self._processes) if process.poll() is None}
        for rank in running:
            self._processes[rank].send_signal(signal.SIGUSR1)
        if running:
            time.sleep(_STACKS)
        for rank in running:
            self._processes[rank].kill()
            self._processes[rank].wait()
        return running

    def _ending(self, rank: int, was_killed: bool) -> Ending:
        answer, output = (_content(files[rank]) for files in (self._answers, self._outputs))
        code = None if was_killed else self._processes[rank].returncode
        return Ending(rank, code, json.loads(answer) if code == 0 else None, output)


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _environment(rank: int, size: int, port: int, env: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment, what torchrun would set, and `env` (None removes a variable)."""
    merged: dict[str, str | None] = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "distlib-local",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **env,
    }
    return {name: value for name, value in merged.items() if value is not None}


# ---- in a rank ---------------------------------------------------------------------------------------------


def be_rank(function: str, arguments: str) -> None:
    """The whole life of a rank. Standard output carries the answer alone; prints go to standard error."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    module, _, name = function.partition(":")
    value = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    with answer:
        json.dump(value, answer)

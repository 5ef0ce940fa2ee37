"""Runs the distributed tests that the installed torch carries, on any backend, forking the ranks of each test.

torch's wheel holds the class that its own continuous integration runs on gloo, NCCL and MPI
(`torch.testing._internal.distributed.distributed_test.DistributedTest`). It decides what to skip by the backend's
name, in decorators that run once, at import:

    BACKEND=gloo   ->  import the module: every test that gloo has is there, the others are marked as skipped
    BACKEND=distlib -> from then on; but where a test compares it with "gloo", they are equal

so another backend is asked exactly what gloo is asked. `--like mpi` opens the tests that torch reserves for MPI
(all_to_all on CPU tensors). World size and decorators are fixed at import: one process of this script per pair.

    python tests/torch_suite/runner.py --backend distlib --world 3 --match 'test_all_reduce'

It writes one JSON object per test on its standard output: name, outcome ("pass", "skip", "fail"), seconds, detail.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import types
import unittest
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import on_cpu

LOG_PREFIX = re.compile(r"^(\[rank\d+\]:)?[EWI]\d{4} \S+ \d+ \S+\] ", re.MULTILINE)  # of torch's logger
RANK_RAISED = 10  # the exit code torch's harness uses for a rank whose test raised
PRELOAD = (  # imported by tests on first use: once here instead of once per rank
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.nn.parallel.distributed",
    "torch.profiler",
)


@dataclass(frozen=True)
class Result:
    """How one test ended on all its ranks. detail: tracebacks, stacks or the reason of a skip."""

    name: str
    outcome: str
    seconds: float
    detail: str


class Guise(str):
    """A backend's name that also equals the name of the backend it is to be treated like."""

    like = ""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.like

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class Barrier:
    """Ranks of a test meet without a process group: the n-th call returns when enough ranks made their n-th call.

    Each rank writes the number of its last call into a file named after its process.
    """

    calls = 0

    @classmethod
    def init(cls) -> None:
        cls.calls = 0

    @classmethod
    def sync(cls, wait_for: int | None = None, timeout: float = 10) -> None:
        cls.calls += 1
        wanted = wait_for or int(os.environ["WORLD_SIZE"])
        folder = Path(os.environ["TEMP_DIR"])
        written = folder / f"call_of_{os.getpid()}"
        written.write_text(str(cls.calls))
        written.replace(folder / "barrier" / str(os.getpid()))
        end = time.monotonic() + max(timeout, 30)
        while sum(int(file.read_text()) >= cls.calls for file in (folder / "barrier").iterdir()) < wanted:
            if time.monotonic() > end:
                raise RuntimeError("barrier timeout")
            time.sleep(0.003)


class Suite:
    """torch's test class, decorated for the backend `like`, opened with `backend`."""

    def __init__(self, backend: str, like: str, world: int, gpu_tests: bool) -> None:
        os.environ.update(BACKEND=like, WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", INIT_METHOD="file://")
        provide_expecttest()
        import torch.testing._internal.common_distributed as common

        if gpu_tests:
            on_cpu.open_gpu_tests(common)
        import torch.testing._internal.distributed.distributed_test as module

        if gpu_tests:
            on_cpu.name_gpus(module)
        module.Barrier = Barrier  # torch's own looks every 0.1 s, and each test has at least two
        for name in PRELOAD:
            importlib.import_module(name)
        self.world = world
        self.gpu_tests = gpu_tests
        self.common = common
        self.module = module
        self.skips = {skip.exit_code: skip.message for skip in common.TEST_SKIPS.values()}
        if backend == "distlib":
            importlib.import_module("distlib.comm.process_group")  # what a first group would import
        os.environ["BACKEND"] = backend
        module.BACKEND = Guise(backend)
        module.BACKEND.like = like
        for features in common.DistTestCases.backend_feature.values():
            features.add(backend)
        bases = (module.TestDistBackend, module.DistributedTest._DistTestBase)
        self.cls: type[Any] = type(f"On_{backend}", bases, {"__module__": module.__name__})
        gc.collect()
        gc.freeze()  # what is there stays shared with the ranks, which would else copy all that a collection visits

    def names(self, pattern: str) -> list[str]:
        """The names of the tests in which the regular expression is found, sorted."""
        return [n for n in sorted(dir(self.cls)) if n.startswith("test_") and re.search(pattern, n)]

    def run(self, name: str, limit: float) -> Result:
        """One test on `world` freshly forked ranks; they are killed, with their stacks shown, after `limit` s."""
        start = time.monotonic()
        if getattr(getattr(self.cls, name), "__unittest_skip__", False):  # unittest's own runner looks at it
            return Result(name, "skip", 0, getattr(self.cls, name).__unittest_skip_why__)
        self.common.initialize_temp_directories()
        self.module.INIT_METHOD = os.environ["INIT_METHOD"]  # a file in the test's own folder
        with tempfile.TemporaryDirectory() as folder:
            Barrier.init()
            ranks = [Rank(self.cls, rank, name, folder, self.gpu_tests) for rank in range(self.world)]
            late = not wait(ranks, limit)
            outcome, detail = self._judge(ranks, late, limit)
        self.common.cleanup_temp_dir()
        return Result(name, outcome, round(time.monotonic() - start, 2), detail)

    def _judge(self, ranks: list[Rank], late: bool, limit: float) -> tuple[str, str]:
        codes = [rank.code for rank in ranks]
        if not late and all(code == 0 for code in codes):
            return "pass", ""
        if not late and len(set(codes)) == 1 and codes[0] in self.skips:
            return "skip", self.skips[codes[0]]
        head = f"exit codes {codes}" + (f", the rest ended after {limit:.0f} s" if late else "")
        return "fail", "\n".join([head, *(rank.report() for rank in ranks)])


def provide_expecttest() -> None:
    """torch's harness derives its TestCase from the package expecttest; these tests use nothing that it adds."""
    if importlib.util.find_spec("expecttest") is None:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in


class Rank:
    """One forked process that runs one test as torch's harness would."""

    def __init__(self, cls: type[Any], rank: int, name: str, folder: str, gpu_tests: bool) -> None:
        self.rank = rank
        self.code: int | None = None
        self.output = os.path.join(folder, f"output_of_{rank}")
        self.ours, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with open(self.output, "wb", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            self.ours.close()
            with on_cpu.on_cpu() if gpu_tests else contextlib.nullcontext():
                os._exit(run_one(cls, rank, name, os.path.join(folder, "rendezvous"), theirs))
        theirs.close()

    def poll(self) -> bool:
        """True once it has ended; `code` is then its exit code, or minus the signal that ended it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def kill(self, by: int) -> None:
        if not self.poll():
            os.kill(self.pid, by)

    def report(self) -> str:
        """The traceback it sent, if any, and the end of what it printed."""
        with open(self.output, errors="replace") as file:
            printed = LOG_PREFIX.sub("", file.read()).strip()
        return f"--- rank {self.rank} (exit code {self.code})\n{printed[-6000:]}"


def run_one(cls: type[Any], rank: int, name: str, rendezvous: str, pipe: Connection) -> int:
    """In a rank: the test's exit code. Only what torch's own entry point needs is set up."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    code = 0
    try:
        cls._run(rank, name, rendezvous, pipe)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is, this process ends with it
        traceback.print_exc()
        code = RANK_RAISED
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait(ranks: list[Rank], limit: float, grace: float = 10) -> bool:
    """Waits for all ranks; False when some had to be killed, after `limit` s or `grace` s after one raised."""
    end = time.monotonic() + limit
    raised = False
    while not all([rank.poll() for rank in ranks]):
        if not raised and any(rank.code == RANK_RAISED or (rank.code or 0) < 0 for rank in ranks):
            raised, end = True, min(end, time.monotonic() + grace)
        if time.monotonic() > end:
            for rank in ranks:
                rank.kill(signal.SIGUSR1)
            time.sleep(0.3)
            for rank in ranks:
                rank.kill(signal.SIGKILL)
            while not all([rank.poll() for rank in ranks]):
                time.sleep(0.01)
            return False
        time.sleep(0.005)
    return True


def results(args: argparse.Namespace) -> Iterator[Result]:
    suite = Suite(args.backend, args.like, args.world, args.gpu_tests)
    chosen = set(args.names)
    for name in suite.names(args.match):
        if not chosen or name in chosen:
            yield suite.run(name, args.limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="distlib")
    parser.add_argument("--like", default="gloo", help="whose tests: gloo or mpi")
    parser.add_argument("--world", type=int, default=3)
    parser.add_argument("--gpu-tests", action="store_true", help="CUDA tests too, on CPU tensors")
    parser.add_argument("--match", default="", help="a regular expression that names must contain")
    parser.add_argument("--limit", type=float, default=90, help="seconds for one test")
    parser.add_argument("names", nargs="*", help="only these tests")
    args = parser.parse_args()
    shown = os.fdopen(os.dup(1), "w", buffering=1)  # what torch's tests print goes to standard error
    os.dup2(2, 1)
    for result in results(args):
        print(json.dumps(asdict(result)), file=shown)


if __name__ == "__main__":
    main()

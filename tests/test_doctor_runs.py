"""`distlib doctor` and `distlib bench` for real: their own ranks, which may misbehave, and ranks of a job."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
from ranks import run_ranks
from rich.console import Console
from torch.distributed import TCPStore
from typer.testing import CliRunner

from distlib import bench
from distlib.cli import app
from distlib.doctor import local_ranks
from distlib.doctor.examine import Absent, examine, outcome
from distlib.doctor.facts import Report
from distlib.doctor.local_ranks import Ending, LocalRanks

# ---- ranks of our own --------------------------------------------------------------------------------------


def misbehave(*_: object) -> str:
    """Rank 0 hangs, rank 1 stops itself, rank 2 raises once they do."""
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    print("noise that is no answer")
    if rank == 2:
        store.wait(["0", "1"])
        raise ValueError("rank 2 has had enough")
    store.set(str(rank), "here")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)
    return "never"


def test_ranks_that_hang_stop_or_raise_are_ended_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "_GRACE", 0.5)
    monkeypatch.setattr(local_ranks, "_STACKS", 2.0)  # a rank may have to wait for a core to write them
    with LocalRanks(3, f"{__name__}:misbehave") as ranks:
        hung, stopped, raised = ranks.wait(60)
        pids = [process.pid for process in ranks._processes]
    assert hung.code is None and "misbehave" in hung.output, hung
    assert stopped.code is None and raised.code == 1 and "noise" in raised.output
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    result = outcome([hung, stopped, raised])
    assert result.error == "rank 2 failed: ValueError: rank 2 has had enough"


def test_outcomes_of_ranks_that_failed() -> None:
    def error(*endings: Ending) -> str:
        return outcome(list(endings)).error

    killed = Ending(0, None, None, "Current thread:\n  File one\n")
    assert error(killed) == "rank 0 did not finish in time: Current thread:\n  File one"
    assert error(killed, Ending(1, -9, None, "")) == "rank 1 failed: it printed nothing and ended with code -9"
    trace = "warning\nTraceback (most recent call last):\n  File x\nRuntimeError: first\nsecond line\n"
    assert (
        error(Ending(0, 1, None, trace), Ending(1, 1, None, trace)) == "rank 0 failed: RuntimeError: first\nsecond line"
    )


# ---- real runs ---------------------------------------------------------------------------------------------

OPERATIONS = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "send and recv"]


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLIB_NODS", "3")
    done = CliRunner().invoke(app, ["doctor", "--json"])
    report = Report.model_validate_json(done.stdout)
    assert report.selftest is not None and report.selftest.right == OPERATIONS, report
    assert report.selftest.ranks == 2 and report.selftest.registered_seconds > 0
    assert [p.what for p in report.problems if p.level == "error"] == ["DISTLIB_NODS is no setting of distlib"]
    assert done.exit_code == report.exit_code == 1


def examine_in_job(rank: int, size: int) -> dict[str, Any] | None:
    try:
        return examine(selftest=True, timeout=30).model_dump()
    except Absent as absent:
        assert rank > 0 and absent.__cause__ is None
        return None


def test_doctor_in_a_job() -> None:
    first, *others = run_ranks(2, examine_in_job)
    assert others == [None]
    report = Report.model_validate(first)
    assert report.selftest is not None and report.selftest.in_job and report.selftest.right == OPERATIONS
    assert [node.ranks for node in report.nodes] == ([[0, 1]] if report.facts.build.core_works else [[0], [1]])
    assert report.exit_code == 0, report.problems


def examine_without_the_others(rank: int, size: int) -> list[str]:
    if rank > 0:
        return []
    report = examine(selftest=True, timeout=2)
    return [f"{problem.topic}: {problem.what}" for problem in report.problems if problem.level == "error"]


def test_doctor_in_a_job_with_a_rank_missing() -> None:
    (error,), _ = run_ranks(2, examine_without_the_others)
    assert error.startswith("self-test: ") and "rank 1" in error


def test_bench_starts_ranks() -> None:
    done = CliRunner().invoke(app, ["bench", "collectives", "--ranks", "2", "--sizes", "1,4KiB", "--json"])
    assert done.exit_code == 0, done.output
    results = bench.Results.model_validate_json(done.stdout)
    assert results.ranks == 2 and [line.op for line in results.lines[::2]] == list(bench.OPS)
    assert [line.bytes for line in results.lines[:2]] == [8, 4096]  # one element a rank at the least
    assert all(line.seconds > 0 for line in results.lines)
    text = io.StringIO()
    Console(file=text, width=80).print(bench.table(results))
    assert "algorithm GB/s" in text.getvalue() and max(map(len, text.getvalue().splitlines())) <= 80


def bench_in_job(rank: int, size: int) -> str:
    results = bench.run_here(["all_gather"], [4096], False, "distlib", 30)
    return results.model_dump_json()


def test_bench_in_a_job() -> None:
    first, second = map(json.loads, run_ranks(2, bench_in_job))
    assert first == second and first["ranks"] == 2 and not first["registered"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sizes", "big"], "'big' is not a number of bytes"),
        (["--ops", "all_reduc"], "there is no 'all_reduc'; there are all_reduce"),
    ],
)
def test_bench_refuses(arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["bench", "collectives", *arguments])
    assert done.exit_code == 1 and complaint in done.stderr


def test_bench_tells_its_operations() -> None:
    told = " ".join(CliRunner().invoke(app, ["bench", "collectives", "--help"]).output.split())
    assert f"commas between: {', '.join(bench.OPS)}. Default: all." in told


def test_bench_refuses_ranks_of_its_own_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    done = CliRunner().invoke(app, ["bench", "collectives", "--ranks", "4"])
    assert done.exit_code == 1 and "this one has 2 ranks" in done.stderr


def test_bandwidths() -> None:
    line = bench.Line(op="all_reduce", bytes=1000, seconds=0.5)
    assert line.algorithm_bandwidth == 2000 and line.bus_bandwidth(4) == 3000
    assert bench.Line(op="all_gather", bytes=1000, seconds=0.5).bus_bandwidth(4) == 1500

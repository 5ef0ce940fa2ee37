"""The rank pool itself: values, tracebacks, stacks of hung and stopped ranks, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import Pool, RankError, pool, process_group, run_ranks, run_ranks_raw, store


def _square(rank: int, n: int, offset: int) -> tuple[int, torch.Tensor]:
    return rank * rank + offset, torch.full((2,), n)


def test_values_come_back_by_rank() -> None:
    values = run_ranks(4, _square, 10)
    assert [value for value, _ in values] == [10, 11, 14, 19]
    assert all(torch.equal(tensor, torch.tensor([4, 4])) for _, tensor in values)


def _big(rank: int, n: int) -> bytes:
    return bytes([rank]) * (5 << 20)


def test_large_values_come_back() -> None:
    assert [(len(value), value[0]) for value in run_ranks(2, _big)] == [(5 << 20, 0), (5 << 20, 1)]


def _process_facts(rank: int, n: int) -> tuple[int, int, int]:
    before = psutil.Process().num_threads()
    torch.manual_seed(0)
    return os.getpid(), before, int(torch.randint(1 << 30, ()).item())


def test_every_call_has_fresh_processes_with_one_thread() -> None:
    first, second = run_ranks(2, _process_facts), run_ranks(2, _process_facts)
    assert len({pid for pid, _, _ in first + second}) == 4
    assert {threads for _, threads, _ in first + second} == {1}


@pytest.mark.alone
def test_four_ranks_start_in_well_under_a_second() -> None:
    run_ranks(1, _process_facts)  # the server may have to start
    begin = time.monotonic()
    run_ranks(4, _process_facts)
    assert time.monotonic() - begin < 3  # some 0.1 s on a quiet machine


def _raise_on(rank: int, n: int, bad: list[int]) -> int:
    wanted = rank + 100
    print("said by rank", rank)
    if rank in bad:
        raise ValueError(f"wrong on {wanted}")
    return wanted


def test_every_failing_ranks_traceback_is_shown() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(3, _raise_on, [0, 2])
    text = str(caught.value)
    assert "2 of 3 ranks failed" in text
    assert "ValueError: wrong on 100" in text and "ValueError: wrong on 102" in text
    assert "in _raise_on" in text and "said by rank 2" in text and "said by rank 1" not in text
    assert [outcome.kind for outcome in caught.value.outcomes] == ["exception", "value", "exception"]


def _assert_small(rank: int, n: int) -> None:
    measured = 41 + rank
    assert measured < 0


def test_a_failed_assertion_shows_the_variables() -> None:
    with pytest.raises(RankError, match="measured = 42"):
        run_ranks(2, _assert_small)


def _hang_on_one(rank: int, n: int) -> str:
    if rank == 1:
        _sleep_in_here()
    return "done"


def _sleep_in_here() -> None:
    time.sleep(600)


def test_a_timeout_shows_the_stacks_of_the_ranks_that_hang() -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 \(timeout.*not finish in 3 s.*_sleep_in_here") as caught:
        run_ranks(2, _hang_on_one, timeout=3)
    assert time.monotonic() - begin < 10
    assert [outcome.kind for outcome in caught.value.outcomes] == ["value", "timeout"]


def _raise_while_others_hang(rank: int, n: int) -> None:
    if rank == 0:
        store().wait(["hangs"])
        raise RuntimeError("first failure")
    store().set("hangs", "")
    _sleep_in_here()


def test_the_others_get_only_a_grace_after_a_failure() -> None:
    outcomes = run_ranks_raw(2, _raise_while_others_hang, grace=1)
    assert [outcome.kind for outcome in outcomes] == ["exception", "timeout"]
    assert "after another rank had failed" in outcomes[1].text and "_sleep_in_here" in outcomes[1].text


def _die(rank: int, n: int, how: str) -> int:
    if rank == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "exit":
            os._exit(3)
        if how == "sys.exit":
            sys.exit("enough")
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
    return rank


@pytest.mark.parametrize(
    ("how", "kind", "code", "text"),
    [
        ("kill", "signal", 9, "killed by SIGKILL"),
        ("segv", "signal", 11, "killed by SIGSEGV"),
        ("exit", "exit", 3, "exited with code 3"),
        ("sys.exit", "exception", None, "SystemExit: enough"),
        ("stop", "stopped", None, "in _die"),
    ],
)
def test_how_a_rank_died_is_told(how: str, kind: str, code: int | None, text: str) -> None:
    first, second, third = run_ranks_raw(3, _die, how, timeout=20)
    assert (first.value, third.value) == (0, 2)
    assert (second.kind, second.code, second.value) == (kind, code, None)
    assert text in second.text
    assert second.seconds < 10
    if how == "segv":
        assert "Segmentation fault" in second.output


def _stop_then_let_the_other_hang(rank: int, n: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    _sleep_in_here()


def test_a_stopped_rank_tells_its_stack_on_timeout() -> None:
    stopped, hung = run_ranks_raw(2, _stop_then_let_the_other_hang, timeout=3)
    assert stopped.kind == hung.kind == "timeout"
    assert "it was stopped" in stopped.text and "_stop_then_let_the_other_hang" in stopped.text
    assert "it was stopped" not in hung.text


def _environment(rank: int, n: int) -> tuple[str | None, str | None, str | None, str]:
    return os.environ.get("FROM_TEST"), os.environ.get("FROM_CALL"), os.environ.get("OLD"), os.environ["RANK"]


def test_ranks_see_the_callers_environment_and_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_TEST", "a")
    monkeypatch.setenv("OLD", "b")
    seen = run_ranks(2, _environment, env={"FROM_CALL": "c", "OLD": None})
    assert seen == [("a", "c", None, "0"), ("a", "c", None, "1")]


def _what_is_there(rank: int, n: int) -> list[str]:
    return [name for name in ("distlib.engine", "distlib.comm.group", "distlib._native") if name in sys.modules]


def test_ranks_start_with_distlib_imported_and_its_core_not_loaded() -> None:
    assert run_ranks(1, _what_is_there) == [["distlib.engine", "distlib.comm.group"]]


def _plan_here(rank: int, n: int) -> tuple[float, str]:
    from distlib.comm.group import Group  # noqa: F401 - needs torch, and no package of others

    try:
        import distlib.plan  # noqa: F401
    except ModuleNotFoundError as error:
        return float(rank + n), str(error.name)
    return 0.0, ""


def test_ranks_start_where_a_package_that_they_do_not_need_is_missing(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError('not on this machine', name='pydantic')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        lacking, plain = Pool(), {"timeout": 60.0, "env": {}, "grace": None}
        try:
            outcomes = lacking.run(2, _plan_here, (), **plain)
            assert [outcome.value for outcome in outcomes] == [(2.0, "pydantic"), (3.0, "pydantic")]
        finally:
            lacking.close()


def test_a_setting_that_was_read_before_ranks_were_forked_is_refused() -> None:
    with pytest.raises(RuntimeError, match="DISTLIB_DEVICE_CHUNK_KB was read when distlib was imported"):
        run_ranks(1, _what_is_there, env={"DISTLIB_DEVICE_CHUNK_KB": "128"})
    assert run_ranks(1, _square, 1, env={"DISTLIB_CHUNK_KB": "128"})[0][0] == 1


def _sum_over_gloo(rank: int, n: int, by_environment: bool) -> float:
    if by_environment:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=store(), rank=rank, world_size=n)
    x = torch.ones(3) * (rank + 1)
    dist.all_reduce(x)
    dist.destroy_process_group()
    return float(x.sum())


@pytest.mark.parametrize("by_environment", [False, True])
def test_ranks_meet(by_environment: bool) -> None:
    assert run_ranks(2, _sum_over_gloo, by_environment) == [9.0, 9.0]


def _broadcast_in_a_group(rank: int, n: int) -> int:
    with process_group(rank, n, backend="gloo") as group:
        x = torch.tensor([rank + 5])
        dist.broadcast(x, src=1, group=group)
    assert not dist.is_initialized()
    return int(x)


def test_process_group_is_made_and_destroyed() -> None:
    assert run_ranks(3, _broadcast_in_a_group) == [6, 6, 6]


def test_functions_without_a_name_are_refused() -> None:
    with pytest.raises(TypeError, match="make it a top-level function"):
        run_ranks(2, lambda rank, n: rank)


def _leave_a_grandchild(rank: int, n: int) -> int:
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid


def test_what_a_rank_started_ends_with_the_call() -> None:
    pids = run_ranks(2, _leave_a_grandchild)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert len(pool.strays) == 2 and all("sleep 600" in stray for stray in pool.strays)
    pool.strays.clear()  # they are this test's purpose


def test_closing_the_pool_leaves_no_process() -> None:
    own = Pool()
    own.run(2, _square, (0,), timeout=60, env={}, grace=None)
    assert own.children() == []
    server = own.server_pid
    assert server is not None and psutil.pid_exists(server)
    own.close()
    assert not psutil.pid_exists(server)
    assert own.server_pid is None


KILLED_SESSION = """
import sys
import signal
import ranks, test_ranks
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background had ignored
ranks.run_ranks(2, test_ranks._tell_pid_and_hang, sys.argv[1])
"""


def _tell_pid_and_hang(rank: int, n: int, folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    _sleep_in_here()


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_ranks_and_server_end_when_the_test_process_does(tmp_path: Path, sig: signal.Signals) -> None:
    here = Path(__file__).parent
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    session = subprocess.Popen(
        [sys.executable, "-c", KILLED_SESSION, str(tmp_path)], env=environ, stderr=subprocess.PIPE, text=True
    )
    try:
        while len(list(tmp_path.iterdir())) < 2:
            assert session.poll() is None
            time.sleep(0.05)
        below = psutil.Process(session.pid).children(recursive=True)
        assert len(below) == 3  # the server and two ranks
        session.send_signal(sig)
        _, printed = session.communicate(timeout=30)
    finally:
        session.kill()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    if sig == signal.SIGINT:
        assert printed.count("_sleep_in_here") == 2 and "KeyboardInterrupt" in printed

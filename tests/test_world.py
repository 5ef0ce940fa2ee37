"""init() and shutdown(): under each launcher, again and again, and wherever ranks fail to meet."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcome, process_group, run_ranks, run_ranks_raw, store

import distlib.rendezvous
import distlib.roll_call
import distlib.world
from distlib.launchers import Launch
from distlib.rendezvous import meet
from distlib.topology import Topology
from distlib.world import LONGEST_TIMEOUT

SECONDS = timedelta(seconds=20)
RECORD = {"backend": "gloo", "nodes": None, "gpu": None}

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
import distlib

with distlib.init() as world:
    total = torch.tensor([world.rank + 1.0])
    dist.all_reduce(total)
    mpi = sys.modules.get("mpi4py.MPI")
    facts = dict(
        rank=world.rank, size=world.size, local=[world.local_rank, world.local_size],
        node=[world.node_rank, world.node_count], launcher=world.launcher, total=total.item(),
        device=world.device.type, again=distlib.init() is world,
        mpi="absent" if mpi is None else "finalised" if mpi.Is_finalized() else "running",
    )
facts["closed"] = not dist.is_initialized()
print("FACTS " + json.dumps(facts) + "\\n", end="", flush=True)
"""


# ---- under each launcher


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, which ends with the block, whatever happens."""
    launchers = ("OMPI_", "PMI", "SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(distlib.world.__file__).parents[1])}
    clean |= {"CUDA_VISIBLE_DEVICES": ""}  # ranks may outnumber GPUs
    process = subprocess.Popen(
        command,
        env=clean,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _facts(command: list[str], tmp_path: Path) -> list[dict[str, Any]]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with _running([*command, str(script)]) as process:
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 0, output
    lines = [line.split("FACTS ", 1)[1] for line in output.splitlines() if "FACTS " in line]
    return sorted(map(json.loads, lines), key=lambda facts: facts["rank"])


def _expected(launcher: str, size: int, mpi: str = "absent") -> list[dict[str, Any]]:
    common = {"size": size, "node": [0, 1], "launcher": launcher, "total": size * (size + 1) / 2}
    common |= {"device": "cpu", "again": True, "closed": True, "mpi": mpi}
    return [{"rank": rank, "local": [rank, size], **common} for rank in range(size)]


def test_plain_python_is_a_world_of_one(tmp_path: Path) -> None:
    assert _facts([sys.executable], tmp_path) == _expected("single", 1)


def test_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--log-dir", str(tmp_path), "--master-port", str(_free_port())]  # else the port of any other job
    assert _facts(command, tmp_path) == _expected("torchrun", 2)


@pytest.mark.mpi
def test_mpirun_ends_mpi_once_the_ranks_have_met(tmp_path: Path, mpirun: list[str]) -> None:
    command = [*mpirun, "-np", "2", sys.executable]
    assert _facts(command, tmp_path) == _expected("openmpi", 2, mpi="finalised")


# ---- in forked ranks


def _become(variables: dict[str, str]) -> None:
    """Forget what the rank pool set, and carry another launcher's variables."""
    for name in [*os.environ]:
        if name.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "GROUP_")):
            del os.environ[name]
    os.environ.update(variables)


def _srun(rank: int, n: int, job: int) -> tuple[Any, ...]:
    _become(
        {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(n)}
        | {"SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": str(n)}
        | {"SLURM_JOB_NODELIST": "localhost"}
    )
    with distlib.init("gloo", SECONDS) as world:
        total = torch.tensor([float(world.rank)])
        dist.all_reduce(total)
        return world.launcher, world.rank, world.size, world.local_rank, world.node_count, total.item()


def test_srun() -> None:
    job = os.getpid()  # the port derives from it: not another run's
    assert run_ranks(2, _srun, job) == [("slurm", 0, 2, 0, 1, 1.0), ("slurm", 1, 2, 1, 1, 1.0)]


def _again_and_again(rank: int, n: int) -> list[int]:
    sums = []
    for turn in range(3):
        world = distlib.init("gloo", SECONDS)
        assert distlib.init() is world and distlib.init("gloo") is world
        total = torch.tensor([rank + turn])
        dist.all_reduce(total)
        sums.append(int(total))
        if rank == turn % n:
            time.sleep(0.05)  # ranks leave and come back at different times
        distlib.shutdown()
        distlib.shutdown()
        assert not dist.is_initialized()
    return sums


def test_init_after_shutdown_meets_anew() -> None:
    assert run_ranks(2, _again_and_again) == [[1, 3, 5]] * 2


def _leave_at_once(rank: int, n: int, backend: str) -> list[tuple[int, int]]:
    met = []
    for _ in range(5):
        with distlib.init(backend, SECONDS) as world:
            met.append((world.rank, world.size))
    return met


@pytest.mark.parametrize("backend", ["distlib", "gloo"])
def test_ranks_that_leave_at_once_do_not_disturb_those_that_arrive(backend: str) -> None:
    assert run_ranks(3, _leave_at_once, backend) == [[(rank, 3)] * 5 for rank in range(3)]


def _ask_twice(rank: int, n: int) -> list[str]:
    messages = []
    distlib.init("gloo", SECONDS)
    for other in ({"backend": "nccl"}, {"timeout": timedelta(seconds=7)}, {"nodes": 2}):
        with pytest.raises(ValueError) as caught:
            distlib.init(**other)  # type: ignore[arg-type]
        messages.append(str(caught.value))
    return messages


def test_a_second_init_that_differs_names_both_values() -> None:
    backend, timeout, nodes = run_ranks(1, _ask_twice)[0]
    assert "backend='nccl'" in backend and "backend='gloo'" in backend
    assert "seconds=7" in timeout and "seconds=20" in timeout
    assert "nodes=2" in nodes and "nodes=None" in nodes and "Fix: " in nodes


def _adopt(rank: int, n: int) -> tuple[Any, ...]:
    with process_group(rank, n, "gloo"):
        world = distlib.init()
        with pytest.raises(ValueError, match=r"backend='nccl'.*backend='gloo'"):
            distlib.init("nccl")
        with pytest.raises(ValueError, match="nodes=2.*nodes=1"):
            distlib.init(nodes=2)
        distlib.shutdown()
        assert dist.is_initialized()  # it is the script's group
        return world.rank, world.size, world.local_rank


def test_the_scripts_own_process_group_is_adopted_and_left_alone() -> None:
    assert run_ranks(2, _adopt) == [(0, 2, 0), (1, 2, 1)]


def _pretend(rank: int, n: int) -> tuple[Any, ...]:
    with distlib.init("distlib", SECONDS, nodes=2) as world:
        place = (world.node_rank, world.node_count, world.local_rank, world.local_size)
    assert "DISTLIB_NODES" not in os.environ
    distlib.world._proved_topology = lambda: Topology((tuple(range(n)),))  # a backend that does not pretend
    with pytest.raises(RuntimeError, match="nodes=2 took no effect"):
        distlib.init("distlib", SECONDS, nodes=2)
    assert not dist.is_initialized() and "DISTLIB_NODES" not in os.environ
    return place


def test_one_host_pretends_to_be_several() -> None:
    assert run_ranks(3, _pretend) == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]


def _fork_after_init(rank: int, n: int) -> bytes:
    distlib.init("gloo", SECONDS)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            distlib.init()
        except RuntimeError as error:
            os.write(write, str(error).encode())
        distlib.shutdown()  # must not touch the parent's group
        os._exit(0)
    os.waitpid(child, 0)
    dist.all_reduce(torch.ones(1))
    return os.read(read, 1000)


def test_a_fork_after_init_is_told_so() -> None:
    for message in run_ranks(2, _fork_after_init):
        assert b"forked from rank" in message and b"Fix: call distlib.init() after forking" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": ""}, "backend='' must name"),
        ({"timeout": 60}, "timeout=60 must be a positive timedelta"),
        ({"timeout": timedelta(0)}, "must be a positive timedelta"),
        ({"timeout": timedelta.max}, r"timeout=datetime.timedelta\(days=999999999, .*\) must be at most 3650 days"),
        ({"timeout": timedelta(days=99999)}, r"timeout=datetime.timedelta\(days=99999\) must be at most 3650 days"),
        ({"nodes": 0}, "nodes=0 must be a whole number"),
        ({"nodes": 2}, "nodes=2 is not possible with 1 ranks. Fix: choose 1 to 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTLIB_NODES", raising=False)
    with pytest.raises(ValueError, match=message):
        distlib.init(**arguments)


def _waits_long(rank: int, n: int) -> float:
    distlib.init(timeout=LONGEST_TIMEOUT)
    x = torch.ones(3)
    dist.all_reduce(x)
    (dist.recv if rank else dist.send)(x, 1 - rank)
    distlib.shutdown()
    return x[0].item()


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_longest_timeout_can_be_waited_for(nodes: str) -> None:
    assert run_ranks(2, _waits_long, env={"DISTLIB_NODES": nodes}) == [2.0, 2.0]


@pytest.mark.parametrize(("variable", "message"), [("x", "is no whole number"), ("3", "DISTLIB_NODES=3")])
def test_a_wrong_variable_is_refused(variable: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLIB_NODES", variable)
    with pytest.raises(ValueError, match=message):
        distlib.init("gloo", nodes=1)


@pytest.mark.parametrize(
    ("backend", "local_rank", "gpus", "device"),
    [
        ("cpu:distlib,cuda:nccl", 3, 4, "cuda:3"),
        ("nccl", 3, 1, "cuda:0"),  # the launcher shows each rank its own GPU only
        ("distlib", 3, 4, "cpu"),
        ("cpu:gloo", 3, 4, "cpu"),
        ("nccl", 3, 0, "cpu"),
    ],
)
def test_the_gpu_is_the_ranks_own(
    backend: str, local_rank: int, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    launch = Launch("torchrun", 7, 8, local_rank, 4, "a", 1)
    assert str(distlib.world._pick_device(backend, launch)) == device
    assert list(map(str, current)) == [d for d in [device] if d != "cpu"]


# ---- where ranks fail to meet: threads stand for ranks, each with a connection of its own


def _free_port() -> int:
    """A port that nobody listens at. Not one of those that the kernel gives to connections: between this call and its
    use, a test beside this one would take it sooner or later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _launch(rank: int, size: int, port: int, **other: Any) -> Launch:
    return dataclasses.replace(Launch("torchrun", rank, size, rank, size, "127.0.0.1", port), **other)


def _together(*calls: Callable[[], object]) -> list[object]:
    """What each call returned or raised, all of them run at once."""
    outcomes: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            outcomes[index] = calls[index]()
        except RuntimeError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


def _meet(launch: Launch, seconds: float = 20, **other: Any) -> Callable[[], object]:
    return lambda: meet(launch, RECORD | other, timedelta(seconds=seconds)).store


@pytest.mark.alone
def test_missing_ranks_are_named_on_every_rank() -> None:
    port = _free_port()
    begin = time.monotonic()
    zero, two = _together(*(_meet(_launch(rank, 4, port), 2.0) for rank in (0, 2)))
    assert time.monotonic() - begin < 5
    for rank, error in ((0, zero), (2, two)):
        start = f"rank {rank} of 4 (torchrun): ranks 1, 3 did not come to the rendezvous at 127.0.0.1:{port}"
        assert str(error).startswith(f"{start} within 2 s. Fix: ")


def test_nobody_serving_names_address_launcher_and_fix() -> None:
    port = _free_port()
    for launcher, fix in (
        ("slurm", "export MASTER_ADDR before srun"),
        ("openmpi", "set DISTLIB_MASTER_ADDR"),
    ):
        with pytest.raises(RuntimeError) as caught:
            _meet(_launch(1, 2, port, launcher=launcher), 0.5)()
        assert f"rank 1 of 2 ({launcher}): nobody answers at 127.0.0.1:{port}" in str(caught.value)
        assert fix in str(caught.value)


@pytest.mark.alone
def test_a_port_in_use_is_named_on_every_rank() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stale:  # listens, and never says a word
        port = stale.getsockname()[1]
        begin = time.monotonic()
        serving, coming = _together(*(_meet(_launch(rank, 2, port), 1.5) for rank in (0, 1)))
        assert time.monotonic() - begin < 6
    assert f"cannot serve the rendezvous at 127.0.0.1:{port}: the port is in use" in str(serving)
    assert f"what listens at 127.0.0.1:{port} is silent for 1.5 s: another program" in str(coming)
    for error in (serving, coming):
        assert isinstance(error, RuntimeError) and "--master-port" in str(error)


def test_settings_that_differ_are_one_error_on_every_rank() -> None:
    port = _free_port()
    backends = ["gloo", "distlib", "gloo"]
    errors = _together(*(_meet(_launch(rank, 3, port), backend=b) for rank, b in enumerate(backends)))
    for error in errors:
        assert "the ranks disagree: backend='gloo' on ranks 0, 2, but backend='distlib' on rank 1" in str(error)


def test_ranks_that_would_share_a_gpu_are_told_which() -> None:
    port = _free_port()
    gpus = ["GPU-a", "GPU-b", "GPU-a"]
    errors = _together(*(_meet(_launch(rank, 3, port), gpu=gpu) for rank, gpu in enumerate(gpus)))
    for error in errors:
        assert "ranks 0, 2 would share GPU GPU-a, which NCCL refuses. Fix: " in str(error)


def test_two_jobs_at_one_address_do_not_mix() -> None:
    port = _free_port()
    ours = [_meet(_launch(rank, 2, port, launcher="slurm", job="7.0")) for rank in range(2)]
    theirs = _meet(_launch(1, 2, port, launcher="slurm", job="8.0"), 3.0)
    first, second, other = _together(*ours, theirs)
    assert isinstance(first, dist.Store) and isinstance(second, dist.Store)
    assert "rank 1 of 2 (slurm): rank 0 did not come" in str(other)


def test_a_rank_that_comes_twice_is_told_so() -> None:
    port = _free_port()
    zero, one, twin = _together(*(_meet(_launch(r, 3, port, local_rank=i), 5.0) for i, r in enumerate((0, 1, 1))))
    told = [error for error in (one, twin) if "another process came" in str(error)]
    assert len(told) == 1 and "rank 2 did not come" in str(zero), (zero, one, twin)


def test_ranks_restarted_on_the_same_store_meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store when it restarts ranks: what the first attempt left there must not count."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = agent.port
    torchrun = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (torchrun | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    for _attempt in range(3):
        stores = _together(*(_meet(_launch(rank, 3, port)) for rank in range(3)))
        for rank, found in enumerate(stores):
            assert isinstance(found, dist.Store), found
            assert found.add(f"seen by {rank}", 1) == 1
        distlib.rendezvous._opened.clear()
    del agent


def test_mpi_without_mpi4py_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 \(openmpi\): .*Fix: pip install 'distlib-train\[mpi\]'"):
        _meet(Launch("openmpi", 0, 2, 0, 2, None, None))()


def _fail_while_serving(rank: int, n: int, port: int, how: signal.Signals) -> str:
    shared = store()
    shared.set(f"up/{rank}", "")
    shared.wait([f"up/{r}" for r in range(n)])  # no process has still to start in the 6 s below
    _become({"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def step(chair: distlib.roll_call._Chair) -> None:
        if chair.store.check(["hello/1", "hello/2"]):
            os.kill(os.getpid(), how)

    distlib.roll_call._Chair.step = step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as caught:
        distlib.init("gloo", timedelta(seconds=6))
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        (signal.SIGSTOP, "stopped", "stopped answering for 6 s. Fix: see whether rank 0"),
        (signal.SIGKILL, "signal", "lost the rendezvous at 127.0.0.1"),
    ],
)
def test_rank_0_failing_in_the_roll_call_is_an_error_on_the_others(how: signal.Signals, kind: str, words: str) -> None:
    outcomes = run_ranks_raw(3, _fail_while_serving, _free_port(), how)
    assert outcomes[0].kind == kind
    for rank in (1, 2):
        assert words in outcomes[rank].value, outcomes[rank]


def _die_during_init(rank: int, n: int) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    shared = store()
    shared.set(f"up/{rank}", "")
    shared.wait(["up/0", "up/2"])  # no process has still to start in the 4 s below
    with pytest.raises(RuntimeError) as caught:
        distlib.init("gloo", timedelta(seconds=4))
    return str(caught.value)


def test_a_rank_killed_before_init_is_named_by_the_others() -> None:
    outcomes: list[Outcome] = run_ranks_raw(3, _die_during_init)
    assert outcomes[1].kind == "signal"
    for rank in (0, 2):
        assert "rank 1 did not come" in outcomes[rank].value, outcomes[rank]

"""The emulated cluster: hosts are separate, links have their rate, and nothing outlives the driver."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import emulated_cluster  # noqa: E402
import network_namespaces as namespaces  # noqa: E402
from emulated_cluster import bits_per_second, run_cluster  # noqa: E402

REASON = emulated_cluster.unavailable()
needs_cluster = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# Rank 1 sends 16 MB to rank 0 over plain TCP. No torch: torchrun's own import of it is slow enough.
SEND = """
import os, socket, sys, time
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}")
print(f"interfaces {sorted(os.listdir('/sys/class/net'))}, {len(os.listdir('/sys/fs/cgroup'))} cgroups")
if os.environ["RANK"] == "0":
    server = socket.create_server(("host0", 5000))
    peer, _ = server.accept()
    started, count = time.monotonic(), 0
    while part := peer.recv(1 << 20):
        count += len(part)
    print(f"megabits {count * 8 / 1e6 / (time.monotonic() - started):.0f}")
else:
    for attempt in range(100):
        try:
            peer = socket.create_connection(("host0", 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    peer.sendall(bytes(16_000_000))
"""

FAIL = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(7)
time.sleep(600)
"""

HANG = "import time; print('hanging', flush=True); time.sleep(600)"


@pytest.mark.parametrize("rate, bits", [("1gbit", 10**9), ("2.5Gbit", 2_500_000_000), ("500kbit", 500_000)])
def test_rates_are_read_as_tc_reads_them(rate: str, bits: int) -> None:
    assert bits_per_second(rate) == bits


@pytest.mark.parametrize("rate", ["", "fast", "1", "-1mbit", "0mbit", "1gb"])
def test_a_bad_rate_is_refused_by_name(rate: str) -> None:
    with pytest.raises(ValueError, match=f"rate '{rate}'"):
        bits_per_second(rate)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(emulated_cluster.ClusterUnavailable, match="root|Linux"):
        run_cluster(["script.py"])


@pytest.mark.skipif(REASON is not None and "Linux" in REASON, reason=str(REASON))
def test_names_of_the_living_are_not_stale_and_of_the_dead_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "NETNS", tmp_path / "netns")
    own = namespaces.new_prefix()
    head, pid_namespace, pid, start, serial = own.split("-")
    reused = "-".join([head, pid_namespace, pid, str(int(start) - 1), serial])  # our pid, an earlier process
    elsewhere = "-".join([head, str(int(pid_namespace) + 1), pid, "1", serial])  # another container's
    (tmp_path / "netns").mkdir()
    for name in (own, reused, elsewhere, "distlib-of-somebody", "other"):
        (tmp_path / "netns" / f"{name}.host0").touch()
    assert namespaces.stale() == [reused]


@needs_cluster
@pytest.mark.root
@pytest.mark.alone  # rates are measured, and a run clears up after others
def test_hosts_are_separate_and_links_have_the_rate(tmp_path: Path) -> None:
    script = tmp_path / "send.py"
    script.write_text(SEND)
    echo = io.StringIO()
    result = run_cluster([str(script)], rate="100mbit", timeout=90, echo=echo)
    assert result.returncode == 0, echo.getvalue()
    for host in (0, 1):
        assert f"rank {host} of 2 on host{host}" in result.output[host]
        assert f"[host{host}] rank {host} of 2" in echo.getvalue()
        cgroups = len(os.listdir("/sys/fs/cgroup"))
        assert f"interfaces ['eth0', 'lo'], {cgroups} cgroups" in result.output[host]
    megabits = float(result.output[0].split("megabits")[1].split()[0])
    assert 30 < megabits < 115, "shaped to 100, on a machine that may be busy"
    assert 16_000_000 < result.tx_bytes[1] < 17_500_000, "payload, headers and the rendezvous"
    assert result.tx_bytes[1] == result.rx_bytes[0]
    assert_nothing_left(os.getpid(), tmp_path)


@needs_cluster
@pytest.mark.root
@pytest.mark.alone
def test_the_failing_hosts_exit_code_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(FAIL)
    result = run_cluster([str(script)], timeout=90, grace=0.0)
    assert result.returncode == 1, "torchrun's code for a failed rank"
    assert "exitcode  : 7" in result.output[1]
    assert_nothing_left(os.getpid(), tmp_path)


@needs_cluster
@pytest.mark.root
@pytest.mark.alone
def test_nothing_is_left_after_sigterm_of_the_driver(tmp_path: Path) -> None:
    with driver(tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[host0] hanging\n"
        assert len(namespaces.members(host_name(process.pid))) >= 2, "torchrun and its rank"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert_nothing_left(process.pid, tmp_path)


@needs_cluster
@pytest.mark.root
@pytest.mark.alone
def test_the_next_run_clears_up_after_kill_9_of_the_driver(tmp_path: Path) -> None:
    with driver(tmp_path) as process:
        wait_for(lambda: list(namespaces.NETNS.glob(f"distlib-*-{process.pid}-*.host0")))
        wait_for(lambda: namespaces.members(host_name(process.pid)))
        process.kill()
        process.wait()
        (prefix,) = [prefix for prefix in namespaces.stale() if f"-{process.pid}-" in prefix]
        namespaces.remove(prefix)
        assert_nothing_left(process.pid, tmp_path)


@contextlib.contextmanager
def driver(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command line with one host whose rank hangs."""
    script = folder / "hang.py"
    script.write_text(HANG)
    command = [sys.executable, str(BENCHMARKS / "emulated_cluster.py"), "--hosts", "1", "--", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def host_name(pid: int) -> str:
    (path,) = namespaces.NETNS.glob(f"distlib-*-{pid}-*.host0")
    return path.name


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def assert_nothing_left(pid: int, folder: Path) -> None:
    """No namespace of that driver (so no link or bridge), no file, no process with a script in `folder`."""
    assert not list(namespaces.NETNS.glob(f"distlib-*-{pid}-*"))
    assert not list(namespaces.NETNS.parent.glob(f"distlib-*-{pid}-*"))
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if command.parent.name != str(pid):
                assert str(folder) not in command.read_text(errors="replace")

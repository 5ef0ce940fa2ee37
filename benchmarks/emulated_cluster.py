"""k hosts on one machine: network namespaces with own hostnames, links of a given rate, torchrun in each.

    python benchmarks/emulated_cluster.py --hosts 2 --ranks-per-host 2 --rate 1gbit -- script.py arguments

        namespace host0              namespace switch              namespace host1
     +-------------------+        +---------------------+        +-------------------+
     | torchrun: r ranks |        |       bridge        |        | torchrun: r ranks |
     |   eth0 [tbf out] ============ port0       port1 ============ eth0 [tbf out]   |
     +-------------------+        | [tbf out] [tbf out] |        +-------------------+
                                  +---------------------+

Both ends of a link shape what they send, so a host sends and receives at the rate. Everything, the bridge
too, lives inside namespaces of this run: the machine's own network is neither touched nor reached, addresses
cannot clash, and removing the namespaces removes all of it. Only the rate is emulated; a link adds no delay
(netem, which could, is missing from many kernels). Linux only; needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

import network_namespaces as namespaces

MASTER_PORT = 29500  # a new namespace has every port free
TIMED_OUT = 124
_TOOLS = {"iproute2": ("ip", "tc"), "util-linux": ("nsenter", "unshare", "setpriv", "mount")}
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}

# Runs inside the host's network namespace, in mount and UTS namespaces of its own: $1 hostname, $2 hosts
# file, then the command. /sys must be mounted anew to show this namespace's interfaces; the control groups
# under it are kept, for programs that look up their memory limit.
_ENTER = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2" /etc/hosts
exec 3< /sys/fs/cgroup
mount -t sysfs sysfs /sys
mount --no-canonicalize --rbind /proc/self/fd/3 /sys/fs/cgroup
exec 3<&-
shift 2
exec "$@"
"""


class ClusterUnavailable(RuntimeError):
    """This machine or user cannot make an emulated cluster; the message says why and what to do."""


@dataclass(frozen=True)
class ClusterResult:
    """What one run gave. Sequences are indexed by host.

    Bytes are those of whole frames on the host's link (payload, TCP and IP headers, torchrun's rendezvous),
    counted by the kernel from the start of the run to its end.
    """

    returncode: int  # 0, else the first failing host's; 128 + n for signal n; 124 where the run timed out
    output: tuple[str, ...]
    tx_bytes: tuple[int, ...]
    rx_bytes: tuple[int, ...]
    seconds: float


def unavailable() -> str | None:
    """Why this process cannot make an emulated cluster and what to do, or None where it can."""
    if sys.platform != "linux":
        return f"an emulated cluster needs Linux network namespaces; this is {sys.platform}"
    if os.geteuid() != 0:
        return f"an emulated cluster needs root to make network namespaces; uid is {os.geteuid()}: use sudo"
    match = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    held = int(match[1], 16) if match else 0
    for name, bit in _CAPABILITIES.items():
        if not held >> bit & 1:
            return f"an emulated cluster needs {name}, which this root lacks: start the container --privileged"
    for package, tools in _TOOLS.items():
        for tool in tools:
            if shutil.which(tool) is None:
                return f"an emulated cluster needs `{tool}`, which is not found: apt-get install {package}"
    return None


def run_cluster(
    command: Sequence[str],
    hosts: int = 2,
    ranks_per_host: int = 1,
    rate: str = "1gbit",
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    grace: float = 30.0,
    echo: TextIO | None = None,
    note_latency: bool = False,
) -> ClusterResult:
    """Run `torchrun ... command` on every emulated host and remove every trace of the hosts afterwards.

    command: script and its arguments (or `-m module ...`), as torchrun takes them.
    rate: of each host's link in each direction, as tc writes it ("500mbit", "2gbit").
    env: added to this process's environment.
    timeout: seconds until all hosts are killed (returncode 124).
    grace: seconds that the other hosts get to end by themselves once one host failed.
    echo: where each line goes as it comes, behind its host's name.
    note_latency: measure and echo the idle round trip first.

    SIGINT, SIGTERM and SIGHUP (when called in the main thread) end the run, remove what it made and then
    raise KeyboardInterrupt or SystemExit. Raises ClusterUnavailable without root or tools, ValueError for a
    bad argument, RuntimeError where the kernel refuses a part of the network.
    """
    reason = unavailable()
    if reason:
        raise ClusterUnavailable(reason)
    if not 1 <= hosts <= 250 or ranks_per_host < 1:
        raise ValueError(f"hosts={hosts} must be 1 to 250 and ranks_per_host={ranks_per_host} at least 1")
    bits_per_second(rate)
    for prefix in namespaces.stale():
        namespaces.remove(prefix)
    with _signals() as stop, _network(hosts, rate) as network:
        if note_latency and echo is not None:
            idle = f"idle round trip host0 - host{hosts - 1}: {network.round_trip() * 1e6:.0f} us"
            print(f"{idle}; the rate is emulated, delay is not", file=echo, flush=True)
        before = network.counters()
        started = time.monotonic()
        outputs, code = _run_hosts(network, command, ranks_per_host, env or {}, timeout, grace, echo, stop)
        seconds = time.monotonic() - started
        after = network.counters()
    tx, rx = (tuple(b[way] - a[way] for a, b in zip(before, after, strict=True)) for way in (0, 1))
    return ClusterResult(code, outputs, tx, rx, seconds)


def bits_per_second(rate: str) -> int:
    """Bits per second of a rate as tc writes it, e.g. "2gbit" -> 2_000_000_000. ValueError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)bit", rate.lower())
    bits = round(float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")) if match else 0
    if bits < 1:
        raise ValueError(f"rate {rate!r} is not a positive number with a unit: write it like 500mbit")
    return bits


class _Network:
    """Hosts and switch of one run."""

    def __init__(self, hosts: int, rate: str) -> None:
        self.prefix = namespaces.new_prefix()
        self.hosts = hosts
        self.rate = rate
        self.hosts_file = namespaces.side_file(self.prefix)

    def name(self, host: int) -> str:
        return f"{self.prefix}.host{host}"

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    def create(self) -> None:
        # The second form is what a dual-stack server, as c10d's is, sees as the address of its client.
        forms = ("", "::ffff:")
        lines = [f"{form}{self.address(host)} host{host}" for form in forms for host in range(self.hosts)]
        self.hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        switch = f"{self.prefix}.switch"
        namespaces.create(switch)
        namespaces.ip_batch(switch, "link add bridge type bridge stp_state 0 mcast_snooping 0", "link set bridge up")
        for host in range(self.hosts):
            name, port = self.name(host), f"port{host}"
            namespaces.create(name)
            namespaces.ip_batch(
                switch,
                f"link add {port} type veth peer name eth0 netns {name}",
                f"link set {port} master bridge",
                f"link set {port} up",
            )
            namespaces.ip_batch(name, f"addr add {self.address(host)}/24 dev eth0", "link set eth0 up")
            self._shape(name, "eth0")
            self._shape(switch, port)

    def _shape(self, namespace: str, device: str) -> None:
        # The bucket holds 1 ms of traffic, and at least two segments of 64 KiB as the kernel hands them down.
        burst = max(128 * 1024, bits_per_second(self.rate) // 8 // 1000)
        shape = f"tbf rate {self.rate} burst {burst} latency 50ms"
        namespaces.call("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape.split())

    def counters(self) -> list[tuple[int, int]]:
        """(sent, received) bytes of each host's eth0 so far: its /sys/class/net/eth0/statistics."""
        return [self._counters(host) for host in range(self.hosts)]

    def _counters(self, host: int) -> tuple[int, int]:
        show = ("-j", "-s", "link", "show", "dev", "eth0")
        (link,) = json.loads(namespaces.call("ip", "-n", self.name(host), *show))
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]

    def entered(self, host: int, command: Sequence[str]) -> list[str]:
        """`command` as run on `host`; it gets SIGTERM should this process be killed outright."""
        outside = ["setpriv", "--pdeathsig", "TERM", "nsenter", f"--net={namespaces.NETNS / self.name(host)}"]
        inside = ["unshare", "--mount", "--uts", "sh", "-c", _ENTER, "sh"]
        return [*outside, *inside, f"host{host}", str(self.hosts_file), *command]

    def round_trip(self) -> float:
        """Seconds of the fastest of 50 one-byte TCP round trips between the first and the last host."""
        serve = (
            "import socket; server = socket.create_server(('', 9)); print(flush=True)\n"
            "peer = server.accept()[0]\n"
            "while byte := peer.recv(1): peer.send(byte)"
        )
        ask = (
            f"import socket, time; peer = socket.create_connection(('host{self.hosts - 1}', 9)); best = 9.0\n"
            "for _ in range(50):\n"
            "    start = time.perf_counter(); peer.send(b'?'); peer.recv(1)\n"
            "    best = min(best, time.perf_counter() - start)\n"
            "print(best)"
        )
        entered = self.entered(self.hosts - 1, [sys.executable, "-c", serve])
        with subprocess.Popen(entered, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
            assert server.stdout is not None
            server.stdout.readline()  # it listens
            return float(namespaces.call(*self.entered(0, [sys.executable, "-c", ask])))


@contextlib.contextmanager
def _network(hosts: int, rate: str) -> Iterator[_Network]:
    network = _Network(hosts, rate)
    try:
        network.create()
        yield network
    finally:
        namespaces.remove(network.prefix)


@dataclass
class _Stop:
    signum: int | None = None


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """In the main thread a signal only sets `signum`, and raises when the block has ended and cleaned up.

    A handler that raised at once could do so anywhere, in the middle of cleaning too.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stop.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signum is not None:
            raise SystemExit(128 + stop.signum)


def _run_hosts(
    network: _Network,
    command: Sequence[str],
    ranks_per_host: int,
    env: Mapping[str, str],
    timeout: float | None,
    grace: float,
    echo: TextIO | None,
    stop: _Stop,
) -> tuple[tuple[str, ...], int]:
    """Output per host and the run's exit code; no process is left on any host."""
    lines: list[list[str]] = [[] for _ in range(network.hosts)]
    lock = threading.Lock()

    def read(host: int, stream: TextIO) -> None:
        for line in stream:
            lines[host].append(line)
            if echo is not None:
                with lock:
                    echo.write(f"[host{host}] {line.rstrip()}\n")
                    echo.flush()

    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ, **env}
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for host in range(network.hosts):
            torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={network.hosts}"]
            torchrun += [f"--node-rank={host}", f"--nproc-per-node={ranks_per_host}"]
            torchrun += [f"--master-addr={network.address(0)}", f"--master-port={MASTER_PORT}", *command]
            process = subprocess.Popen(
                network.entered(host, torchrun),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C reaches this process only, which then ends the run
            )
            processes.append(process)
            assert process.stdout is not None
            readers.append(threading.Thread(target=read, args=(host, process.stdout), daemon=True))
            readers[-1].start()
        code = _wait(processes, timeout, grace, stop)
    finally:
        for host in range(network.hosts):
            namespaces.kill_members(network.name(host))
        for process in processes:
            process.wait()
        for reader in readers:
            reader.join(timeout=10)  # ends with the last process that holds the pipe
    return tuple("".join(part) for part in lines), code


def _wait(processes: Sequence[subprocess.Popen[str]], timeout: float | None, grace: float, stop: _Stop) -> int:
    """Exit code of the first process that failed, 0 where none did, 124 where `timeout` passed first."""
    deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
    failed = 0
    while stop.signum is None:
        codes = [process.poll() for process in processes]
        bad = [code for code in codes if code]
        if bad and not failed:
            failed = bad[0] if bad[0] > 0 else 128 - bad[0]
            deadline = min(deadline, time.monotonic() + grace)
        if None not in codes:
            return failed
        if time.monotonic() > deadline:
            return failed or TIMED_OUT
        time.sleep(0.05)
    return failed


def _key_value(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return key, value


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run a script with torchrun on emulated hosts.",
        usage="%(prog)s [options] -- script.py [arguments]",
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--rate", default="1gbit", help="of each host's link, each way, as tc writes it")
    parser.add_argument("--latency-note", action="store_true", help="measure the idle round trip first")
    parser.add_argument("--env", type=_key_value, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--timeout", type=float, help="seconds until all hosts are killed (exit code 124)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds for the others once one failed")
    parser.add_argument("command", nargs="+", help="script and its arguments, after `--`")
    options = parser.parse_args()
    try:
        result = run_cluster(
            options.command,
            hosts=options.hosts,
            ranks_per_host=options.ranks_per_host,
            rate=options.rate,
            env=dict(options.env),
            timeout=options.timeout,
            grace=options.grace,
            echo=sys.stdout,
            note_latency=options.latency_note,
        )
    except (ClusterUnavailable, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(f"on the links of {options.rate}, in {result.seconds:.1f} s, with headers and rendezvous:")
    for host, (sent, received) in enumerate(zip(result.tx_bytes, result.rx_bytes, strict=True)):
        print(f"  host{host}: sent {sent:,} bytes, received {received:,} bytes")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())

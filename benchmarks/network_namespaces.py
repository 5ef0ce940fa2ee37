"""Named network namespaces that a run owns, and their removal with all in them, even after a `kill -9`.

A name holds the owner's pid namespace, pid and start time:
`distlib-<pid namespace>-<pid>-<start>-<serial>.<part>`. So a later run can prove that the owner is dead, and
leaves alone what belongs to a living process or to another container.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

NETNS = Path("/run/netns")  # where iproute2 keeps the named namespaces
_NAME = re.compile(r"(distlib-(?P<pid_namespace>\d+)-(?P<pid>\d+)-(?P<start>\d+)-\d+)\.\w+")
_serial = itertools.count()


def new_prefix() -> str:
    """A name of which no other run has namespaces; namespaces are called `<prefix>.<part>`."""
    return f"distlib-{_pid_namespace()}-{os.getpid()}-{_start_time(os.getpid())}-{next(_serial)}"


def side_file(prefix: str) -> Path:
    """Where a run may keep one small file; removed with its namespaces."""
    return NETNS.parent / f"{prefix}.file"


def create(name: str) -> None:
    """Make the namespace with its loopback up and no IPv6, whose chatter would show on the byte counters."""
    call("ip", "netns", "add", name)
    turn_off = "! test -d /proc/sys/net/ipv6 || echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6"
    call("nsenter", f"--net={NETNS / name}", "sh", "-c", turn_off)
    ip_batch(name, "link set lo up")


def ip_batch(namespace: str, *lines: str) -> None:
    """Run the `ip` commands `lines` inside the namespace."""
    call("ip", "-n", namespace, "-batch", "-", stdin="\n".join(lines))


def call(*command: str, stdin: str = "") -> str:
    """Output of a command; RuntimeError with its complaint where it fails. A Ctrl-C does not reach it."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        complaint = f"`{' '.join(command)}` failed with exit code {done.returncode}: {done.stderr.strip()}"
        raise RuntimeError(f"{complaint}\n{stdin}".rstrip())
    return done.stdout


def remove(prefix: str) -> None:
    """Kill what lives in the namespaces of `prefix`, then remove them and so their links and bridges."""
    names = sorted(path.name for path in NETNS.glob(f"{prefix}.*"))
    for name in names:
        kill_members(name)
    for name in names:
        call("ip", "netns", "del", name)
    side_file(prefix).unlink(missing_ok=True)


def stale() -> list[str]:
    """Prefixes that runs left behind whose process is provably dead (it was killed outright)."""
    dead = set()
    for path in [*NETNS.glob("distlib-*"), *NETNS.parent.glob("distlib-*.file")]:
        match = _NAME.fullmatch(path.name)
        if match and int(match["pid_namespace"]) == _pid_namespace():
            if _start_time(int(match["pid"])) != int(match["start"]):
                dead.add(match[1])
    return sorted(dead)


def members(name: str, pids: Sequence[int] | None = None) -> list[int]:
    """Those of `pids` (default: all processes) that live in the namespace."""
    wanted = (NETNS / name).stat()
    found = []
    for pid in pids if pids is not None else [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]:
        # Ended meanwhile, or a zombie, or more privileged than this process: then it is none of ours.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), wanted):
                found.append(pid)
    return found


def kill_members(name: str, patience: float = 20.0) -> None:
    """SIGKILL every process in the namespace until none is left; RuntimeError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while living := members(name):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {living} in namespace {name} outlived SIGKILL by {patience} s")
        for pid in living:
            with contextlib.suppress(ProcessLookupError):  # already gone: what is wanted
                handle = os.pidfd_open(pid)
                try:
                    if members(name, [pid]):  # so the handle is not of one that got its number
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        time.sleep(0.02)


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])  # field 22 of proc(5); the name may hold anything

"""Cores, memory, limits and kernel services: read from the system, or tried out."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from distlib.doctor.facts import Kernel, Limits, Machine

_CGROUPS = Path("/sys/fs/cgroup")
_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}  # the system call's number
_FUTEX_WAKE_PRIVATE = 129


def machine(arena: int) -> Machine:
    """Cores and memory. `arena`: bytes of address space that a rank will ask for."""
    cores = os.cpu_count() or 1
    return Machine(
        host=socket.gethostname(),
        cores=cores,
        affinity=sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores)),
        cores_quota=cores_quota(own_cgroups()),
        memory=total_memory(),
        memory_available=available_memory(),
        memory_limit=memory_limit(own_cgroups())[0],
        arena=arena,
        shm=shared_memory_size(),
    )


def shared_memory_size(folder: Path = Path("/dev/shm")) -> int | None:
    """Bytes of /dev/shm, which NCCL uses between ranks of a host (distlib does not); None: there is none."""
    if not folder.is_dir():
        return None
    system = os.statvfs(folder)
    return system.f_frsize * system.f_blocks


def total_memory() -> int:
    """Bytes of memory of the machine."""
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """Bytes that processes can still take, of the machine's memory and of the container's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = memory_limit(own_cgroups())
    return available if limit is None else max(0, min(available, limit - used))


def own_cgroups(text: str | None = None, root: Path = _CGROUPS) -> list[Path]:
    """Folders of this process's control groups, the innermost first; `text` is /proc/self/cgroup's."""
    if text is None:
        file = Path("/proc/self/cgroup")
        text = file.read_text() if file.exists() else ""
    folders: list[Path] = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for top in [root / controllers] if controllers else [root]:
            inner = top / path.lstrip("/")
            # In a container the path may be the host's: then only the top is there.
            chain = [inner, *inner.parents][: len(inner.parts) - len(top.parts)] + [top]
            folders += [folder for folder in chain if folder.is_dir()]
    return folders


def memory_limit(cgroups: list[Path]) -> tuple[int | None, int]:
    """The tightest memory limit of control groups (None: none) and what is used of it, both in bytes."""
    found: list[tuple[int, int]] = []
    for folder in cgroups:
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and limit < 1 << 60:  # version 1 writes a huge number for "none"
                found.append((limit, max(0, (used or 0) - _inactive_file(folder))))
    return min(found, key=lambda pair: pair[0] - pair[1], default=(None, 0))


def cores_quota(cgroups: list[Path]) -> float | None:
    """Cores' worth of time that control groups allow; None: no quota."""
    found: list[float] = []
    for folder in cgroups:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                found.append(int(quota) / int(period))
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_us and period_us and quota_us > 0:
            found.append(quota_us / period_us)
    return min(found, default=None)


def _number(file: Path) -> int | None:
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.lstrip("-").isdigit() else None


def _inactive_file(folder: Path) -> int:
    """Page cache, which the kernel gives up before it kills."""
    file = folder / "memory.stat"
    lines = file.read_text().splitlines() if file.exists() else []
    values = dict(line.split()[:2] for line in lines)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def limits() -> Limits:
    """ulimits in force (the soft ones)."""

    def soft(which: int) -> int | None:
        value = resource.getrlimit(which)[0]
        return None if value == resource.RLIM_INFINITY else value

    return Limits(
        address_space=soft(resource.RLIMIT_AS),
        open_files=soft(resource.RLIMIT_NOFILE),
        locked_memory=soft(resource.RLIMIT_MEMLOCK),
    )


def kernel() -> Kernel:
    """Each service used once, in this process."""
    return Kernel(memfd=_tried(_try_memfd), futex=_tried(_try_futex), abstract_sockets=_tried(_try_abstract_socket))


def _tried(attempt: Callable[[], None]) -> str:
    """Empty if it works, else the system's reason."""
    try:
        attempt()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _try_memfd() -> None:
    """Memory that two mappings share, as the arena uses it."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has none")
    fd = os.memfd_create("distlib-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 1 << 20)
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE) as one, mmap.mmap(fd, mmap.PAGESIZE) as other:
            one[:5] = b"hello"
            if other[:5] != b"hello":
                raise OSError("two mappings of one file differ")
    finally:
        os.close(fd)


def _try_futex() -> None:
    """Wake whoever waits on a word: nobody does."""
    number = _FUTEX_CALL.get(platform.machine())
    if platform.system() != "Linux":
        raise OSError("this system has none")
    if number is None:
        return  # another architecture: the self-test tells
    call = ctypes.CDLL(None, use_errno=True).syscall
    word = ctypes.c_uint32(0)
    if call(number, ctypes.byref(word), _FUTEX_WAKE_PRIVATE, 1, None, None, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _try_abstract_socket() -> None:
    """A file descriptor handed over a socket without a file, and the peer's user asked of the kernel."""
    if not hasattr(socket, "SO_PEERCRED"):
        raise OSError("this system has none")
    with _connected() as (near, far), open(os.devnull) as file:
        size = struct.calcsize("3i")
        user = struct.unpack("3i", far.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1]
        if user != os.geteuid():
            raise OSError(f"the kernel says that user {user} is at the other end, not {os.geteuid()}")
        socket.send_fds(near, [b"x"], [file.fileno()])
        _, descriptors, _, _ = socket.recv_fds(far, 1, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        if not descriptors:
            raise OSError("file descriptors do not pass")


@contextmanager
def _connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection over an abstract socket."""
    name = f"\0distlib-doctor-{os.getpid()}"
    kind = (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket.socket(*kind) as listener, socket.socket(*kind) as near:
        listener.bind(name)
        listener.listen(1)
        near.connect(name)
        with listener.accept()[0] as far:
            yield near, far

"""Sockets that a forked child must not keep. Others see by their closing that this process has ended, and the kernel
closes them when the last process that holds them ends: a data loader's worker may outlive its parent."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

_DESCRIPTORS = "/proc/self/fd"
_kept: dict[int, int] = {}  # descriptor -> inode, which tells whether it is still the same socket


@contextlib.contextmanager
def not_by_children() -> Iterator[None]:
    """Sockets that are opened meanwhile, by C++ code that does not tell which, are not for forked children."""
    before = _sockets()
    yield
    now = _sockets()
    opened = {fd: inode for fd, inode in now.items() if before.get(fd) != inode}
    still = {fd: inode for fd, inode in _kept.items() if now.get(fd) == inode}
    _kept.clear()
    _kept.update(still | opened)


def _sockets() -> dict[int, int]:
    """The sockets of this process; none where the system does not list them."""
    if not os.path.isdir(_DESCRIPTORS):
        return {}
    found = {int(name): _inode(int(name)) for name in os.listdir(_DESCRIPTORS)}
    return {fd: inode for fd, inode in found.items() if inode}


def _inode(fd: int) -> int:
    """The number of the socket behind a descriptor; 0: there is none."""
    try:
        found = os.fstat(fd)
    except OSError:  # closed meanwhile
        return 0
    return found.st_ino if stat.S_ISSOCK(found.st_mode) else 0


def _let_go() -> None:
    """In a forked child: the descriptors stay taken, as objects that the child inherited may close them."""
    if not _kept:
        return
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd, inode in _kept.items():
        if _inode(fd) == inode:
            os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)
    _kept.clear()


os.register_at_fork(after_in_child=_let_go)

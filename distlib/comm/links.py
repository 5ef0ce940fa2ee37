"""A connection between every two ranks of a group on one host: hands over descriptors, carries notices, and ends when
the process at its other end does."""

from __future__ import annotations

import json
import os
import secrets
import socket
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from distlib.comm.meeting import check_user

Exchange = Callable[[str], list[str]]  # every rank's text, by rank; all ranks must call
Notice = dict[str, Any]
_MOST = 16_000  # bytes of a notice
_all: weakref.WeakSet[Links] = weakref.WeakSet()


class Links:
    """This rank's connections to the others, by rank. `pids`: the processes there. Made by all ranks together.

    Abstract Unix sockets: nothing in the file system, and nobody but processes of this host (and this network
    namespace) can come; the kernel tells whose process is at the other end. RuntimeError naming the rank that could
    not be reached, or that belongs to another user.
    """

    def __init__(self, rank: int, labels: Sequence[int], exchange: Exchange, timeout: float) -> None:
        self._labels, self._timeout = labels, timeout
        self._sockets: dict[int, socket.socket] = {}
        self.pids: dict[int, int] = {}
        try:
            self._open(rank, exchange, timeout)
        except OSError as error:
            self.close()
            raise RuntimeError(
                f"rank {labels[rank]} cannot reach the other ranks of its host over Unix sockets: {error}. Start all "
                "ranks of a host in one network namespace, or give each a GPU of its own"
            ) from error
        _all.add(self)

    def _open(self, rank: int, exchange: Exchange, timeout: float) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            name = f"distlib-link-{os.getpid()}-{secrets.token_hex(16)}"
            door.bind("\0" + name)
            door.listen(len(self._labels))
            door.settimeout(timeout)
            names = exchange(name)
            for r in range(rank):  # of each pair the higher rank knocks
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sock.settimeout(timeout)
                self._sockets[r] = sock
                sock.connect("\0" + names[r])
                self.pids[r] = check_user(sock, f"rank {self._labels[r]}")
                sock.send(json.dumps({"rank": rank}).encode())
            for _ in range(rank + 1, len(self._labels)):
                sock, _ = door.accept()
                sock.settimeout(timeout)
                pid = check_user(sock, "a process at the door")
                r = int(json.loads(sock.recv(_MOST))["rank"])
                self._sockets[r], self.pids[r] = sock, pid
        self._block(False)

    def _block(self, blocking: bool) -> None:
        for sock in self._sockets.values():
            sock.settimeout(self._timeout if blocking else 0.0)

    def swap_descriptors(self, fd: int) -> dict[int, int]:
        """Gives `fd` to every other rank. Returns theirs, by rank, to be closed by the caller; all ranks must call."""
        taken: dict[int, int] = {}
        self._block(True)
        try:
            for sock in self._sockets.values():
                socket.send_fds(sock, [b"fd"], [fd])
            for r, sock in self._sockets.items():
                _, fds, _, _ = socket.recv_fds(sock, 16, 1, socket.MSG_CMSG_CLOEXEC)
                if not fds:
                    raise OSError(f"rank {self._labels[r]} hung up")
                taken[r] = fds[0]
        except OSError as error:
            for other in taken.values():
                os.close(other)
            raise RuntimeError(f"memory could not be handed over between ranks: {error}") from error
        finally:
            self._block(False)
        return taken

    def tell(self, notice: Notice) -> None:
        """Sends a notice to every other rank that is still there. Never blocks."""
        data = json.dumps(notice).encode()
        for sock in self._sockets.values():
            try:
                sock.send(data, socket.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionResetError, BlockingIOError):
                continue  # it has ended, or hears nothing any more: hear() and the timeouts tell

    def hear(self) -> list[tuple[int, Notice | None]]:
        """What has come from whom since the last call; None: that process has ended. Never blocks."""
        heard: list[tuple[int, Notice | None]] = []
        for r, sock in list(self._sockets.items()):
            while True:
                try:
                    data = sock.recv(_MOST)
                except BlockingIOError:
                    break
                except ConnectionResetError:
                    data = b""
                if not data:
                    self._sockets.pop(r).close()
                    heard.append((r, None))
                    break
                heard.append((r, json.loads(data)))
        return heard

    def close(self) -> None:
        """Hangs up."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def _hang_up_in_child() -> None:
    """A forked child must not keep connections open by which its parent's end is seen."""
    for links in list(_all):
        links.close()


os.register_at_fork(after_in_child=_hang_up_in_child)

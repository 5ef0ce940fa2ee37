"""Ranks of one host meet: memory handed over a Unix socket, the peer's user checked, a nonce echoed through the memory.

What is proved here is all that distlib believes about who shares a host: no hostname, no launcher variable. A rank
connects to another's door (an abstract Unix socket: nothing in the file system), the kernel says whose process is at
the other end (SO_PEERCRED), each sends the memfd of its arena (SCM_RIGHTS), and each reads back to the other a nonce
that only lies in that memory. The socket then stays open: the kernel closes it when the process ends, which is how
death is seen.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import struct
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from distlib import native, settings

log = logging.getLogger("distlib")
_NONCE = 32
_HANDSHAKE_SECONDS = 20.0
_PAUSE = 0.1  # seconds until a process without descriptors looks again whether it can open the door
_FULL = "Too many open files: no descriptor is left for the memory of other ranks; raise the limit, see ulimit -n"


@dataclass(frozen=True)
class Card:
    """What a rank tells all others of itself. The first four fields only save pointless knocking: they prove
    nothing."""

    boot: str  # the kernel's boot id
    network: int  # network namespace: abstract sockets do not cross it
    user: int
    pretend_node: int  # DISTLIB_NODES splits one host into several
    door: str  # "" where the core cannot be used
    pid: int
    cores: str  # those it may run on, as a hexadecimal mask

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str | bytes) -> Card:
        return Card(**json.loads(text))

    def may_share_host(self, other: Card) -> bool:
        """Whether knocking is worth a try."""
        mine = (self.boot, self.network, self.user, self.pretend_node)
        return bool(self.door and other.door) and mine == (
            other.boot,
            other.network,
            other.user,
            other.pretend_node,
        )


def pretend_node(rank: int, size: int) -> int:
    """The pretend node of a world rank under DISTLIB_NODES=k: contiguous blocks, as even as possible; 0 without."""
    text = os.environ.get("DISTLIB_NODES", "")
    if not text:
        return 0
    if not text.isdigit() or not 1 <= int(text) <= size:
        raise ValueError(f"DISTLIB_NODES={text!r}: must be a number from 1 to the world size {size}")
    return rank * int(text) // size


def _arena_bytes() -> int:
    """Address space for this process's arena: all of the host's memory, unless DISTLIB_ARENA_MB says otherwise."""
    memory = min(int(psutil.virtual_memory().total), 1 << 38)
    return settings.integer("DISTLIB_ARENA_MB", memory >> 20, 64, "MiB") << 20


def check_user(sock: socket.socket, who: str) -> int:
    """The pid at the other end, whose user must be this process's own."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise RuntimeError(f"{who} belongs to user {user}, this process to user {os.geteuid()}: no memory is shared")
    return pid


def _is_full(error: BaseException) -> bool:
    """Whether a call failed because this process, or the system, may open no more files."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


class Host:
    """This process's place on its host: its arena, its door, and the peers that came through it."""

    _here: Host | None = None
    _lock = threading.Lock()

    @classmethod
    def here(cls) -> Host:
        """The one of this process. A forked child gets its own: the parent's door and arena are the parent's."""
        with cls._lock:
            if cls._here is None or cls._here.pid != os.getpid():
                cls._here = cls()
            return cls._here

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.core = native.core()
        self.peers: dict[str, Any] = {}  # door -> native Peer
        self.door = ""
        self._refused: dict[str, str] = {}  # door -> why its memory and ours could not be exchanged
        self._full = False  # no descriptor was left to let somebody in
        self._changed = threading.Condition()
        if self.core is None:
            return
        self.arena = self.core.Arena(_arena_bytes())
        self.door = f"distlib-{self.pid}-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + self.door)
        self._listener.listen(1024)
        os.register_at_fork(after_in_child=self._close_in_child)
        threading.Thread(target=self._welcome, name="distlib-door", daemon=True).start()

    def _close_in_child(self) -> None:
        """A forked child must not keep the door open, nor the sockets by which the parent's death is seen."""
        if self.pid == os.getpid():
            return
        self._listener.close()
        for peer in self.peers.values():
            peer.forget_socket()

    def card(self, rank: int, size: int) -> Card:
        """This process's card as world rank `rank` of `size`."""
        with open("/proc/sys/kernel/random/boot_id") if os.path.exists("/proc") else open(os.devnull) as f:
            boot = f.read().strip()
        network = os.stat("/proc/self/ns/net").st_ino if os.path.exists("/proc/self/ns/net") else 0
        mask = sum(1 << core for core in os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        node = pretend_node(rank, size)
        return Card(boot, network, os.geteuid(), node, self.door, self.pid, f"{mask:x}")

    # ------------------------------------------------------------ meeting

    def meet(self, cards: dict[int, Card], me: int, timeout: float) -> set[int]:
        """The ranks of `cards` that are proved to share this host, `me` included. Every rank of `cards` must call.

        Of each pair the higher rank knocks. Raises RuntimeError naming the rank that did not come within `timeout`.
        """
        mine = cards[me]
        if not mine.door:
            return {me}
        likely = [r for r, card in cards.items() if r != me and mine.may_share_host(card)]
        until = time.monotonic() + timeout
        for r in likely:
            if r < me and cards[r].door not in self.peers:
                self._knock(r, cards[r])
        for r in likely:
            came = self._came(cards[r].door, until)
            if cards[r].door in self._refused:
                raise RuntimeError(f"rank {r} (pid {cards[r].pid}) is on this host: {self._refused[cards[r].door]}")
            if not came:
                raise RuntimeError(
                    f"rank {r} (pid {cards[r].pid}) of this host did not come to the meeting within {timeout:.0f} s. "
                    "Did it end or hang while starting? Look at its output"
                )
        return {me, *likely}

    def _came(self, door: str, until: float) -> bool:
        """Whether the rank of a door came, or was turned away, in time."""
        known = lambda: door in self.peers or door in self._refused  # noqa: E731
        with self._changed:
            self._changed.wait_for(lambda: known() or self._full, max(0.0, until - time.monotonic()))
            if self._full and not known():
                raise RuntimeError(f"pid {self.pid}: {_FULL}")
            return known()

    def _knock(self, rank: int, card: Card) -> None:
        who = f"rank {rank} (pid {card.pid})"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(_HANDSHAKE_SECONDS)
                sock.connect("\0" + card.door)
                pid = check_user(sock, who)
                block = self._nonce()
                self._send(sock, {"door": self.door, "size": self.arena.size, "at": block.offset}, self.arena.fd)
                hello, fd = self._receive(sock, who)
                self._expect(hello["nonce"] == bytes(memoryview(block)[:_NONCE]).hex(), who)
                peer = self._map(sock, fd, hello["size"], pid)
                self._send(sock, {"nonce": peer.peek(hello["at"], _NONCE).hex()})
                done, _ = self._receive(sock, who, wants_fd=False)
                self._expect(bool(done.get("welcome")), who)
        except OSError as error:
            if _is_full(error):
                raise RuntimeError(f"pid {self.pid}: {_FULL}") from error
            raise RuntimeError(
                f"{who} is on this host, but its shared memory cannot be reached: {error}. "
                "Did it end while starting? Look at its output"
            ) from error
        self._admit(card.door, peer)

    def _map(self, sock: socket.socket, fd: int, size: int, pid: int) -> Any:
        """The peer's arena, mapped; if that fails, the peer is told why before this rank raises. fd: -1 where the
        kernel dropped it, as this process may open no more files."""
        try:
            if fd < 0:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return self.core.Peer(fd, size, os.dup(sock.fileno()), pid)
        except (MemoryError, RuntimeError, OSError) as error:
            why = _FULL if _is_full(error) else str(error)
            self._send(sock, {"error": f"pid {self.pid}: {why}"})
            raise RuntimeError(f"pid {self.pid}: {why}") from error

    def _welcome(self) -> None:
        """Answers the door, for as long as the process lives."""
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not _is_full(error):
                    return  # closed: the process is forked or ending
                self._set_full(True)
                time.sleep(_PAUSE)  # whoever knocked still stands there
                self._set_full(False)
                continue
            with sock:
                sock.settimeout(_HANDSHAKE_SECONDS)
                try:
                    self._answer(sock)
                except (OSError, RuntimeError, KeyError, ValueError) as error:
                    log.warning("a process that came to the door of pid %d was turned away: %s", self.pid, error)

    def _set_full(self, full: bool) -> None:
        with self._changed:
            self._full = full
            self._changed.notify_all()

    def _answer(self, sock: socket.socket) -> None:
        pid = check_user(sock, "the process at the door")
        hello, fd = self._receive(sock, "the process at the door")
        try:
            peer = self._map(sock, fd, hello["size"], pid)
            block = self._nonce()
            nonce = peer.peek(hello["at"], _NONCE).hex()
            self._send(sock, {"size": self.arena.size, "at": block.offset, "nonce": nonce}, self.arena.fd)
            proof, _ = self._receive(sock, f"pid {pid}", wants_fd=False)
            self._expect(proof["nonce"] == bytes(memoryview(block)[:_NONCE]).hex(), f"pid {pid}")
            self._send(sock, {"welcome": True})
        except RuntimeError as error:
            with self._changed:
                self._refused[hello["door"]] = str(error)
                self._changed.notify_all()
            raise
        self._admit(hello["door"], peer)

    def _admit(self, door: str, peer: Any) -> None:
        with self._changed:
            self.peers[door] = peer
            self._changed.notify_all()

    def _nonce(self) -> Any:
        block = self.arena.allocate(_NONCE, True)
        memoryview(block)[:_NONCE] = secrets.token_bytes(_NONCE)
        return block

    @staticmethod
    def _expect(true: bool, who: str) -> None:
        if not true:
            raise RuntimeError(f"{who} could not read back what lies in the memory it was given: not the same host")

    @staticmethod
    def _send(sock: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
        socket.send_fds(sock, [json.dumps(message).encode()], [] if fd is None else [fd])

    @staticmethod
    def _receive(sock: socket.socket, who: str, wants_fd: bool = True) -> tuple[dict[str, Any], int]:
        """What the other end says, and the descriptor it sends along; -1: none, or this process may have no more."""
        data, fds, flags, _ = socket.recv_fds(sock, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        message = json.loads(data) if data else {}
        if "error" in message:
            raise RuntimeError(f"{who} cannot share memory: {message['error']}")
        if not data or (wants_fd and not fds and not flags & socket.MSG_CTRUNC):
            raise OSError(f"{who} hung up during the handshake")
        return message, fds[0] if fds else -1

"""Every rank answers the roll with its settings; all get one verdict, so that a mistake is no hang.

The store may hold keys of an earlier roll call: torchrun keeps its store when it restarts ranks, and init()
may follow shutdown(). So each process answers with a nonce; only what repeats its nonce is meant for it:

    every rank    hello/<rank>       <- nonce and settings
    rank 0        roster/<rank>      <- that hello and a new session; again whenever a hello changes
    every rank    <session>/<rank>   <- here, once the roster answers its own hello
    rank 0        <session>/verdict  <- null, once all are here and agree; else what is wrong, and the fix
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import Store

from distlib.launchers import Launch

T = TypeVar("T")
Record = Mapping[str, Any]  # a rank's settings: "gpu" must differ where it is not None, the others must not


@dataclass
class Patience:
    """How long this rank goes on waiting, and how its complaints begin."""

    launch: Launch
    timeout: timedelta

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.timeout.total_seconds()

    @property
    def waited(self) -> str:
        return f"{self.timeout.total_seconds():.3g} s"

    @property
    def left(self) -> float:
        return max(0.001, self.deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline

    def error(self, what: str, fix: str) -> RuntimeError:
        launch = self.launch
        return RuntimeError(f"rank {launch.rank} of {launch.size} ({launch.launcher}): {what}. Fix: {fix}.")

    def run(self, call: Callable[[], T], late: Callable[[], RuntimeError], grace: float = 0.0) -> T:
        """`call()`, or `late()` raised when time is up: for calls that cannot be interrupted.

        `grace`: seconds more, for steps inside `call` that tell better what they waited for.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def target() -> None:
            try:
                results.append(call())
            except BaseException as error:  # noqa: BLE001 (raised below, in the caller's thread)
                errors.append(error)

        thread = threading.Thread(target=target, daemon=True, name="distlib rendezvous")
        thread.start()
        thread.join(self.left + grace)
        if errors:
            raise errors[0]
        if not results:
            raise late()
        return results[0]


def call_roll(store: Store, where: str, record: Record, patience: Patience) -> str:
    """Wait until all ranks are here and agree; returns the session's name, which no roll call had before.

    Every rank calls it. `where` is the store's address, for messages. Raises RuntimeError within the timeout,
    the same on every rank that is here.
    """
    session, complaint = _guarded(lambda: _answer(store, where, record, patience), where, patience)
    if complaint:
        raise patience.error(*complaint)
    return session


def leave_together(store: Store, where: str, patience: Patience) -> None:
    """Wait until all ranks are done with `store` for now; rank 0, which may serve it, returns last.

    Every rank calls it. If a rank went on and ended while another still connects, that one would fail.
    """
    absent = _guarded(lambda: _leave(store, patience), where, patience)
    if absent:
        problem = f"{_ranks(absent)} came to {where}, but did not finish init() within {patience.waited}"
        raise patience.error(problem, "see their own errors")


def _leave(store: Store, patience: Patience) -> list[int]:
    """The ranks that did not come to the end in time."""
    rank, size = patience.launch.rank, patience.launch.size
    store.set(f"done/{rank}", "")
    if absent := _wait(store, "done", size, patience):
        return absent
    store.set(f"gone/{rank}", "")
    return _wait(store, "gone", size, patience) if rank == 0 else []


def _wait(store: Store, place: str, size: int, patience: Patience) -> list[int]:
    """Wait for every rank's key; returns the ranks whose key was not there in time."""
    pause = 0.001
    while not store.check(_keys(place, size)):
        if patience.is_over:
            return _absent(store, place, size)
        time.sleep(min(pause, patience.left))
        pause = min(2 * pause, 0.1)
    return []


def _guarded(talk: Callable[[], T], where: str, patience: Patience) -> T:
    """`talk()` with a store whose calls fail when its server ends, and never return when it is stopped."""

    def guarded() -> T:
        try:
            return talk()
        except RuntimeError as error:
            problem = f"lost the rendezvous at {where} ({error})"
            raise patience.error(problem, "see rank 0's own error") from error

    def late() -> RuntimeError:
        problem = f"the rendezvous at {where} stopped answering for {patience.waited}"
        return patience.error(problem, "see whether rank 0 is stopped, or its host unreachable")

    return patience.run(guarded, late, grace=0.5)


Complaint = tuple[str, str]  # what is wrong, how to fix it


def _answer(store: Store, where: str, record: Record, patience: Patience) -> tuple[str, Complaint | None]:
    """This rank's session and, if something is wrong, the complaint."""
    rank, size = patience.launch.rank, patience.launch.size
    hello = json.dumps({"nonce": secrets.token_hex(8), "size": size, **record})
    store.set(f"hello/{rank}", hello)
    chair = _Chair(store, where, patience) if rank == 0 else None
    session, pause = "", 0.001
    while True:
        if _read(store, f"hello/{rank}") != hello:
            problem = f"another process came to the rendezvous at {where} as rank {rank}"
            return "", (problem, "start each rank once, and two jobs with two ports (MASTER_PORT)")
        if chair:
            chair.step()
        for_hello, called = json.loads(_read(store, f"roster/{rank}") or '["", ""]')
        if for_hello == hello and called != session:
            session = called
            store.set(f"{session}/{rank}", "here")
        if verdict := session and _read(store, f"{session}/verdict"):
            return session, json.loads(verdict)
        if patience.is_over and not chair:
            return "", _missing(_absent(store, "hello", size) or [0], where, patience)
        time.sleep(min(pause, patience.left))
        pause = min(2 * pause, 0.1)


class _Chair:
    """Rank 0's second part: it writes the roster and gives the verdict."""

    def __init__(self, store: Store, where: str, patience: Patience) -> None:
        self.store, self.where, self.patience = store, where, patience
        self.hellos: dict[int, str] = {}
        self.session = ""

    def step(self) -> None:
        """Look once whether a roster or the verdict is due; when time is up, both are."""
        store, size, is_over = self.store, self.patience.launch.size, self.patience.is_over
        if not is_over and not store.check(_keys("hello", size)):
            return
        absent = _absent(store, "hello", size)
        present = [rank for rank in range(size) if rank not in absent]
        values = store.multi_get([f"hello/{rank}" for rank in present])
        hellos = {rank: value.decode() for rank, value in zip(present, values, strict=True)}
        if hellos != self.hellos:
            self.hellos, self.session = hellos, secrets.token_hex(8)
            for rank, hello in hellos.items():
                store.set(f"roster/{rank}", json.dumps([hello, self.session]))
        if store.check(_keys(self.session, size)):
            self._give(_compare([json.loads(hello) for hello in hellos.values()]))
        elif is_over:
            self._give(_missing(absent or _absent(store, self.session, size), self.where, self.patience))

    def _give(self, complaint: Complaint | None) -> None:
        self.store.set(f"{self.session}/verdict", json.dumps(complaint))


def _compare(records: list[dict[str, Any]]) -> Complaint | None:
    """What is wrong with the settings of all ranks, in rank order."""
    for name in records[0]:
        ranks_by_value: dict[Any, list[int]] = {}
        for rank, record in enumerate(records):
            ranks_by_value.setdefault(record.get(name), []).append(rank)
        if name == "gpu":
            for gpu, ranks in ranks_by_value.items():
                if gpu is not None and len(ranks) > 1:
                    problem = f"{_ranks(ranks)} would share GPU {gpu}, which NCCL refuses"
                    fix = (
                        "start no more ranks per host than it has GPUs, or build distlib with CUDA and leave backend "
                        "'auto', or use the CPU: backend='distlib'"
                    )
                    return problem, fix
        elif name != "nonce" and len(ranks_by_value) > 1:
            sides = [f"{name}={value!r} on {_ranks(ranks)}" for value, ranks in ranks_by_value.items()]
            return f"the ranks disagree: {', but '.join(sides)}", "call distlib.init() alike on every rank"
    return None


def _missing(ranks: list[int], where: str, patience: Patience) -> Complaint:
    problem = f"{_ranks(ranks)} did not come to the rendezvous at {where} within {patience.waited}"
    return problem, "see whether they started; raise timeout= if they start slowly"


def _read(store: Store, key: str) -> str:
    """The value of `key`, or "" at once: torch's own get() waits for the key and logs when it gives up."""
    return store.get(key).decode() if store.check([key]) else ""


def _keys(place: str, size: int) -> list[str]:
    return [f"{place}/{rank}" for rank in range(size)]


def _absent(store: Store, place: str, size: int) -> list[int]:
    keys = _keys(place, size)
    return [] if store.check(keys) else [rank for rank, key in enumerate(keys) if not store.check([key])]


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"

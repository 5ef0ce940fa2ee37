"""Parts of a run, one after the other, each in a process of its own that is given so much time and then ended.

A part that fails or hangs is told about, and the others go on. What a part leaves unspent goes to the next ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent  # where parts run
TAIL = 4000  # characters of a part's output that are kept in the results
GRACE = 5.0  # seconds in which a process that is being ended may write its stacks


@dataclass(frozen=True)
class Part:
    """A command and the seconds that it gets at least. why_not: it is left out, for this reason."""

    name: str
    command: Sequence[str]
    seconds: float
    environ: Mapping[str, str] = field(default_factory=dict)
    why_not: str = ""


@dataclass(frozen=True)
class Done:
    """How a part ended. outcome: "passed", "failed", "timed out" or "left out"; output: its end, unless it passed."""

    name: str
    outcome: str
    seconds: float = 0.0
    limit: float = 0.0
    code: int | None = None
    why: str = ""
    output: str = ""


def run_all(parts: Sequence[Part], total: float, logs: Path, tell: Callable[[Done], object] = print) -> list[Done]:
    """Every part in turn, within `total` seconds. Each may take what is left but for what those behind it are promised.

    logs: a folder for each part's output, NAME.log.
    """
    end = time.monotonic() + total
    logs.mkdir(parents=True, exist_ok=True)
    dones = []
    for index, part in enumerate(parts):
        promised = sum(other.seconds for other in parts[index + 1 :] if not other.why_not)
        limit = end - time.monotonic() - promised
        done = run(part, limit, logs / f"{part.name}.log")
        dones.append(done)
        tell(done)
    return dones


def run(part: Part, limit: float, log: Path) -> Done:
    """One part, ended after `limit` seconds with all that it started."""
    if part.why_not or limit <= 0:
        return Done(part.name, "left out", why=part.why_not or "no time was left for it")
    begin, survived = time.monotonic(), ""
    environ = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **part.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environ,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # it hangs, or this process is being interrupted
                survived = _end(process)
    outcome, why = "passed", ""
    if code is None:
        outcome, why = "timed out", f"it was ended after {limit:.0f} s{survived}"
    elif code:
        outcome, why = "failed", f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    tail = "" if outcome == "passed" else log.read_text(errors="replace")[-TAIL:]
    return Done(part.name, outcome, time.monotonic() - begin, limit, code, why, tail)


def _end(process: subprocess.Popen[bytes]) -> str:
    """Ends a part and all below it, also what has a session of its own, as ranks have. Python writes its stacks first.

    SIGABRT and not SIGTERM: faulthandler answers it, even where the interpreter hangs in a call of CUDA. Returns what
    is to be said about processes that not even SIGKILL ends, as those in a driver that hangs.
    """
    below = [*psutil.Process(process.pid).children(recursive=True)]
    for other in (*reversed(below), process):
        try:
            other.send_signal(signal.SIGABRT)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue  # it has ended meanwhile
    psutil.wait_procs(below, timeout=GRACE)
    _wait(process)
    for other in (*below, process):
        try:
            other.kill()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(below, timeout=GRACE)
    left = [other.pid for other in alive if other.is_running() and other.status() != psutil.STATUS_ZOMBIE]
    left += [] if _wait(process) else [process.pid]
    return f"; processes {sorted(left)} cannot be killed" if left else ""


def _wait(process: subprocess.Popen[bytes]) -> bool:
    """Whether it ended in time."""
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        return False
    return True

"""What a run says and writes: a progress bar or plain lines, the sample, the final tables, a JSON file."""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from rich import box, progress
from rich.console import Console
from rich.table import Table

import distlib
from lm.curve import LossCurve
from lm.settings import Settings

SHOWN_RANKS = 16  # rows in the table of ranks


@dataclass(frozen=True)
class RankReport:
    """One rank's own numbers. Bytes as distlib.ledger() counts them."""

    rank: int
    node: int
    communication_seconds: float  # this rank's time in collectives, waiting for others included
    bytes_counted: int
    bytes_expected: int
    bytes_between_hosts: int  # of those counted
    state_bytes: int  # memory of parameters, gradients and optimizer state, counted
    state_expected: int  # the same by formula
    peak_bytes: int  # memory of the process


@dataclass(frozen=True)
class Summary:
    """A whole run. Losses in nats per byte; the train loss is the mean of the last twentieth of the steps."""

    parameters: int
    train_loss: float
    validation_loss: float
    first_validation_loss: float
    seconds: float
    tokens_per_second: float
    ranks: list[RankReport]

    @staticmethod
    def of(curve: LossCurve, parameters: int, seconds: float, speed: float, ranks: list[RankReport]) -> Summary:
        last = curve.training[-max(1, len(curve.training) // 20) :]
        first_validation, validation = curve.validation[0][1], curve.validation[-1][1]
        return Summary(parameters, sum(last) / len(last), validation, first_validation, seconds, speed, ranks)

    @property
    def all_ranks(self) -> RankReport:
        """The ranks' sums; of their seconds, the mean."""
        columns = list(zip(*map(astuple, self.ranks), strict=True))
        sums = RankReport(*map(sum, columns))
        return replace(sums, communication_seconds=sums.communication_seconds / len(self.ranks))


def gather(world: distlib.World, memory: distlib.MemoryReport) -> list[RankReport]:
    """The reports of all ranks, on all ranks. Every rank must call it."""
    ledger = distlib.ledger()
    mine = RankReport(
        rank=world.rank,
        node=world.node_rank,
        communication_seconds=ledger.seconds,
        bytes_counted=ledger.total_bytes(),
        bytes_expected=sum(row.bytes for row in ledger.expected()),
        bytes_between_hosts=ledger.total_bytes("between hosts"),
        state_bytes=memory.total,
        state_expected=sum(memory.formula.values()),
        peak_bytes=peak_bytes(world.device),
    )
    reports: list[Any] = [None] * world.size
    dist.all_gather_object(reports, mine)
    return reports


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: resident, or on a GPU what torch allocated there."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Speaker:
    """Says how a run goes: a live bar in a terminal, plain lines elsewhere. Only rank 0 speaks.

    Around the training loop it is a context manager. `steps` of the whole run, of which `done` lie behind it.
    """

    def __init__(self, world: distlib.World, steps: int, done: int = 0) -> None:
        # Open MPI gives its ranks pseudo-terminals also where its own output goes to a file.
        direct = None if world.launcher in ("single", "torchrun") else False
        self.console = Console(
            quiet=world.rank != 0, force_terminal=direct, highlight=False, markup=False, soft_wrap=True
        )
        self._steps = steps
        self._bar: progress.Progress | None = None
        if self.console.is_terminal and not self.console.quiet:
            self._bar = progress.Progress(
                progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                progress.BarColumn(bar_width=None),
                progress.TextColumn("{task.fields[numbers]}"),
                progress.TimeRemainingColumn(),
                console=self.console,
                expand=True,
                refresh_per_second=2,  # drawing takes time from rank 0, for which all others wait
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, numbers="")

    def __enter__(self) -> Speaker:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def opening(
        self,
        world: distlib.World,
        threads: int,
        parameters: int,
        train_bytes: int,
        validation_bytes: int,
        engine: distlib.Engine,
    ) -> None:
        device = f"{counted(threads, 'thread')} each" if world.device.type == "cpu" else "a GPU each"
        where = f"{counted(world.size, 'rank')} on {counted(world.node_count, 'node')}"
        self.console.print(f"{where} ({world.launcher}), {device}")
        self.console.print(
            f"{parameters:,} parameters; {train_bytes:,} bytes to train on, {validation_bytes:,} to validate"
        )
        self.console.print(f"\n{engine.describe()}\n")

    def trained(self, done: int, loss: float, rate: float, tokens_per_second: float) -> None:
        """`done` steps are; `loss` is the mean of all ranks and of the steps since the last time."""
        if self._bar:
            numbers = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
            self._bar.update(self._task, completed=done, numbers=numbers)
        else:
            self.console.print(f"{self._at(done)}  loss {loss:.4f}  lr {rate:.2e}  {tokens_per_second:,.0f} tokens/s")

    def validated(self, done: int, loss: float) -> None:
        self.console.print(f"{self._at(done)}  validation loss {loss:.4f} nats per byte")

    def saving(self, done: int, path: Path, stall: float) -> None:
        self.console.print(f"{self._at(done)}  saving to {path} in the background; training stood still {stall:.3f} s")

    def _at(self, done: int) -> str:
        return f"step {done:>{len(str(self._steps))}}/{self._steps}"

    def sampled(self, text: bytes) -> None:
        """Generated bytes as text; what would steer a terminal is shown as unknown."""
        shown = (c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text.decode(errors="replace"))
        self.console.rule("sample", align="left")
        self.console.print("".join(shown))
        self.console.rule()

    def summary(self, summary: Summary) -> None:
        """The final tables: the run's numbers, then a row per rank."""
        run = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        run.add_row("parameters", f"{summary.parameters:,}")
        run.add_row("train loss", f"{summary.train_loss:.4f} nats per byte")
        run.add_row("validation loss", f"{summary.validation_loss:.4f} (at first {summary.first_validation_loss:.4f})")
        run.add_row("training time", f"{summary.seconds:.1f} s")
        run.add_row("speed, all ranks", f"{summary.tokens_per_second:,.0f} tokens/s")
        self.console.print(run)

        between_hosts = len({rank.node for rank in summary.ranks}) > 1
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        columns = ["rank", "node", "communi-\ncation", "bytes\ncounted", "bytes\nexpected"]
        columns += ["state\ncounted", "by\nformula", "peak\nmemory"]
        for column in columns + ["between\nhosts"] * between_hosts:
            table.add_column(column, justify="right")
        rows = [(str(r.rank), str(r.node), r) for r in summary.ranks[:SHOWN_RANKS]]
        if len(summary.ranks) > 1:
            rows.append(("all", "", summary.all_ranks))
        for name, node, r in rows:
            sizes = [r.bytes_counted, r.bytes_expected, r.state_bytes, r.state_expected, r.peak_bytes]
            sizes += [r.bytes_between_hosts] * between_hosts
            table.add_row(name, node, f"{r.communication_seconds:.2f} s", *map(show_size, sizes))
        self.console.print(table)


def show_size(nbytes: int) -> str:
    """As "7.48 MB": three digits, so that a row fits into 80 columns."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    digits = 0 if nbytes < 1000 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[0]}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_json(
    path: Path,
    settings: Settings,
    plan: distlib.Plan,
    world: distlib.World,
    threads: int,
    curve: LossCurve,
    summary: Summary,
) -> None:
    """Settings, plan, loss curves and final numbers of a run. Written aside and renamed: whole or not at all."""
    content = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
        "plan": plan.to_dict(),
        "world": {"size": world.size, "nodes": world.node_count, "launcher": world.launcher,
                  "device": world.device.type, "threads": threads},
        "train_loss": curve.training,
        "validation_loss": curve.validation,
        "summary": asdict(summary),
    }  # fmt: skip
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)

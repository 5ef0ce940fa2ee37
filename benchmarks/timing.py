"""Timing across ranks: variants take turns (A B C, A B C, ...), all ranks starting at an agreed moment."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LEAD = 0.02  # seconds between agreeing on a moment and that moment; gloo needs 7 ms where ranks outnumber cores


@dataclass
class Timings:
    """Per variant and round: seconds from the agreed start to the last rank's end; growth of `counter`."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    counted: dict[str, list[int]] = field(default_factory=dict)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    group: dist.ProcessGroup,
    rounds: int,
    repeat: int = 1,
    warmup: int = 2,
    counter: Callable[[], int] | None = None,
) -> Timings:
    """Time `repeat` calls of each variant in each round, per call. All ranks of `group` (gloo) must call.

    The end is that of the last rank: with more ranks than cores, one rank's own time would leave out the time
    it waited for its core. The clock is the machine's, so ranks must share it (emulated hosts do). `warmup`
    rounds go before and are dropped. `counter`, if any, is read between calls, when all ranks are at rest.
    """
    elapsed: list[float] = []
    counts: list[int] = []
    for _ in range(warmup + rounds):
        for call in variants.values():
            start = _agree(group)
            counts.append(counter() if counter else 0)
            time.sleep(max(0.0, start - time.perf_counter()))
            for _ in range(repeat):
                call()
            elapsed.append((time.perf_counter() - start) / repeat)
    _agree(group)
    counts.append(counter() if counter else 0)
    longest = torch.tensor(elapsed, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    timings = Timings()
    for index, name in enumerate(variants):
        mine = slice(warmup * len(variants) + index, None, len(variants))
        timings.seconds[name] = longest.tolist()[mine]
        grown = [after - before for before, after in zip(counts, counts[1:], strict=False)]
        timings.counted[name] = grown[mine]
    return timings


def _agree(group: dist.ProcessGroup) -> float:
    """A moment shortly ahead, the same on all ranks, once all ranks have come here."""
    moment = torch.tensor(time.perf_counter() + LEAD, dtype=torch.float64)
    dist.all_reduce(moment, dist.ReduceOp.MAX, group=group)
    return moment.item()


def is_rank() -> bool:
    """Whether a launcher started this process as a rank, rather than a person the benchmark."""
    return "RANK" in os.environ


def write_samples(path: Path, samples: object) -> None:
    """Hand rank 0's samples to the process that started the ranks. Other ranks write nothing."""
    if os.environ["RANK"] == "0":
        path.write_text(json.dumps(samples))


def free_groups() -> None:
    """A rank's last call: torch aborts now and then where a gloo group lives on when the interpreter ends."""
    gc.collect()


def run_ranks(script: str, ranks: int, arguments: Sequence[str] = (), **environ: str) -> Any:
    """Start `script --samples FILE arguments` on `ranks` ranks of this host; return what rank 0 wrote.

    environ: variables for the ranks, on top of this process's.
    """
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.json"
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        command = [*torchrun, script, f"--samples={samples}", *arguments]
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ, **environ})
        return json.loads(samples.read_text())

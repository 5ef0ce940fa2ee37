"""Checkpoints: for how long an asynchronous save stalls training, and how fast saves and loads are.

The GPT of 33.6 M parameters under `distlib.DataParallel` with AdamW, 256 tokens a rank, one thread, and what it saves:
403 MB of weights and moments. In turns: a training step; `distlib.save(asynchronous=True)` beside DCP's `async_save`,
each timed until it returns and then waited for; `distlib.save` and `load` beside plain `torch.save` and `torch.load` on
rank 0, which do without checksums, without waiting for the disk, and without the other ranks.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from data_parallel import GPT, TOKENS, VOCABULARY, Step
from timing import free_groups, interleaved, is_rank, run_ranks, write_samples
from torch.distributed.checkpoint.state_dict import get_state_dict

import distlib

STALL = "asynchronous save, seconds until training goes on"
FIRST = "the first asynchronous save: memory is taken"
WHOLE = "save and load, 403 MB"
ROUNDS = 5
BUSY = "a step while a save is in the background"


def on_rank(options: argparse.Namespace) -> None:
    """Measure and let rank 0 write {what: {variant: seconds per round}}."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    with distlib.init():
        gloo = dist.new_group(backend="gloo")
        names = [tempfile.mkdtemp(dir=options.folder) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(names, group=gloo)
        try:
            write_samples(options.samples, _measure(gloo, Path(names[0])))
        finally:
            dist.barrier(group=gloo)
            if dist.get_rank() == 0:
                shutil.rmtree(names[0])


def _measure(gloo: dist.ProcessGroup, folder: Path) -> dict[str, dict[str, list[float]]]:
    torch.manual_seed(1 + dist.get_rank())
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1))

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    torch.manual_seed(0)
    step = Step(GPT(), distlib.DataParallel, loss_of, lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True))
    step()
    model, optimizer = step.model, step.optimizer
    pending: list[Callable[[], Any]] = []

    def ours() -> None:
        handle = distlib.save(folder / "ours", model=model, optimizer=optimizer, asynchronous=True)
        assert handle is not None
        pending.append(handle.wait)

    theirs_number = 0

    def theirs() -> None:
        nonlocal theirs_number
        theirs_number += 1
        weights, state = get_state_dict(model.module, optimizer)
        state_dict = {"model": weights, "optimizer": state}
        path = folder / f"dcp{theirs_number}"
        pending.append(dcp.async_save(state_dict, checkpoint_id=path, process_group=gloo).result)

    def settle() -> None:
        while pending:
            pending.pop()()
        for number in range(theirs_number):
            if dist.get_rank() == 0:
                shutil.rmtree(folder / f"dcp{number + 1}", ignore_errors=True)

    first = interleaved({"distlib": ours, "wait": settle, "DCP async_save": theirs, "wait ": settle}, gloo, 1, warmup=0)
    variants = {
        "step": step,
        "distlib": ours,
        "wait": settle,
        "DCP async_save": theirs,
        "wait ": settle,
    }
    stalls = interleaved(variants, gloo, rounds=ROUNDS, warmup=1).seconds

    def in_background() -> None:
        ours()
        begun = time.perf_counter()
        step()
        busy.append(time.perf_counter() - begun)
        settle()

    busy: list[float] = []
    quiet = interleaved({"step": step, "busy": in_background}, gloo, ROUNDS, warmup=1).seconds["step"]

    def torch_save() -> None:
        if dist.get_rank() == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "plain.pt")

    def torch_load() -> None:
        if dist.get_rank() == 0:
            found = torch.load(folder / "plain.pt", weights_only=True)
            model.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])

    whole = {
        "distlib.save": lambda: distlib.save(folder / "ours", model=model, optimizer=optimizer),
        "torch.save, rank 0": torch_save,
        "distlib.load": lambda: distlib.load(folder / "ours", model=model, optimizer=optimizer),
        "torch.load, rank 0": torch_load,
    }
    saved = interleaved(whole, gloo, ROUNDS, warmup=1).seconds
    keep = ("step", "distlib", "DCP async_save")
    return {
        STALL: {name: stalls[name] for name in keep},
        FIRST: {name: first.seconds[name] * 2 for name in ("distlib", "DCP async_save")},
        BUSY: {"step with a save": busy[1:], "step": quiet},
        WHOLE: saved,
    }


def main() -> None:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        parser.add_argument("--folder", type=Path)
        on_rank(parser.parse_args())
        free_groups()
        return
    import report
    from report import Bar, Row

    parser = report.parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: the temporary folder")
    options = parser.parse_args()
    bars = {
        STALL: [Bar("distlib", "step", at_most=0.5), Bar("distlib", "DCP async_save", at_most=1.0)],
        FIRST: [Bar("distlib", "DCP async_save")],
        BUSY: [Bar("step with a save", "step")],
        WHOLE: [Bar("torch.save, rank 0", "distlib.save"), Bar("torch.load, rank 0", "distlib.load")],
    }
    samples = run_ranks(__file__, 2, [f"--folder={options.folder}"] if options.folder else [])
    rows = [Row(what, 2, samples[what], bars[what]) for what in bars]
    notes = [
        "Both peers write on this machine's disk. DCP's stall includes get_state_dict, without which it has no state."
    ]
    report.publish(report.Report("checkpoint", "Checkpoints: stall and speed", rows, notes), options)


if __name__ == "__main__":
    main()

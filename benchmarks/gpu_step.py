"""Training steps on GPUs: the full sharded path over plain torch, waits of the host, bits, offloaded activations.

    python benchmarks/gpu_step.py                  # on one card, and on all of them where there are several
    python benchmarks/gpu_step.py --device fake    # its logic in small, without a GPU: no times are told

The model is the largest of a list that the card's memory allows, 1.0 B parameters from 64 GiB on. Both contenders take
turns, four steps at a time; seconds are medians over the rounds. Curves of losses are those of a small model, with
deterministic algorithms; two ranks on one card talk through mapped memory, ranks with a card each over NCCL too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timing import free_groups, is_rank, run_ranks, write_samples

if TYPE_CHECKING:  # ranks draw nothing
    from gpu_report import Check, GpuReport
    from report import Row

OURS, TORCH = "distlib", "torch"
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
CLOSE = 1e-5  # relative: how far 20 losses in fp32 may be from those of one process


# ---- on every rank ----------------------------------------------------------------------------------------


def on_rank(options: argparse.Namespace) -> None:
    import gpu_ranks
    import torch.distributed as dist
    from gpu_cards import device_of

    device = device_of(options.device)
    lone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if os.environ["WORLD_SIZE"] == "1" else {}
    dist.init_process_group("distlib", **lone)
    try:
        write_samples(options.samples, gpu_ranks.PARTS[options.part](device, options.rounds))
    finally:
        dist.destroy_process_group()


# ---- the process that starts the ranks --------------------------------------------------------------------


def results(device: str, rounds: int) -> GpuReport:
    from gpu_cards import cards, one_card
    from gpu_report import GpuReport

    def ranks(n: int, part: str, **environ: str) -> Any:
        arguments = [f"--device={device}", f"--part={part}", f"--rounds={rounds}"]
        if n == 1:
            return run_alone(arguments, **DETERMINISTIC, **environ)
        return run_ranks(__file__, n, arguments, **DETERMINISTIC, **environ)

    alone = ranks(1, "alone")
    both = ranks(2, "curves", **one_card())
    checks = [*step_checks(alone["steps"]), *alone_checks(alone["curves"], alone["offload"])]
    checks += curve_checks("2 processes on one device", 2, both["curves"], alone["curves"])
    rows: list[Row] = []
    notes = [f"Steps: {alone['steps']['size']}, bf16. Curves: a small model."]
    if device == "fake":
        notes.append("The device is tests/fake_device: nothing was timed.")
    else:
        blocking = ranks(1, "curves", CUDA_LAUNCH_BLOCKING="1")["curves"]
        same = [setting for setting in blocking if blocking[setting] == alone["curves"][setting]]
        checks.append(_equal("CUDA_LAUNCH_BLOCKING=1: the same bits", 1, len(same), len(blocking)))
        rows, more = step_rows(alone["steps"], alone["offload"])
        checks += more
        if cards() > 1:
            every = ranks(cards(), "together")
            checks += curve_checks("a card each", cards(), every["curves"], alone["curves"])
            rows += speed_rows(every["speed"], cards())
    return GpuReport("gpu_step", "Training steps on a GPU", rows, notes, checks)


def run_alone(arguments: Sequence[str], **environ: str) -> Any:
    """As run_ranks, with one rank, which needs no launcher."""
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.json"
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        command = [sys.executable, __file__, f"--samples={samples}", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **rank, **environ})
        return json.loads(samples.read_text())


def _equal(what: str, ranks: int, count: int, of: int) -> Check:
    from gpu_report import Check

    return Check(what, ranks, f"{count} of {of} curves", "all", count == of)


def step_checks(steps: dict[str, Any]) -> list[Check]:
    """Waits of the host per steady step; the control, which waits for each loss, shows that they are seen."""
    from gpu_ranks import STEADY
    from gpu_report import Check

    checks = []
    for name in (OURS, TORCH):
        found = [*steps["waits"][name], *steps.get("traced", {}).get(name, ())]
        told = f"{len(found)}, the first: {found[0]}" if found else "0"
        bar = ("0", not found) if name == OURS else ("report", None)
        checks.append(Check(f"host synchronisations in {STEADY} steady steps, {name}", 1, told, *bar))
    seen = len(steps["control"])
    what = f"the same with {STEADY} waits on purpose: they are seen"
    checks.append(Check(what, 1, str(seen), f">= {STEADY}", seen >= STEADY))
    return checks


def alone_checks(curves: dict[str, list[str]], offload: dict[str, Any]) -> list[Check]:
    """What one process shows without a clock."""
    from gpu_report import Check

    losses = offload["losses"]
    same = losses["offload"] == losses["plain"]
    return [
        *prefetch_checks("1 process", 1, curves),
        close_check("1 process: fp32 losses beside plain torch", 1, curves, curves),
        Check("activation offload: the same loss", 1, "equal" if same else str(losses), "equal", same),
    ]


def prefetch_checks(what: str, ranks: int, curves: dict[str, list[str]]) -> list[Check]:
    pairs = [(curves[f"{kind}, prefetch=0"], curves[f"{kind}, prefetch=2"]) for kind in ("fp32", "bf16")]
    return [_equal(f"{what}: prefetch on and off, the same bits", ranks, sum(a == b for a, b in pairs), len(pairs))]


def curve_checks(what: str, ranks: int, curves: dict[str, list[str]], alone: dict[str, list[str]]) -> list[Check]:
    """Several ranks against one process that sees the whole batch."""
    close = close_check(f"{what}: fp32 losses beside one process", ranks, curves, alone)
    return [*prefetch_checks(what, ranks, curves), close]


def close_check(what: str, ranks: int, curves: dict[str, list[str]], alone: dict[str, list[str]]) -> Check:
    from gpu_report import Check

    apart = distance(curves["fp32, prefetch=2"], alone["fp32, torch"])
    return Check(what, ranks, f"{apart:.1e}", f"<= {CLOSE:.0e}", apart <= CLOSE)


def distance(first: list[str], second: list[str]) -> float:
    """The largest relative difference of two curves."""
    pairs = [(float.fromhex(a), float.fromhex(b)) for a, b in zip(first, second, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def step_rows(steps: dict[str, Any], offload: dict[str, Any]) -> tuple[list[Row], list[Check]]:
    """What was timed on one card, with what belongs to it."""
    from gpu_report import Ceiling, Check
    from report import Bar, Row
    from report_bytes import Bytes

    seconds, size = steps["seconds"], steps["size"]
    rows: list[Row] = [Row(f"{size}: step", 1, seconds["wall"], [Ceiling(OURS, TORCH, at_most=1.03)])]
    for kind in ("events", "forward and backward", "optimizer"):
        what = "step by events" if kind == "events" else kind
        rows.append(Row(f"{size}: {what}", 1, seconds[kind], [Ceiling(OURS, TORCH)]))
    for what, counted in (("held between steps", steps["held"]), ("at the peak of a step", steps["peak"])):
        samples = {name: [float(count)] for name, count in counted.items()}
        rows.append(Bytes(f"memory {what}", 1, samples, [Bar(OURS, TORCH)]))
    blocks = "{} of {} blocks".format(*offload["blocks"])
    rows.append(Row(f"activation offload, {blocks}: step", 1, offload["seconds"], [Bar("offload", "plain")]))
    share, copying, _ = offload["hidden"]
    moved = 2 * offload["moved"] / copying / 1e9
    told = f"{share:.0%} of {copying * 1e3:.0f} ms of copies, {moved:.0f} GB/s"
    return rows, [Check(f"activation offload, {blocks}: hidden behind compute", 1, told)]


def speed_rows(speed: dict[str, Any], ranks: int) -> list[Row]:
    from report import Row

    return [Row(f"{speed['size']} a card, stage 3: step", ranks, speed["seconds"]["wall"], [])]


def main() -> None:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        parser.add_argument("--part", required=True)
        parser.add_argument("--device", required=True)
        parser.add_argument("--rounds", type=int, required=True)
        on_rank(parser.parse_args())
        free_groups()
        return
    import report
    from gpu_cards import use_checkout

    parser = report.parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "fake"), default="cuda")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    use_checkout()
    report.publish(results(options.device, options.rounds), options)


if __name__ == "__main__":
    main()

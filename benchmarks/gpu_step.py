"""Training steps on GPUs: the full sharded path over plain torch, waits of the host, bits, offloaded activations.

    python benchmarks/gpu_step.py                  # on one card, and on all of them where there are several
    python benchmarks/gpu_step.py --device fake    # its logic in small, without a GPU: no times are told

The model is the largest of a list that the card's memory allows, 1.0 B parameters from 64 GiB on. Both contenders take
turns, four steps at a time; seconds are medians over the rounds. Curves of losses are those of a small model, with
deterministic algorithms; two ranks on one card talk through mapped memory, ranks with a card each over NCCL too.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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


class Runs:
    """Starts ranks, and goes on where they fail: what is measured by then is kept."""

    def __init__(self, device: str, rounds: int) -> None:
        self.arguments = [f"--device={device}", f"--rounds={rounds}"]
        self.failed: list[Check] = []

    def __call__(self, n: int, part: str, **environ: str) -> Any:
        """What rank 0 of n wrote of a part; None where the ranks failed."""
        run = run_alone if n == 1 else functools.partial(run_ranks, __file__, n)
        try:
            return run([*self.arguments, f"--part={part}"], **DETERMINISTIC, **environ)
        except subprocess.CalledProcessError as error:
            from gpu_report import Check

            around = "".join(f", {name}={value}" for name, value in environ.items())
            told = f"exit code {error.returncode}, see the log"
            self.failed.append(Check(f"{part}{around}: runs to its end", n, told, "exit code 0", False))
            return None


def results(device: str, runs: Runs) -> Iterator[GpuReport]:
    """The report as it grows: what may hang comes last."""
    from gpu_cards import cards, one_card
    from gpu_report import GpuReport

    rows: list[Row] = []
    checks: list[Check] = []
    notes: list[str] = []

    def so_far() -> GpuReport:
        return GpuReport("gpu_step", "Training steps on a GPU", rows, notes, [*checks, *runs.failed])

    if device == "fake":
        notes.append("The device is tests/fake_device: nothing was timed.")
    # In one process there: starting takes longer than what it does.
    alone = (runs(1, "alone") or {}) if device == "fake" else None
    one = lambda part: runs(1, part) if alone is None else alone.get(part)  # noqa: E731
    if steps := one("steps"):
        notes.append(f"Steps: {steps['size']}, bf16. Curves: a small model.")
        checks += step_checks(steps)
        rows += step_rows(steps)
    yield so_far()
    if offload := one("offload"):
        checks += offload_checks(offload)
        rows += offload_rows(offload)
    yield so_far()
    curves = one("curves")
    if curves is None:
        yield so_far()
        return  # what is left is compared with them
    checks += [
        *prefetch_checks("1 process", 1, curves),
        close_check("1 process: fp32 losses beside plain torch", 1, curves, curves),
    ]
    yield so_far()
    both = runs(2, "curves", **one_card())
    if both:
        checks += curve_checks("2 processes on one device", 2, both, curves)
    yield so_far()
    if device == "fake":
        return
    for n, free, around in ((1, curves, {}), (2, both, one_card())):
        blocking = runs(n, "curves", CUDA_LAUNCH_BLOCKING="1", **around) if free else None
        if blocking:
            same = sum(blocking[setting] == curve[: len(blocking[setting])] for setting, curve in free.items())
            checks.append(_equal("CUDA_LAUNCH_BLOCKING=1: the same bits", n, same, len(free)))
        yield so_far()
    if cards() > 1:
        if every := runs(cards(), "curves"):
            checks += curve_checks("a card each", cards(), every, curves)
        if speed := runs(cards(), "speed"):
            rows += speed_rows(speed, cards())
        yield so_far()


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
    if "traced control" in steps:
        seen = len(steps["traced control"])
        checks.append(Check(f"{what} in a profile", 1, str(seen), f">= {STEADY}", seen >= STEADY))
    return checks


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


def step_rows(steps: dict[str, Any]) -> list[Row]:
    """What was timed on one card; nothing on the fake device."""
    from gpu_report import Ceiling
    from report import Bar, Row
    from report_bytes import Bytes

    if "seconds" not in steps:
        return []
    seconds, size = steps["seconds"], steps["size"]
    rows: list[Row] = [Row(f"{size}: step", 1, seconds["wall"], [Ceiling(OURS, TORCH, at_most=1.03)])]
    for kind in ("events", "forward and backward", "optimizer"):
        what = "step by events" if kind == "events" else kind
        rows.append(Row(f"{size}: {what}", 1, seconds[kind], [Ceiling(OURS, TORCH)]))
    for what, counted in (("held between steps", steps["held"]), ("at the peak of a step", steps["peak"])):
        samples = {name: [float(count)] for name, count in counted.items()}
        rows.append(Bytes(f"memory {what}", 1, samples, [Bar(OURS, TORCH)]))
    return rows


def offload_checks(offload: dict[str, Any]) -> list[Check]:
    from gpu_report import Check

    losses = offload["losses"]
    same = losses["offload"] == losses["plain"]
    checks = [Check("activation offload: the same loss", 1, "equal" if same else str(losses), "equal", same)]
    what = f"activation offload, {_blocks(offload)}: hidden behind compute"
    if "not seen" in offload:
        checks.append(Check(what, 1, offload["not seen"]))
    if "hidden" in offload:
        share, copying, _ = offload["hidden"]
        rate = 2 * offload["moved"] / copying / 1e9
        told = f"{share:.0%} of {copying * 1e3:.0f} ms of copies, {rate:.0f} GB/s"
        checks.append(Check(what, 1, told))
    return checks


def offload_rows(offload: dict[str, Any]) -> list[Row]:
    from report import Bar, Row

    if not offload["seconds"]["plain"]:
        return []
    return [Row(f"activation offload, {_blocks(offload)}: step", 1, offload["seconds"], [Bar("offload", "plain")])]


def _blocks(offload: dict[str, Any]) -> str:
    return "{} of {} blocks".format(*offload["blocks"])


def speed_rows(speed: dict[str, Any], ranks: int) -> list[Row]:
    from report import Row

    return [Row(f"{speed['size']} a card, stage 3: step", ranks, speed["seconds"]["wall"], [])]


def main() -> int:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        parser.add_argument("--part", required=True)
        parser.add_argument("--device", required=True)
        parser.add_argument("--rounds", type=int, required=True)
        on_rank(parser.parse_args())
        free_groups()
        return 0
    import report
    from gpu_cards import use_checkout

    parser = report.parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "fake"), default="cuda")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    use_checkout()
    runs, around = Runs(options.device, options.rounds), report.surroundings()
    for found in results(options.device, runs):
        report.save(found, around, options.out)
    report.publish(found, options)
    return 1 if runs.failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Collectives of tensors on GPUs, by kernels in memory that ranks map: two ranks on one card, then a card each.

    python benchmarks/gpu_collectives.py                  # beside NCCL where there are several cards
    python benchmarks/gpu_collectives.py --device fake    # its logic in small, without a GPU: no times are told

Two ranks on one card take turns on it, so their times are reported and say nothing about latency. With a card each,
mapped memory and torch's NCCL take turns at every size, also where distlib would leave the size to NCCL: where one
overtakes the other is what distlib/comm/device.py wants to know. Every operation's result is compared, bit for bit,
with what it must be. A size is that of the whole message: what all-reduce sums, all-gather puts together,
reduce-scatter divides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timing import free_groups, interleaved, is_rank, run_ranks, write_samples

if TYPE_CHECKING:  # ranks draw nothing
    import torch
    import torch.distributed as dist
    from gpu_report import GpuReport
    from report import Row

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"cuda": (64 * KIB, MIB, 16 * MIB), "fake": (4 * KIB,)}
KINDS = ("all_reduce", "all_gather", "reduce_scatter")
MAPPED, NCCL = "mapped memory", "NCCL"
RUNS = "runs to its end"  # of a check on ranks, not on what they found
# Calls that are timed together, and rounds at most. Ranks that share a card need milliseconds for every step of a call.
REPEAT, SHARED_REPEAT, SHARED_ROUNDS = 10, 2, 5
# Threads of the fake device are fibers: few of them, and small slots, so that a small message goes in pieces too.
FEW = {"DISTLIB_DEVICE_THREADS": "32", "DISTLIB_DEVICE_BLOCKS": "2", "DISTLIB_DEVICE_STAGING_KB": "1"}


# ---- on every rank ----------------------------------------------------------------------------------------


def on_rank(options: argparse.Namespace) -> None:
    """{"kind bytes": {"seconds": {way: seconds per round}, "right": {way: whether every rank had the right bits}}}"""
    import torch.distributed as dist
    from gpu_cards import device_of

    from distlib.comm import device as ways
    from distlib.comm.group import Group

    device = device_of(options.device)
    dist.init_process_group("distlib")
    ways._IPC_TO = {dist.get_world_size(): 1 << 62}  # mapped memory at every size, not only where it should be ahead
    groups: dict[str, Any] = {MAPPED: Group.of()}
    if options.nccl:
        groups[NCCL] = dist.new_group(backend="nccl")
    gloo = dist.new_group(backend="gloo")
    found = {}
    try:
        for size in SIZES[options.device]:
            for kind in KINDS:
                found[f"{kind} {size}"] = _measure(kind, size, groups, device, gloo, options)
        write_samples(options.samples, found)
    finally:
        dist.destroy_process_group()


def _measure(
    kind: str,
    size: int,
    groups: dict[str, Any],
    device: torch.device,
    gloo: dist.ProcessGroup,
    options: argparse.Namespace,
) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    right = {}
    for way, group in groups.items():
        mine = torch.tensor(float(_is_right(kind, size, group, device)))
        dist.all_reduce(mine, dist.ReduceOp.MIN, group=gloo)
        right[way] = bool(mine.item())
    if device.type != "cuda":
        return {"right": right, "seconds": {}}

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(options.repeat):
                call()
            torch.cuda.synchronize()

        return run

    calls = {way: repeated(_call(kind, size, group, device)[0]) for way, group in groups.items()}
    seconds = interleaved(calls, gloo, options.rounds).seconds
    return {
        "right": right,
        "seconds": {way: [taken / options.repeat for taken in each] for way, each in seconds.items()},
    }


def _is_right(kind: str, size: int, group: Any, device: torch.device) -> bool:
    """Small whole numbers, whose sums are exact in fp32 in any order."""
    import torch
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    call, given, result = _call(kind, size, group, device)
    whole = torch.arange(size // 4, dtype=torch.float32) % 1000
    part = slice(rank * given.numel(), (rank + 1) * given.numel()) if kind == "all_gather" else slice(None)
    given.copy_((whole if kind == "all_gather" else whole + rank)[part])
    expected = whole if kind == "all_gather" else whole * ranks + sum(range(ranks))
    if kind == "reduce_scatter":
        expected = expected[rank * result.numel() : (rank + 1) * result.numel()]
    call()
    return torch.equal(result.cpu(), expected)


def _call(kind: str, size: int, group: Any, device: torch.device) -> tuple[Callable[[], object], Any, Any]:
    """(A collective of fp32 zeros, what it reads, what it writes)."""
    import torch
    import torch.distributed as dist

    whole = torch.zeros(size // 4, device=device)
    part = torch.zeros(size // 4 // dist.get_world_size(), device=device)
    by_torch = isinstance(group, dist.ProcessGroup)
    if kind == "all_reduce":
        reduce = (lambda: dist.all_reduce(whole, group=group)) if by_torch else (lambda: group.all_reduce(whole))
        return reduce, whole, whole
    if kind == "all_gather":
        gather = dist.all_gather_into_tensor
        call = (lambda: gather(whole, part, group=group)) if by_torch else (lambda: group.all_gather(whole, part))
        return call, part, whole
    scatter = dist.reduce_scatter_tensor
    call = (lambda: scatter(part, whole, group=group)) if by_torch else (lambda: group.reduce_scatter(part, whole))
    return call, whole, part


# ---- the process that starts the ranks --------------------------------------------------------------------


def results(device: str, rounds: int) -> Iterator[GpuReport]:
    """The report as it grows. Ranks that fail are told about, and the others go on."""
    from gpu_cards import cards
    from gpu_report import Check, GpuReport

    notes = ["Seconds a call, of several in a row; fp32. Two ranks on one card take turns: no statement on latency."]
    if device == "fake":
        notes = ["The device is tests/fake_device: nothing was timed."]
    worlds = [(2, False, "2 ranks on one card")]
    several = cards() if device == "cuda" else 1
    if several > 1:
        worlds += [(ranks, True, "a card each") for ranks in sorted({2, several})]
    rows, checks = [], []
    for ranks, spread, where in worlds:
        try:
            more, others = _of(device, ranks, spread, where, rounds)
        except subprocess.CalledProcessError as error:
            told = f"exit code {error.returncode}, see the log"
            more, others = [], [Check(f"{where}: {RUNS}", ranks, told, "exit code 0", False)]
        rows, checks = rows + more, checks + others
        yield GpuReport("gpu_collectives", "Collectives in mapped memory of GPUs", rows, notes, checks)


def _of(device: str, ranks: int, spread: bool, where: str, rounds: int) -> tuple[list[Row], list[Any]]:
    """Rows and checks of one world. spread: each rank has a card of its own, and NCCL is measured beside."""
    from gpu_cards import one_card
    from gpu_report import Check
    from report import Bar, Row

    environ = dict(FEW) if device == "fake" else {} if spread else one_card()
    repeat = REPEAT if spread else SHARED_REPEAT
    rounds = rounds if spread else min(rounds, SHARED_ROUNDS)
    arguments = [f"--device={device}", f"--rounds={rounds}", f"--repeat={repeat}", *(["--nccl"] if spread else [])]
    found = run_ranks(__file__, ranks, arguments, **environ)
    rows = []
    for name, one in found.items():
        kind, size = name.split()
        shown = f"{int(size) // MIB} MiB" if int(size) >= MIB else f"{int(size) // KIB} KiB"
        bars = [Bar(MAPPED, NCCL)] if spread else []
        if one["seconds"]:
            rows.append(Row(f"{kind}, {shown}, {where}", ranks, one["seconds"], bars))
    wrong = [f"{name} by {way}" for name, one in found.items() for way, right in one["right"].items() if not right]
    told = f"wrong: {', '.join(wrong)}" if wrong else f"{len(found)} of {len(found)} right"
    return rows, [Check(f"{', '.join(KINDS)}, {where}: results", ranks, told, "all right", not wrong)]


def main() -> int:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        parser.add_argument("--device", required=True)
        parser.add_argument("--rounds", type=int, required=True)
        parser.add_argument("--repeat", type=int, required=True)
        parser.add_argument("--nccl", action="store_true")
        on_rank(parser.parse_args())
        free_groups()
        return 0
    import report
    from gpu_cards import use_checkout

    parser = report.parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "fake"), default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    use_checkout()
    around = report.surroundings()
    for found in results(options.device, options.rounds):
        report.save(found, around, options.out)
    report.publish(found, options)
    return 1 if any(RUNS in check.what for check in found.checks) else 0


if __name__ == "__main__":
    sys.exit(main())

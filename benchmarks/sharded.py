"""Sharded training on one host: the time of a step, the bytes that a rank holds, the peak memory of its process.

    python benchmarks/sharded.py            # all of it, some three minutes
    python benchmarks/sharded.py --quick    # the same claims from few rounds

One GPT of 33.6 M parameters, fp32, 256 tokens a rank, one thread a rank, full steps with AdamW. The contenders of
`peers.py` take turns, step by step. For peak memory each has a process tree of its own. Counted bytes are those that
`memory_report()` adds up; the formula is ZeRO's and MiCS's, with 4 bytes of parameter, 4 of gradient, 8 of moments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
import torch
import torch.distributed as dist
from data_parallel import GPT, TOKENS, VOCABULARY, Block
from timing import free_groups, interleaved, is_rank, run_ranks, write_samples
from torch import nn

import distlib

if TYPE_CHECKING:  # ranks draw nothing
    from report import Report, Row

MIB = 2**20
OURS, FSDP2, DEEPSPEED = "distlib stage 3", "FSDP2", "DeepSpeed ZeRO-3"
ALONE, ALONE_SHARE = "no communication", "no communication, 1/n of the optimizer"
STEP = "GPT, 33.6 M parameters, 256 tokens"
# What `memory_report` is compared on: name -> (stage, partition size, copies of the model's bytes per rank of p).
CASES: dict[str, tuple[int, int | None, Callable[[int], float]]] = {
    "stage 1": (1, None, lambda p: 8 + 8 / p),
    "stage 2": (2, None, lambda p: 4 + 12 / p),
    "stage 3": (3, None, lambda p: 16 / p),
    "MiCS p=1": (3, 1, lambda p: 16 / p),
    "MiCS p=2": (3, 2, lambda p: 16 / p),
}
STATE = ("parameters", "gradients", "optimizer")


def model() -> GPT:
    """Alike on all ranks."""
    torch.manual_seed(0)
    return GPT()


def batch() -> peers.Batch:
    """This rank's own."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def contenders(deepspeed: str) -> dict[str, Callable[[nn.Module], peers.Peer]]:
    return {
        ALONE: peers.NoCommunication,
        ALONE_SHARE: peers.NoCommunicationShare,
        OURS: peers.Sharded,
        "DDP": peers.DDP,
        FSDP2: peers.FSDP2,
        **peers.deepspeed_peer(deepspeed),
    }


# ---- on every rank ----------------------------------------------------------------------------------------


def on_rank(options: argparse.Namespace) -> None:
    """Do what `options.part` says and let rank 0 write what came of it."""
    torch.set_num_threads(1)
    part = {"steps": _steps, "counted": _counted, "peak": _peak}[options.part]
    if options.part == "peak" and options.contender == OURS:
        distlib.init()  # as its users start
    else:
        dist.init_process_group("gloo")
    try:
        write_samples(options.samples, part(options))
    finally:
        dist.destroy_process_group()


def _steps(options: argparse.Namespace) -> dict[str, list[float]]:
    """{contender: seconds per round}."""
    built = {name: build(model()) for name, build in contenders(options.deepspeed).items()}
    mine = batch()
    for peer in built.values():
        for _ in range(3):
            peer.step([mine])
    # Those without communication see this rank's data only, and so have losses of their own.
    peers.check_losses({name: peer for name, peer in built.items() if name not in (ALONE, ALONE_SHARE)})
    calls = {name: functools.partial(peer.step, [mine]) for name, peer in built.items()}
    gloo = dist.new_group(backend="gloo")
    return interleaved(calls, gloo, options.rounds, warmup=1).seconds


def _counted(options: argparse.Namespace) -> list[dict[str, dict[str, dict[str, int]]]]:
    """Of every rank: {case: {"counted": bytes by name, "formula": bytes by name}}, after a step."""
    size, mine = dist.get_world_size(), {}
    for name in options.cases:
        stage, partition_size, _ = CASES[name]
        peer = peers.Sharded(model(), stage, partition_size if partition_size is not None else size)
        peer.step([batch()])
        report = peer.model.memory_report(peer.optimizer)
        mine[name] = {"counted": dict(report.counted), "formula": dict(report.formula)}
        del peer, report
    return _of_all_ranks(mine)


def _peak(options: argparse.Namespace) -> list[dict[str, int]]:
    """Of every rank: its process number and the most memory that was ever resident in it."""
    peer = contenders(options.deepspeed)[options.contender](model())
    for _ in range(5):
        peer.step([batch()])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return _of_all_ranks({"pid": os.getpid(), "resident": int(status["VmHWM"].split()[0]) * 1024})


def _of_all_ranks(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


# ---- the process that starts the ranks --------------------------------------------------------------------


def step_row(deepspeed: str, rounds: int) -> Row:
    from report import Bar, Row

    samples = run_ranks(__file__, 2, ["--part=steps", f"--deepspeed={deepspeed}", f"--rounds={rounds}"])
    bars = [
        Bar(OURS, ALONE, at_most=1.12),
        Bar(OURS, ALONE_SHARE),
        Bar(FSDP2, OURS, at_least=1.5),
        Bar(DEEPSPEED, OURS, at_least=1.8),
        Bar("DDP", ALONE),
    ]
    return Row(STEP, 2, samples, [bar for bar in bars if bar.first in samples])


def counted_rows() -> list[Row]:
    """Counted bytes of the rank that holds most, beside the formula: 2 % and one unit's buffer are allowed on top."""
    from report import Bar
    from report_bytes import Bytes

    plain = model()
    psi = sum(parameter.numel() for parameter in plain.parameters())
    block = sum(parameter.numel() for parameter in Block().parameters())
    unit = 4 * max(block, psi - block * len(plain.blocks))  # embedding and output layer are one unit
    rows: list[Row] = []
    for ranks, cases in ((2, list(CASES)), (4, ["MiCS p=2"])):
        every = run_ranks(__file__, ranks, ["--part=counted", "--cases", *cases])
        for case in cases:
            stage, partition_size, formula_of = CASES[case]
            formula = formula_of(partition_size or ranks) * psi
            stated = sum(every[0][case]["formula"].values())
            state = max(sum(rank[case]["counted"][kind] for kind in STATE) for rank in every)
            total = max(sum(rank[case]["counted"].values()) for rank in every)
            least = 16 * psi / (partition_size or ranks)  # a p-th of everything: no stage can do with less
            if abs(stated - formula) > 0.02 * formula or state < 0.98 * least:
                raise RuntimeError(
                    f"{case}, {ranks} ranks: memory_report() states {stated:,} bytes by formula, which gives "
                    f"{formula:,.0f}, and counts {state:,}, of at least {least:,.0f}"
                )
            samples = {"state": [state], "state and unit buffers": [total], "formula": [formula]}
            bars = [
                Bar("state", "formula", at_most=1.02),
                Bar("state and unit buffers", "formula", at_most=1.02 + unit / formula),
            ]
            rows.append(Bytes(f"{case}: bytes of a rank", ranks, samples, bars))
    return rows


def peak_rows(deepspeed: str) -> list[Row]:
    """Peak memory of each contender in a process tree of its own, 2 ranks."""
    from report import Bar
    from report_bytes import Bytes

    measured = {name: _peak_of(name, deepspeed) for name in (OURS, FSDP2, DEEPSPEED) if name in contenders(deepspeed)}
    rows = []
    for what in ("resident, larger rank", "proportional, all ranks", "proportional, with the launcher"):
        samples = {name: [peaks[what]] for name, peaks in measured.items()}
        bars = [Bar(OURS, name, at_most=1.0) for name in measured if name != OURS]
        rows.append(Bytes(f"peak memory: {what}", 2, samples, bars))
    return rows


def _peak_of(name: str, deepspeed: str) -> dict[str, int]:
    """Bytes. Resident memory counts a page that two ranks share twice, proportional memory once, half for each."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        command += [f"--samples={file}", "--part=peak", f"--contender={name}", f"--deepspeed={deepspeed}"]
        with subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **os.environ}) as tree:
            seen = []
            while tree.poll() is None:
                seen.append(_proportional(tree.pid))
                time.sleep(0.02)
        if tree.returncode:
            raise RuntimeError(f"{name}: the ranks failed with exit code {tree.returncode}; their output is above")
        ranks = json.loads(file.read_text())
    pids = {str(rank["pid"]) for rank in ranks}
    return {
        "resident, larger rank": max(rank["resident"] for rank in ranks),
        "proportional, all ranks": max(sum(b for pid, b in moment.items() if pid in pids) for moment in seen),
        "proportional, with the launcher": max(sum(moment.values()) for moment in seen),
    }


def _proportional(root: int) -> dict[str, int]:
    """Process number -> bytes now (PSS), of a process and all that come from it. Those that just ended are left out."""
    import psutil

    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):  # the launcher has ended
        launcher = psutil.Process(root)
        for process in (launcher, *launcher.children(recursive=True)):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                found[str(process.pid)] = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return found


def results(quick: bool) -> Report:
    from deepspeed_trial import DeepSpeedTrial
    from report_bytes import ByteReport

    deepspeed = DeepSpeedTrial()
    rows = [step_row(deepspeed.argument, 4 if quick else 12), *counted_rows(), *peak_rows(deepspeed.argument)]
    notes = [
        *deepspeed.notes,
        "Peers over gloo, with the settings that they ship with.",
    ]
    return ByteReport("sharded", "Sharded training on one host", rows, notes)


def main() -> None:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        parser.add_argument("--part", required=True)
        parser.add_argument("--contender")
        parser.add_argument("--cases", nargs="*")
        parser.add_argument("--deepspeed", default="none")
        parser.add_argument("--rounds", type=int)
        on_rank(parser.parse_args())
        free_groups()
        return
    import report

    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: rough ratios")
    options = parser.parse_args()
    report.publish(results(options.quick), options)


if __name__ == "__main__":
    main()

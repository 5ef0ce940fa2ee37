"""MiCS over a slow network: 2 emulated hosts x 2 ranks, several micro-steps, beside ZeRO-3, FSDP2 and HSDP.

    sudo python benchmarks/mics_network.py            # the sweep over link rates and micro-steps, some six minutes
    sudo python benchmarks/mics_network.py --quick    # one rate, two numbers of micro-steps

One GPT of 6.4 M parameters (25.7 MB in fp32; the 33.6 M of the other benchmarks would take minutes a step), a batch so
small that communication is what takes time, full steps with AdamW; the contenders of `peers.py` take turns. And
the hierarchical all-gather of a partition group that spans both hosts, beside the flat one. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
import torch
import torch.distributed as dist
from collectives import all_gather_flat
from timing import free_groups, interleaved, is_rank, write_samples
from torch import nn

import distlib
from distlib import Group

if TYPE_CHECKING:  # ranks draw nothing
    from report import Report, Row

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from lm.model import GPT, VOCABULARY

HOSTS, PER_HOST = 2, 2
RANKS = HOSTS * PER_HOST
LAYERS, WIDTH, HEADS, TOKENS = 8, 256, 4, 32
RATES, RATE = ("500mbit", "1gbit", "2gbit", "5gbit"), "1gbit"
MICRO_STEPS, MICRO = (1, 2, 4, 8), 4
GATHERED = 64 * 2**20  # bytes of the whole that hierarchical and flat gathers gather
MICS, FSDP2, DEEPSPEED = "MiCS p=2", "FSDP2", "DeepSpeed ZeRO-3"
HSDP, DEFERRED = "HSDP", "HSDP, deferred all-reduce"
TX_BYTES = Path("/sys/class/net/eth0/statistics/tx_bytes")


# ---- on every rank ----------------------------------------------------------------------------------------


def on_rank(options: argparse.Namespace) -> None:
    """Measure and let rank 0 write {"steps": ..., "sent": ..., "gather": ..., "ledger": ...}."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    gloo = dist.new_group(backend="gloo")
    try:
        result = _steps(options, gloo)
        if options.gather_rounds:
            result |= _gathers(options.gather_rounds, gloo)
        write_samples(options.samples, result)
    finally:
        dist.destroy_process_group()


def _steps(options: argparse.Namespace, gloo: dist.ProcessGroup) -> dict[str, Any]:
    """Of each number of micro-steps: {contender: seconds}, and {contender: bytes on the link of rank 0's host}."""
    contenders: dict[str, Callable[[nn.Module], peers.Peer]] = {
        MICS: functools.partial(peers.Sharded, partition_size=PER_HOST),
        DEFERRED: functools.partial(peers.DeferredHSDP, partition_size=PER_HOST),
        HSDP: functools.partial(peers.HSDP, partition_size=PER_HOST),
        FSDP2: peers.FSDP2,
        **peers.deepspeed_peer(options.deepspeed),
    }
    built = {}
    for name, build in contenders.items():
        torch.manual_seed(0)
        built[name] = build(GPT(LAYERS, WIDTH, HEADS))
    torch.manual_seed(1 + dist.get_rank())
    tokens = torch.randint(VOCABULARY, (max(options.micro_steps), 1, TOKENS + 1))
    batches = [(each[:, :-1], each[:, 1:]) for each in tokens]
    for peer in built.values():
        for _ in range(3):
            peer.step(batches[:2])
    peers.check_losses(built)
    seconds, sent = {}, {}
    for count in options.micro_steps:
        calls = {name: functools.partial(peer.step, batches[:count]) for name, peer in built.items()}
        rounds = options.bar_rounds if count == MICRO else 2 if count < MICRO else 1  # long steps vary less
        timings = interleaved(calls, gloo, rounds, warmup=0, counter=lambda: int(TX_BYTES.read_text()))
        seconds[str(count)], sent[str(count)] = timings.seconds, timings.counted
    return {"steps": seconds, "sent": sent}


def _gathers(rounds: int, gloo: dist.ProcessGroup) -> dict[str, Any]:
    """Seconds of both ways, and the bytes between hosts that the ledgers of each host's ranks count for one call."""
    group = Group.of(peers.distlib_group())
    nodes = group.topology.nodes
    if [len(node) for node in nodes] != [PER_HOST] * HOSTS:
        raise RuntimeError(f"rank {group.rank} sees the hosts {nodes}: run it through emulated_cluster.run_cluster")
    piece = group.registered_empty(GATHERED // 4 // group.size).fill_(group.rank)
    whole = group.registered_empty(GATHERED // 4)
    expected = torch.arange(group.size, dtype=torch.float32).repeat_interleave(piece.numel())
    calls: dict[str, Callable[[], object]] = {}
    counted = {}
    for name, levels in (("hierarchical", True), ("flat", False)):
        calls[name] = functools.partial(group.all_gather, whole, piece, hierarchical=levels)
        whole.fill_(-1)
        distlib.ledger().reset()
        calls[name]()
        if not torch.equal(whole, expected):
            raise RuntimeError(f"rank {group.rank}: the {name} gather gave a wrong result")
        mine = torch.zeros(HOSTS, dtype=torch.int64)
        mine[next(i for i, node in enumerate(nodes) if group.rank in node)] = distlib.ledger().total_bytes(
            "between hosts"
        )
        dist.all_reduce(mine, group=gloo)
        counted[name] = mine.tolist()
    ordinary, target = piece.clone(), torch.empty(GATHERED // 4)
    calls["gloo"] = lambda: all_gather_flat(target, ordinary, group=gloo)
    return {"gather": interleaved(calls, gloo, rounds).seconds, "ledger": counted}


# ---- the process that starts the ranks --------------------------------------------------------------------


def run(rate: str, *arguments: str) -> dict[str, Any]:
    """What rank 0 of an emulated cluster of that rate wrote."""
    from emulated_cluster import run_cluster

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.json"
        command = [__file__, f"--samples={file}", *arguments]
        result = run_cluster(command, HOSTS, PER_HOST, rate, timeout=600, echo=sys.stderr)
        if result.returncode:
            raise RuntimeError(f"{rate}: the ranks failed with exit code {result.returncode}; their output is above")
        return json.loads(file.read_text())


def rows_of(measured: dict[str, dict[str, Any]]) -> list[Row]:
    """One row per rate and number of micro-steps; only the one that the bars are for has comparisons."""
    from report import Bar, Row

    rows = []
    for rate, result in measured.items():
        for count, samples in result["steps"].items():
            bars = [
                Bar(DEEPSPEED, MICS, at_least=2.89),
                Bar(FSDP2, MICS, at_least=2.89),
                Bar(HSDP, MICS, at_least=1.3),
                Bar(DEFERRED, MICS, at_least=1.05),
            ]
            shown = [bar for bar in bars if bar.first in samples and (rate, int(count)) == (RATE, MICRO)]
            rows.append(Row(f"GPT, 6.4 M parameters, {count} micro-steps, {rate}", RANKS, samples, shown))
    return rows


def gather_rows(result: dict[str, Any]) -> list[Row]:
    from report import Bar, Row
    from report_bytes import Bytes

    rows = [
        Row("all_gather 64 MiB, p=4 over 2x2", RANKS, result["gather"], [Bar("flat", "hierarchical", at_least=1.3)])
    ]
    formula = {"hierarchical": (RANKS - PER_HOST) * GATHERED / RANKS, "flat": (RANKS - 1) * GATHERED / RANKS}
    for name, by_host in result["ledger"].items():
        samples = {"ledger": [float(max(by_host))], "formula": [formula[name]]}
        bars = [Bar("ledger", "formula", at_most=1.0), Bar("ledger", "formula", at_least=1.0)]
        rows.append(Bytes(f"{name} gather: sent by a host", RANKS, samples, bars))
    return rows


def sweep(measured: dict[str, dict[str, Any]]) -> dict[str, dict[tuple[str, int], float]]:
    """{peer: {(rate, micro-steps): its median time over that of MiCS}}."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for rate, result in measured.items():
        for count, samples in result["steps"].items():
            ours = statistics.median(samples[MICS])
            for name, seconds in samples.items():
                if name != MICS:
                    found.setdefault(name, {})[rate, int(count)] = statistics.median(seconds) / ours
    return found


def sweep_table(ratios: dict[str, dict[tuple[str, int], float]], measured: dict[str, dict[str, Any]]) -> str:
    lines = [f"| link | micro-steps | {MICS} | {' | '.join(f'{name} / MiCS' for name in ratios)} |"]
    lines.append("|" + "---|" * (3 + len(ratios)))
    for rate, result in measured.items():
        for count, samples in result["steps"].items():
            cells = [f"{of[rate, int(count)]:.2f}x" for of in ratios.values()]
            ours = f"{statistics.median(samples[MICS]) * 1e3:.0f} ms"
            lines.append(f"| {rate} | {count} | {ours} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_sweep(ratios: dict[str, dict[tuple[str, int], float]], path: Path) -> None:
    """A panel per peer, a line per rate: how many times longer its step takes than that of MiCS."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(ratios), figsize=(3.2 * len(ratios), 3.4), sharey=True, squeeze=False)
    for axes, (name, of) in zip(panels[0], ratios.items(), strict=True):
        for rate in dict.fromkeys(rate for rate, _ in of):
            counts = [count for r, count in of if r == rate]
            axes.plot(counts, [of[rate, count] for count in counts], marker="o", label=rate)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(MICRO_STEPS, [str(count) for count in MICRO_STEPS])
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("micro-steps")
    panels[0][0].set_ylabel("time of a step / that of MiCS")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def results(options: argparse.Namespace) -> Report:
    """Measure, draw the sweep, and give the report."""
    from deepspeed_trial import DeepSpeedTrial
    from report_bytes import ByteReport

    deepspeed = DeepSpeedTrial()
    rates, counts = ((RATE,), (1, MICRO)) if options.quick else (RATES, MICRO_STEPS)
    measured = {}
    for rate in rates:
        bar = rate == RATE
        measured[rate] = run(
            rate,
            f"--deepspeed={deepspeed.argument}",
            "--micro-steps",
            *map(str, counts),
            f"--bar-rounds={(3 if options.quick else 5) if bar else 2}",
            f"--gather-rounds={(3 if options.quick else 7) if bar else 0}",
        )
    sent = measured[RATE]["sent"][str(MICRO)]
    ratios = sweep(measured)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_sweep(ratios, options.out / "mics_network_sweep.png")
    notes = [
        *deepspeed.notes,
        f"{LAYERS} layers of width {WIDTH}, 1 x {TOKENS} tokens a micro-batch. Peers over gloo, with the settings that "
        "they ship with.",
        f"Sent on a host's link per step of {MICRO} micro-steps, with headers: "
        + ", ".join(f"{name} {statistics.median(counts) / 1e6:.1f} MB" for name, counts in sent.items())
        + ".",
        sweep_table(ratios, measured),
        "![Sweep over link rate and micro-steps](results/mics_network_sweep.png)",
    ]
    rows = [*rows_of(measured), *gather_rows(measured[RATE])]
    title = f"MiCS between {HOSTS} emulated hosts x {PER_HOST} ranks at {RATE}"
    return ByteReport("mics_network", title, rows, notes)


def main() -> None:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        parser.add_argument("--deepspeed", required=True)
        parser.add_argument("--micro-steps", type=int, nargs="+", required=True)
        parser.add_argument("--bar-rounds", type=int, required=True)
        parser.add_argument("--gather-rounds", type=int, required=True)
        on_rank(parser.parse_args())
        free_groups()
        return
    import report

    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one rate, few rounds: rough ratios")
    options = parser.parse_args()
    report.publish(results(options), options)


if __name__ == "__main__":
    main()

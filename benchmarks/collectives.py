"""Collectives over distlib beside gloo and beside a plain copy of as many bytes, on one host and between two.

    python benchmarks/collectives.py          # 2 and 4 ranks on this host
    python benchmarks/collectives.py --bus    # 2 emulated hosts x 2 ranks at 2 Gbit/s: root and iproute2

Sizes are of the whole tensor: a reduce-scatter's input, an all-gather's output, both sides of an all-reduce.
"copy" is every rank copying as many bytes at the same time with torch, which reads each line of the target before
overwriting it; "streamed copy" does not, and so moves as little through memory as can be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from timing import free_groups, interleaved, is_rank, run_ranks, write_samples

import distlib
from distlib import Group, native

if TYPE_CHECKING:  # ranks draw nothing, and the process that starts them starts no world
    from report import Report, Row

KIB, MIB = 2**10, 2**20
# Newer torch has renamed these two; the old names warn.
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
RATE = "2gbit"
Variants = dict[str, Callable[[], object]]


# ---- on every rank ----------------------------------------------------------------------------------------


def on_rank(options: argparse.Namespace) -> None:
    """Measure and let rank 0 write {what: {variant: seconds per round}}."""
    torch.set_num_threads(1)
    with distlib.init():
        group, gloo = Group.of(), dist.new_group(backend="gloo")
        if options.between:
            write_samples(options.samples, _between_hosts(group, gloo))
        else:
            write_samples(options.samples, _on_one_host(group, gloo))


def _on_one_host(group: Group, gloo: dist.ProcessGroup) -> dict[str, dict[str, list[float]]]:
    cases: dict[str, tuple[Variants, int, int]] = {
        "all_reduce 64 MiB": (_all_reduce(group, gloo, 64 * MIB), 15, 1),
        "all_reduce 64 KiB": (_all_reduce(group, gloo, 64 * KIB), 15, 40),
        "reduce_scatter 64 MiB": (_reduce_scatter(group, gloo, 64 * MIB), 15, 1),
        "all_gather 64 MiB": (_all_gather(group, gloo, 64 * MIB), 15, 1),
    }
    return {
        what: interleaved(variants, gloo, rounds, repeat).seconds for what, (variants, rounds, repeat) in cases.items()
    }


def _between_hosts(group: Group, gloo: dist.ProcessGroup) -> dict[str, object]:
    """The times; "sent": bytes that each call put on the link of rank 0's host; "ledger": those it counts."""
    if len(group.topology.nodes) < 2:
        raise RuntimeError(f"rank {group.rank} sees one host only, nodes={group.topology.nodes}: use --bus")
    variants = _all_reduce(group, gloo, 64 * MIB)
    del variants["copy"], variants["streamed copy"]
    sent = Path("/sys/class/net/eth0/statistics/tx_bytes")
    timings = interleaved(variants, gloo, rounds=9, counter=lambda: int(sent.read_text()))
    distlib.ledger().reset()
    variants["registered"]()
    mine = distlib.ledger().total_bytes("between hosts") if group.rank in group.topology.nodes[0] else 0
    counted = torch.tensor(mine)
    dist.all_reduce(counted, group=gloo)
    return {"all_reduce 64 MiB": timings.seconds, "sent": timings.counted, "ledger": counted.item()}


def _all_reduce(group: Group, gloo: dist.ProcessGroup, size: int) -> Variants:
    registered, ordinary = group.registered_empty(size // 4), torch.empty(size // 4)
    variants = {
        "registered": lambda: group.all_reduce(registered),
        "ordinary": lambda: group.all_reduce(ordinary),
        "gloo": lambda: dist.all_reduce(ordinary, group=gloo),
    }
    total = sum(range(1, group.size + 1))
    for name, call in variants.items():
        tensor = registered if name == "registered" else ordinary
        tensor.fill_(group.rank + 1)
        call()
        _check(name, tensor, torch.full_like(tensor, total))
        tensor.zero_()  # sums of zeros stay zeros, whatever the number of rounds
    return {**variants, "copy": _copy(size), "streamed copy": _streamed_copy(size)}


def _reduce_scatter(group: Group, gloo: dist.ProcessGroup, size: int) -> Variants:
    whole, part = size // 4, size // 4 // group.size
    inputs = {"registered": group.registered_empty(whole), "ordinary": torch.empty(whole)}
    outputs = {"registered": group.registered_empty(part), "ordinary": torch.empty(part)}
    variants = {
        "registered": lambda: group.reduce_scatter(outputs["registered"], inputs["registered"]),
        "ordinary": lambda: group.reduce_scatter(outputs["ordinary"], inputs["ordinary"]),
        "gloo": lambda: reduce_scatter_flat(outputs["ordinary"], inputs["ordinary"], group=gloo),
    }
    for name, call in variants.items():
        kind = "registered" if name == "registered" else "ordinary"
        inputs[kind].copy_(torch.arange(group.size).repeat_interleave(part))
        call()
        _check(name, outputs[kind], torch.full((part,), float(group.rank * group.size)))
    return {**variants, "copy": _copy(size)}


def _all_gather(group: Group, gloo: dist.ProcessGroup, size: int) -> Variants:
    whole, part = size // 4, size // 4 // group.size
    inputs = {"registered": group.registered_empty(part), "ordinary": torch.empty(part)}
    outputs = {"registered": group.registered_empty(whole), "ordinary": torch.empty(whole)}
    variants = {
        "registered": lambda: group.all_gather(outputs["registered"], inputs["registered"]),
        "ordinary": lambda: group.all_gather(outputs["ordinary"], inputs["ordinary"]),
        "gloo": lambda: all_gather_flat(outputs["ordinary"], inputs["ordinary"], group=gloo),
    }
    expected = torch.arange(group.size, dtype=torch.float32).repeat_interleave(part)
    for name, call in variants.items():
        kind = "registered" if name == "registered" else "ordinary"
        inputs[kind].fill_(group.rank)
        outputs[kind].fill_(-1)
        call()
        _check(name, outputs[kind], expected)
    return {**variants, "copy": _copy(size)}


def _copy(size: int) -> Callable[[], object]:
    source, target = torch.zeros(size // 4).fill_(1), torch.zeros(size // 4).fill_(2)  # pages are there
    return lambda: target.copy_(source)


def _streamed_copy(size: int) -> Callable[[], object]:
    core = native.core()
    if core is None:
        raise RuntimeError(f"this benchmark needs distlib's compiled core, but {native.why_not()}")
    source, target = torch.zeros(size // 4).fill_(1), torch.zeros(size // 4).fill_(2)
    return lambda: core.copy(target.data_ptr(), source.data_ptr(), source.nbytes)


def _check(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(result, expected):
        raise RuntimeError(f"variant {name} computed a wrong result: {result[:4]}..., expected {expected[:4]}...")


# ---- the process that starts the ranks --------------------------------------------------------------------


def on_one_host() -> list[Row]:
    from report import Bar, Row

    rows = []
    for ranks in (2, 4):
        more = ranks == 4
        bars = {
            "all_reduce 64 MiB": [
                Bar("gloo", "registered", at_least=6 if more else 5),
                Bar("registered", "copy", at_most=1.5 if more else 1.25),
                Bar("registered", "streamed copy", at_most=1.5 if more else 1.25),
                Bar("gloo", "ordinary", at_least=3 if more else 2.5),
            ],
            "all_reduce 64 KiB": [
                Bar("gloo", "registered", at_least=8 if more else 10),
                Bar("gloo", "ordinary", at_least=8 if more else 10),
            ],
            "reduce_scatter 64 MiB": [
                Bar("gloo", "registered", at_least=12 if more else 10),
                Bar("gloo", "ordinary"),
            ],
            "all_gather 64 MiB": [Bar("gloo", "registered", at_least=8), Bar("gloo", "ordinary")],
        }
        samples = run_ranks(__file__, ranks)
        rows += [Row(what, ranks, samples[what], bars[what]) for what in bars]
    return rows


def between_hosts() -> Report:
    from emulated_cluster import run_cluster
    from report import Bar, Report, Row

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.json"
        command = [__file__, "--between", f"--samples={file}"]
        result = run_cluster(command, hosts=2, ranks_per_host=2, rate=RATE, timeout=300, echo=sys.stderr)
        if result.returncode:
            raise RuntimeError(f"the ranks failed with exit code {result.returncode}; their output is above")
        samples = json.loads(file.read_text())
    what = "all_reduce 64 MiB"
    bars = [Bar("gloo", "registered", at_least=1.3), Bar("gloo", "ordinary", at_least=1.3)]
    sent = ", ".join(f"{name} {statistics.median(counts) / MIB:.1f} MiB" for name, counts in samples["sent"].items())
    note = (
        f"Sent on a host's link per call, with headers: {sent}. Payload that distlib's ledger counts: "
        f"{samples['ledger'] / MIB:.1f} MiB; by formula 64 MiB in two levels, 96 MiB in a flat ring."
    )
    return Report("between_hosts", f"Between 2 emulated hosts at {RATE}", [Row(what, 4, samples[what], bars)], [note])


def main() -> None:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        parser.add_argument("--between", action="store_true")
        on_rank(parser.parse_args())
        free_groups()
        return
    import report

    parser = report.parser(__doc__)
    parser.add_argument("--bus", action="store_true", help="between two emulated hosts instead of on one host")
    options = parser.parse_args()
    if options.bus:
        report.publish(between_hosts(), options)
    else:
        report.publish(report.Report("collectives", "Collectives on one host", on_one_host()), options)


if __name__ == "__main__":
    main()

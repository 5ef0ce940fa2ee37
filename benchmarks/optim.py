"""AdamW on one flat parameter of 100 M elements: distlib's, torch's fused one, DeepSpeed's, and a copy of the bytes.

A step reads the parameter, its gradient and two moments, and writes all but the gradient: 28 bytes an element. The copy
moves as many: it reads 14 bytes an element and writes them, by as many threads, by the core's copy (stores that bypass
the caches) and by torch's, whichever is faster. All variants step the same parameter and gradient, in turns; each has
moments of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import report
import torch
from report import Bar, Report, Row
from torch import nn

from distlib import native
from distlib.optim import AdamW

OURS, FUSED, CPU_ADAM, COPY = "distlib", "torch fused", "DeepSpeedCPUAdam", "copy"
BYTES = 28  # an element and step
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    notes: list[str] = []
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows.append(_row(options, threads, notes))
    title = f"AdamW on {options.elements / 1e6:.0f} M fp32 parameters in one flat buffer"
    report.publish(Report("optim", title, rows, notes), options)


def _row(options: argparse.Namespace, threads: int, notes: list[str]) -> Row:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(options.elements))
    weight.grad = torch.randn(options.elements)
    variants: dict[str, Callable[[], object]] = {
        OURS: AdamW([weight], **OPTIONS).step,
        FUSED: torch.optim.AdamW([weight], fused=True, **OPTIONS).step,
    }
    peer = _deepspeed(weight, notes)
    if peer is not None:
        variants[CPU_ADAM] = peer
    copies = _copies(options.elements, threads)
    variants |= copies
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-2, options.rounds):
        # Each begins with caches full of what the one before it wrote: all take every place in turn.
        order = list(variants)[turn % len(variants) :] + list(variants)[: turn % len(variants)]
        for name in order:
            call = variants[name]
            begin = time.perf_counter()
            call()
            if turn >= 0:
                samples[name].append(time.perf_counter() - begin)
    medians = {name: sorted(taken)[len(taken) // 2] for name, taken in samples.items()}
    fastest = min(copies, key=medians.__getitem__)
    samples[COPY] = samples[fastest]
    rates = ", ".join(f"{name} {options.elements * BYTES / taken / 1e9:.1f}" for name, taken in medians.items())
    notes.append(f"GB/s with {threads} thread{'s' * (threads > 1)}: {rates}; the copy to compare with is {fastest}.")
    bars = [Bar(FUSED, OURS, at_least=1.0), Bar(COPY, OURS, at_least=0.8)]
    if peer is not None:
        bars.insert(1, Bar(CPU_ADAM, OURS, at_least=1.0))
    return Row(f"AdamW, {threads} thread{'s' * (threads > 1)}", 1, samples, bars)


def _deepspeed(weight: nn.Parameter, notes: list[str]) -> Callable[[], object] | None:
    """DeepSpeed's step of the same parameter, or None with a note: it is compiled when first used."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam([weight], adamw_mode=True, **OPTIONS).step
    except Exception as error:  # noqa: BLE001 (whatever keeps it from being built is told)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        note = f"DeepSpeedCPUAdam could not be built, so it is not compared with: {reason}"
        if note not in notes:
            notes.append(note)
        return None


def _copies(elements: int, threads: int) -> dict[str, Callable[[], object]]:
    """Copies of half the bytes that a step moves."""
    size = elements * BYTES // 2
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    found: dict[str, Callable[[], object]] = {"copy by torch": lambda: target.copy_(source)}
    core = native.core()
    if core is not None:
        pool = ThreadPoolExecutor(threads)
        edges = [size * part // threads // 64 * 64 for part in range(threads)] + [size]

        def part(index: int) -> None:
            begin, end = edges[index], edges[index + 1]
            core.copy(target.data_ptr() + begin, source.data_ptr() + begin, end - begin)

        found["copy by the core"] = lambda: list(pool.map(part, range(threads)))
    return found


if __name__ == "__main__":
    main()

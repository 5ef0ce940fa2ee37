"""Pipeline parallelism on one host: bubbles, training steps beside torch's pipelines, activations, and the split.

    python benchmarks/pipeline.py            # all of it, some thirty minutes
    python benchmarks/pipeline.py --quick    # the same claims from few rounds, and one GPT

Bubbles: stages that sleep, see `pipeline_bubbles.py`. Steps: GPTs on 2 ranks of one thread each, 4 micro-batches of 256
tokens, full steps with AdamW; the contenders of `pipeline_peers.py` take turns. Activations: bytes that live tensors
have, beside the formula of the schedule. Split: against a search through all splits.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pipeline_bubbles
import torch
import torch.distributed as dist
from data_parallel import GPT, TOKENS, VOCABULARY, WIDTH
from pipeline_peers import Contender, Distlib, TorchPipeline, check_losses, even_split
from timing import free_groups, interleaved, is_rank, run_ranks, write_samples
from torch import Tensor, nn

import distlib
from distlib.activations.live import LiveBytes
from distlib.comm.slots import Slot
from distlib.pipeline import NAMES, generate, peak_activations, save_png, split_layers

if TYPE_CHECKING:  # ranks draw nothing
    from report import Report, Row

MICRO_BATCHES = 4
# The output layer weighs 1.3 blocks in the first GPT, that of other benchmarks; 5.3 in the second, as in GPT-2 small.
VOCABULARIES = (VOCABULARY, 4 * VOCABULARY)
OURS = {"1f1b": "distlib 1f1b", "zb-h1": "distlib zb-h1", "zb-v": "distlib zb-v"}
TORCH = {"1F1B": "torch 1F1B", "ZB1P": "torch ZB1P", "ZBV": "torch ZBV"}
SAME_SPLIT = ", our split"
# Activations: layers that keep more bytes for a micro-batch than the gradient of a weight has.
HELD_RANKS, HELD_LAYERS, HELD_MICRO_BATCHES, HELD_TOKENS, HELD_WIDTH = 4, 8, 8, 512, 256
PROFILES, MOST_LAYERS = 200, 12


# ---- on every rank ----------------------------------------------------------------------------------------


def on_rank(options: argparse.Namespace) -> None:
    """Do what `options.part` says and let rank 0 write what came of it."""
    torch.set_num_threads(1)
    if options.part == "steps":
        dist.init_process_group("gloo")
    else:
        distlib.init()
    try:
        part = {"bubbles": _bubbles, "steps": _steps, "activations": _activations}[options.part]
        write_samples(options.samples, part(options))
    finally:
        dist.destroy_process_group()


def _bubbles(options: argparse.Namespace) -> dict[str, Any]:
    return pipeline_bubbles.measure(options.rounds)


def _steps(options: argparse.Namespace) -> dict[str, Any]:
    """{"seconds": per contender and round, "splits": in words, "timed": a step of each of distlib's schedules}."""

    def model() -> GPT:
        torch.manual_seed(0)
        made = GPT()
        made.embedding = nn.Embedding(options.vocabulary, WIDTH)
        made.head = nn.Linear(WIDTH, options.vocabulary, bias=False)
        return made

    generator = torch.Generator().manual_seed(1)
    text = torch.randint(options.vocabulary, (MICRO_BATCHES, TOKENS + 1), generator=generator)
    tokens, targets = text[:, :-1], text[:, 1:]
    built: dict[str, Contender] = {}
    first = built[OURS["1f1b"]] = Distlib("1f1b", model(), "auto", tokens)
    built[OURS["zb-h1"]] = Distlib("zb-h1", model(), first.begins, tokens)
    in_v = built[OURS["zb-v"]] = Distlib("zb-v", model(), "auto", tokens)
    for kind, name in TORCH.items():
        ours = in_v.begins if kind == "ZBV" else first.begins
        even = even_split(len(ours) + 1)
        built[name] = TorchPipeline(kind, model(), even, tokens)
        if ours != even:
            built[name + SAME_SPLIT] = TorchPipeline(kind, model(), ours, tokens)
    for contender in built.values():
        for _ in range(2):
            contender.step(tokens, targets)
    check_losses(built)
    calls = {name: functools.partial(contender.step, tokens, targets) for name, contender in built.items()}
    seconds = interleaved(calls, dist.new_group(backend="gloo"), options.rounds, warmup=1).seconds
    check_losses(built)
    return {
        "seconds": seconds,
        "splits": {name: str(c.model.division) for name, c in built.items() if isinstance(c, Distlib)},
        "timed": {name: _timed(c, tokens, targets) for name, c in built.items() if isinstance(c, Distlib)},
        "copies": _copies(first, tokens, targets),
    }


def _timed(contender: Distlib, tokens: Tensor, targets: Tensor) -> dict[str, float]:
    """Medians of three steps: seconds of compute on the busier rank, the longest span, the bubble."""
    runs = [contender.model.timed_step(tokens, targets)[1] for _ in range(3)]
    contender.optimizer.zero_grad()
    return {
        "busy": statistics.median(max(run.busy) for run in runs),
        "span": statistics.median(run.cost for run in runs),
        "bubble": statistics.median(run.bubble for run in runs),
    }


def _copies(contender: Distlib, tokens: Tensor, targets: Tensor) -> float:
    """Seconds of this rank's copies into slots in a step, the median of five: what sending without them would save."""
    spent: list[float] = []
    fill = Slot.fill

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        fill(*args)
        spent[-1] += time.perf_counter() - began

    with mock.patch.object(Slot, "fill", timed):
        for _ in range(5):
            spent.append(0.0)
            contender.model.train_step(tokens, targets)
    contender.optimizer.zero_grad()
    return statistics.median(spent)


class Layer(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HELD_WIDTH)
        self.up, self.down = nn.Linear(HELD_WIDTH, 4 * HELD_WIDTH), nn.Linear(4 * HELD_WIDTH, HELD_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def _activations(_: argparse.Namespace) -> dict[str, Any]:
    """{"unit": bytes of a rank's layers for a micro-batch, schedule: most bytes that lived on each rank in a step}."""
    batch = torch.randn(HELD_MICRO_BATCHES, HELD_TOKENS, HELD_WIDTH)
    share = nn.Sequential(*(Layer() for _ in range(HELD_LAYERS // HELD_RANKS)))
    with LiveBytes() as live:
        kept = share(batch[:1])
        found: dict[str, Any] = {"unit": live.live}
        del kept
    for name in NAMES:
        if name == "auto":
            continue
        stages = generate(name, HELD_RANKS, HELD_MICRO_BATCHES).stages
        each = HELD_LAYERS // stages
        parts = [nn.Sequential(*(Layer() for _ in range(each))) for _ in range(stages)]
        trained = distlib.PipelineParallel(
            None,
            schedule=name,
            microbatches=HELD_MICRO_BATCHES,
            split=parts,
            loss_fn=lambda output, _: output.square().mean(),
        )
        trained.train_step(batch)  # makes the gradients, to which the next step adds
        with LiveBytes() as live:
            trained.train_step(batch)
            peak = live.peak
        peaks: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, peak)
        found[name] = peaks
    return found


# ---- the process that starts the ranks --------------------------------------------------------------------


def step_row(vocabulary: int, found: dict[str, Any]) -> Row:
    from report import Bar, Row

    seconds = found["seconds"]
    bars = [
        Bar(OURS["1f1b"], OURS["zb-h1"], at_least=1.08),
        Bar(TORCH["1F1B"], OURS["1f1b"], at_least=1.10),
        Bar(TORCH["ZB1P"], OURS["zb-h1"], at_least=1.10),
        Bar(TORCH["ZBV"], OURS["zb-h1"], at_least=1.10),
        Bar(TORCH["ZBV"], OURS["zb-v"], at_least=1.10),
        Bar(TORCH["1F1B"] + SAME_SPLIT, OURS["1f1b"]),
        Bar(TORCH["ZB1P"] + SAME_SPLIT, OURS["zb-h1"]),
        Bar(TORCH["ZBV"] + SAME_SPLIT, OURS["zb-v"]),
    ]
    what = f"GPT, vocabulary {vocabulary:,}, {MICRO_BATCHES} x {TOKENS} tokens"
    return Row(what, 2, seconds, [bar for bar in bars if bar.first in seconds])


def step_notes(vocabulary: int, found: dict[str, Any]) -> list[str]:
    """What a rank's time goes into, and the splits."""
    inside = (
        f"{name}: the busier rank computes {at['busy']:.2f} of {at['span']:.2f} s, bubble {at['bubble']:.3f}"
        for name, at in found["timed"].items()
    )
    splits = (f"{name}:\n{words}" for name, words in found["splits"].items() if name != OURS["zb-h1"])
    return [
        f"Vocabulary {vocabulary:,}, a step without the optimizer: {'; '.join(inside)}. Rank 0 copies activations "
        f"into shared memory for {found['copies'] * 1e6:.0f} us of a step of 1f1b. The split that distlib found:",
        "```\n" + "\n".join(splits) + "\n```",
    ]


def activation_rows(found: dict[str, Any]) -> list[Row]:
    """Bytes on the rank that holds most, beside the formula: micro-batches times the bytes of one."""
    from report import Bar
    from report_bytes import Bytes

    rows: list[Row] = []
    for name, peaks in found.items():
        if name != "unit":
            formula = peak_activations(name, HELD_RANKS, HELD_MICRO_BATCHES) * found["unit"]
            samples = {"live": [float(max(peaks))], "formula": [formula]}
            what = f"activations, {name}, m={HELD_MICRO_BATCHES}"
            rows.append(Bytes(what, HELD_RANKS, samples, [Bar("live", "formula")]))
    return rows


def split_row() -> Row:
    """How many random chains of layers `split_layers` divides as well as the best of all splits."""
    from pipeline_report import Plain
    from report import Bar

    draw, equal = random.Random(0), 0
    for _ in range(PROFILES):
        layers = draw.randint(2, MOST_LAYERS)
        stages = draw.randint(1, layers)
        costs = [draw.lognormvariate(0, 1) for _ in range(layers)]
        cuts = [draw.random() * draw.randint(0, 1) for _ in range(layers - 1)]
        best = min(
            _slowest((0, *inner, layers), costs, cuts) for inner in itertools.combinations(range(1, layers), stages - 1)
        )
        equal += split_layers(costs, stages, communication=cuts).slowest <= best * (1 + 1e-12)
    samples = {"optimal": [float(equal)], "profiles": [float(PROFILES)]}
    return Plain(f"splits of up to {MOST_LAYERS} layers", 1, samples, [Bar("optimal", "profiles", at_least=1.0)])


def _slowest(bounds: tuple[int, ...], costs: list[float], cuts: list[float]) -> float:
    around = [0.0, *cuts, 0.0]  # nothing is sent before the first layer nor after the last
    return max(sum(costs[a:b]) + around[a] + around[b] for a, b in itertools.pairwise(bounds))


def results(options: argparse.Namespace) -> Report:
    """Measure, draw time lines, and give the report."""
    from pipeline_report import PipelineReport

    def part(name: str, ranks: int, rounds: int, *more: str) -> dict[str, Any]:
        return run_ranks(__file__, ranks, [f"--part={name}", f"--rounds={rounds}", *more])

    rows: list[Row] = []
    pictures, latencies, steps = [], [], []
    options.out.mkdir(parents=True, exist_ok=True)
    for ranks in (4, 8):
        found = part("bubbles", ranks, 3 if options.quick else 9)
        rows += pipeline_bubbles.rows_of(ranks, found)
        comm, send, post = (found["message"][cost] * 1e6 for cost in ("comm", "send", "post"))
        latencies.append(f"{comm:.0f} us on {ranks} ranks (its sender is busy for {send:.0f}), {post:.0f} to expect it")
        if ranks == 4:
            for name in pipeline_bubbles.DRAWN:
                file = f"pipeline_{name}.png"
                save_png(pipeline_bubbles.time_line(name, ranks, found), options.out / file)
                pictures.append(f"![Measured time line of {name}](results/{file})")
    for vocabulary in VOCABULARIES[: 1 if options.quick else None]:
        found = part("steps", 2, 2 if options.quick else 20, f"--vocabulary={vocabulary}")
        rows.append(step_row(vocabulary, found))
        steps += step_notes(vocabulary, found)
    rows += [*activation_rows(part("activations", HELD_RANKS, 1)), split_row()]
    notes = [
        "Bubbles: F, B and W of a rank are sleeps of "
        + " or ".join(", ".join(f"{s * 1e3:.0f}" for s in each) for each in pipeline_bubbles.LENGTHS.values())
        + f" ms. A message takes, by ping-pong, {'; '.join(latencies)}.",
        "Time lines, in seconds: F a forward, B the gradients of inputs, W those of weights, BW both; numbers are "
        "micro-batches; the later stage of a rank is paler. Where ranks sleep there are no activations: 0 bytes.",
        *pictures,
        "Steps: torch's stages have equally many layers, embedding and output layer counted as one each; or, where it "
        "says so, the split that distlib found. ZB1P is ScheduleInterleavedZeroBubble with one stage per rank.",
        *steps,
        "Activations: the formula holds a micro-batch from its forward to its weight gradients; live bytes are also "
        "those that a backward makes on its way.",
    ]
    return PipelineReport("pipeline", "Pipeline parallelism on one host", rows, notes)


def main() -> None:
    if is_rank():
        parser = argparse.ArgumentParser()
        parser.add_argument("--samples", type=Path, required=True)
        parser.add_argument("--part", required=True)
        parser.add_argument("--rounds", type=int, required=True)
        parser.add_argument("--vocabulary", type=int)
        on_rank(parser.parse_args())
        free_groups()
        return
    import report

    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: rough ratios")
    options = parser.parse_args()
    report.publish(results(options), options)


if __name__ == "__main__":
    main()

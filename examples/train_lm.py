"""Trains a GPT on bytes of real text, on one process or many: the same losses, whatever starts it.

    python examples/train_lm.py
    torchrun --nproc-per-node 2 examples/train_lm.py
    mpirun -np 2 python examples/train_lm.py
    torchrun --nproc-per-node 4 examples/train_lm.py --strategy mics --partition-size 2
    torchrun --nproc-per-node 2 examples/train_lm.py --data my_texts/ --width 256 --steps 2000 --out run.json

The parts lie beside it in lm/: settings, data, model, strategy, schedule, curve, checkpoint, report.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from lm import report
from lm.checkpoint import Checkpoints
from lm.curve import LossCurve
from lm.data import Sampler, batch_of, count_windows, load_corpus
from lm.model import GPT, generate, next_token_loss
from lm.schedule import learning_rate
from lm.settings import Settings, check, parse
from lm.strategy import Parallel, wrap
from torch import Tensor, nn

import distlib


def main(arguments: list[str] | None = None) -> None:
    settings = parse(arguments)
    with distlib.init() as world:
        try:
            train(settings, world)
        except FloatingPointError as error:
            raise SystemExit(f"train_lm: rank {world.rank}: {error}") from None


def train(settings: Settings, world: distlib.World) -> None:
    """The whole run. Every rank calls it with the same settings."""
    threads = share_cores(world)
    torch.manual_seed(settings.seed)

    # Every rank reads the same text and builds the same model; the sampler deals each its own windows.
    with together(world):
        check(settings, world.size)
        text, validation_text = load_corpus(settings.data, settings.context)
        windows = count_windows(text, settings.context)
        sampler = Sampler(windows, settings.batch, world.rank, world.size, settings.seed)
        plain = GPT(settings.layers, settings.width, settings.heads, settings.tied).to(world.device)

    # The parallel strategy. Whatever it is, gradients are averaged over all ranks when backward returns.
    parameters = sum(p.numel() for p in plain.parameters())
    with together(world):
        model = wrap(plain, settings)
    optimizer = make_optimizer(model, settings)
    curve = LossCurve(settings.steps, world.device)
    checkpoints = Checkpoints(settings, model, optimizer, sampler, curve)
    with together(world):
        start = checkpoints.resume(settings.resume) if settings.resume else 0

    speaker = report.Speaker(world, settings.steps, start)
    speaker.opening(world, threads, parameters, len(text), len(validation_text))
    seconds = 0.0  # of training; validation is not in it
    with speaker, checkpoints:
        for step in range(start, settings.steps):
            if step % settings.validate_every == 0:
                curve.validation.append((step, validate(model, validation_text, settings, world)))
                speaker.validated(*curve.validation[-1])

            begun = time.perf_counter()
            rate = learning_rate(step, settings.steps, settings.lr, settings.warmup)
            curve.add(train_step(model, optimizer, rate, next(sampler), text, settings))
            done = step + 1
            saves = done == settings.steps or settings.save_every and done % settings.save_every == 0
            loss = curve.settle() if saves or done % settings.report_every == 0 else None
            seconds += time.perf_counter() - begun

            tokens_per_second = (done - start) * settings.batch * settings.context / seconds
            if loss is not None:
                speaker.trained(done, loss, rate, tokens_per_second)
            if saves and settings.save:
                speaker.saving(done, settings.save, checkpoints.save(done))
        curve.validation.append((settings.steps, validate(model, validation_text, settings, world)))
        speaker.validated(*curve.validation[-1])

    sample = generate(model, settings.prompt.encode(), settings.sample, settings.context, settings.seed, world.device)
    speaker.sampled(sample)
    summary = report.Summary.of(
        curve, parameters, seconds, tokens_per_second, report.gather(world, model.memory_report(optimizer))
    )
    speaker.summary(summary)
    if settings.out and world.rank == 0:
        report.write_json(settings.out, settings, world, threads, curve, summary)


def train_step(
    model: Parallel,
    optimizer: torch.optim.Optimizer,
    rate: float,
    windows: np.ndarray,
    text: np.ndarray,
    settings: Settings,
) -> Tensor:
    """One optimizer step on this rank's `windows`. Returns their mean loss, a scalar tensor."""
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for micro_step, part in enumerate(np.split(windows, settings.accumulate)):
        last = micro_step == settings.accumulate - 1
        with contextlib.nullcontext() if last else model.no_sync():
            inputs, targets = batch_of(text, part, settings.context, device)
            loss = next_token_loss(model(inputs), targets) / settings.accumulate
            loss.backward()
        total += loss.detach()
    model.clip_grad_norm_(settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return total


@torch.no_grad()
def validate(model: nn.Module, text: np.ndarray, settings: Settings, world: distlib.World) -> float:
    """Mean loss in nats per byte of windows spread evenly over `text`. Every rank must call it.

    Every rank runs equally many forwards, and which windows count does not depend on the number of ranks.
    """
    batches = max(1, settings.validation_windows // settings.batch)
    spread = np.linspace(0, count_windows(text, settings.context) - 1, batches * settings.batch).astype(np.int64)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in np.split(spread, batches):
        inputs, targets = batch_of(text, np.split(batch, world.size)[world.rank], settings.context, world.device)
        total += next_token_loss(model(inputs), targets, reduction="sum")
    dist.all_reduce(total)
    return total.item() / (spread.size * settings.context)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, with weight decay on all but the norms' scales."""
    scales = [p for name, p in model.named_parameters() if "norm" in name]
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def share_cores(world: distlib.World) -> int:
    """Gives this rank its part of the host's cores, unless OMP_NUM_THREADS decides. Returns the threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))
    return torch.get_num_threads()


@contextlib.contextmanager
def together(world: distlib.World) -> Iterator[None]:
    """Runs the block on every rank; where it fails on one, all ranks end, each with a line that says why."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem)
    if problem is not None:
        raise SystemExit(f"train_lm: rank {world.rank}: {problem}")
    for rank, theirs in enumerate(problems):
        if theirs is not None:
            raise SystemExit(f"train_lm: rank {world.rank} stops because of rank {rank}: {theirs}")


if __name__ == "__main__":
    main()

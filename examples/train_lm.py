"""Trains a GPT on bytes of real text, on one process or many: the same losses, whatever starts it.

    python examples/train_lm.py
    torchrun --nproc-per-node 2 examples/train_lm.py
    mpirun -np 2 python examples/train_lm.py
    torchrun --nproc-per-node 4 examples/train_lm.py --strategy mics --partition-size 2
    torchrun --nproc-per-node 4 examples/train_lm.py --plan examples/plans/pipeline.yaml
    torchrun --nproc-per-node 2 examples/train_lm.py --data my_texts/ --width 256 --steps 2000 --out run.json

The parts lie beside it in lm/: settings, data, model, strategy, schedule, curve, checkpoint, report.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator

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
from lm.strategy import plan_of
from torch import nn

import distlib
from distlib.shards import shard_of


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

    # Every rank reads the same text and builds the same model.
    with together(world):
        check(settings, world.size)
        plan = plan_of(settings)
        text, validation_text = load_corpus(settings.data, settings.context)
        plain = GPT(settings.layers, settings.width, settings.heads, settings.tied)  # its parts go to GPUs, if any
    parameters = sum(p.numel() for p in plain.parameters())

    # The plan says how the ranks share the work. Those that see different data are dealt different windows.
    with together(world):
        rows = settings.batch * plan.pipeline // world.size
        engine = distlib.parallelize(
            plain,
            plan,
            optimizer=lambda parameters: make_optimizer(parameters, plan, settings),
            loss_fn=next_token_loss,
            example_inputs=torch.zeros(rows, settings.context, dtype=torch.int64),
        )
        windows = count_windows(text, settings.context)
        sampler = Sampler(windows, settings.batch, engine.data_rank, engine.data_size, settings.seed)
    curve = LossCurve(settings.steps, world.device)
    checkpoints = Checkpoints(settings, engine, sampler, curve)
    if settings.resume:
        with together(world):
            checkpoints.resume(settings.resume)

    start = engine.steps
    speaker = report.Speaker(world, settings.steps, start)
    speaker.opening(world, threads, parameters, len(text), len(validation_text), engine)
    seconds = 0.0  # of training; validation is not in it
    with speaker, checkpoints:
        for step in range(start, settings.steps):
            if step % settings.validate_every == 0:
                curve.validation.append((step, validate(engine, validation_text, settings, world)))
                speaker.validated(*curve.validation[-1])

            begun = time.perf_counter()
            rate = learning_rate(step, settings.steps, settings.lr, settings.warmup)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            inputs, targets = batch_of(text, next(sampler), settings.context, world.device)
            curve.add(engine.train_step(inputs, targets))
            done = engine.steps
            saves = done == settings.steps or settings.save_every and done % settings.save_every == 0
            loss = curve.settle() if saves or done % settings.report_every == 0 else None
            seconds += time.perf_counter() - begun

            tokens_per_second = (done - start) * settings.batch * settings.context / seconds
            if loss is not None:
                speaker.trained(done, loss, rate, tokens_per_second)
            if saves and settings.save:
                speaker.saving(done, settings.save, checkpoints.save())
        curve.validation.append((settings.steps, validate(engine, validation_text, settings, world)))
        speaker.validated(*curve.validation[-1])

    prompt = settings.prompt.encode()
    sample = generate(engine.eval(), prompt, settings.sample, settings.context, settings.seed, world.device)
    speaker.sampled(sample)
    summary = report.Summary.of(
        curve, parameters, seconds, tokens_per_second, report.gather(world, engine.memory_report())
    )
    speaker.summary(summary)
    if settings.out and world.rank == 0:
        report.write_json(settings.out, settings, plan, world, threads, curve, summary)


def validate(engine: distlib.Engine, text: np.ndarray, settings: Settings, world: distlib.World) -> float:
    """Mean loss in nats per byte of windows spread evenly over `text`. Every rank must call it.

    Which windows count does not depend on the number of ranks.
    """
    batches = max(1, settings.validation_windows // settings.batch)
    spread = np.linspace(0, count_windows(text, settings.context) - 1, batches * settings.batch).astype(np.int64)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    engine.eval()
    for batch in np.split(spread, batches):
        mine = np.split(batch, engine.data_size)[engine.data_rank]
        total += engine.eval_step(*batch_of(text, mine, settings.context, world.device))
    engine.train()
    return total.item() / batches


def make_optimizer(parameters: Iterable[nn.Parameter], plan: distlib.Plan, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, with weight decay on all but the norms' scales. distlib's own, where its state is to lie in files."""
    matrices, scales = [], []
    for parameter in parameters:
        shard = shard_of(parameter)  # a rank may hold a piece only: of what?
        shape = parameter.shape if shard is None else shard.shape
        (matrices if len(shape) > 1 else scales).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    if plan.offload:
        return distlib.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
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
    except (ValueError, OSError, ImportError) as error:  # ImportError: a plan asks for what is not installed
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

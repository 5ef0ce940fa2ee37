"""What runs on the ranks of benchmarks/gpu_step.py: timed steps, waits of the host, offload, curves of losses."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gpu_trace
import torch
import torch.distributed as dist
from gpu_model import (
    SMALL,
    TINY,
    Batch,
    Contender,
    Plain,
    Sharded,
    Size,
    batch_of,
    module_of,
    next_token_loss,
    size_for,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import distlib

OURS, TORCH = "distlib", "torch"
WARMUP = 4  # steps: the second records the order of units, the third uses it
STEADY = 5  # steps in which waits are counted
CURVE = {"cuda": 20, "fake": 6}  # steps of a curve
BLOCKED = 8  # the same of several ranks whose launches block: each then waits for its turn on a card that they share
AGREEMENT = 2e-3  # relative: how far the contenders' losses may be apart in bf16


# ---- steps on one device --------------------------------------------------------------------------------------


def steps(device: torch.device, rounds: int) -> dict[str, Any]:
    """Both contenders in turns: seconds, bytes, where the host waited. Times are there on a GPU only."""
    on_card = device.type == "cuda"
    size = size_for(torch.cuda.mem_get_info(device)[0]) if on_card else TINY
    batch = batch_of(size, device)
    makers: dict[str, Callable[..., Contender]] = {OURS: Sharded, TORCH: Plain}
    built, held = {}, {}
    for name, make in makers.items():
        before = _allocated(device)
        built[name] = make(module_of(size, device), device, torch.bfloat16)
        losses = [built[name].step(batch) for _ in range(WARMUP)]
        held[name] = _allocated(device) - before
        built[name].loss = losses[-1]
    found: dict[str, Any] = {"size": str(size), "held": held}
    found["losses"] = {name: contender.loss.item() for name, contender in built.items()}
    low, high = sorted(found["losses"].values())
    if not high - low <= AGREEMENT * abs(high):
        raise RuntimeError(f"the contenders' losses are more than {AGREEMENT} apart: {found['losses']}")
    found["waits"] = {name: waits(device, functools.partial(several, built[name], batch)) for name in built}
    found["control"] = waits(device, lambda: [built[TORCH].step(batch).item() for _ in range(STEADY)])
    if on_card:
        found["traced"] = {
            name: gpu_trace.waits(gpu_trace.trace(functools.partial(several, built[name], batch))) for name in built
        }
        waiting = lambda: [built[TORCH].step(batch).item() for _ in range(STEADY)]  # noqa: E731
        found["traced control"] = gpu_trace.waits(gpu_trace.trace(waiting))
        found["peak"] = {name: _peak(built, name, batch) - (sum(held.values()) - held[name]) for name in built}
        found |= timed(built, batch, rounds)
    return found


def several(contender: Contender, batch: Batch) -> None:
    for _ in range(STEADY):
        contender.step(batch)


def waits(device: torch.device, call: Callable[[], object]) -> list[str]:
    """Where the host waits for the device in `call`, by torch's sync-debug mode or by the fake device's account."""
    if device.type == "fake":
        import fake_device

        fake_device.reset()
        call()
        return [str(sync) for sync in fake_device.host_syncs()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}: {w.message}" for w in said if "synchronizing CUDA operation" in str(w.message)]


def timed(built: dict[str, Contender], batch: Batch, rounds: int, repeat: int = 4) -> dict[str, Any]:
    """Seconds of a step per round, by the wall clock and by events: the whole step, forward and backward, the rest."""
    kinds = ("wall", "events", "forward and backward", "optimizer")
    samples: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in built} for kind in kinds}
    for turn in range(-1, rounds):
        for name, contender in built.items():
            taken = _round(contender, batch, repeat)
            if turn >= 0:
                for kind, seconds in zip(kinds, taken, strict=True):
                    samples[kind][name].append(seconds)
    return {"seconds": samples}


def _round(contender: Contender, batch: Batch, repeat: int) -> tuple[float, ...]:
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(repeat)]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for start, middle, end in marks:
        start.record()
        contender.step(batch, middle.record)
        end.record()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - begin) / repeat
    first, second = (
        statistics.mean(a.elapsed_time(b) for a, b in pairs) * 1e-3
        for pairs in ([(m[0], m[1]) for m in marks], [(m[1], m[2]) for m in marks])
    )
    return wall, marks[0][0].elapsed_time(marks[-1][2]) * 1e-3 / repeat, first, second


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(built: dict[str, Contender], name: str, batch: Batch) -> int:
    """Bytes allocated at the peak of a step, of all that is on the card."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    built[name].step(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


# ---- activations in host memory --------------------------------------------------------------------------------


def offload(device: torch.device, rounds: int) -> dict[str, Any]:
    """Forward and backward with the first quarter of the blocks' activations in pinned memory, beside plain ones."""
    on_card = device.type == "cuda"
    size = size_for(torch.cuda.mem_get_info(device)[0]) if on_card else Size(4, 64, 2, 4, 64)
    module, batch = module_of(size, device).to(torch.bfloat16), batch_of(size, device)
    resident = size.layers - size.layers // 4

    def step() -> torch.Tensor:
        loss = next_token_loss(module(batch[0]), batch[1])
        loss.backward()
        for p in module.parameters():
            p.grad = None
        return loss.detach()

    found: dict[str, Any] = {"size": str(size), "blocks": [size.layers - resident, size.layers]}
    samples: dict[str, list[float]] = {"offload": [], "plain": []}
    losses = {}
    for _ in range(2):  # both settings twice, so that neither only comes first
        for setting in samples:
            with contextlib.ExitStack() as after:
                if setting == "offload":
                    report = distlib.checkpoint_activations(module, "offload", resident=resident)
                    after.callback(report.remove)
                losses[setting] = [step().item() for _ in range(3)][-1]
                if setting == "offload":
                    found["moved"] = report.moved_bytes
                if on_card:
                    samples[setting] += [_wall(step) for _ in range(rounds)]
                    if setting == "offload":
                        events = gpu_trace.trace(step)
                        try:
                            found["hidden"] = gpu_trace.hidden_share(events)
                        except ValueError as error:  # where a profile sees no GPU; the times are there all the same
                            found["not seen"] = str(error)
    return found | {"losses": losses, "seconds": samples}


def _wall(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


# ---- curves -----------------------------------------------------------------------------------------------------


def curves(device: torch.device) -> dict[str, list[str]]:
    """Losses of the whole batch over some steps, as hexadecimal digits, by setting: the same bits or not."""
    size = SMALL if device.type == "cuda" else TINY
    found = {}
    for precision, compute in (("fp32", None), ("bf16", torch.bfloat16)):
        for prefetch in (0, 2):
            model = Sharded(module_of(size, device), device, compute, prefetch)
            found[f"{precision}, prefetch={prefetch}"] = curve(model, size, device)
        if dist.get_world_size() == 1:
            found[f"{precision}, torch"] = curve(Plain(module_of(size, device), device, compute), size, device)
    return found


def curve(contender: Contender, size: Size, device: torch.device) -> list[str]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with deterministic(device):
        losses = [
            contender.step(batch_of(size, device, step % 2, rank, ranks)) for step in range(length(device, ranks))
        ]
    mine = torch.stack(losses).double().cpu()
    dist.all_reduce(mine)
    return [loss.hex() for loss in (mine / ranks).tolist()]


def length(device: torch.device, ranks: int) -> int:
    """Steps of a curve."""
    blocks = ranks > 1 and os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
    return min(CURVE[device.type], BLOCKED if blocks else CURVE[device.type])


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within it, kernels give the same bits each time. (The parent sets CUBLAS_WORKSPACE_CONFIG.)"""
    torch.use_deterministic_algorithms(device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # would hide reads of what was never written
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def speed(device: torch.device, rounds: int) -> dict[str, Any]:
    """Steps of the large model on several cards, without a contender; each rank has a batch of its own."""
    size = size_for(torch.cuda.mem_get_info(device)[0])
    batch = batch_of(size, device, rank=0)
    model = Sharded(module_of(size, device), device, torch.bfloat16)
    several(model, batch)
    dist.barrier()
    return {"size": str(size)} | timed({OURS: model}, batch, rounds)


# ---- the parts, by name ---------------------------------------------------------------------------------------


def alone(device: torch.device, rounds: int) -> dict[str, Any]:
    """All that one rank does, in one process."""
    return {name: PARTS[name](device, rounds) for name in ("steps", "curves", "offload")}


PARTS: dict[str, Callable[[torch.device, int], dict[str, Any]]] = {
    "alone": alone,
    "steps": steps,
    "curves": lambda device, rounds: curves(device),
    "offload": offload,
    "speed": speed,
}

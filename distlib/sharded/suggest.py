"""The smallest partition group that a model fits into, with the arithmetic."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distlib.memory import PerParameter, formula
from distlib.sharded.groups import partition_of
from distlib.sharded.options import HALF, MixedPrecision
from distlib.sharded.units import divide
from distlib.topology import Topology

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: int | float | str) -> int:
    """Bytes: a number, or text such as "80GiB" or "512 MB". ValueError for anything else."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        number, factor = float(text), 1
    else:
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]?i?)b?\s*", str(text).lower())
        if not found or found[2] not in _UNITS:
            raise ValueError(f"memory={text!r}: give bytes, or text such as '80GiB'")
        number, factor = float(found[1]), _UNITS[found[2]]
    if not 0 < number < math.inf:
        raise ValueError(f"memory={text!r}: must be a positive number of bytes")
    return int(number * factor)


@dataclass(frozen=True)
class Candidate:
    """One partition size: bytes per rank by kind, whether they fit."""

    partition_size: int
    nodes: int  # that a partition group spans, at most
    bytes: dict[str, int]
    fits: bool

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Suggestion:
    """What `suggest_partition` found. Prints as the arithmetic; `int()` of it is the partition size."""

    partition_size: int
    memory: int
    candidates: tuple[Candidate, ...]
    text: str

    def __int__(self) -> int:
        return self.partition_size

    __index__ = __int__

    def __str__(self) -> str:
        return self.text


def suggest_partition(
    model: nn.Module,
    world: Any,
    memory: int | float | str,
    *,
    stage: int = 3,
    mixed_precision: MixedPrecision | None = None,
    optimizer_bytes: int = 8,
    activations: int | float | str | None = None,
    prefetch: int = 2,
    verbose: bool = True,
) -> Suggestion:
    """The smallest partition size p with which the model's training state fits into each rank's memory.

    Small partitions keep traffic near: that is the point of MiCS (arXiv 2205.00119). Pure arithmetic; any rank may
    call it, alone, also with a model on the meta device.

    Args:
        model: the module before wrapping.
        world: the World (`distlib.init()`), or the number of ranks on one host.
        memory: bytes that a rank may use, such as "80GiB".
        stage: 1, 2 or 3.
        mixed_precision: as for ShardedDataParallel.
        optimizer_bytes: per parameter: 8 for AdamW, 4 for SGD with momentum and Lion, 0 for SGD.
        activations: bytes to leave for activations and all else.
        prefetch: units gathered ahead, as for ShardedDataParallel: their buffers count.
        verbose: print the arithmetic on rank 0.

    Raises:
        ValueError: it fits with no partition size; the message holds the arithmetic.
    """
    limit = parse_bytes(memory)
    reserve = parse_bytes(activations) if activations else 0
    if isinstance(world, int):
        size, local, rank, topology = world, world, 0, Topology((tuple(range(world)),))
    else:
        size, rank, topology = world.size, world.rank, world.topology
        local = min(len(node) for node in topology.nodes)
    compute = mixed_precision.param if mixed_precision else None
    trained: dict[torch.dtype, int] = {}
    frozen = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained[parameter.dtype] = trained.get(parameter.dtype, 0) + parameter.numel()
        else:
            frozen += parameter.numel() * (compute or parameter.dtype).itemsize
    sizes = [sum(p.numel() * (compute or p.dtype).itemsize for p in unit.parameters) for unit in divide(model, "auto")]
    blocks = sorted(sizes[1:], reverse=True)
    buffers = sizes[0] + sum(blocks[: 1 + prefetch]) if stage == 3 else 0
    buffers += 2 * max(sizes, default=0)  # gradients on their way
    candidates = []
    for p in (p for p in range(1, size + 1) if size % p == 0):
        parts = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0}
        for dtype, count in trained.items():
            master = torch.float32 if compute is not None and dtype in HALF else dtype
            each = PerParameter.of(master, compute, optimizer_bytes)
            for kind, value in formula(count, each, stage, p, size).items():
                parts[kind] += value
        parts["parameters"] += frozen / (p if stage == 3 else 1)
        whole = {kind: int(value) for kind, value in parts.items()}
        whole["unit buffers"] = buffers if p > 1 else 2 * max(sizes, default=0)
        whole["activations"] = reserve
        spans = max(len({topology.node_of(r) for r in group}) for group in partition_of(topology, p))
        candidates.append(Candidate(p, spans, whole, sum(whole.values()) <= limit))
    text = _say(candidates, limit, sum(trained.values()), stage, local)
    chosen = next((c for c in candidates if c.fits), None)
    if chosen is None:
        raise ValueError(f"the model fits on no partition of {size} ranks with {_gib(limit)} each:\n{text}")
    text += f"\nsmallest that fits: partition_size={chosen.partition_size}"
    if verbose and rank == 0:
        print(text)
    return Suggestion(chosen.partition_size, limit, tuple(candidates), text)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _say(candidates: list[Candidate], limit: int, parameters: int, stage: int, local: int) -> str:
    kinds = list(candidates[0].bytes)
    lines = [
        f"{parameters:,} trained parameters, stage {stage}, {_gib(limit)} per rank, {local} ranks per host",
        "   p | hosts | " + " | ".join(f"{kind:>12}" for kind in kinds) + " |        total | fits",
    ]
    for c in candidates:
        cells = " | ".join(f"{_gib(c.bytes[kind]):>12}" for kind in kinds)
        lines.append(
            f"{c.partition_size:4d} | {c.nodes:5d} | {cells} | {_gib(c.total):>12} | {'yes' if c.fits else 'no'}"
        )
    return "\n".join(lines)

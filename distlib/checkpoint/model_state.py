"""What of a model is saved: its parameters as pieces, its persistent buffers, and which names are tied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from distlib.checkpoint.layout import Piece
from distlib.shards import part_of, shard_of

MODEL = "model."


@dataclass(frozen=True)
class ModelState:
    """pieces: by parameter and buffer, under "model." and the module's name. aliases: other names of what is tied, to
    the one it is stored under. by_id: the piece of each parameter, by the parameter's id(). tensors: (name, shape,
    dtype) of all that the model stores, on this rank or others."""

    pieces: list[Piece]
    aliases: dict[str, str]
    by_id: dict[int, Piece]
    tensors: list[tuple[str, tuple[int, ...], str]]


def model_state(model: nn.Module, rank: int, size: int) -> ModelState:
    """Every parameter and persistent buffer of the model on this rank. Nothing is copied.

    Parameters without a Shard are whole and equal on all ranks, so all ranks may write them. Buffers may differ, as
    the statistics of a batch norm do: rank 0's count. Of a part of a model, all ranks are those that hold the part. A
    tied weight or a buffer that another stage counts is read, never written. ValueError, by name, for parameters that
    another library has divided.
    """
    part = part_of(model)
    ties: dict[str, str] = {}
    elsewhere: set[str] = set()
    if part is not None:
        rank, size, ties = part.replica, part.replicas, part.aliases
        elsewhere |= {MODEL + name for name in part.elsewhere}
    pieces: list[Piece] = []
    aliases: dict[str, str] = {}
    by_id: dict[int, Piece] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = MODEL + ties.get(name, name)
        if id(parameter) in by_id:
            if key != by_id[id(parameter)].name:
                aliases[key] = by_id[id(parameter)].name
            continue
        shard = shard_of(parameter)
        if is_divided(parameter):
            raise ValueError(
                f"'{name}' is divided over ranks by DeepSpeed's stage 3: save with Engine.save, and convert the folder "
                "with distlib.checkpoint.deepspeed.convert_deepspeed"
            )
        if shard is None:
            piece = Piece(key, parameter.shape, 0, parameter.detach(), rank, size)
        else:
            if shard.numel != parameter.numel():
                raise RuntimeError(
                    f"'{name}' has {parameter.numel()} elements on this rank, but its shard says {shard.numel}: the "
                    "parameter was replaced after wrapping"
                )
            replica = (shard.replica, shard.replicas) if shard.counted else (1, 2)
            piece = Piece(key, shard.shape, shard.offset, parameter.detach(), *replica, spread=shard.counted)
        by_id[id(parameter)] = piece
        pieces.append(piece)
    seen: dict[int, str] = {}
    for name, buffer in persistent_buffers(model):
        key = MODEL + ties.get(name, name)
        if id(buffer) in seen:
            if key != seen[id(buffer)]:
                aliases[key] = seen[id(buffer)]
            continue
        seen[id(buffer)] = key
        replica = (1, 2) if key in elsewhere else (rank, size)
        elsewhere.add(key)  # another stage of this rank may have a copy
        pieces.append(Piece(key, buffer.shape, 0, buffer.detach(), *replica, spread=False))
    if part is None:
        return ModelState(pieces, aliases, by_id, [(p.name, tuple(p.shape), str(p.tensor.dtype)) for p in pieces])
    tensors = [(MODEL + name, shape, dtype) for name, shape, dtype in part.tensors]
    return ModelState(pieces, {MODEL + a: MODEL + n for a, n in ties.items()}, by_id, tensors)


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed's stage 3 has made a parameter its own: it is empty, but while it is gathered."""
    return hasattr(parameter, "ds_id")


def replica_of(model: nn.Module, rank: int) -> int:
    """Which copy of the whole model this rank is in: ranks of a pipeline share one, any other rank is one."""
    part = part_of(model)
    return rank if part is None else part.replica


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and buffers that belong into a state dict; one that is shared comes under each of its names, and stages of
    one rank may have copies under one name.

    Raises ValueError for modules with extra state of their own, which no tensor can hold.
    """
    given: set[tuple[str, int]] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"module '{prefix}' ({type(module).__name__}) has extra state (get_extra_state), which checkpoints do "
                "not hold: pass it in extra="
            )
        for key, buffer in module._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if buffer is None or key in module._non_persistent_buffers_set or (name, id(buffer)) in given:
                continue
            given.add((name, id(buffer)))
            yield name, buffer

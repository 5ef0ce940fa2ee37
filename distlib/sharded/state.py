"""Whole parameters for users: full state dicts, a context in which the module holds whole parameters, loading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distlib.sharded.flat import Flat
from distlib.sharded.gather import UnitState
from distlib.sharded.groups import Grid
from distlib.shards import shard_of


@torch.no_grad()
def gather_flat(flat: Flat, grid: Grid) -> torch.Tensor:
    """A flat's parameters, whole, in the optimizer's dtype and where it works: 1-D, of the layout's length. Every rank
    must call."""
    part = flat.master
    if flat.subparts > 1 and grid.replication is not None:
        part = torch.empty(flat.layout.part, dtype=flat.dtype, device=flat.master.device)
        grid.replication.all_gather(part, flat.master)
    whole = torch.empty(flat.layout.numel, dtype=flat.dtype, device=flat.master.device)
    if grid.gather is None:
        return whole.copy_(part)
    grid.gather.all_gather(whole, part.contiguous())
    return whole


def full_state_dict(
    module: nn.Module, states: Sequence[UnitState], grid: Grid, rank0_only: bool
) -> dict[str, torch.Tensor]:
    """Whole parameters and buffers by the module's own names, one flat gathered after the other."""
    whole: dict[str, torch.Tensor] = {}
    aliases: dict[torch.Tensor, list[str]] = {}  # of tied parameters, and of modules registered twice
    for name, piece in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(piece, []).append(name)
    keep = grid.world.rank == 0 or not rank0_only
    for state in states:
        for flat in state.flats:
            gathered = gather_flat(flat, grid)
            if keep:
                for view, piece in zip(flat.view_on(gathered), flat.pieces, strict=True):
                    value = view.to("cpu", copy=True)
                    whole.update(dict.fromkeys(aliases[piece], value))
    if grid.gather is not None:
        grid.gather.barrier()  # a rank that drops the model now must not free memory that another one still reads
    if not keep:
        return {}
    return {
        name: whole[name]
        if name in whole
        else value.detach().to("cpu", copy=True)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in module.state_dict().items()
    }


@contextlib.contextmanager
def summon(states: Sequence[UnitState], grid: Grid, writeback: bool) -> Iterator[None]:
    """The module holds whole parameters, this rank's own copies; `writeback`: changes are kept."""
    flats = [flat for state in states for flat in state.flats]
    wholes = [gather_flat(flat, grid).to(flat.device) for flat in flats]
    for flat, whole in zip(flats, wholes, strict=True):
        flat.show([nn.Parameter(view, requires_grad=flat.trained) for view in flat.view_on(whole)])
    try:
        yield
    finally:
        for flat in flats:
            flat.show_pieces()
        if writeback:
            for flat, whole in zip(flats, wholes, strict=True):
                flat.load(whole)


def cut(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of whole parameters, or of pieces, as one of pieces. Raises ValueError by name for other shapes."""
    pieces = dict(module.named_parameters(remove_duplicate=False))
    found: dict[str, Any] = {}
    for name, value in state_dict.items():
        piece = pieces.get(name)
        shard = None if piece is None else shard_of(piece)
        if piece is None or shard is None or not isinstance(value, torch.Tensor):
            found[name] = value
        elif value.shape == shard.shape:
            flat = value.detach().reshape(-1)[shard.offset : shard.offset + shard.numel]
            found[name] = flat.view(piece.shape)
        elif value.shape == piece.shape:
            found[name] = value
        else:
            raise ValueError(
                f"{name!r}: a tensor of shape {tuple(value.shape)} was given; the parameter has shape "
                f"{tuple(shard.shape)}, this rank's piece of it {tuple(piece.shape)}"
            )
    return found

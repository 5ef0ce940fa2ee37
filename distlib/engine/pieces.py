"""Optimizers that look at the shape of a parameter, which in stages 1 to 3 is that of a piece: it has one dimension."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from distlib.comm.group import Group
from distlib.shards import shard_of


@dataclass
class _Seen:
    """What a rank sees of an optimizer. asks: a group decays. decaying: parameters in such groups. undecayed: name and
    shape of a matrix in a group that does not. cut: of a parameter that Adafactor has a piece of."""

    asks: bool = False
    decaying: int = 0
    undecayed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Warns of a group with weight_decay that is empty on all ranks, where there are matrices in one without: they were
    told apart by p.ndim. A collective of all ranks.

    Raises ValueError, on all ranks, for an Adafactor (torch's, Transformers') on pieces.
    """
    ranks, group = [_seen(optimizer)], Group.of(None)
    if group.size > 1 and not group.counts_only:
        everyone: list[_Seen] = ranks * group.size
        dist.all_gather_object(everyone, ranks[0])
        ranks = everyone
    cut = [name for rank in ranks for name in rank.cut]
    if cut:
        raise ValueError(
            f"Adafactor computes with rows and columns, and a rank has a piece of {cut[0]} only. Take stage=0; or "
            'stage=1 with ownership="whole", and optimizer=lambda p: Adafactor([one for one in p if one.numel()], ...)'
        )
    undecayed = [name for rank in ranks for name in rank.undecayed]
    if undecayed and any(rank.asks for rank in ranks) and not any(rank.decaying for rank in ranks):
        warnings.warn(
            "the optimizer decays nothing: its group with weight_decay has no parameters, and matrices such as "
            f"{undecayed[0]} are in one without. In stages 1 to 3 parameters are pieces with one dimension: do not "
            "group them by p.ndim, but by len((shard_of(p) or p).shape), with shard_of of distlib.shards",
            stacklevel=3,
        )


def _seen(optimizer: torch.optim.Optimizer) -> _Seen:
    seen = _Seen()
    is_adafactor = any(kind.__name__ == "Adafactor" for kind in type(optimizer).__mro__)
    for group in optimizer.param_groups:
        decays = bool(group.get("weight_decay"))
        seen.asks |= decays
        seen.decaying += len(group["params"]) if decays else 0
        for p in group["params"]:
            shard = shard_of(p)
            if shard is None:
                continue
            name = f"{shard.name} {tuple(shard.shape)}"
            if not decays and len(shard.shape) > 1:
                seen.undecayed = [name]
            if is_adafactor and p.shape != shard.shape:
                seen.cut = [name]
    return seen

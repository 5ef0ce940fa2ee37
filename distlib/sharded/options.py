"""What a user chooses, as small values, and which choices do not go together."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MixedPrecision:
    """In which dtypes a sharded model computes, while the optimizer works on fp32 master shards.

    param: of the parameters in forward and backward (and of floating-point inputs, which are cast to it); None: as they
    are. reduce: in which gradients travel in hop 1; they are summed in fp32 whatever it is; None: as `param`.
    torch.float32 is exact and twice the bytes. output: what floating-point outputs of the model are cast to; None: as
    they come. Raises ValueError for what is no floating-point dtype.
    """

    param: torch.dtype | None = None
    reduce: torch.dtype | None = None
    output: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("param", "reduce", "output"):
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ValueError(f"MixedPrecision: {name}={dtype!r} is not a floating-point dtype")


@dataclass(frozen=True)
class Options:
    """The arguments of ShardedDataParallel that say how, not what.

    host: pieces, their gradients and the optimizer's state are in the host's memory, the model on another device.
    """

    stage: int
    mixed_precision: MixedPrecision
    reshard_after_forward: bool | int
    hierarchical: bool | str
    prefetch: int
    offload: Path | None
    shard_optimizer: str
    gather_dtype: torch.dtype | None
    ownership: str
    host: bool = False


def offloaded(offload: str | Path | None, device: torch.device) -> tuple[Path | None, bool]:
    """What `offload` means on a device: the folder of the optimizer's state, and whether the optimizer works in the
    host's memory. ValueError where it cannot take effect."""
    if offload is None:
        return None, False
    if not isinstance(offload, (str, PathLike)):
        raise ValueError(f'offload={offload!r}: must be a folder (a Path), or "cpu" for a model on a GPU')
    on_host = device.type != "cpu"
    if offload == "cpu":
        if not on_host:
            raise ValueError(
                'offload="cpu" moves optimizer state from a GPU to CPU memory, and this model is on the CPU: give a '
                "folder (a Path), or leave it out"
            )
        return None, True
    return Path(offload), on_host


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of a structure (tuples, lists, dicts), in `dtype`; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tree_map_only(torch.Tensor, lambda t: cast(t, dtype), value)


def check(o: Options) -> None:
    """Choices that are unknown, or that cannot take effect together: ValueError, saying what to change."""
    if o.stage not in (1, 2, 3):
        raise ValueError(f"stage={o.stage!r}: must be 1, 2 or 3")
    if not isinstance(o.mixed_precision, MixedPrecision):
        raise ValueError(
            f"mixed_precision={o.mixed_precision!r}: must be a distlib.MixedPrecision, such as "
            "MixedPrecision(param=torch.bfloat16)"
        )
    if o.hierarchical not in (True, False, "auto"):
        raise ValueError(f'hierarchical={o.hierarchical!r}: must be True, False or "auto"')
    if isinstance(o.prefetch, bool) or not isinstance(o.prefetch, int) or o.prefetch < 0:
        raise ValueError(f"prefetch={o.prefetch!r}: must be a number of units, 0 or more")
    if o.shard_optimizer not in ("partition", "world"):
        raise ValueError(f'shard_optimizer={o.shard_optimizer!r}: must be "partition" or "world"')
    if o.ownership not in ("flat", "whole"):
        raise ValueError(f'ownership={o.ownership!r}: must be "flat" or "whole"')
    if o.gather_dtype not in (None, torch.int8):
        raise ValueError(f"gather_dtype={o.gather_dtype!r}: must be None or torch.int8")
    for wrong, why in _TABLE:
        if wrong(o):
            raise ValueError(why)


# Pairs that are not supported, each with the reason: what cannot take effect is refused, never ignored.
_TABLE = (
    (
        lambda o: o.ownership == "whole" and o.stage != 1,
        'ownership="whole" needs stage=1: in stages 2 and 3 gradients and parameters are cut to equal shards',
    ),
    (
        lambda o: o.ownership == "whole" and o.shard_optimizer == "world",
        'ownership="whole" cannot be combined with shard_optimizer="world", which cuts every shard again',
    ),
    (
        lambda o: o.stage != 3 and o.reshard_after_forward is not True,
        "reshard_after_forward says what stage 3 does after a forward; stages 1 and 2 keep whole parameters",
    ),
    (
        lambda o: o.gather_dtype is not None and o.stage != 3,
        "gather_dtype is for the gathers of stage 3; stages 1 and 2 gather once per optimizer step",
    ),
)

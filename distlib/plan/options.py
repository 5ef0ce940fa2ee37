"""A plan's settings as the arguments of what honours them: one function per wrapper, nothing left over.

`tests/test_plan.py` changes each setting and looks for the change here, so that no setting is inert.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distlib.plan.checked import nearest

if TYPE_CHECKING:
    from distlib.plan.mesh import Place
    from distlib.plan.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def data_parallel(plan: Plan) -> dict[str, Any]:
    """For `DataParallel`: stage 0."""
    reduce = plan.precision.reduce
    return {
        "bucket_mb": plan.bucket_mb,
        "find_unused_parameters": plan.find_unused_parameters,
        "gradient_dtype": DTYPES[reduce] if reduce not in (None, "fp32") else None,
    }


def sharded(plan: Plan, module: nn.Module, whole: nn.Module | None = None) -> dict[str, Any]:
    """For `ShardedDataParallel(module, ...)`: stages 1 to 3.

    whole: the model that `module` is a part of: `units` must be in it, and those that the part lacks are left out.
    """
    from distlib.sharded.options import MixedPrecision

    kind = plan.precision
    mixed = MixedPrecision(
        DTYPES[kind.dtype] if kind.dtype != "fp32" else None,
        DTYPES[kind.reduce] if kind.reduce is not None else None,
        DTYPES[kind.output] if kind.output is not None else None,
    )
    return {
        "stage": plan.stage,
        "partition_size": plan.partition_size,
        "units": classes("units", plan.units, module, whole),
        "mixed_precision": mixed,
        "reshard_after_forward": plan.reshard_after_forward,
        "hierarchical": plan.hierarchical,
        "prefetch": plan.prefetch,
        "offload": plan.offload,
        "shard_optimizer": plan.shard_optimizer,
        "gather_dtype": torch.int8 if plan.gather_dtype == "int8" else None,
        "ownership": plan.ownership,
    }


def pipeline(plan: Plan) -> dict[str, Any]:
    """For `PipelineParallel`: pipeline=2 or more."""
    computes_apart = plan.stage > 0 and plan.precision.dtype != "fp32"
    return {
        "stages": plan.stages,
        "schedule": plan.schedule,
        "microbatches": plan.microbatches,
        "split": plan.split if isinstance(plan.split, str) else list(plan.split),
        "costs": plan.costs,
        "limit": plan.limit,
        "timeout": timeout(plan),
        "shape_header": plan.shape_header,
        "compute_dtype": DTYPES[plan.precision.dtype] if computes_apart else None,
    }


def activations(plan: Plan, module: nn.Module, whole: nn.Module | None = None) -> dict[str, Any] | None:
    """For `checkpoint_activations(module, ...)`; None: everything is kept. A budget needs example_inputs besides.

    whole: the model that `module` is a part of, as for `sharded`.
    """
    kept = plan.activations
    if kept.policy is None and kept.budget is None:
        return None
    return {
        "policy": kept.policy or "full",  # what it must be beside a budget
        "budget": kept.budget,
        "blocks": classes("activations.blocks", kept.blocks, module, whole),
        "folder": kept.folder,
        "resident": kept.resident,
        "window": kept.window,
    }


def autocast(plan: Plan) -> torch.dtype | None:
    """The dtype of torch.autocast around forward and loss; None: none. Stages 1 to 3 have compute copies instead."""
    return DTYPES[plan.precision.dtype] if plan.stage == 0 and plan.precision.dtype != "fp32" else None


def scaler(plan: Plan) -> dict[str, Any] | None:
    """For `distlib.optim.GradScaler`; None: losses are not scaled."""
    if plan.precision.dtype != "fp16":
        return None
    return {"init_scale": plan.precision.init_scale, "growth_interval": plan.precision.growth_interval}


def timeout(plan: Plan) -> timedelta | None:
    """For groups made for the plan; None: the world's."""
    return None if plan.timeout is None else timedelta(seconds=plan.timeout)


def seed(plan: Plan, place: Place) -> int | None:
    """What torch's generators start from on a rank: alike along a pipeline, different for different data."""
    return None if plan.seed is None else plan.seed + place.data_parallel.index(place.rank)


def classes(
    what: str, names: str | Sequence[str], module: nn.Module, whole: nn.Module | None = None
) -> str | list[type[nn.Module]]:
    """The classes of modules that `names` mean: "Block", or with its Python module where that is not enough.

    Raises ValueError for a name that no module of `whole` (default: `module`) has, or that two classes share.
    """
    if isinstance(names, str):
        return names
    found: list[type[nn.Module]] = []
    everywhere = dict.fromkeys(type(part) for part in (module if whole is None else whole).modules())
    here = {type(part) for part in module.modules()}
    for name in names:
        fitting = [kind for kind in everywhere if name in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")]
        if not fitting:
            raise ValueError(
                f"{what}={list(names)}: no module is a {name!r}{nearest(name, [k.__name__ for k in everywhere])}"
            )
        if len(fitting) > 1:
            full = [f"{kind.__module__}.{kind.__qualname__}" for kind in fitting]
            raise ValueError(f"{what}={list(names)}: {name!r} may be any of {full}; give one of these")
        found += [kind for kind in fitting if kind in here]
    return found

"""Settings that do not go together: one table. `Plan` refuses what is in it; docs/plan.md prints it.

A row reads: where `holds`, the `settings` must be left at their defaults, because `why`; `fix` says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distlib.plan.plan import Plan


@dataclass(frozen=True)
class Refusal:
    """One row. where: `holds` in words. settings: names, dotted in nested values; refused if not at their defaults."""

    where: str
    holds: Callable[[Plan], bool]
    settings: tuple[str, ...]
    why: str
    fix: str


def contradictions(plan: Plan) -> list[str]:
    """What `plan` sets against the table, in words; empty for a sound plan."""
    found = []
    for row in TABLE:
        if row.holds(plan):
            wrong = [name for name in row.settings if value_of(plan, name) != _default(plan, name)]
            found += [f"{name}={value_of(plan, name)!r} with {row.where}: {row.why}. {row.fix}" for name in wrong]
    return found


def markdown() -> str:
    """The table for docs/plan.md."""
    lines = ["| with | is refused | because | instead |", "|---|---|---|---|"]
    for row in TABLE:
        names = ", ".join(f"`{name}`" for name in row.settings)
        lines.append(f"| {row.where.replace('|', '/')} | {names} | {row.why} | {row.fix} |")
    return "\n".join(lines) + "\n"


def value_of(plan: Any, name: str) -> Any:
    """The value of a setting, dotted in nested values."""
    for part in name.split("."):
        plan = getattr(plan, part)
    return plan


def _default(plan: Any, name: str) -> Any:
    first, _, rest = name.partition(".")
    default = type(plan).model_fields[first].default
    return value_of(default, rest) if rest else default


_SHARDED = (
    "partition_size",
    "units",
    "reshard_after_forward",
    "hierarchical",
    "prefetch",
    "shard_optimizer",
    "gather_dtype",
    "ownership",
    "offload",
)

TABLE = (
    Refusal(
        "pipeline=1",
        lambda p: p.pipeline == 1,
        ("schedule", "virtual", "split", "costs", "limit", "shape_header"),
        "there are no stages of a pipeline",
        "Give pipeline=2 or more, or leave it out",
    ),
    Refusal(
        "pipeline=1",
        lambda p: p.pipeline == 1,
        ("timeout",),
        "the group of all ranks has the timeout that distlib.init() gave it",
        "Pass timeout= to distlib.init()",
    ),
    Refusal(
        'a schedule other than "interleaved"',
        lambda p: p.schedule != "interleaved" and p.pipeline > 1,
        ("virtual",),
        'the schedule has a fixed number of stages per rank: "zb-v" two, the others one',
        'Leave it out, or take schedule="interleaved"',
    ),
    Refusal(
        'a schedule other than "auto"',
        lambda p: p.schedule != "auto" and p.pipeline > 1,
        ("limit",),
        "the schedule is fixed, and so are the activations that it holds",
        'Leave it out, or take schedule="auto"',
    ),
    Refusal(
        "split= names",
        lambda p: p.split != "auto" and p.pipeline > 1,
        ("costs",),
        "the cut is given, so no costs are looked at",
        "Leave one of them out",
    ),
    Refusal(
        "pipeline=2 or more",
        lambda p: p.pipeline > 1,
        ("precision.output",),
        "it would cast what goes from stage to stage as well",
        "Cast in loss_fn",
    ),
    Refusal(
        "pipeline=2 or more",
        lambda p: p.pipeline > 1,
        ("reshard_after_forward",),
        "the schedule's table says when a stage is whole",
        "Leave it out",
    ),
    Refusal(
        "stage=0",
        lambda p: p.stage == 0,
        _SHARDED,
        "every rank holds all of the model: nothing is divided, gathered or kept elsewhere",
        "Give stage=1, 2 or 3, or leave it out",
    ),
    Refusal(
        "stage=0",
        lambda p: p.stage == 0,
        ("precision.output",),
        "torch.autocast chooses the dtype of each result, the last one too",
        "Cast in loss_fn, or give stage=1 with partition_size=1",
    ),
    Refusal(
        "stage=1, 2 or 3",
        lambda p: p.stage > 0,
        ("bucket_mb", "find_unused_parameters"),
        "gradients travel by units, and parameters without a gradient are always allowed",
        "Leave it out",
    ),
    Refusal(
        "stage=1 or 2",
        lambda p: p.stage in (1, 2),
        ("reshard_after_forward", "gather_dtype"),
        "parameters stay whole, and are gathered once per optimizer step",
        "Give stage=3, or leave it out",
    ),
    Refusal(
        "stage=2 or 3",
        lambda p: p.stage in (2, 3),
        ("ownership",),
        "gradients and parameters are cut to equal pieces",
        "Give stage=1, or leave it out",
    ),
    Refusal(
        'ownership="whole"',
        lambda p: p.ownership == "whole",
        ("shard_optimizer",),
        "it would cut whole parameters again",
        "Leave one of them out",
    ),
    Refusal(
        'precision "fp32" or "bf16"',
        lambda p: p.precision.dtype != "fp16",
        ("precision.init_scale", "precision.growth_interval"),
        "only fp16 scales its loss",
        'Give dtype="fp16", or leave it out',
    ),
    Refusal(
        "activations.budget",
        lambda p: p.activations.budget is not None,
        ("activations.policy", "activations.resident"),
        "a budget chooses for each block",
        "Leave one of them out",
    ),
    Refusal(
        "activations.budget in a pipeline",
        lambda p: p.activations.budget is not None and p.pipeline > 1,
        ("activations.folder",),
        "tensors on their way to files and back take memory that depends on which micro-batches meet",
        'Leave it out, or give policy="offload" instead of a budget',
    ),
    Refusal(
        "neither activations.policy nor activations.budget",
        lambda p: p.activations.policy is None and p.activations.budget is None,
        ("activations.blocks", "activations.folder", "activations.resident", "activations.window"),
        "all activations are kept",
        "Give a policy or a budget, or leave it out",
    ),
    Refusal(
        'activations "full" or "selective"',
        lambda p: p.activations.policy in ("full", "selective"),
        ("activations.folder", "activations.resident", "activations.window"),
        "nothing is moved",
        'Give policy="offload", or leave it out',
    ),
    Refusal(
        "activations.budget without activations.folder",
        lambda p: p.activations.budget is not None and p.activations.folder is None,
        ("activations.window",),
        "a budget moves tensors only into a folder",
        "Give a folder, or leave it out",
    ),
    Refusal(
        'engine="deepspeed"',
        lambda p: p.engine == "deepspeed",
        (
            "pipeline",
            "partition_size",
            "units",
            "reshard_after_forward",
            "hierarchical",
            "prefetch",
            "shard_optimizer",
            "gather_dtype",
            "ownership",
            "bucket_mb",
            "find_unused_parameters",
            "precision.output",
            "timeout",
        ),
        "DeepSpeed has no such setting, or one of another meaning",
        'Leave it out, or take engine="distlib"',
    ),
)

"""A DeepSpeed configuration read as a `Plan`: every key is honoured, not needed, yours to do, or cannot be honoured.

    ds_config.json -> deepspeed_keys.KEYS, key by key -> Plan + a note on each key       read_deepspeed
    Plan -> ds_config                                                                     write_deepspeed

DeepSpeed is not imported. Its own reader ignores unknown top-level keys; this one names them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlib.integrations.deepspeed_keys import CONFIGURATION
from distlib.integrations.deepspeed_rules import Draft, Note, walk
from distlib.plan import files
from distlib.plan.plan import Plan

_ORDER = {
    "cannot": "cannot be honoured",
    "yours": "yours to do",
    "honoured": "honoured",
    "unneeded": "not needed",
}


@dataclass(frozen=True)
class Reading:
    """What a DeepSpeed configuration says. Prints as the report.

    notes: one for each key, in the order of the configuration, and for each default of DeepSpeed that is not ours.
    optimizer, scheduler: (type, its parameters) that it names, to be made by the caller, who passes parallelize() an
    optimizer; "auto" parameters are left out.
    """

    plan: Plan
    notes: tuple[Note, ...]
    optimizer: tuple[str, dict[str, Any]] | None = None
    scheduler: tuple[str, dict[str, Any]] | None = None

    def of(self, verdict: str) -> tuple[Note, ...]:
        """The notes with one verdict: "honoured", "unneeded", "yours", "cannot"."""
        return tuple(note for note in self.notes if note.verdict == verdict)

    def complain(self, strict: bool) -> None:
        """Warns once of what is left to do and what cannot be honoured; strict: ValueError if anything cannot."""
        cannot = self.of("cannot")
        if cannot and strict:
            raise ValueError("DeepSpeed configuration:" + "".join(f"\n  {note}" for note in cannot))
        left = [*cannot, *self.of("yours")]
        if left:
            warnings.warn("DeepSpeed configuration:" + "".join(f"\n  {note}" for note in left), stacklevel=3)

    def __str__(self) -> str:
        lines = [str(self.plan), "DeepSpeed configuration"]
        for verdict, title in _ORDER.items():
            notes = self.of(verdict)
            if notes:
                lines += [f"  {title}", *(f"    {note.key}={note.value!r}: {note.text}" for note in notes)]
        return "\n".join(lines)


def read_deepspeed(
    config: Mapping[str, Any] | str | Path, *, world_size: int | None = None, **settings: Any
) -> Reading:
    """The plan of a DeepSpeed configuration, with a note on each of its keys. Pure: no ranks, no DeepSpeed.

    Args:
        config: a mapping, or the path of a JSON file.
        world_size: data-parallel ranks, where the accumulation follows from train_batch_size.
        settings: of the Plan; they go over what the configuration says, and stand in for what is "auto" there.

    Raises:
        ValueError: a file that is no JSON; a value that DeepSpeed would not take, with its key; settings that do not go
            together, as of Plan.
    """
    if world_size is not None and (type(world_size) is not int or world_size < 1):
        raise ValueError(f"world_size={world_size!r}: must be a number of ranks, 1 or more")
    if isinstance(config, (str, Path)):
        try:
            config = files.read_json(Path(config).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"a DeepSpeed configuration is a mapping, not {type(config).__name__}")
    draft = Draft(config, settings, world_size)
    notes = walk(config, CONFIGURATION, draft)
    try:
        plan = draft.plan()
    except ValueError as error:
        raise ValueError(
            f"DeepSpeed configuration, as a plan: {error}\nGive other settings beside the configuration"
        ) from None
    return Reading(plan, tuple(notes), draft.optimizer, draft.scheduler)


def write_deepspeed(plan: Plan, rows: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a plan with engine="deepspeed", so that no default of DeepSpeed's changes it. What
    it has no key for is the caller's: the seed, and activations, which `checkpoint_activations` applies to the module
    before.

    rows: of one micro-batch on one rank.

    Raises ValueError for another engine, and for an init_scale that is no power of two.
    """
    if plan.engine != "deepspeed":
        raise ValueError(f'engine={plan.engine!r}: a DeepSpeed configuration is for engine="deepspeed"')
    zero: dict[str, Any] = {"stage": plan.stage}
    if plan.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    elif plan.offload is not None:
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": plan.offload}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": plan.microbatches,
        "gradient_clipping": plan.clip or 0.0,  # DeepSpeed's default is not none
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    kind = plan.precision
    if kind.dtype != "fp32" and plan.stage == 0:
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[kind.dtype]}
    elif kind.dtype == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    elif kind.dtype == "fp16":
        power = math.frexp(kind.init_scale)[1] - 1
        if kind.init_scale != 2.0**power or power < 0:
            raise ValueError(f"precision.init_scale={kind.init_scale}: DeepSpeed takes a power of two, 1 or more")
        scale = {"initial_scale_power": power, "loss_scale_window": kind.growth_interval, "hysteresis": 1}
        config["fp16"] = {"enabled": True, "loss_scale": 0, **scale}
    if kind.reduce is not None:
        config["communication_data_type"] = kind.reduce
    return config

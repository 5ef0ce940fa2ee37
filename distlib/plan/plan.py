"""`Plan`: what a run is, as data. Two plans that are equal train alike; a plan goes to a file and back unchanged.

A plan holds choices, no objects: nothing here starts a process, asks for a device, or needs a module. `refusals` has
what does not go together, `world` what only the ranks can tell, `options` what each wrapper is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from distlib.plan import files
from distlib.plan.checked import Checked, SettingsError, nearest, setting

if TYPE_CHECKING:
    from distlib.memory import PerParameter
    from distlib.plan.expected import Expected, PerStage
    from distlib.plan.mesh import World

Dtype = Literal["fp32", "bf16", "fp16"]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(lambda v: tuple(v) if type(v) is list else v)]
Folder = Annotated[str, Field(min_length=1), BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v)]
_DTYPE = 'one of "fp32", "bf16", "fp16"'
_CLASSES = '"auto" or a list of names of module classes'


class Precision(Checked):
    """In which dtypes a model computes. As text, the first of these: precision="bf16"."""

    dtype: Dtype = setting(
        "fp32",
        _DTYPE,
        "of forward and backward. Stages 1 to 3: parameters, inputs and all operations, beside fp32 masters. Stage 0: "
        "fp32 parameters under torch.autocast, which chooses by operation",
    )
    reduce: Dtype | None = setting(
        None,
        _DTYPE + ", or None",
        "in which gradients travel, summed in fp32. None: stages 1 to 3 as dtype, stage 0 fp32",
    )
    output: Dtype | None = setting(
        None, _DTYPE + ", or None", "what the model's outputs are cast to; None: as they come"
    )
    init_scale: float = setting(
        65536.0, "a number above 0, at most 2.0**127", "fp16: the loss scale to begin with", gt=0, le=2.0**127
    )
    growth_interval: Count = setting(2000, "a number of steps", "fp16: steps without overflow until the scale doubles")


class Activations(Checked):
    """What blocks keep for backward. As text, the policy: activations="selective"."""

    policy: Literal["full", "selective", "offload"] | None = setting(
        None, 'one of "full", "selective", "offload", or None', "of all repeated blocks; None: keep everything"
    )
    budget: Annotated[int, Field(gt=0)] | Annotated[float, Field(ge=0, le=1)] | str | None = setting(
        None,
        'bytes (an int, or text such as "2GiB") or a part from 0.0 to 1.0',
        "peak bytes of a step on a rank beside parameters, gradients and optimizer state: the fastest choices that fit",
    )
    blocks: Literal["auto"] | Names = setting("auto", _CLASSES, "which blocks")
    folder: Folder | None = setting(None, "a folder on a disk, or None", "where tensors of CPU ranks are offloaded to")
    resident: Annotated[int, Field(ge=0)] | None = setting(
        None, "a number of blocks, or None", "offload: so many last blocks keep their tensors; None: 1, in a pipeline 0"
    )
    window: Count | str | None = setting(
        None,
        'bytes (an int, or text such as "64MiB"), or None',
        "offload: bytes on their way; None: the largest block's",
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _is_not_none_at_all(cls, value: Any) -> Any:
        if type(value) is int and value == 0:  # else it would count as the part 0.0
            raise ValueError("must be bytes above 0, or the part 0.0: the least memory that is possible")
        return value

    @field_validator("budget", "window", mode="after")
    @classmethod
    def _is_size(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str):
            from distlib.activations.size import parse_size

            try:
                parse_size(info.field_name, value)
            except ValueError:
                raise ValueError('must be bytes, such as "512MiB" or "2GiB"') from None
        return value


def _short(kind: type[Checked], first: str) -> BeforeValidator:
    """Text stands for its first setting, a mapping for all of them."""

    def made(value: Any) -> Any:
        if isinstance(value, kind) or not isinstance(value, (str, Mapping)):
            return value
        if isinstance(value, Mapping) and (nameless := [key for key in value if not isinstance(key, str)]):
            raise SettingsError(
                kind.__name__,
                [f"{k}={value[k]!r}: unknown key{nearest(str(k), kind.model_fields)}" for k in nameless],
            )
        return kind(**({first: value} if isinstance(value, str) else value))

    return BeforeValidator(made)


def _activations(value: Any) -> Any:
    return Activations() if value is None else value


class Plan(Checked):
    """What a run is: how a model is divided over ranks, how it computes, and what it keeps.

    Give settings by keyword, or a file: `Plan.from_file("plan.yaml")`. It cannot be changed; `replace(stage=2)` makes
    another. docs/plan.md lists every setting with its default, and what cannot be combined.

    Raises ValueError with every problem found: key, value, and what would be right; an unknown key with the nearest.
    """

    pipeline: Count = setting(1, "a number of ranks, 1 or more", "ranks of one pipeline; 1: no pipeline")
    virtual: Count | None = setting(
        None,
        "a number of stages, or None",
        "stages per rank of the pipeline; None: as the schedule has, 2 if interleaved",
    )
    schedule: str = setting("1f1b", "the name of a schedule", "of the pipeline: a name in distlib.pipeline.NAMES")
    microbatches: Count = setting(
        1, "a number of micro-batches, 1 or more", "parts of a rank's batch per step; without a pipeline, accumulated"
    )
    split: Literal["auto"] | Names = setting(
        "auto", '"auto" or a list of names of modules', 'where stages begin; "auto": the slowest is as fast as can be'
    )
    costs: Literal["measured", "estimated"] = setting(
        "measured",
        '"measured" or "estimated"',
        'for split="auto": one rank runs each kind of module, or counts operations',
    )
    limit: float | None = setting(
        None,
        "a number of micro-batches, 1 or more, or None",
        'for schedule="auto": most micro-batches whose activations a rank holds; None: 2 pipeline',
        ge=1,
        allow_inf_nan=False,
    )

    shape_header: bool = setting(
        False,
        "True or False",
        "of a pipeline: only the rank of the first stage is given the batch, and tells the others its shapes",
    )

    stage: int = setting(
        0,
        "0 (replicated), 1, 2 or 3",
        "what ranks divide: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too (ZeRO)",
        ge=0,
        le=3,
    )
    partition_size: Count | Literal["node"] | None = setting(
        None,
        'a number of ranks, "node", or None',
        'ranks that divide one copy (MiCS); "node": those of a host; None: all of a pipeline stage',
    )
    units: Literal["auto"] | Names = setting("auto", _CLASSES, "what is gathered and reduced as one")
    reshard_after_forward: bool | Annotated[int, Field(ge=2)] = setting(
        True,
        "True, False, or a number of ranks, 2 or more",
        "stage 3: free whole parameters after forward, keep them, or keep them among so many ranks (hpZ)",
    )
    hierarchical: bool | Literal["auto"] = setting(
        "auto", 'True, False or "auto"', "gather and reduce in two levels where a partition group spans hosts"
    )
    prefetch: Annotated[int, Field(ge=0)] = setting(2, "a number of units, 0 or more", "units gathered ahead of use")
    shard_optimizer: Literal["partition", "world"] = setting(
        "partition", '"partition" or "world"', "ranks that divide the optimizer's state: of a copy, or of all copies"
    )
    gather_dtype: Literal["int8"] | None = setting(
        None, '"int8" or None', "stage 3: gather block-quantized parameters (qwZ), lossy; None: as they are"
    )
    ownership: Literal["flat", "whole"] = setting(
        "flat", '"flat" or "whole"', "stage 1: pieces of equal size, or whole parameters, for optimizers such as Muon"
    )
    offload: Folder | None = setting(
        None, '"cpu", a folder, or None', "where the optimizer's state lies; a folder: in files, by distlib.optim"
    )
    bucket_mb: float = setting(
        25.0, "a number of MiB above 0", "stage 0: the largest bucket of gradients", gt=0, allow_inf_nan=False
    )
    find_unused_parameters: bool = setting(False, "True or False", "stage 0: allow parameters without a gradient")

    activations: Annotated[Activations, _short(Activations, "policy"), BeforeValidator(_activations)] = setting(
        Activations(),
        'None, "full", "selective", "offload", or a mapping such as {"budget": "2GiB"}',
        "what blocks keep for backward; None: everything",
    )
    precision: Annotated[Precision, _short(Precision, "dtype")] = setting(
        Precision(), _DTYPE + ', or a mapping such as {"dtype": "bf16", "reduce": "fp32"}', "dtypes of computing"
    )
    clip: float | None = setting(
        None,
        "a number above 0, or None",
        "most norm of all gradients together; None: not clipped",
        gt=0,
        allow_inf_nan=False,
    )

    timeout: float | None = setting(
        None,
        "seconds above 0, or None",
        "seconds for each message and collective of a pipeline; None: as init()",
        gt=0,
        allow_inf_nan=False,
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = setting(
        None,
        "a whole number from 0, or None",
        "of random numbers: replicas get different ones; None: torch's as they are",
    )
    engine: Literal["distlib", "deepspeed"] = setting("distlib", '"distlib" or "deepspeed"', "what runs the plan")

    @field_validator("schedule", mode="after")
    @classmethod
    def _is_schedule(cls, value: str) -> str:
        from distlib.pipeline.schedules import NAMES

        if value not in NAMES:
            raise ValueError(f"there is no such schedule{nearest(value.lower().replace('_', '-'), NAMES)}")
        return value

    def contradictions(self) -> list[str]:
        from distlib.plan.refusals import contradictions

        return contradictions(self)

    # ------------------------------------------------------------ derived

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages that each rank holds."""
        return self.virtual or (2 if self.schedule in ("interleaved", "zb-v") and self.pipeline > 1 else 1)

    @property
    def stages(self) -> int:
        """Pipeline stages of the model."""
        return self.pipeline * self.stages_per_rank

    def check(self, world: World) -> None:
        """Raises one ValueError for all that these ranks cannot do. Pure: any rank may call it, alone.

        world: the World of `distlib.init()`; or a Topology, or a number of ranks on one host: then nothing is known of
        devices, and what depends on them is not checked.
        """
        from distlib.plan.world import check

        check(self, world)

    def expected(
        self,
        parameters: PerStage,
        world: World,
        *,
        activations: PerStage = 0,
        messages: PerStage = 0,
        each: PerParameter | None = None,
        optimizer_bytes: int = 8,
        shared: bool = False,
    ) -> Expected:
        """Bytes of memory and bytes on the wire by the published formulas; see `distlib.plan.expected.expected`."""
        from distlib.plan.expected import expected

        return expected(
            self,
            parameters,
            world,
            activations=activations,
            messages=messages,
            each=each,
            optimizer_bytes=optimizer_bytes,
            shared=shared,
        )

    # ------------------------------------------------------------ files

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """The plan in a .yaml, .yml or .json file. ValueError as of Plan, naming the file."""
        try:
            return cls(**files.read(Path(path)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_deepspeed(
        cls,
        config: Mapping[str, Any] | str | Path,
        *,
        strict: bool = False,
        world_size: int | None = None,
        **settings: Any,
    ) -> Plan:
        """The plan of a DeepSpeed configuration, a mapping or a JSON file. Warns of what is left to do, and cannot be.

        `distlib.integrations.deepspeed_config.read_deepspeed` returns the report as well.

        Args:
            strict: raise instead, if a key cannot be honoured.
            world_size: data-parallel ranks, if the configuration gives train_batch_size without the accumulation.
            settings: of the plan, over those of the configuration; needed for keys that are "auto".

        Raises:
            ValueError: strict; a value that DeepSpeed would not take; or settings that do not go together.
        """
        from distlib.integrations.deepspeed_config import read_deepspeed

        reading = read_deepspeed(config, world_size=world_size, **settings)
        reading.complain(strict)
        return reading.plan

    def to_dict(self, defaults: bool = True) -> dict[str, Any]:
        """Plain values: Plan(**plan.to_dict()) == plan. defaults=False: only what differs from the defaults."""
        names = type(self).model_fields if defaults else self.changed()
        return {name: _plain(getattr(self, name)) for name in names}

    def to_yaml(self, defaults: bool = True) -> str:
        """The text of a file that `from_file` reads."""
        return files.to_yaml(self.to_dict(defaults))

    def __str__(self) -> str:
        shown = self.to_dict(defaults=False)
        if not shown:
            return "Plan: all settings at their defaults"
        width = max(map(len, shown))
        lines = (f"  {name:{width}}  {_show(value)}" for name, value in shown.items())
        return "\n".join(["Plan", *lines, "  all else at its default"])


def _plain(value: Any) -> Any:
    if isinstance(value, (Precision, Activations)):
        changed = {name: _plain(v) for name, v in value.changed().items()}
        first = next(iter(type(value).model_fields))
        if changed.keys() <= {first}:
            return getattr(value, first)
        return changed
    return list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(v)}" for key, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

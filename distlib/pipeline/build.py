"""From a divided model to what this rank runs: its stages' modules, their schedule, and the weights they share."""

from __future__ import annotations

import copy
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from distlib import reach
from distlib.comm.group import Group
from distlib.data_parallel.agreement import require_equal
from distlib.initialise import Init, initialise, require_init, unset
from distlib.pipeline.actions import Kind, Schedule, ScheduleError
from distlib.pipeline.division import Division
from distlib.pipeline.ghost import places
from distlib.pipeline.micro_batches import MicroBatch, divide, moved, rows_of
from distlib.pipeline.passes import fuse
from distlib.pipeline.schedules import NAMES, generate
from distlib.pipeline.simulate import Costs
from distlib.pipeline.split_backward import Report, prepare
from distlib.pipeline.stages import Part, StageModule, cut, edges
from distlib.pipeline.ties import Tie
from distlib.shards import PartOfModel, Shard, mark, shard_of
from distlib.world import before_shutdown

_CPU = torch.device("cpu")

# ---------------------------------------------------------------- arguments


def check(module: Any, schedule: Any, microbatches: Any, loss_fn: Any, timeout: Any) -> None:
    """What a Plan would say of them."""
    if module is not None and not isinstance(module, nn.Module):
        raise ValueError(
            f"module is {type(module).__name__}: give the model, or module=None and the stages as split=[module, ...]"
        )
    if not isinstance(schedule, str | Schedule):
        raise ValueError(f"schedule={schedule!r}: give one of {', '.join(NAMES)}, or a Schedule")
    if not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 1:
        raise ValueError(f"microbatches={microbatches!r}: must be a whole number, 1 or more")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn={loss_fn!r}: must be a function (output, target) -> scalar, or None")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if timeout is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0):
        raise ValueError(f"timeout={timeout!r}: must be seconds above 0, a timedelta, or None for the group's")


def require_alike(group: Group, **options: Any) -> None:
    """Raises RuntimeError on all ranks, naming the options that differ between them. A collective."""

    def told(value: Any) -> str:
        if isinstance(value, Schedule):
            return f"{value.name!r} (checksum of its actions {zlib.crc32(str(value).encode()):08x})"
        if isinstance(value, list | tuple) and value and isinstance(value[0], str | nn.Module):
            return repr([part if isinstance(part, str) else type(part).__name__ for part in value])
        return repr(value) if value is None or isinstance(value, str | int | float | torch.dtype) else "given"

    require_equal(group, "PipelineParallel: its options", [(k, told(v)) for k, v in options.items()], _CPU)


def stages_of(schedule: str | Schedule, stages: int | None, ranks: int) -> int:
    """How many stages; checks that ranks and schedule can have them."""
    if isinstance(schedule, Schedule):
        if schedule.ranks != ranks or stages not in (None, schedule.stages):
            raise ValueError(
                f"schedule {schedule.name!r} is of {schedule.stages} stages on {schedule.ranks} ranks; there are "
                f"{ranks} ranks" + ("" if stages is None else f", and stages={stages}")
            )
        return schedule.stages
    each = 2 if schedule in ("interleaved", "zb-v") else 1
    if stages is None:
        return ranks * each
    if stages % ranks or (schedule != "interleaved" and stages != ranks * each):
        wants = f"a multiple of {ranks}" if schedule == "interleaved" else str(ranks * each)
        hint = ": schedule='interleaved' gives ranks several" if stages % ranks == 0 else ""
        raise ValueError(f"stages={stages}: schedule {schedule!r} on {ranks} ranks has {wants} stages{hint}")
    return stages


def make_schedule(
    schedule: str | Schedule, stages: int, ranks: int, micro_batches: int, costs: Costs | None, limit: float | None
) -> Schedule:
    """The table of computations."""
    if isinstance(schedule, Schedule):
        if schedule.has_messages or schedule.micro_batches != micro_batches:
            raise ScheduleError(
                f"schedule {schedule.name!r} has {schedule.micro_batches} micro-batches"
                f"{' and messages' if schedule.has_messages else ''}: give one of compute actions with "
                f"microbatches={micro_batches}"
            )
        return schedule
    if schedule == "auto":
        return generate("auto", ranks, micro_batches, costs=costs, limit=limit)
    virtual = stages // ranks if schedule in ("interleaved", "zb-v") else None
    return generate(schedule, ranks, micro_batches, virtual=virtual)


def example_of(inputs: Any, micro_batches: int, target: Any = None, device: torch.device = _CPU) -> MicroBatch | None:
    """The first micro-batch of an example, where the model computes; all of it, where it has fewer rows."""
    if inputs is None:
        return None
    rows = rows_of(inputs)
    return moved(divide(inputs, target, micro_batches if rows >= micro_batches else 1)[:1], device)[0]


def device_for(module: nn.Module, asked: torch.device | str | None) -> torch.device:
    """Where the model will compute: as asked; else where it is, the CPU for a model on meta.

    Stages on the CPU and on meta can go anywhere. ValueError, by name, for a tensor that is elsewhere already.
    """
    there = {place.tensor.device: place.name for place in reversed(places(module))}
    there.pop(torch.device("meta"), None)
    if asked is None:
        if len(there) > 1:
            raise ValueError(f"the model lies on {', '.join(sorted(map(str, there)))}: move it to one device first")
        return next(iter(there), torch.device("cpu"))
    device = torch.empty(0, device=asked).device  # "cuda" is the current GPU
    for where, name in there.items():
        if where != device and where.type != "cpu":
            raise ValueError(
                f"{name} is on {where}, the model is to be on {device}: move it with module.to() before, or build the "
                "model on the CPU or the meta device"
            )
    return device


# ---------------------------------------------------------------- modules


def stage_modules(
    module: nn.Module, division: Division, own: Sequence[int], init: Init | None, everything: bool
) -> dict[int, StageModule]:
    """The modules of this rank's stages. What else the model holds goes to the meta device, which frees its memory.

    A weight of two stages gets a copy for each. everything: parameters on meta are initialised; else only those that
    several stages hold, so that these can be made equal.
    """
    made: dict[int, StageModule] = {}
    seen_modules: set[int] = set()
    seen_tensors: set[int] = set()
    for stage in own:
        part = StageModule(module, division.holdings[stage].names)
        _separate(part, seen_modules, seen_tensors)
        seen_modules |= {id(m) for m in part.modules()}
        seen_tensors |= {id(place.tensor) for place in places(part)}
        made[stage] = part
    for place in places(module):
        if id(place.tensor) not in seen_tensors and place.tensor.device.type != "meta":
            place.put(_like(place.tensor, place.tensor.to("meta")))
    shared = {alias for alias, name in division.aliases.items() if name in division.tied} | division.tied.keys()
    for part in made.values():
        materialise(part, init, None if everything else shared)
    return made


def _separate(part: StageModule, modules: set[int], tensors: set[int]) -> None:
    """Gives the stage copies of what another stage of this rank holds as well."""
    copies: dict[int, nn.Module] = {}

    def walk(owner: nn.Module) -> None:
        for key, child in list(owner._modules.items()):
            if child is None:
                continue
            if id(child) in modules:
                if id(child) not in copies:
                    copies[id(child)] = copy.deepcopy(child)
                owner._modules[key] = copies[id(child)]
            else:
                walk(child)

    walk(part)
    twins: dict[int, torch.Tensor] = {}
    for place in places(part):
        if id(place.tensor) in tensors:
            if id(place.tensor) not in twins:
                twins[id(place.tensor)] = _like(place.tensor, place.tensor.detach().clone())
            place.put(twins[id(place.tensor)])


def _like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values.detach(), requires_grad=tensor.requires_grad)
    return values


def materialise(module: nn.Module, init: Init | None, only: set[str] | None = None) -> nn.Module:
    """Gives modules whose parameters or buffers are on meta memory and values, in place. only: those that own one of
    these names.

    Values start from torch's seed and the name of the module, so they do not depend on how the model is divided.

    Raises ValueError for a module with neither `init` nor reset_parameters(), and for what they leave without values.
    """
    real: dict[int, torch.Tensor] = {}
    owners: dict[int, tuple[str, nn.Module]] = {}
    wanted = {
        id(place.owner)
        for place in places(module)
        if place.tensor.device.type == "meta" and (only is None or place.name in only)
    }
    for place in places(module):
        if id(place.owner) in wanted and place.tensor.device.type == "meta":
            if id(place.tensor) not in real:
                real[id(place.tensor)] = _like(place.tensor, torch.empty_like(place.tensor, device="cpu"))
                unset(real[id(place.tensor)])
            place.put(real[id(place.tensor)])
            owners.setdefault(id(place.owner), (place.name.rpartition(".")[0], place.owner))
    fresh = {id(tensor) for tensor in real.values()}
    done: set[int] = set()
    for name, owner in owners.values():
        require_init(owner, init, name)
        earlier = {t: t.detach().clone() for t in _own(owner) if id(t) in done}  # tied: the first owner's values count
        own = (*owner._parameters.items(), *owner._buffers.items())
        new = {key: t.detach() for key, t in own if t is not None and id(t) in fresh}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
            initialise(owner, init, name, new)
        with torch.no_grad():
            for tensor, values in earlier.items():
                tensor.copy_(values)
        done |= {id(t) for t in _own(owner)}
    return module


def _own(owner: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*owner._parameters.values(), *owner._buffers.values()) if t is not None]


def split_backwards(modules: Mapping[int, StageModule], schedule: Schedule) -> dict[int, Report]:
    """Prepares the stages whose backward the schedule divides."""
    divided = {a.stage for line in fuse(schedule).actions for a in line if a.kind is Kind.W}
    return {stage: prepare(part) for stage, part in modules.items() if stage in divided}


@dataclass(frozen=True)
class Held:
    """What a rank holds of a pipeline before data parallelism wraps it.

    rank: in the pipeline. schedule: of compute actions. modules: of this rank's stages; reports: of those whose
    backward is divided. example: a micro-batch. compute_dtype: as of PipelineParallel.
    """

    rank: int
    division: Division
    schedule: Schedule
    modules: Mapping[int, StageModule]
    reports: Mapping[int, Report]
    example: MicroBatch | None
    compute_dtype: torch.dtype | None

    def recorded(self) -> tuple[Schedule, tuple[Part, ...]]:
        """The table as it will run for the example, and the stages' parts of it; under the caller's autocast."""
        assert self.example is not None
        with torch.set_grad_enabled(True):
            program = self.division.recordings.of(self.example.args, self.example.kwargs, self.compute_dtype)
        parts = cut(program, [stage for _, stage in self.division.calls], self.schedule.stages)
        return fuse(self.schedule.with_edges(edges(parts))), parts


# ---------------------------------------------------------------- weights of several stages


def holders(division: Division, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Of each tied weight that is trained, the pipeline's ranks that hold it, the first stage's first."""
    trained = {place.name for place in places(division.ghost) if place.tensor.requires_grad}
    return {
        name: tuple(dict.fromkeys(schedule.placement[stage] for stage in stages))
        for name, stages in division.tied.items()
        if name in trained
    }


class SharedGroups:
    """Groups of ranks that share weights. A rank is in some of them only, and each is made by its own ranks alone: so
    they are distlib's own groups, which are named by ranks and count, not c10d's, which all ranks would have to make.

    timeout: seconds, of making them and of their collectives.
    """

    _made_before: ClassVar[Counter[tuple[int, ...]]] = Counter()

    def __init__(self, timeout: float) -> None:
        self._timeout = timedelta(seconds=timeout)
        self._made: dict[tuple[int, ...], Group] = {}

    def of(self, ranks: Sequence[int]) -> Group | None:
        """The group of these global ranks; None for this rank alone. Every rank in it calls, in the same order."""
        key = tuple(sorted(set(ranks)))
        if len(key) == 1:
            return None
        if key not in self._made:
            name = f"tied weights of ranks {', '.join(map(str, key))} #{self._made_before[key]}"
            self._made_before[key] += 1
            store = dist.PrefixStore(name, _get_default_store())
            own = key.index(dist.get_rank())
            made = self._made[key] = Group.create(store, own, len(key), self._timeout, name, key)
            before_shutdown(made.close)
        return self._made[key]


def copies_of(name: str, division: Division, parts: Mapping[int, nn.Module]) -> dict[int, nn.Parameter]:
    """The copies of a tied weight on this rank, or this rank's pieces of them, by stage."""
    found: dict[int, nn.Parameter] = {}
    for stage, part in parts.items():
        for own, parameter in part.named_parameters(remove_duplicate=False):
            if division.aliases.get(own, own) == name:
                found[stage] = parameter
    return found


@torch.no_grad()
def equalise(
    division: Division,
    modules: Mapping[int, nn.Module],
    ranks: Mapping[str, Sequence[int]],
    group: Group,
    groups: SharedGroups,
) -> None:
    """Gives all copies of tied weights the values of the first stage's. A collective of each weight's holders."""
    for name, places_of in ranks.items():
        copies = list(copies_of(name, division, modules).values())
        if not copies:
            continue
        first = group.ranks[places_of[0]]
        together = groups.of([group.ranks[r] for r in places_of])
        if together is not None:
            reach.broadcast(together, copies[0].data, together.ranks.index(first))
        for other in copies[1:]:
            other.copy_(copies[0])


def tie(
    division: Division,
    parts: Mapping[int, nn.Module],
    ranks: Mapping[str, Sequence[int]],
    group: Group,
    process_group: dist.ProcessGroup | None,
    groups: SharedGroups,
) -> list[Tie]:
    """The ties of this rank's stages, wrapped for data parallelism or not. A collective of the pipeline.

    Where stages are sharded, the ranks of a tie are all that hold pieces of one copy of any stage.
    """
    mine: dict[str, list[int]] = {}
    for name in ranks:
        for parameter in copies_of(name, division, parts).values():
            shard = shard_of(parameter)
            members = [dist.get_rank()] if shard is None or shard.group is None else list(shard.group.ranks)
            mine.setdefault(name, []).extend(members)
    everyone: list[dict[str, list[int]]] = [mine]
    if group.size > 1 and ranks:
        everyone = [{} for _ in range(group.size)]
        dist.all_gather_object(everyone, mine, group=process_group)
    found = []
    for name in ranks:
        copies = copies_of(name, division, parts)
        if copies:
            together = groups.of([r for theirs in everyone for r in theirs.get(name, ())])
            found.append(Tie(name, copies, together, min(division.tied[name]) in copies))
    return found


# ---------------------------------------------------------------- what optimizers and checkpoints are told


def mark_parameters(division: Division, parts: Mapping[int, nn.Module], group: Group, world: Group) -> PartOfModel:
    """Says of each parameter what it is a part of. Returns the same of the model."""
    replica, replicas = 0, 1
    for stage, part in parts.items():
        groups = getattr(part, "process_groups", None)
        if groups is not None:
            replica, replicas = groups["world"].rank, groups["world"].size
        for own, parameter in part.named_parameters():
            name = division.aliases.get(own, own)
            shard = shard_of(parameter)
            if shard is None:
                shard = Shard(name, parameter.shape, 0, parameter.numel(), None, world, replica, replicas)
                mark(parameter, shard)
            shard.name, shard.pipeline, shard.world = name, group, world
            shard.counted = name not in division.tied or stage == min(division.tied[name])
    elsewhere = frozenset(name for name, stage in _first_stages(division).items() if stage not in parts)
    return PartOfModel(division.aliases, division.tensors, replica, replicas, elsewhere)


def _first_stages(division: Division) -> dict[str, int]:
    """The first of the stages that hold a buffer, by its first name in the model."""
    found: dict[str, int] = {}
    for place in places(division.ghost):
        if isinstance(place.tensor, nn.Parameter):
            continue
        name = division.aliases.get(place.name, place.name)
        for held in division.holdings:
            if place.name in held.state or any(place.name.startswith(f"{leaf}.") for leaf in held.leaves):
                found[name] = min(found.get(name, held.stage), held.stage)
    return found


def gathered(parts: Mapping[int, nn.Module], stages: int) -> Sequence[int]:
    """The stages whose parameters move to be whole, so that the table says when: all, or none."""
    return range(stages) if any(getattr(part, "gathers", False) for part in parts.values()) else ()

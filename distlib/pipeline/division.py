"""How a model is divided into stages: decided once, by one rank, the same on all.

module -> ghost -> leaves -> (example inputs: program -> costs -> bounds) -> stage of each leaf -> who holds what
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlib.comm.group import Group
from distlib.data_parallel.agreement import from_first, require_equal
from distlib.pipeline.costs import LeafCost, estimate, measure, split_auto, with_loss
from distlib.pipeline.ghost import places
from distlib.pipeline.micro_batches import MicroBatch
from distlib.pipeline.partition import split_layers
from distlib.pipeline.record import Program
from distlib.pipeline.recordings import Recordings
from distlib.pipeline.simulate import Costs
from distlib.pipeline.stages import Holding, assign, chain, cut, edges, ghost, holdings, leaves_of, tied

Split = str | Sequence[str] | Sequence[nn.Module]

_UNEVEN = 1.5  # times the mean: a stage that takes as long is worth a warning


@dataclass(frozen=True)
class Division:
    """A model in stages.

    recordings: of the whole model, whose leaves lie wholly in a stage. stage_of: of each leaf. calls: with example
    inputs, their leaf calls in order, with the stage of each. holdings: what each stage holds. aliases: other names of
    tied parameters and buffers, to the first one. tied: names of parameters of several stages, with these. tensors:
    name, shape and dtype of all that a state dict of the whole model has. costs: of leaf calls, where they were needed.
    edges: between which stages something travels for the example inputs; sent: per stage, bytes of activations of a
    micro-batch that leave.
    """

    recordings: Recordings
    stage_of: dict[str, int]
    calls: tuple[tuple[str, int], ...]
    holdings: tuple[Holding, ...]
    aliases: dict[str, str]
    tied: dict[str, tuple[int, ...]]
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    costs: tuple[LeafCost, ...] | None
    edges: tuple[tuple[int, int], ...]
    sent: tuple[int, ...]

    @property
    def ghost(self) -> nn.Module:
        """The whole model without data."""
        return self.recordings.ghost

    @property
    def stages(self) -> int:
        return len(self.holdings)

    @cached_property
    def homes(self) -> dict[str, int]:
        """The stage of each leaf, also of those that the example inputs did not use."""
        held = {leaf: part.stage for part in reversed(self.holdings) for leaf in part.leaves}
        return {**held, **self.stage_of}

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        """Trained parameters (elements) of each stage; a tied weight counts on each of its stages."""
        hanging = places(self.ghost)
        found = []
        for held in self.holdings:
            own = {
                id(place.tensor): place.tensor.numel()
                for place in hanging
                if place.tensor.requires_grad
                and (place.name in held.state or any(place.name.startswith(f"{leaf}.") for leaf in held.leaves))
            }
            found.append(sum(own.values()))
        return tuple(found)

    @property
    def times(self) -> list[float]:
        """Of each stage, by the costs of its leaves; zeros where they are not known."""
        times = [0.0] * self.stages
        for cost, (_, stage) in zip(self.costs or (), self.calls if self.costs else (), strict=True):
            times[stage] += cost.total
        return times

    @property
    def uneven(self) -> str | None:
        """What is to be said of a split whose slowest stage has 1.5 times the time of a mean one, or more."""
        times = self.times
        slowest = max(range(self.stages), key=times.__getitem__)
        if not any(times) or times[slowest] * self.stages < _UNEVEN * sum(times):
            return None
        leaves: defaultdict[str, float] = defaultdict(float)
        for cost, (name, stage) in zip(self.costs or (), self.calls, strict=True):
            if stage == slowest:
                leaves[name] += cost.total
        name, most = max(leaves.items(), key=lambda leaf: leaf[1])
        return (
            f"the best split of the model gives stage {slowest} {times[slowest] / sum(times):.0%} of the time, and the "
            f"others wait for it: {name} alone has {most / sum(times):.0%}. Take fewer stages, or name where they "
            "begin (split=), which may be inside of modules that the automatic split leaves whole"
        )

    def __str__(self) -> str:
        """A line per stage: its modules, its parameters, its part of the time."""
        times = self.times
        lines = []
        for held in self.holdings:
            names = list(held.leaves)
            shown = ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)} modules)"
            line = f"stage {held.stage}: {self.parameters[held.stage]:>14,} parameters"
            if any(times):
                line += f"  {times[held.stage] / sum(times):>6.1%} of the time"
            lines.append(f"{line}  {shown}")
        for name, stages in self.tied.items():
            lines.append(f"{name} is on stages {', '.join(map(str, stages))}: their gradients are summed")
        idle = [name for held in self.holdings for name in held.idle]
        if idle:
            lines.append(f"not used by the example inputs: {', '.join(idle)}")
        return "\n".join(lines)

    @property
    def stage_costs(self) -> Costs | None:
        """Costs of the stages, if those of their leaves are known."""
        if self.costs is None:
            return None
        forward, backward, weight, held = ([0.0] * self.stages for _ in range(4))
        for cost, (_, stage) in zip(self.costs, self.calls, strict=True):
            forward[stage] += cost.forward
            backward[stage] += cost.backward
            weight[stage] += cost.weight
            held[stage] += cost.activation_bytes
        return Costs(forward, backward, weight, activations=held)


def whole_model(module: nn.Module | None, split: Split) -> tuple[nn.Module, str | Sequence[str]]:
    """The model, and where it is cut by name: modules that are given stage by stage become one."""
    given = [] if isinstance(split, str) else list(split)
    if any(isinstance(part, nn.Module) for part in given):
        if module is not None:
            raise ValueError("split is a list of stage modules: they are the model, so give module=None")
        return chain(given)
    if module is None:
        raise ValueError("module=None needs split=[module, ...], the stages in order")
    return module, split


def divide(
    module: nn.Module,
    split: str | Sequence[str],
    stages: int,
    example: MicroBatch | None,
    how: str,
    dtype: torch.dtype | None,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    group: Group,
    ranks: dist.ProcessGroup | None,
) -> Division:
    """Divides a model. A collective of `group` (`ranks` as a c10d group): all ranks that train the model together.

    example: a micro-batch; with a target, the loss's cost counts. how: "measured" or "estimated" costs, for
    split="auto".
    """
    _check(split, stages, how)
    require_equal(group, "PipelineParallel: the model's parameters", _facts(module), torch.device("cpu"))
    empty = ghost(module)
    leaves = leaves_of(empty, split)
    recordings = Recordings(empty, leaves)
    costs: list[LeafCost] | None = None
    calls: tuple[tuple[str, int], ...] = ()
    crossing: tuple[tuple[int, int], ...] = ()
    sent = (0,) * stages
    if example is None:
        stage_of = _by_order(empty, leaves, split, stages)
        held = _held_by_order(empty, leaves, stage_of, stages)
    else:
        program = recordings.of(example.args, example.kwargs, dtype)
        if split == "auto":
            costs = from_first(ranks, lambda: _costs(program, module, how, example.target, loss_fn))
            by_call = assign(program, split_auto(program, costs, stages))
        else:
            by_call = assign(program, [str(name) for name in split])
        calls = tuple((call.name, stage) for call, stage in zip(program.leaf_calls, by_call, strict=True))
        stage_of = dict(reversed(calls))  # of the first call
        parts = cut(program, by_call, stages)
        held, crossing = holdings(parts, empty), edges(parts)
        sent = tuple(sum(port.nbytes for port in part.sends) for part in parts)
    told = [] if example is None else [(f"call {k}", line) for k, line in enumerate(str(program).splitlines())]
    told += [(f"leaf call {k}, {name}", f"stage {stage}") for k, (name, stage) in enumerate(calls)]
    told += [(f"leaf {name}", f"stage {stage}") for name, stage in stage_of.items()]
    require_equal(group, "PipelineParallel: what the model does, and its stages,", told, torch.device("cpu"))
    aliases, tensors = _names(empty)
    found = Division(
        recordings,
        stage_of,
        calls,
        held,
        aliases,
        tied(empty, held),
        tensors,
        None if costs is None else tuple(costs),
        crossing,
        sent,
    )
    if group.rank == 0 and (uneven := found.uneven) is not None:
        warnings.warn(uneven, stacklevel=4)  # of who makes the pipeline
    return found


def _check(split: str | Sequence[str], stages: int, how: str) -> None:
    if how not in ("measured", "estimated"):
        raise ValueError(f'costs={how!r}: give "measured" or "estimated"')
    if not isinstance(split, str) and len(split) != stages - 1:
        raise ValueError(
            f"split has {len(split)} names for {stages} stages: name the {stages - 1} that begin the stages after the "
            f"first, or give {stages} stage modules"
        )


def _facts(module: nn.Module) -> list[tuple[str, str]]:
    return [
        (place.name, f"shape {tuple(place.tensor.shape)}, {place.tensor.dtype}, trained {place.tensor.requires_grad}")
        for place in places(module)
    ]


def _costs(
    program: Program, module: nn.Module, how: str, target: Any, loss_fn: Callable[[Any, Any], Tensor] | None
) -> list[LeafCost]:
    costs = measure(program, module) if how == "measured" else estimate(program, module)
    return costs if target is None or loss_fn is None else with_loss(costs, program, loss_fn, target, how)


def _names(module: nn.Module) -> tuple[dict[str, str], tuple[tuple[str, tuple[int, ...], str], ...]]:
    """(aliases, tensors) of a Division."""
    first: dict[int, str] = {}
    aliases, tensors = {}, []
    for place in places(module):
        if not place.persistent:
            continue
        name = first.setdefault(id(place.tensor), place.name)
        if name != place.name:
            aliases[place.name] = name
        else:
            tensors.append((name, tuple(place.tensor.shape), str(place.tensor.dtype)))
    return aliases, tuple(tensors)


# ---------------------------------------------------------------- without example inputs


def _by_order(module: nn.Module, leaves: Sequence[str], split: str | Sequence[str], stages: int) -> dict[str, int]:
    """Leaves in the order of registration, taken to be that of their calls; "auto" by the bytes of their parameters."""
    if split == "auto":
        if len(leaves) < stages:
            raise ValueError(f"the model has {len(leaves)} modules to divide ({', '.join(leaves)}), not {stages}")
        sizes = [sum(p.nbytes for p in module.get_submodule(name).parameters()) + 1 for name in leaves]
        bounds = split_layers(sizes, stages).bounds
    else:
        bounds = (0, *(leaves.index(str(name)) for name in split), len(leaves))
    return {leaves[i]: stage for stage, (a, b) in enumerate(pairwise(bounds)) for i in range(a, b)}


def _held_by_order(
    module: nn.Module, leaves: Sequence[str], stage_of: Mapping[str, int], stages: int
) -> tuple[Holding, ...]:
    """What lies outside of leaves would be on stages that nothing tells: refused."""
    for place in places(module):
        if not any(place.name.startswith(f"{leaf}.") for leaf in leaves):
            raise ValueError(
                f"{place.name} hangs outside of the modules that are divided, and may be used anywhere: give "
                "example_inputs, so that a run can show where"
            )
    return tuple(
        Holding(stage, tuple(name for name in leaves if stage_of[name] == stage), (), ()) for stage in range(stages)
    )

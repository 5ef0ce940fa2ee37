"""The modules of one stage, under the names that they have in the whole model.

    whole model                   stage 1 of 3
      embedding                     .
      blocks                        blocks        an empty container
        0, 1, 2, 3                    1, 2        the same objects
      head                          .

The leaves are the whole model's own modules. What lies between, their ancestors, is played by the program's calls.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from distlib.comm.slots import Room
from distlib.initialise import stand_for
from distlib.pipeline.cut import Part
from distlib.pipeline.ghost import places
from distlib.pipeline.leaves import Names
from distlib.pipeline.player import Player


class Container(nn.Module):
    """Holds what a module of the whole model held, without its forward."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a container of a pipeline stage cannot be called: its module's forward was divided")


@dataclass
class _Own:
    """What a StageModule has of its own, in one attribute: all other names are the model's."""

    leaves: tuple[str, ...]
    players: weakref.WeakKeyDictionary[Part, Player] = field(default_factory=weakref.WeakKeyDictionary)

    def __reduce__(self) -> Any:
        return _Own, (self.leaves,)  # a copy of a stage has players of its own modules


class StageModule(nn.Module):
    """What one stage holds of a model, under the names of the whole model.

    module: the whole model. names: full names of leaves, and of parameters and buffers outside of them, as
    `Holding.names` has them. Nothing is copied: these are the same objects.

    Raises ValueError for a name that the model does not have.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        known = Names(module)
        state = {place.name: place for place in places(module)}
        called: defaultdict[int, list[str]] = defaultdict(list)
        parts = dict(module.named_modules(remove_duplicate=False))
        for name, part in parts.items():
            called[id(part)].append(name)
        self.training = module.training
        stand_for(self, module)
        leaves = [known.find(name) for name in names if name not in state]
        for _, part in leaves:
            for alias in called[id(part)]:  # registered twice: under both names, as in the whole model
                owner, key = self._owner(alias, parts)
                owner.add_module(key, part)
        held = tuple(name for name, _ in leaves)
        for name in names:
            if name not in state or any(name.startswith(f"{leaf}.") for leaf in held):
                continue
            owner, key = self._owner(name, parts)
            tensor = state[name].tensor
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(key, tensor)
            else:
                owner.register_buffer(key, tensor, persistent=state[name].persistent)
        self._distlib = _Own(held)

    def _owner(self, name: str, parts: Mapping[str, nn.Module]) -> tuple[nn.Module, str]:
        """The container in which a name hangs, and its last part. Makes those that are missing."""
        *path, key = name.split(".")
        owner: nn.Module = self
        for depth, step in enumerate(path):
            if step not in owner._modules:
                container = Container()
                original = parts[".".join(path[: depth + 1])]
                container.training = original.training
                stand_for(container, original)
                owner.add_module(step, container)
            inner = owner._modules[step]
            assert inner is not None
            owner = inner
        return owner, key

    def forward(
        self,
        part: Part,
        received: Sequence[Sequence[Tensor]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rooms: Sequence[Sequence[Room]] = (),
    ) -> tuple[tuple[tuple[Tensor, ...], ...], Any]:
        """Play a part: (tensors per send port, the model's output on the last stage and None on others).

        part: of a program recorded for the signature of these inputs. received: per receive port, its tensors, as
        leaves of autograd that require a gradient where the port's spec says so. args, kwargs: the whole model's
        inputs, on every stage. None of them is written to. rooms: per send port, none, or for each tensor where it is
        to be made, if that can be.

        Raises ValueError if the stage does not hold what the part calls, if other inputs come in than recorded, or if
        something would be sent in another shape or dtype than recorded.
        """
        own = self._distlib
        player = own.players.get(part)
        if player is None:
            held = {place.name for place in places(self)}
            missing = [name for name in part.leaves if name not in own.leaves]
            missing += [name for name in part.state if name not in held]
            if missing:
                raise ValueError(
                    f"pipeline: stage {part.stage} does not hold {', '.join(missing)}, which this run uses there. "
                    "Stages hold what the first recorded run used; do inputs or train and eval decide what is used?"
                )
            player = own.players[part] = Player(self, part)
        return player(received, args, kwargs, rooms)


# ---------------------------------------------------------------- who holds what


@dataclass(frozen=True)
class Holding:
    """What a stage holds. leaves: names of modules. state: names of parameters and buffers outside of them. idle: those
    of both that the recorded run did not use; they are here so that checkpoints stay whole."""

    stage: int
    leaves: tuple[str, ...]
    state: tuple[str, ...]
    idle: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What StageModule takes."""
        return self.leaves + self.state


def holdings(parts: Sequence[Part], module: nn.Module) -> tuple[Holding, ...]:
    """What each stage holds: every parameter and buffer of the model lies on one at least.

    What the run did not use is on the stage of the nearest leaf before it in the module tree, else on the first stage.
    """
    leaves = {part.stage: list(part.leaves) for part in parts}
    state = {part.stage: list(part.state) for part in parts}
    idle: dict[int, list[str]] = {part.stage: [] for part in parts}
    order = {name: k for k, (name, _) in enumerate(module.named_modules())}
    first: dict[str, int] = {}
    for part in parts:
        for name in part.leaves:
            first.setdefault(name, part.stage)
    called = sorted(first, key=lambda name: order[name])
    positions = [order[name] for name in called]

    def neighbour(position: int) -> int:
        before = bisect_right(positions, position)
        return first[called[before - 1]] if before else parts[0].stage

    for name in parts[0].program.leaves:
        if name not in first:
            stage = neighbour(order[name])
            leaves[stage].append(name)
            idle[stage].append(name)
    homes: dict[int, set[int]] = defaultdict(set)  # id(tensor) -> stages
    hanging = places(module)
    by_name = {place.name: place.tensor for place in hanging}
    for stage, names in leaves.items():
        for name in names:
            for place in places(module.get_submodule(name)):
                homes[id(place.tensor)].add(stage)
    for stage, names in state.items():
        for name in names:
            homes[id(by_name[name])].add(stage)
    for place in hanging:
        if id(place.tensor) not in homes:
            stage = neighbour(order.get(place.name.rpartition(".")[0], 0))
            homes[id(place.tensor)].add(stage)
            state[stage].append(place.name)
            idle[stage].append(place.name)
    assert all(id(place.tensor) in homes for place in hanging)
    return tuple(
        Holding(
            part.stage,
            tuple(leaves[part.stage]),
            tuple(n for n in state[part.stage] if not any(n.startswith(f"{leaf}.") for leaf in leaves[part.stage])),
            tuple(idle[part.stage]),
        )
        for part in parts
    )


def tied(module: nn.Module, held: Sequence[Holding]) -> dict[str, tuple[int, ...]]:
    """Parameters that lie on several stages, by their first name in the model: the stages. Their gradients must be
    summed over these. Other names of the same parameter are not listed."""
    stages: defaultdict[str, set[int]] = defaultdict(set)
    first: dict[int, str] = {}
    for place in places(module):
        if not isinstance(place.tensor, nn.Parameter):
            continue
        name = first.setdefault(id(place.tensor), place.name)
        for one in held:
            if place.name in one.state or any(place.name.startswith(f"{leaf}.") for leaf in one.leaves):
                stages[name].add(one.stage)
    return {name: tuple(sorted(found)) for name, found in stages.items() if len(found) > 1}

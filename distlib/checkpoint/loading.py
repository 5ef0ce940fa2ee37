"""`load()`: check everything, then write the parameters, then the optimizer and the rest."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distlib.checkpoint import folder, random_state, saving
from distlib.checkpoint.layout import Piece
from distlib.checkpoint.model_state import MODEL, ModelState, model_state, replica_of
from distlib.checkpoint.optimizer_state import GROUPS, GROUPS_OF, STATE, groups_for, kind_of, ordered, restore
from distlib.checkpoint.ranks import Ranks
from distlib.checkpoint.reader import Checkpoint, Target

log = logging.getLogger("distlib.checkpoint")
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class LoadedState:
    """What `load` found beside the model and the optimizer.

    step: as given to `save`. world_size: the ranks that saved. extra: by key, what was saved of it; where ranks
    differed, this rank's, and nothing if the ranks are others now: in number, or in which of them share a copy of the
    model. extra_by_rank: by key, what each rank that saved had, where they differed. rng: whether the random number
    generators were set.
    """

    step: int | None
    world_size: int
    extra: dict[str, Any] = field(default_factory=dict)
    extra_by_rank: dict[str, list[Any]] = field(default_factory=dict)
    rng: bool = False


@dataclass
class _Plan:
    """What this rank reads, and where it goes."""

    checkpoint: Checkpoint
    parameters: list[tuple[Target, torch.Tensor]]  # the tensor, where it is not contiguous, gets the target's copy
    groups: list[dict[str, Any]]
    state_targets: list[Target]
    states: dict[int, dict[str, Any]]
    found: LoadedState
    scaler: Any = None
    generators: dict[str, Any] | None = None


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: Any = None,
    extra: dict[str, Any] | None = None,
    rng: bool = True,
    process_group: dist.ProcessGroup | None = None,
    scaler_required: bool = True,
) -> LoadedState:
    """Load what `save` wrote into `model` and the rest, in whatever layout they are now. Every rank must call it.

    A save of these ranks in the background is waited for. The world size, the partition and the wrapper need not be
    those of the save. Each rank reads only the chunks that
    its pieces need. Everything is checked on all ranks before anything is changed: names, shapes, dtypes, and the
    checksums of all that will be read. Parameters are written in place.

    `extra` and `scaler` are read by pickle, which runs code that the files name: load only what you trust.

    Args:
        model: of the same names, shapes and ties as when saved; parameters of the same dtypes.
        optimizer: of the same class over the model's parameters; it need not have stepped. Groups may be others, as
            long as no group mixes parameters whose saved hyperparameters differ.
        scaler: gets load_state_dict() with what was saved.
        extra: objects that get load_state_dict() with what was saved under their key. The values of all keys come back
            in the LoadedState, too.
        rng: set the random number generators, if as many ranks saved, of which the same ones shared a copy of the
            model (the ranks of a pipeline do); otherwise they stay as they are.
        process_group: the ranks that hold the model; default: all.
        scaler_required: False: where no scaler was saved, the one given stays as it is.

    Returns:
        A LoadedState: step, world size of the save, `extra`, and whether generators were set.

    Raises:
        ValueError: on all ranks, for what is no checkpoint, of another version, or does not fit: naming file,
            parameter, both shapes or dtypes. RuntimeError: for what is missing or damaged. Model and optimizer are
            then as they were, unless the file system fails between the check and the reading.
    """
    ranks = Ranks.of(process_group)
    saving.settle(ranks)
    target = folder.real(path)
    what = f"load from {target}"

    def recovered(replicas: list[int]) -> list[int]:
        folder.recover(target)
        return replicas

    replicas = ranks.agree(replica_of(model, ranks.rank), None, recovered, what)

    def check() -> _Plan:
        return _plan(ranks, replicas, target, model, optimizer, scaler, scaler_required, extra, rng)

    plan = ranks.together(check, what)

    before = getattr(model, "before_writing", None)

    def read() -> None:
        if before is not None:
            before()
        plan.checkpoint.read(plan.state_targets, check=False)  # summed just now
        plan.checkpoint.read([into for into, _ in plan.parameters], check=False)
        with torch.no_grad():
            for into, tensor in plan.parameters:
                if tensor.numel() and into.flat.data_ptr() != tensor.data_ptr():
                    tensor.copy_(into.flat.view(tensor.shape))
        if optimizer is not None:
            restore(optimizer, plan.groups, plan.states)
        if scaler is not None and plan.scaler is not None:
            scaler.load_state_dict(plan.scaler)
        for key, value in (extra or {}).items():
            value.load_state_dict(plan.found.extra[key])
        if plan.generators is not None:
            random_state.restore(plan.generators)

    ranks.together(read, what)
    written = getattr(model, "parameters_written", None)
    if callable(written):
        written()
    log.info("loaded %s, saved by %d ranks at step %s", target, plan.found.world_size, plan.found.step)
    return plan.found


def _plan(
    ranks: Ranks,
    replicas: list[int],
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scaler: Any,
    scaler_required: bool,
    extra: dict[str, Any] | None,
    rng: bool,
) -> _Plan:
    """Everything that can go wrong, before anything is changed."""
    checkpoint = Checkpoint(path)
    state = model_state(model, ranks.rank, ranks.size)
    _check_model(checkpoint, state)
    plan = _Plan(checkpoint, [_target(piece) for piece in state.pieces], [], [], {}, LoadedState(None, 0))
    objects = []
    if optimizer is not None:
        objects += _plan_optimizer(plan, optimizer, state)
    targets = [into for into, _ in plan.parameters] + plan.state_targets
    manifest = checkpoint.manifest
    if scaler is not None and manifest.scaler:
        plan.scaler = checkpoint.object("scaler", trusted=True)
    elif scaler is not None and scaler_required:
        raise ValueError(f"{path} was saved without a scaler: leave scaler= out, or save it")
    elif scaler is not None and ranks.rank == 0:
        log.info("%s was saved without a scaler: the loss scale stays as it is", path)
    # Where the file does not tell, each rank is taken to have had a copy of the model of its own.
    same = (manifest.replicas or list(range(manifest.world_size))) == replicas
    plan.found = _extra(checkpoint, ranks, replicas, extra or {}, rng and manifest.rng and same)
    if plan.found.rng:
        plan.generators = checkpoint.object(f"rng.{ranks.rank}")
    elif rng and manifest.rng and ranks.rank == 0:
        log.info(
            "%s was saved by %d ranks, there are %d now%s: random number generators stay as they are",
            path, manifest.world_size, ranks.size, _otherwise(manifest.world_size, ranks.size),
        )  # fmt: skip
    checkpoint.verify(targets, objects)
    return plan


def _target(piece: Piece) -> tuple[Target, torch.Tensor]:
    tensor = piece.tensor
    flat = (
        tensor.view(-1)
        if tensor.is_contiguous()
        else torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    )
    return Target(piece.name, piece.offset, flat), tensor


def _check_model(checkpoint: Checkpoint, state: ModelState) -> None:
    """Names, ties, shapes and dtypes."""
    manifest, path = checkpoint.manifest, checkpoint.path
    ties = {MODEL + alias: MODEL + name for alias, name in manifest.aliases.items()}
    saved = {name for name in checkpoint.tensors if name.startswith(MODEL) and name not in ties}
    own = {name: (shape, dtype) for name, shape, dtype in state.tensors}
    for theirs, mine, holder in ((ties, state.aliases, "the checkpoint"), (state.aliases, ties, "the model")):
        other = "the model" if holder == "the checkpoint" else "the checkpoint"
        for alias, name in theirs.items():
            if mine.get(alias) != name:
                raise ValueError(
                    f"{path}: '{alias.removeprefix(MODEL)}' and '{name.removeprefix(MODEL)}' are tied in {holder}, not "
                    f"in {other}: build the model as it was saved"
                )
    missing, unknown = sorted(own.keys() - saved), sorted(saved - own.keys())
    if missing or unknown:
        lines = [f"the checkpoint lacks {_listed(missing)}"] if missing else []
        lines += [f"the model lacks {_listed(unknown)}"] if unknown else []
        raise ValueError(f"{path} is of another model: {'; '.join(lines)}")
    for name, (shape, dtype) in own.items():
        entry = checkpoint.tensors[name]
        if tuple(entry.size) != shape:
            raise ValueError(
                f"{path}: '{name.removeprefix(MODEL)}' has shape {tuple(entry.size)} in the checkpoint, {shape} in the "
                "model"
            )
        if str(entry.properties.dtype) != dtype:
            raise ValueError(
                f"{path}: '{name.removeprefix(MODEL)}' of shape {shape} is {entry.properties.dtype} in the checkpoint, "
                f"{dtype} in the model: convert the model before loading, then back"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name.removeprefix(MODEL)}'" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _plan_optimizer(plan: _Plan, optimizer: torch.optim.Optimizer, state: ModelState) -> list[str]:
    """Where each tensor of the optimizer's state goes. Returns the objects that it reads."""
    checkpoint = plan.checkpoint
    manifest, path = checkpoint.manifest, checkpoint.path
    if manifest.optimizer is None:
        raise ValueError(f"{path} was saved without an optimizer: leave optimizer= out")
    saved_by = manifest.optimizer["class"]
    if kind_of(saved_by) != kind_of(optimizer):
        raise ValueError(f"{path} holds the state of {saved_by}; the optimizer is {type(optimizer).__name__}")
    saved = [name for name in sorted(checkpoint.objects) if name == GROUPS or name.startswith(GROUPS_OF)]
    plan.groups = groups_for(optimizer, state, [group for name in saved for group in checkpoint.object(name)])
    pieces = ordered(optimizer, state)
    places: dict[str, list[int]] = {}  # a tied weight of two stages of this rank has two
    for index, piece in enumerate(pieces):
        places.setdefault(piece.name.removeprefix(MODEL), []).append(index)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, entry in checkpoint.tensors.items():
        parameter, _, key = name.removeprefix(STATE).rpartition(".")
        if not name.startswith(STATE):
            continue
        for index in places.get(parameter, ()):
            piece, own, dtype = pieces[index], parameters[index], entry.properties.dtype
            if tuple(entry.size) == tuple(piece.shape) and manifest.optimizer["kinds"].get(key) != "scalar":
                value = torch.empty(own.shape, dtype=dtype, device=own.device)
                plan.state_targets.append(Target(name, piece.offset, value.view(-1)))
            elif tuple(entry.size) == ():
                value = torch.empty((), dtype=dtype)
                plan.state_targets.append(Target(name, 0, value.view(-1)))
            else:
                raise ValueError(
                    f"{path}: optimizer state '{key}' of '{parameter}' has shape {tuple(entry.size)} in the "
                    f"checkpoint, the parameter {tuple(piece.shape)} in the model"
                )
            plan.states.setdefault(index, {})[key] = value
    objects = [name for name in checkpoint.objects if name.startswith(STATE)]
    for name in objects:
        parameter, _, key = name.removeprefix(STATE).rpartition(".")
        for index in places.get(parameter, ()):
            plan.states.setdefault(index, {})[key] = checkpoint.object(name)
    keys = {key for state in plan.states.values() for key in state}
    for index, piece in enumerate(pieces):
        own_state = plan.states.get(index)
        if 0 in piece.shape and own_state is not None and own_state.keys() != keys:
            del plan.states[index]  # of no elements, and saved by a version that left out scalars: begun anew
    return objects


def _otherwise(saved: int, now: int) -> str:
    """How ranks of equal number are not the same."""
    return ", which share copies of the model in another way" if saved == now else ""


def _extra(checkpoint: Checkpoint, ranks: Ranks, replicas: list[int], wanted: dict[str, Any], rng: bool) -> LoadedState:
    """The values of `extra`; that they fit the objects that want them."""
    manifest, path = checkpoint.manifest, checkpoint.path
    values = {key: checkpoint.object(f"extra.{key}", trusted=True) for key in manifest.shared}
    by_rank = {
        key: [checkpoint.object(f"extra_by_rank.{key}.{r}", trusted=True) for r in range(manifest.world_size)]
        for key in manifest.by_rank
    }
    if manifest.world_size == ranks.size and manifest.replicas in (None, replicas):
        values.update({key: all_of[ranks.rank] for key, all_of in by_rank.items()})
    for key, value in wanted.items():
        if not callable(getattr(value, "load_state_dict", None)):
            raise ValueError(f"extra[{key!r}] has no load_state_dict(): take the value from the LoadedState instead")
        if key in by_rank and key not in values:
            raise ValueError(
                f"{path}: extra[{key!r}] was not the same on all {manifest.world_size} ranks that saved, and "
                f"there are {ranks.size} now{_otherwise(manifest.world_size, ranks.size)}: leave it out, and use "
                "LoadedState.extra_by_rank"
            )
        if key not in values:
            raise ValueError(f"{path} was saved without extra[{key!r}]; it has {sorted(values)}")
    return LoadedState(manifest.step, manifest.world_size, values, by_rank, rng)

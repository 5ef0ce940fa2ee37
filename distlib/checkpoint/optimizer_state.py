"""What of an optimizer is saved: state tensors as pieces of their parameters' geometry, hyperparameters by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.optim import Optimizer

from distlib.checkpoint.layout import Piece
from distlib.checkpoint.model_state import MODEL, ModelState
from distlib.shards import shard_of

STATE, GROUPS = "optimizer.state.", "optimizer.param_groups"
GROUPS_OF = "optimizer.param_groups_of."  # and a rank: of parameters that rank 0 does not have
# How a step is computed, not what: an optimizer keeps its own.
OWN = {"foreach", "fused", "capturable", "differentiable", "param_names"}


@dataclass
class OptimizerState:
    """pieces: of state tensors, named "optimizer.state.<parameter>.<key>"; scalars are pieces of shape (). objects:
    plain numbers, by the same kind of name. kinds: "piece" or "scalar", by state key. groups: the hyperparameters, with
    parameters' names as "params"."""

    pieces: list[Piece] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)


def ordered(optimizer: Optimizer, model: ModelState) -> list[Piece]:
    """The pieces of the optimizer's parameters, in the order of its groups."""
    found = []
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            piece = model.by_id.get(id(parameter))
            if piece is None:
                raise ValueError(
                    f"parameter {position} of the optimizer's group {number}, of shape {tuple(parameter.shape)}, is no "
                    "parameter of the model: make the optimizer from model.parameters() after wrapping"
                )
            found.append(piece)
    return found


def _is_first(parameter: torch.Tensor, piece: Piece) -> bool:
    """Of the ranks that hold a parameter without elements, the first."""
    shard = shard_of(parameter)
    return 0 in piece.shape and (shard is None or shard.group is None or shard.group.rank == 0)


def optimizer_state(optimizer: Optimizer, model: ModelState) -> OptimizerState:
    """Everything in `optimizer.state_dict()`, on this rank. Nothing is copied.

    Scalars are equal on all ranks: the rank that holds a parameter's first element gives them; where there is none, the
    first of those that hold the parameter.

    Raises ValueError, by name, for what a checkpoint has no place for: further keys of that dict, state of no
    parameter, state under a key that is no name, and state of another shape than the parameter's.
    """
    pieces = ordered(optimizer, model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [piece.name.removeprefix(MODEL) for piece in pieces]
    saved = optimizer.state_dict()
    _require_of_parameters(optimizer, saved, len(pieces))
    found = OptimizerState()
    for index, state in saved["state"].items():
        piece, name = pieces[index], names[index]
        first = piece.offset == 0 and piece.replica == 0 and (piece.numel > 0 or _is_first(parameters[index], piece))
        for key, value in state.items():
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(
                    f"optimizer state {key!r} of '{name}': only state under a name without a dot can be saved"
                )
            full = f"{STATE}{name}.{key}"
            if not isinstance(value, torch.Tensor):
                if not isinstance(value, (int, float, bool, str, type(None))):
                    raise ValueError(f"optimizer state '{key}' of '{name}' is a {type(value).__name__}: {_REFUSED}")
                found.kinds.setdefault(key, "scalar")
                if first:
                    found.objects[full] = value
            elif value.dim() == 0 and piece.tensor.dim() > 0:
                _note(found.kinds, key, "scalar", name)
                if first:
                    found.pieces.append(Piece(full, torch.Size(), 0, value.detach()))
            elif value.numel() == piece.numel:
                if piece.tensor.dim() > 0:
                    _note(found.kinds, key, "piece", name)
                found.pieces.append(replace(piece, name=full, tensor=value.detach()))
            else:
                raise ValueError(
                    f"optimizer state '{key}' of '{name}' has shape {tuple(value.shape)}, the parameter's piece on "
                    f"this rank {tuple(piece.tensor.shape)}: {_REFUSED}"
                )
    # Ranks divide replicas by their order, which need not be the order in which each of them came by its state.
    found.pieces.sort(key=lambda piece: piece.name)
    for group in saved["param_groups"]:
        found.groups.append({**group, "params": [names[index] for index in group["params"]]})
    return found


def _require_of_parameters(optimizer: Optimizer, saved: dict[str, Any], parameters: int) -> None:
    """ValueError for what `optimizer.state_dict()` holds beside groups and the state of parameters."""
    who = type(optimizer).__name__
    more = sorted(map(str, saved.keys() - {"state", "param_groups"}))
    if more:
        raise ValueError(
            f"{who}.state_dict() has {', '.join(map(repr, more))} beside 'state' and 'param_groups': keep it in the "
            "groups, or save it in extra="
        )
    for key in saved["state"]:
        if type(key) is not int or not 0 <= key < parameters:
            raise ValueError(
                f"optimizer state {key!r} of {who} belongs to no parameter: keep it in the groups, or save it in extra="
            )


_REFUSED = "only state of the parameter's own geometry, and scalars, can be saved for any other layout"


def _note(kinds: dict[str, str], key: str, kind: str, name: str) -> None:
    if kinds.setdefault(key, kind) != kind:
        raise ValueError(
            f"optimizer state '{key}' of '{name}' is a {kind}, of another parameter a {kinds[key]}: {_REFUSED}"
        )


def kind_of(optimizer: Optimizer | str) -> str:
    """Optimizers of one kind can take each other's state."""
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    return "Adam" if name in ("AdamW", "Adam") else name


def groups_for(optimizer: Optimizer, model: ModelState, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's own groups, with the hyperparameters that were saved for their parameters.

    Raises ValueError where a parameter was in no group, or a group now holds parameters whose saved values differ.
    """
    by_name = {name: group for group in saved for name in group["params"]}
    groups, index = [], 0
    names = [piece.name.removeprefix(MODEL) for piece in ordered(optimizer, model)]
    for number, own in enumerate(optimizer.param_groups):
        mine = names[index : index + len(own["params"])]
        group = {key: value for key, value in own.items() if key != "params"}
        first: dict[str, Any] = {}
        for name in mine:
            if name not in by_name:
                raise ValueError(
                    f"the checkpoint's optimizer did not have '{name}', which is in group {number} of this one"
                )
            there = {key: value for key, value in by_name[name].items() if key != "params" and key not in OWN}
            for key, value in there.items():
                if key in first and not _equal(first[key], value):
                    raise ValueError(
                        f"group {number} of the optimizer holds '{mine[0]}', saved with {key}={first[key]!r}, and "
                        f"'{name}', saved with {key}={value!r}: put them in separate groups, as when saving"
                    )
            first = first or there
        groups.append({**group, **first, "params": list(range(index, index + len(mine)))})
        index += len(mine)
    return groups


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def restore(optimizer: Optimizer, groups: list[dict[str, Any]], states: dict[int, dict[str, Any]]) -> None:
    """Gives the optimizer its saved state. states: by the parameter's place in `groups`."""
    given = {index: dict(state) for index, state in states.items()}
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    if _loader(type(optimizer)) is not Optimizer.load_state_dict:
        return
    # torch casts state to the parameter's dtype: moments saved in fp32 for bf16 parameters would lose their bits.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in given.items():
        own = optimizer.state[parameters[index]]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and key in own and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)


def _loader(kind: type[Optimizer]) -> Callable[..., Any]:
    return kind.load_state_dict

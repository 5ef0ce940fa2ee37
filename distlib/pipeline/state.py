"""What a call changes of a model's parameters and buffers, seen from outside while a run is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from distlib.pipeline.ghost import places

Slots = Mapping[tuple[int, str], str]  # (id of a module, key): the first name of what hung there when the run began


class LeafState:
    """The parameters and buffers of a leaf, before a call of it. What is written through .data is not seen."""

    def __init__(self, leaf: str, module: nn.Module, slots: Slots) -> None:
        self._places = places(module)
        self._marks = [_mark(place.tensor) for place in self._places]
        self.names = tuple(slots.get((id(place.owner), place.key), f"{leaf}.{place.name}") for place in self._places)

    def changed(self, unseen: set[int]) -> tuple[str, ...]:
        """Names of those that the call wrote or replaced. unseen: ids of what is written without a new version."""
        found = []
        for name, place, mark in zip(self.names, self._places, self._marks, strict=True):
            same = _mark(place.tensor) == mark and place.store.get(place.key) is place.tensor
            if not same or id(place.tensor) in unseen:
                found.append(name)
        return tuple(dict.fromkeys(found))


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Changes with the tensor's values, as far as torch tells, and with its memory."""
    return tensor._version, tensor.untyped_storage()._cdata


def statistics(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The running averages that a torch function writes, which it does without a new version."""
    if target not in (functional.batch_norm, functional.instance_norm):
        return []
    given = inspect.signature(target).bind(*args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    writes = values["training"] if "training" in values else values["use_input_stats"]
    averages = (values["running_mean"], values["running_var"])
    return [tensor for tensor in averages if writes and tensor is not None]

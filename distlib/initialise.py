"""First values of modules that were built on the meta device: by a function of the caller's, or reset_parameters().

    owner       what holds new memory: a module of the model, or a stage's container for one that was divided
    stood for   the container's module in the whole model, whose class says how its values come about: it holds the
                new tensors while it is initialised
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Init = Callable[[nn.Module], Any]

_stood_for: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def stand_for(container: nn.Module, module: nn.Module) -> None:
    """Whoever initialises `container` from now on initialises its tensors as those of `module`, while that lives."""
    _stood_for[container] = weakref.ref(module)


def original(owner: nn.Module) -> nn.Module:
    """The module of the whole model that `owner` is, or stands for."""
    reference = _stood_for.get(owner)
    module = None if reference is None else reference()
    return owner if module is None else module


def require_init(owner: nn.Module, init: Init | None, name: str) -> None:
    """Raises ValueError for a module on the meta device that nobody can initialise. name: in the model."""
    module = original(owner)
    if init is None and not callable(getattr(module, "reset_parameters", None)):
        raise ValueError(
            f"{name or 'the model'} ({type(module).__name__}) is on the meta device and has no reset_parameters(): "
            "give init=, a function that initialises the parameters and buffers of a module"
        )


def unset(tensor: Tensor) -> None:
    """Fills new memory with what `initialise` recognises."""
    if tensor.is_floating_point() or tensor.is_complex():
        with torch.no_grad():
            tensor.fill_(float("nan"))


def initialise(owner: nn.Module, init: Init | None, name: str, new: Collection[str]) -> None:
    """Gives the tensors in `owner` values: init(module), or its reset_parameters().

    new: attributes of those that have none yet, in whose memory `unset` was. name: of the module in the model.

    Raises ValueError, with names, for those that are as they were.
    """
    module = original(owner)
    reset: Any = getattr(module, "reset_parameters", None)
    if module is owner:
        init(module) if init is not None else reset()
    else:
        _through(module, owner, init or (lambda _: reset()))
    held: Mapping[str, Any] = {**owner._parameters, **owner._buffers}
    if missing := [key for key in new if _is_unset(held.get(key))]:
        by = "init" if init is not None else "reset_parameters()"
        raise ValueError(
            f"{by} left {', '.join(missing)} of {name or 'the model'} ({type(module).__name__}) without values, which "
            "is on the meta device: let it set them, or build this module on the CPU"
        )


def _is_unset(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and bool(tensor.isnan().any())


def _through(module: nn.Module, owner: nn.Module, init: Init) -> None:
    """init(module), with the tensors of `owner` in it; others of its own stay what and where they are."""
    stores = ((module._parameters, owner._parameters), (module._buffers, owner._buffers))
    before = [dict(theirs) for theirs, _ in stores]
    try:
        for theirs, ours in stores:
            theirs.update({key: tensor for key, tensor in ours.items() if key in theirs})
        init(module)
        for theirs, ours in stores:
            ours.update({key: theirs[key] for key in ours if theirs.get(key) is not None})
    finally:
        for (theirs, _), was in zip(stores, before, strict=True):
            theirs.clear()
            theirs.update(was)

"""First values of modules that were built on the meta device: by a function of the caller's, or reset_parameters().

    owner       what holds new memory: a module of the model, or a stage's container for one that was divided
    stood for   the container's module in the whole model, whose class says how its values come about: it holds the
                new tensors while it is initialised
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Init = Callable[[nn.Module], Any]

# What no one starts with: in wider integers than a byte.
_MARKS = {dtype: torch.iinfo(dtype).min + 0x5A for dtype in (torch.int16, torch.int32, torch.int64)}
_stood_for: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def stand_for(container: nn.Module, module: nn.Module) -> None:
    """Whoever initialises `container` from now on initialises its tensors as those of `module`, while that lives."""
    _stood_for[container] = weakref.ref(module)


def _original(owner: nn.Module) -> nn.Module:
    """The module of the whole model that `owner` is, or stands for."""
    reference = _stood_for.get(owner)
    module = None if reference is None else reference()
    return owner if module is None else module


def require_init(owner: nn.Module, init: Init | None, name: str) -> None:
    """Raises ValueError for a module on the meta device that nobody can initialise. name: in the model."""
    module = _original(owner)
    if init is None and not callable(getattr(module, "reset_parameters", None)):
        raise ValueError(
            f"{name or 'the model'} ({type(module).__name__}) is on the meta device and has no reset_parameters(): "
            "give init=, a function that initialises the parameters and buffers of a module"
        )


def unset(tensor: Tensor) -> None:
    """Fills new memory with what `initialise` recognises; bool and one-byte numbers with zeros."""
    with torch.no_grad():
        if tensor.itemsize == 1:
            tensor.zero_()
        else:
            tensor.fill_(_MARKS.get(tensor.dtype, float("nan")))


def initialise(owner: nn.Module, init: Init | None, name: str, new: Mapping[str, Tensor]) -> None:
    """Gives the tensors in `owner` values: init(module), or its reset_parameters().

    new: by attribute, the memory of those that have none yet, on which the tensors there are; it gets the values also
    where others are hung in their place. name: of the module in the model.

    Raises ValueError, with names, for what `unset` filled and is as it was.
    """
    module = _original(owner)
    reset: Any = getattr(module, "reset_parameters", None)
    stores = (owner._parameters, owner._buffers)
    before = {key: tensor for store in stores for key, tensor in store.items() if key in new}
    waiting = [key for store in stores for key, tensor in store.items() if tensor is not None and _is_unset(tensor)]
    if module is owner:
        init(module) if init is not None else reset()
    else:
        _through(module, owner, init or (lambda _: reset()))
    for store in stores:
        for key in new.keys() & store.keys():
            store[key] = _on(new[key], before[key], store[key], f"{name}.{key}".lstrip("."))
    held: dict[str, Any] = {key: tensor for store in stores for key, tensor in store.items()}
    if missing := [key for key in waiting if held.get(key) is not None and _is_unset(held[key])]:
        by = "init" if init is not None else "reset_parameters()"
        raise ValueError(
            f"{by} left {', '.join(missing)} of {name or 'the model'} ({type(module).__name__}) without values, which "
            "is on the meta device: let it set them, or build this module on the CPU"
        )


def _is_unset(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or tensor.itemsize == 1 or not tensor.numel():
        return False
    if tensor.dtype in _MARKS:
        return bool((tensor == _MARKS[tensor.dtype]).all())
    return bool(tensor.isnan().any())


def _on(memory: Tensor, before: Any, now: Any, name: str) -> Any:
    """The tensor that hung there before, on its memory, with the values of what hangs there now."""
    if now is before and now.data_ptr() == memory.data_ptr():
        return before
    if not isinstance(now, Tensor) or now.shape != memory.shape:
        raise ValueError(f"{name}, {list(memory.shape)}, was initialised as {list(getattr(now, 'shape', ()))}")
    with torch.no_grad():
        memory.copy_(now)
        before.data = memory.view(memory.shape)
    return before


def _through(module: nn.Module, owner: nn.Module, init: Init) -> None:
    """init(module), with the tensors of `owner` in it, and others to throw away in place of its own meta tensors: what
    is drawn for those, another stage draws, too."""
    stores = ((module._parameters, owner._parameters), (module._buffers, owner._buffers))
    before = [dict(theirs) for theirs, _ in stores]
    try:
        for theirs, ours in stores:
            for key, tensor in theirs.items():
                if ours.get(key) is not None:
                    theirs[key] = ours[key]
                elif tensor is not None and tensor.device.type == "meta":
                    empty = torch.zeros_like(tensor, device="cpu")
                    theirs[key] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
        init(module)
        for theirs, ours in stores:
            ours.update({key: theirs[key] for key in ours if theirs.get(key) is not None})
    finally:
        for (theirs, _), was in zip(stores, before, strict=True):
            theirs.clear()
            theirs.update(was)

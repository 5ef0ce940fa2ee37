"""A model without its data: a copy on the meta device, and fake tensors in place of parameters while it is recorded.

model    weights on the CPU, a GPU or meta    trained; later wrapped, sharded, divided among ranks
ghost    the same modules, all on meta        kept whole on every rank, to record new signatures with
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from distlib.words import words_of


class Place(NamedTuple):
    """Where a parameter or buffer hangs: in `owner`, as `key`; name: the full one."""

    owner: nn.Module
    key: str
    name: str
    tensor: Tensor
    persistent: bool  # False for a buffer that state_dict leaves out

    @property
    def store(self) -> dict[str, Any]:
        return self.owner._parameters if self.key in self.owner._parameters else self.owner._buffers

    def put(self, tensor: Tensor) -> None:
        """Hang another tensor there."""
        if type(self.owner).__setattr__ is not nn.Module.__setattr__:
            setattr(self.owner, self.key, tensor)  # modules such as nn.LSTM keep lists of their own
        else:
            self.store[self.key] = tensor


def places(module: nn.Module) -> list[Place]:
    """All parameters and buffers in registration order; those that hang in several places come several times."""
    found = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for store in (owner._parameters, owner._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    persistent = key not in owner._non_persistent_buffers_set
                    found.append(Place(owner, key, f"{prefix}.{key}" if prefix else key, tensor, persistent))
    return found


def ghost(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are on the meta device: no data is copied.

    Classes, hooks, ties, `training` and `requires_grad` are those of the module. Tensors that are plain attributes are
    shared with it. Make it before modules are wrapped or sharded.

    Raises ValueError for lazy modules: they have no shapes yet.
    """

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta", requires_grad=False)

    return copy_with(module, empty)


def copy_with(module: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy with `make(tensor)` for each parameter and buffer; ties stay ties, plain attributes are shared."""
    memo: dict[int, Any] = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'} is a {type(part).__name__} of torch.jit, whose modules cannot be recorded: "
                "build the pipeline of the plain module"
            )
    for place in places(module):
        tensor = place.tensor
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise ValueError(f"{place.name} has no shape yet (a lazy module): run a forward first")
        if id(tensor) not in memo:
            new = make(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
    for part in module.modules():
        for leaf in pytree.tree_leaves(dict(vars(part))):
            if isinstance(leaf, Tensor):
                memo.setdefault(id(leaf), leaf)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"{_not_copied(module, memo)} cannot be copied ({words_of(error)}), and a pipeline records the model with "
            "a copy of it that has no data. Make that in its forward, or give it a __deepcopy__"
        ) from error


def _not_copied(module: nn.Module, memo: dict[int, Any]) -> str:
    """What of a module copy.deepcopy fails at: the innermost module, and its attribute."""
    for name, part in reversed(list(module.named_modules())):
        where = f"{name} ({type(part).__name__})" if name else f"the model ({type(part).__name__})"
        for key, value in vars(part).items():
            if key == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # noqa: BLE001 - whatever it is, that is the attribute
                return f"attribute {key} of {where}"
    return f"the model ({type(module).__name__})"


def mirror(ghost: nn.Module, module: nn.Module) -> None:
    """Give the ghost the `training` and `requires_grad` of all modules and parameters that `module`, a stage or the
    whole model, has under the same names. `ghost.train()` and `ghost.eval()` work too, as on any module."""
    parts = dict(ghost.named_modules(remove_duplicate=False))
    for name, part in module.named_modules(remove_duplicate=False):
        if name in parts:
            parts[name].training = part.training
    held = {place.name: place.tensor for place in places(ghost)}
    for place in places(module):
        known = held.get(place.name)
        if known is not None and known.requires_grad != place.tensor.requires_grad:
            known.requires_grad_(place.tensor.requires_grad)


@contextlib.contextmanager
def faked(
    module: nn.Module, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype | None
) -> Iterator[dict[int, str]]:
    """Fake tensors instead of all parameters and buffers inside; afterwards the modules are as they were, attributes
    included. dtype: of the floating parameters, if another one than theirs.

    Yields id(fake) -> the first full name of what it stands for. Each fake lives until the end.
    """
    hanging = places(module)
    fakes: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    for place in hanging:
        real = place.tensor
        if isinstance(real, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise ValueError(f"{place.name} has no shape yet (a lazy module): run a forward first")
        if real.layout != torch.strided:
            raise ValueError(f"{place.name} is {real.layout}: only dense parameters and buffers can be recorded")
        if id(real) not in fakes:
            is_parameter = isinstance(real, nn.Parameter)
            kind = dtype if dtype is not None and is_parameter and real.is_floating_point() else real.dtype
            with mode:
                fake = torch.empty_strided(real.shape, real.stride(), dtype=kind, device=device)
                fakes[id(real)] = nn.Parameter(fake, requires_grad=real.requires_grad) if is_parameter else fake
            names[id(fakes[id(real)])] = place.name
    parts = list(module.modules())
    saved = [(part, dict(vars(part)), dict(part._parameters), dict(part._buffers)) for part in parts]
    try:
        for place in hanging:
            place.put(fakes[id(place.tensor)])
        yield names
    finally:
        for part, attributes, parameters, buffers in saved:
            vars(part).clear()
            vars(part).update(attributes)
            for store, before in ((part._parameters, parameters), (part._buffers, buffers)):
                store.clear()
                store.update(before)
        for place in hanging:
            place.put(place.tensor)

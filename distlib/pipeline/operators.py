"""Operators below autograd: what tells two calls apart, and the same operator for memory that is given."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

Kind = tuple[Any, Hashable]  # an operator, and all of its arguments but the values of tensors

_aten = torch.ops.aten
_MEMORY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_TOLD_BY_VALUE = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_BELOW_PYTHON = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.Python)


def kind_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kind | None:
    """Of a call. None if it is of higher order, on other tensors than dense ones, or if values decide the shape."""
    if not isinstance(func, torch._ops.OpOverload) or torch.Tag.dynamic_output_shape in func.tags:
        return None
    traits: list[Any] = [torch.get_default_dtype()]
    for x in leaves(args, kwargs):
        if isinstance(x, Tensor):
            if not is_dense(x):
                return None
            traits.append((x.shape, x.stride(), x.dtype, x.device))
        elif isinstance(x, _TOLD_BY_VALUE):
            traits.append((type(x), x))
        else:
            traits.append(type(x))
    return func, tuple(traits)


def leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Arguments of an operator: those are no deeper than lists. Lists are told by their lengths."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, (list, tuple)):
            yield len(x)
            yield from x
        else:
            yield x


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor has, while it lives or a StorageWeakRef does."""
    return tensor.untyped_storage()._cdata


def is_dense(x: Any) -> bool:
    """Whether it is a tensor with memory of its own. Subclasses and nested tensors know few operators."""
    return (type(x) is Tensor or type(x) is nn.Parameter) and x.layout is torch.strided and not x.is_nested


def out_variant(func: Any) -> Callable[..., Tensor] | None:
    """The same operator for a given result, if it has one that makes it there (and does not copy it there), by the same
    kernel (what is composed of others, as inference mode shows it, may be composed in another way)."""
    if func.overloadpacket in _MEMORY:
        return _as_given
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return None
    packet, arguments = func.overloadpacket, func._schema.arguments
    for name in packet.overloads():
        other = getattr(packet, name)
        declared = other._schema.arguments
        outs = [argument for argument in declared if argument.is_out]
        rest = [argument for argument in declared if not argument.is_out]
        alike = [(a.name, str(a.type)) for a in rest] == [(a.name, str(a.type)) for a in arguments]
        if alike and len(outs) == 1 and torch.Tag.generated not in other.tags:
            return other if outs[0].name == "out" else _with_out(other, outs[0].name)
    return None


def _with_out(func: Any, name: str) -> Callable[..., Tensor]:
    """An operator whose given result has another name."""
    return lambda *args, out, **kwargs: func(*args, **kwargs, **{name: out})


def _as_given(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
    """Memory, for an operator that asks for some."""
    return out


def can_be_looked_into(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether `seen_inside` can call it: there is a kernel of its tensors' device, and it takes its arguments as they
    are. (Numbers stand for tensors in some calls; the operator's own call makes those.)"""
    arguments = func._schema.arguments
    given = {argument.name: x for argument, x in zip(arguments, args, strict=False)} | dict(kwargs)
    numbers = any(str(a.type) == "Tensor" and isinstance(given.get(a.name), (int, float, complex)) for a in arguments)
    return not numbers and any(isinstance(x, Tensor) for x in leaves(args, kwargs))


def seen_inside(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls an operator's kernel below the mode that is on: the mode sees the operators that the kernel calls, and not
    the operator itself."""
    keys = reduce(or_, (torch._C._dispatch_keys(x) for x in leaves(args, kwargs) if isinstance(x, Tensor)))
    return func.redispatch(keys & _BELOW_PYTHON, *args, **kwargs)

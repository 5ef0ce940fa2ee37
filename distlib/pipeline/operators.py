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
_RESIZE_WHAT_IS_GIVEN = {_aten.huber_loss}
_TOLD_BY_VALUE = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_BELOW_PYTHON = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.Python)

# What has no variant for a given result, but asks the dispatcher for the memory, or calls what has one. Only these are
# looked into: Python cannot repeat all calls that kernels make (some have numbers that stand for tensors).
_KERNELS = {
    getattr(_aten, name)
    for name in (
        *("native_layer_norm", "native_group_norm", "native_batch_norm"),
        *("convolution", "_convolution", "mkldnn_convolution", "thnn_conv2d", "slow_conv_dilated2d"),
        *("embedding", "relu", "clone", "_to_copy", "repeat", "constant_pad_nd", "flip", "roll"),
    )
    if hasattr(_aten, name)  # torch's own, not promised to stay
}


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


def has_default_strides(tensor: Tensor) -> bool:
    """Whether its strides are those of a new tensor, also where a dimension has one element and any would do."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != step:
            return False
        step *= max(size, 1)
    return True


def out_variant(func: Any) -> Callable[..., Tensor] | None:
    """The same operator for a given result, if it has one that makes it there (and does not copy it there), by the same
    kernel (what is composed of others may be composed in another way)."""
    packet, arguments = func.overloadpacket, func._schema.arguments
    if packet in _MEMORY:
        return _as_given
    if packet in _RESIZE_WHAT_IS_GIVEN or _has_kernel(func, "CompositeImplicitAutograd"):
        return None
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
    """Memory, for an operator that asks for some. For deterministic algorithms, torch fills what it gives."""
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        if out.dtype == torch.bool:
            out.fill_(True)
        elif out.is_floating_point() or out.is_complex():
            out.fill_(torch.nan)
        else:
            out.fill_(torch.iinfo(out.dtype).max)
    return out


def can_be_looked_into(func: Any) -> bool:
    """Whether `call_kernel` shows a mode where the result's memory comes from."""
    return func.overloadpacket in _KERNELS


def is_known_to_autograd(func: Any) -> bool:
    """Whether autograd has a formula for it, or for all that it is composed of. Else it sees what the kernel calls."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace == "aten":
        return True
    return any(_has_kernel(func, key) for key in ("Autograd", "AutogradCPU", "CompositeImplicitAutograd"))


def call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls an operator from a mode, as if there were none."""
    if is_known_to_autograd(func) or not any(isinstance(x, Tensor) for x in leaves(args, kwargs)):
        return func(*args, **kwargs)
    keys, guard = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with guard(keys.AutogradFunctionality, False), guard(keys.ADInplaceOrView, False):  # a mode is below them
        return call_kernel(func, args, kwargs)


def call_kernel(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls an operator's kernel for its tensors, below modes: one that is on sees what the kernel calls."""
    keys = reduce(or_, (torch._C._dispatch_keys(x) for x in leaves(args, kwargs) if isinstance(x, Tensor)))
    return func.redispatch(keys & _BELOW_PYTHON, *args, **kwargs)


def _has_kernel(func: Any, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)

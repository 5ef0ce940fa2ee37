"""What can be wrapped, what must be equal on all ranks, and what must not change afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from distlib import streams
from distlib.comm.group import Group
from distlib.data_parallel.naming import Transparent
from distlib.data_parallel.reducer import Options
from distlib.data_parallel.replicas import describe

_HALF = (torch.float16, torch.bfloat16)


def options(chosen: Options) -> None:
    """Options that contradict each other or make no sense: ValueError."""
    number = isinstance(chosen.bucket_mb, (int, float))
    if not (number and math.isfinite(chosen.bucket_mb) and chosen.bucket_mb > 0):
        raise ValueError(f"bucket_mb must be a positive number of MiB, got {chosen.bucket_mb!r}")
    if chosen.gradient_dtype is not None and chosen.gradient_dtype not in _HALF:
        raise ValueError(f"gradient_dtype must be torch.float16 or torch.bfloat16, got {chosen.gradient_dtype!r}")
    if chosen.gradient_dtype is not None and chosen.comm_hook is not None:
        raise ValueError("gradient_dtype and comm_hook both say how gradients travel; choose one")
    if chosen.find_unused_parameters and chosen.static_graph:
        raise ValueError(
            "find_unused_parameters allows other unused parameters in every step, static_graph the same ones "
            "in all steps; choose one"
        )
    if chosen.comm_hook is not None and not callable(chosen.comm_hook):
        raise ValueError(f"comm_hook must be callable, got {chosen.comm_hook!r}")


def plain(wrapped: nn.Module) -> None:
    """What no wrapper can take: no module, lazy, wrapped already, sparse. ValueError, naming the parameter and the
    fix."""
    if not isinstance(wrapped, nn.Module):
        is_class = isinstance(wrapped, type) and issubclass(wrapped, nn.Module)
        fix = f"make one: {wrapped.__name__}(...)" if is_class else "of several, make one: torch.nn.Sequential(...)"
        raise ValueError(f"module={wrapped!r:.200} must be a torch.nn.Module; {fix}")
    for name, tensor in [*wrapped.named_parameters(), *wrapped.named_buffers()]:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{name!r} has no shape yet: run one forward of the lazy module before wrapping")
    for prefix, part in wrapped.named_modules():
        if isinstance(part, (Transparent, nn.parallel.DistributedDataParallel)):
            raise ValueError(
                f"{prefix or 'the module'!r} is wrapped in {type(part).__name__} already: its gradients would be "
                "averaged twice. Wrap the plain module"
            )
        if getattr(part, "sparse", False) is True and isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            name = f"{prefix}.weight" if prefix else "weight"
            raise ValueError(
                f"{name!r} would have sparse gradients, which flat buffers cannot hold: build the embedding with "
                "sparse=False"
            )


def strided(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """ValueError, by name, for a tensor of another layout."""
    for name, tensor in named:
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name!r} has layout {tensor.layout}; flat buffers can only hold strided tensors")


def module(wrapped: nn.Module, chosen: Options) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters that gradients are averaged for, each once, in registration order: none, if all are frozen.

    Raises:
        ValueError: a module that cannot be wrapped, naming the parameter and the fix.
    """
    plain(wrapped)
    named = [*wrapped.named_parameters(), *wrapped.named_buffers()]
    for name, tensor in named:
        if tensor.device.type == "meta":
            raise ValueError(f"{name!r} is on the meta device: materialise the module before wrapping")
    trained = [(name, p) for name, p in wrapped.named_parameters() if p.requires_grad]
    first_name, first = next(iter([*trained, *named]), ("", None))
    for name, tensor in named:
        if first is not None and tensor.device != first.device:
            raise ValueError(
                f"all parameters and buffers must be on one device: {first_name!r} is on {first.device}, "
                f"{name!r} on {tensor.device}"
            )
    strided(trained)
    for name, parameter in trained:
        if parameter.is_complex() and chosen.gradient_dtype is not None:
            raise ValueError(f"{name!r} is complex: gradient_dtype cannot hold it")
    return [name for name, _ in trained], [parameter for _, parameter in trained]


def device_of(wrapped: nn.Module, group: Group) -> torch.device:
    """Where the module's tensors are; without any, one whose tensors the group communicates."""
    for tensor in [*wrapped.parameters(), *wrapped.buffers()]:
        return tensor.device
    there = streams.accelerator()
    return torch.device("cpu") if there is None or group.on_device("cpu") else there


def facts(wrapped: nn.Module, chosen: Options, broadcast_buffers: bool) -> list[tuple[str, str]]:
    """What must be equal on all ranks, as (name, description)."""
    hook = "none" if chosen.comm_hook is None else "given"
    return [
        *((f"parameter {name}", describe(p, with_strides=True)) for name, p in wrapped.named_parameters()),
        *((f"buffer {name}", describe(b, with_strides=False)) for name, b in wrapped.named_buffers()),
        ("option bucket_mb", str(chosen.bucket_mb)),
        ("option find_unused_parameters", str(chosen.find_unused_parameters)),
        ("option static_graph", str(chosen.static_graph)),
        ("option broadcast_buffers", str(broadcast_buffers)),
        ("option gradient_dtype", str(chosen.gradient_dtype)),
        ("option comm_hook", hook),
    ]


class Places:
    """Where the parameters hang in the module, to notice that they were replaced, frozen or unfrozen.

    replaced, unfrozen, frozen: what each means for the wrapper, and the fix; frozen=None: parameters may be frozen.
    """

    def __init__(self, wrapped: nn.Module, *, replaced: str, unfrozen: str, frozen: str | None) -> None:
        self._replaced, self._unfrozen, self._frozen = replaced, unfrozen, frozen
        self._places = [
            (owner._parameters, key, parameter, parameter.requires_grad, f"{prefix}.{key}" if prefix else key)
            for prefix, owner in wrapped.named_modules()
            for key, parameter in owner._parameters.items()
            if parameter is not None
        ]
        self._kinds = [(p.dtype, p.device, p.shape) for _, _, p, _, _ in self._places]

    def check(self, rank: int) -> None:
        """Before a forward that records a graph. Raises RuntimeError, by name."""
        for owner, key, parameter, trained, name in self._places:
            if owner.get(key) is not parameter or parameter.requires_grad is not trained:
                self._explain(owner.get(key), parameter, trained, f"rank {rank}: parameter {name!r} was")

    def _explain(self, found: torch.Tensor | None, parameter: torch.Tensor, trained: bool, it_was: str) -> None:
        if found is not parameter:
            raise RuntimeError(f"{it_was} replaced after wrapping: {self._replaced}")
        if not trained:
            raise RuntimeError(f"{it_was} frozen when it was wrapped and requires a gradient now: {self._unfrozen}")
        if self._frozen is not None:
            raise RuntimeError(f"{it_was} frozen (requires_grad_(False)) after wrapping: {self._frozen}")

    def check_kinds(self, rank: int) -> None:
        """After `.to()` and its like. Raises RuntimeError, by name."""
        for (owner, key, parameter, _, name), kind in zip(self._places, self._kinds, strict=True):
            found = owner.get(key)
            if found is not parameter or (parameter.dtype, parameter.device, parameter.shape) != kind:
                raise RuntimeError(
                    f"rank {rank}: parameter {name!r} changed from {kind[0]} on {kind[1]} after wrapping; "
                    "call .to() on the module before wrapping it"
                )


def warn_of_hooks(module: nn.Module) -> None:
    """Warns of hooks on parameters, which in pieces never run: gradients reach pieces outside of autograd."""
    hooked = [
        name
        for name, parameter in module.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    if hooked:
        shown = ", ".join(map(repr, hooked[:3])) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
        warnings.warn(
            f"hooks on the parameters {shown} will not run: the gradients of pieces are sums over ranks, made outside "
            "of autograd. Change gradients between backward and step, or on modules (register_full_backward_hook)",
            stacklevel=4,
        )

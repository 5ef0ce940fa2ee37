"""What a recorder is told while a model runs: calls of leaves, of torch functions and of custom autograd Functions, and
what goes past these."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distlib.pipeline.refusals import ASKS_FOR_VALUES, line


class Recorder(Protocol):
    """Writes down. inside: the leaf or autograd.Function that runs; in_glue: whether none does that is a leaf.

    drew: an operator drew random numbers. past: one that no torch function announced. asked: an error for values that
    are not there. thread: in which the model runs.
    """

    inside: str | None
    drew: bool
    past: str | None
    asked: Exception | None
    thread: int

    @property
    def in_glue(self) -> bool: ...
    def call(
        self,
        target: str | Callable[..., Any],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Runs it and writes it down."""
        ...


class Glue(TorchFunctionMode):
    """Hands torch functions of the glue to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._recorder.inside is not None:
            return func(*args, **(kwargs or {}))
        return self._recorder.call(func, func, args, kwargs or {})


class Draws(TorchDispatchMode):
    """Notices operators that draw random numbers, wherever they are called."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._recorder.inside is None and self._recorder.past is None:
            self._recorder.past = f"{func}{line()}"
        if torch.Tag.nondeterministic_seeded in func.tags and not _never_drops(func, args, kwargs or {}):
            self._recorder.drew = True
        try:
            return func(*args, **(kwargs or {}))
        except ASKS_FOR_VALUES as error:
            if self._recorder.in_glue:
                self._recorder.asked = self._recorder.asked or error
            raise


def _never_drops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Attention has the tag whatever its dropout."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "dropout_p":
            return not value
    declared = {argument.name: argument for argument in func._schema.arguments}
    return "dropout_p" in declared and not kwargs.get("dropout_p", declared["dropout_p"].default_value)


def _has_more_than_a_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or kind.__call__ is not nn.Module.__call__


@contextlib.contextmanager
def intercepted(leaves: Mapping[str, nn.Module], recorder: Recorder) -> Iterator[None]:
    """Calls of the leaves go to the recorder: each gets, for now, a subclass of its class."""

    def subclass(name: str, kind: type[nn.Module]) -> type[nn.Module]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            run = kind.__call__.__get__(self)
            if recorder.inside is None:
                return recorder.call(name, run, args, kwargs)
            if recorder.inside in leaves:
                return run(*args, **kwargs)
            raise ValueError(
                f"pipeline: {name} is called inside of {recorder.inside}, which runs in one stage. Activation "
                "checkpointing belongs inside of the blocks: distlib.checkpoint_activations(module)"
            )

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            run = super(made, self).forward
            if recorder.inside is not None:
                return run(*args, **kwargs)
            if _has_more_than_a_forward(self, kind):
                raise ValueError(
                    f"pipeline: {name}.forward is called itself, past the hooks or the __call__ of the module; a stage "
                    "calls the module. Call the module, or take its hooks off"
                )
            return recorder.call(name, run, args, kwargs)

        own = {"__call__": call, "forward": forward, "__module__": kind.__module__}
        made: Any = type(kind.__name__, (kind,), own)
        return made

    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for name, part in leaves.items():
            kind = type(part)
            part.__class__ = subclass(name, kind)
            changed.append((part, kind))
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind


@contextlib.contextmanager
def whole_functions(recorder: Recorder) -> Iterator[None]:
    """Custom autograd Functions in glue are one call each: torch function modes see only what they do inside."""
    function = torch.autograd.Function
    plain = function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        run = plain.__get__(None, cls)
        if recorder.inside is not None or threading.get_ident() != recorder.thread:
            return run(*args, **kwargs)
        return recorder.call(run, run, args, kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = plain

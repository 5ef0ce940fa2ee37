"""Borders in a run of a module: where modules inside of it begin and end, as hooks of that one run see them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn


class Border(NamedTuple):
    """Where `module` begins, or ends, for the `nth` time, from 0, in a run of what it lies in."""

    module: nn.Module
    ends: bool
    nth: int


@contextlib.contextmanager
def all_borders(module: nn.Module | None, passed: Callable[[Border], None]) -> Iterator[None]:
    """Tells `passed` of every border in what `module` runs, if there is one."""
    counts: Counter[tuple[nn.Module, bool]] = Counter()

    def tell(part: nn.Module, ends: bool) -> None:
        passed(Border(part, ends, counts[part, ends]))
        counts[part, ends] += 1

    parts = [] if module is None or _is_closed(module) else list(_inside(module, {module}))
    with contextlib.ExitStack() as stack:
        for part, ends in itertools.product(parts, (False, True)):
            stack.enter_context(_hooked(part, ends, partial(tell, part, ends)))
        yield


@contextlib.contextmanager
def at_border(border: Border | None, then: Callable[[], None]) -> Iterator[None]:
    """Calls `then` at a border; at once where there is none."""
    if border is None:
        then()
        yield
        return
    turns = itertools.count()
    with _hooked(border.module, border.ends, lambda: then() if next(turns) == border.nth else None):
        yield


@contextlib.contextmanager
def _hooked(module: nn.Module, ends: bool, then: Callable[[], None]) -> Iterator[None]:
    hook = _Hook(then)
    handle = module.register_forward_hook(hook) if ends else module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        hook.then = None


class _Hook:
    """Calls `then` on the thread that made it, while it is registered, and not inside of an operator. Copies, made when
    a module is copied, do nothing."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.then, self._thread = then, threading.get_ident()

    def __call__(self, *given: Any) -> None:
        # A function that torch.compile makes of modules is compiled once more when they have hooks, and calls none.
        if torch.compiler.is_compiling():
            return
        if self.then is not None and self._thread == threading.get_ident() and not _is_inside_of_an_operator():
            self.then()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _is_inside_of_an_operator() -> bool:
    """Or in inference mode."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def _inside(module: nn.Module, known: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules in a module; nothing of those that are closed."""
    for part in module.children():
        if part not in known and not _is_closed(part):
            known.add(part)
            yield part
            yield from _inside(part, known)


def _is_closed(module: nn.Module) -> bool:
    """Whether it is compiled, or runs otherwise if anything inside has a hook."""
    called, forward = getattr(module, "_compiled_call_impl", None), getattr(module, "forward", None)
    compiled = "_orig_mod" in module._modules or called is not None or hasattr(forward, "_torchdynamo_orig_callable")
    return compiled or isinstance(module, (torch.jit.ScriptModule, nn.TransformerEncoderLayer))

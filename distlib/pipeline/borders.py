"""Borders in a run of a module: where modules inside of it begin and end, as hooks of that one run see them."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
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
    """`passed` is told of every border in what `module` runs, if there is one."""
    counts: Counter[tuple[nn.Module, bool]] = Counter()

    def told(part: nn.Module, ends: bool) -> Callable[[], None]:
        def tell() -> None:
            counts[part, ends] += 1
            passed(Border(part, ends, counts[part, ends] - 1))

        return tell

    with contextlib.ExitStack() as stack:
        for part in () if module is None or _is_closed(module) else _inside(module, {module}):
            for ends in (False, True):
                stack.enter_context(_hook(part, ends, told(part, ends)))
        yield


@contextlib.contextmanager
def at_border(border: Border, then: Callable[[], None]) -> Iterator[None]:
    """Calls `then` at a border."""
    left = border.nth

    def count() -> None:
        nonlocal left
        if left == 0:
            then()
        left -= 1

    with _hook(border.module, border.ends, count):
        yield


@contextlib.contextmanager
def _hook(module: nn.Module, ends: bool, then: Callable[[], None]) -> Iterator[None]:
    thread = threading.get_ident()

    def hook(*given: Any) -> None:
        # Copies of a module may run on other threads. A compiled function that calls modules is compiled once more
        # for hooks on them, of which it does not keep these.
        if not torch.compiler.is_compiling() and threading.get_ident() == thread:
            then()

    handle = module.register_forward_hook(hook) if ends else module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _inside(module: nn.Module, known: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules inside of a module, without those that are compiled, or run otherwise if anything has a hook."""
    for part in module.children():
        if part not in known and not _is_closed(part):
            known.add(part)
            yield part
            yield from _inside(part, known)


def _is_closed(module: nn.Module) -> bool:
    called, forward = getattr(module, "_compiled_call_impl", None), getattr(module, "forward", None)
    compiled = "_orig_mod" in module._modules or called is not None or hasattr(forward, "_torchdynamo_orig_callable")
    return compiled or isinstance(module, (torch.jit.ScriptModule, nn.TransformerEncoderLayer))

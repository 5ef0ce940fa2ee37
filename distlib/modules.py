"""What a module of a tree is: something that is called, or a list of blocks."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called: lists and dicts of modules cannot."""
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in vars(module)


def has_parameters(module: nn.Module) -> bool:
    """Of its own, or of modules inside of it."""
    return next(module.parameters(), None) is not None


def is_repeated(module: nn.Module) -> bool:
    """Whether it is a ModuleList or Sequential with at least two children of one class that have parameters.

    Each parametrized module gets a class of its own: what counts is the one it had.
    """
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    kinds = [type_before_parametrizations(child) for child in module.children() if has_parameters(child)]
    return any(kinds.count(kind) >= 2 for kind in kinds)

"""A wrapper that the wrapped module shines through: its names, its state, its attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from torch import nn


def under_one_name(
    wrapper: nn.Module, parts: Iterable[nn.Module], memo: set[nn.Module] | None, prefix: str, remove_duplicate: bool
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of a wrapper that shares its name with what it holds."""
    memo = set() if memo is None else memo
    if remove_duplicate and wrapper in memo:
        return
    memo.add(wrapper)
    yield prefix, wrapper
    for part in parts:
        yield from part.named_modules(memo, prefix, remove_duplicate)


class Transparent(nn.Module):
    """Holds `module`; parameters, buffers, submodules and state are named as if it were not wrapped.

    That holds too where the wrapper is itself a part of a larger module.
    """

    _instead_of_pickling = "pickle or copy its .module, or save its state_dict()"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.register_load_state_dict_pre_hook(_with_prefix)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are the module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not set yet: do not ask ourselves for ever
                raise
        return getattr(self.module, name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The wrapper and its module share the empty name; parameters and buffers are named by this."""
        yield from under_one_name(self, [self.module], memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's own state dict: the same keys as without the wrapper."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of the module, as saved with or without the wrapper. Every rank loads the same.

        Raises:
            ValueError: with `assign=True`, which would replace the parameters that gradients are averaged
                for.
        """
        if assign:
            raise ValueError(
                "load_state_dict(assign=True) replaces parameters after wrapping; load before wrapping, or "
                "copy with assign=False"
            )
        return self.module.load_state_dict(state_dict, strict=strict)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} belongs to its process group and cannot be pickled or copied; "
            f"{self._instead_of_pickling}"
        )


def _with_prefix(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loading as a part of a larger module: torch looks for the wrapped module's keys under "module."."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)

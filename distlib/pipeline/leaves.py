"""Which modules are leaves: called as one, in one stage. All their ancestors are opened.

GPT                 opened
  embedding         leaf
  blocks            opened: a list has no forward of its own
    0, 1, 2, ...    leaves
  final_norm, head  leaves
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from distlib.modules import has_forward


class Chain(nn.Sequential):
    """Modules one after the other. The first is given all inputs; a tuple that one returns is the next one's positional
    arguments. Names in state_dict begin with the position: "0.", "1.", ..."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result: Any = None
        for k, module in enumerate(self):
            if k == 0:
                result = module(*args, **kwargs)
            else:
                result = module(*result) if type(result) is tuple else module(result)
        return result


def chain(modules: Sequence[nn.Module]) -> tuple[Chain, list[str]]:
    """Modules given stage by stage, as one model, and the names that begin its stages: all but the first."""
    bad = next((m for m in modules if not isinstance(m, nn.Module)), None)
    if bad is not None or not modules:
        raise ValueError(f"pipeline: split must be a list of modules, one per stage; it has {bad!r}")
    if len({id(m) for m in modules}) != len(modules):
        raise ValueError("pipeline: the same module is given as two stages; share its parameters between two modules")
    return Chain(*modules), [str(k) for k in range(1, len(modules))]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: which known names a wrong one resembles."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""


class Names:
    """A model's modules by full name. A module that hangs in several places goes by the first of its names."""

    def __init__(self, module: nn.Module) -> None:
        self._model = type(module).__name__
        self._named = dict(module.named_modules(remove_duplicate=False))
        self._first = {id(part): name for name, part in module.named_modules()}

    def find(self, name: str) -> tuple[str, nn.Module]:
        """A module by any of its names: the first of them, and the module.

        Raises ValueError, with names that resemble it, if there is none.
        """
        if name not in self._named:
            raise ValueError(f"pipeline: {self._model} has no module {name!r}{nearest(name, self._named)}")
        return self._first[id(self._named[name])], self._named[name]


def leaves_of(module: nn.Module, split: str | Sequence[str] = "auto") -> list[str]:
    """The full names of a model's leaves, in registration order.

    split: "auto" opens repeated lists: a ModuleList or Sequential with two children or more of one class that have
        parameters; the longest one wherever it is, and all others that lie in no block of it or of each other. Or the
        full names of modules that begin a stage, of which only the ancestors are opened.

    Modules without a forward, such as lists, are always opened. A module that hangs in several places comes once.

    Raises ValueError for an unknown name (with the nearest one), the model itself, or a name inside of another.
    """
    if isinstance(split, str):
        if split != "auto":
            raise ValueError(f'pipeline: split={split!r} must be "auto", names of modules, or a list of modules')
        cuts = _repeated_children(module)
    else:
        names = Names(module)
        cuts = [names.find(name)[0] for name in split]
        for name in cuts:
            outer = next((other for other in cuts if name.startswith(f"{other}.")), None)
            if name == "" or outer is not None:
                where = f"inside of {outer}" if outer is not None else "the whole model"
                raise ValueError(f"pipeline: split names {name!r}, which is {where}; a stage begins with whole modules")
    opened = {""}
    for name in cuts:
        while name:
            name = name.rpartition(".")[0]
            opened.add(name)
    found: list[str] = []
    seen = {id(module)}
    for name, child in _divide(module, "", opened):
        if id(child) not in seen:
            seen.add(id(child))
            found.append(name)
    return found


def _divide(module: nn.Module, prefix: str, opened: set[str]) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        name = f"{prefix}.{key}" if prefix else key
        if name in opened or not has_forward(child):
            yield from _divide(child, name, opened)
        else:
            yield name, child


def _repeated_children(module: nn.Module) -> list[str]:
    """Children of the longest repeated list, and of the outermost others."""
    lists = [(name, part, _repeats(part)) for name, part in module.named_modules() if _repeats(part) >= 2]
    if not lists:
        return []
    longest = max(lists, key=lambda found: found[2])[0]
    blocks: set[str] = set()  # children of a chosen list: nothing inside of them is cut
    found: list[str] = []
    for name, part, _ in lists:
        ancestors = _ancestors(name)
        is_above = name in _ancestors(longest)
        if name != longest and not is_above and (blocks & {*ancestors, name}):
            continue
        children = [f"{name}.{key}" if name else key for key, _ in part.named_children()]
        within = {*_ancestors(longest), longest}
        found += [child for child in children if child not in within]
        blocks |= {child for child in children if child not in within}
    return found


def _repeats(module: nn.Module) -> int:
    """How many children of a list are of its most frequent class, of those with parameters."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return 0
    kinds = Counter(type(child) for child in module.children() if next(child.parameters(), None) is not None)
    return max(kinds.values(), default=0)


def _ancestors(name: str) -> list[str]:
    """Names above: "a.b.c" gives ["a.b", "a", ""]; none for the model itself."""
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found

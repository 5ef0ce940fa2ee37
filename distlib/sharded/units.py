"""The module tree divided into units: what is gathered, reduced and freed as one.

    GPT                          unit "" (root): all that belongs to no other unit
      embedding, norm, head
      blocks  (a ModuleList)
        0  Block                 unit "blocks.0"
        1  Block                 unit "blocks.1"

"auto" makes one unit of each child of a repeated list: a ModuleList or Sequential with at least two children of the
same class that have parameters. Children without a forward, such as lists in lists, are never called: what they hold
takes their place. Small neighbours are joined until a unit is worth a message; children that are large and hold
repeated lists themselves are divided further.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from distlib.modules import has_forward, has_parameters, is_repeated

SMALLEST = 1 << 20  # bytes: below it, latency counts for more than bandwidth
LARGEST = 512 << 20  # bytes: above it, a unit's buffer is better divided


@dataclass
class Unit:
    """Modules whose parameters are gathered together, and those parameters. The root has the empty name."""

    name: str
    modules: list[nn.Module]
    parameters: list[nn.Parameter] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a parameter hangs: `owner._parameters[key]`; its full name; whether `owner` intercepts assignment."""

    owner: nn.Module
    key: str
    name: str

    @property
    def intercepts(self) -> bool:
        """Modules such as nn.LSTM keep lists of their own of what is assigned to them."""
        return type(self.owner).__setattr__ is not nn.Module.__setattr__


def places(module: nn.Module) -> dict[nn.Parameter, list[Place]]:
    """Every parameter with all the places where it hangs (tied parameters have several), in registration order."""
    found: dict[nn.Parameter, list[Place]] = {}
    for prefix, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{key}" if prefix else key
                found.setdefault(parameter, []).append(Place(owner, key, name))
    return found


def divide(module: nn.Module, how: str | Sequence[type[nn.Module]]) -> list[Unit]:
    """The units of a module in registration order, the root first. Every parameter is in exactly one.

    A parameter that is used in several units (tied) belongs to the root.

    Args:
        how: "auto", or the classes of modules that are units. Units do not nest: the outermost counts.

    Raises:
        ValueError: `how` is neither, or has a class that occurs nowhere in the module, or one without a forward.
    """
    if isinstance(how, str):
        if how != "auto":
            raise ValueError(f'units={how!r}: must be "auto" or a list of module classes')
        groups = list(_repeated(module, ""))
    elif isinstance(how, Collection):
        groups = [[pair] for pair in _of_classes(module, how)]
    else:
        such = how.__name__ if isinstance(how, type) else "Block"
        raise ValueError(f'units={how!r}: must be "auto" or a list of module classes, such as units=[{such}]')
    owner: dict[nn.Module, Unit] = {}
    root = Unit("", [module])
    units = [root]
    for group in groups:
        unit = Unit(group[0][0], [part for _, part in group])
        if any(part is module for part in unit.modules):
            continue  # the root itself
        units.append(unit)
        for part in unit.modules:
            for inner in part.modules():
                owner.setdefault(inner, unit)
    for parameter, hangs in places(module).items():
        homes = {id(owner.get(place.owner, root)): owner.get(place.owner, root) for place in hangs}
        home = next(iter(homes.values())) if len(homes) == 1 else root
        home.parameters.append(parameter)
    return [unit for unit in units if unit.parameters or unit is root]


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _repeated(module: nn.Module, prefix: str) -> Iterator[list[tuple[str, nn.Module]]]:
    """Groups of neighbours in the repeated lists inside of a module."""
    for name, child in _children(module, prefix):
        yield from _joined(child, name) if is_repeated(child) else _repeated(child, name)


def _joined(repeated: nn.Module, prefix: str) -> Iterator[list[tuple[str, nn.Module]]]:
    """Groups of neighbours in a repeated list."""
    group: list[tuple[str, nn.Module]] = []
    size = 0
    for name, block in _called(repeated, prefix):
        inside = list(_repeated(block, name)) if _bytes(block) > LARGEST else []
        if not inside:
            group.append((name, block))
            size += _bytes(block)
        if group and (inside or size >= SMALLEST):
            yield group
            group, size = [], 0
        yield from inside
    if group:
        yield group


def _called(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules inside of a list that have parameters and a forward."""
    for name, child in _children(module, prefix):
        if not has_parameters(child):
            continue
        if has_forward(child):
            yield name, child
        else:
            yield from _called(child, name)


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Children by full name."""
    for key, child in module.named_children():
        yield f"{prefix}.{key}" if prefix else key, child


def _of_classes(module: nn.Module, classes: Sequence[type[nn.Module]]) -> list[tuple[str, nn.Module]]:
    chosen = tuple(classes)
    for one in chosen:
        if not (isinstance(one, type) and issubclass(one, nn.Module)):
            raise ValueError(f"units={list(classes)}: {one!r} is not a class of modules")
        if not any(isinstance(part, one) for part in module.modules()):
            raise ValueError(f"units: the module has no {one.__name__}")
    found: list[tuple[str, nn.Module]] = []

    def walk(part: nn.Module, name: str) -> None:
        if isinstance(part, chosen) and part is not module:
            _require_forward(part, name)
            found.append((name, part))
            return
        for inner, child in _children(part, name):
            walk(child, inner)

    walk(module, "")
    seen: set[int] = set()  # a module registered twice is one unit
    return [pair for pair in found if not (id(pair[1]) in seen or seen.add(id(pair[1])))]  # type: ignore[func-returns-value]


def _require_forward(part: nn.Module, name: str) -> None:
    if has_forward(part) or not has_parameters(part):
        return
    inside = list(dict.fromkeys(type(module).__name__ for _, module in _called(part, name)))
    give = f"such as {' or '.join(inside)}" if inside else "around it"
    raise ValueError(
        f"units: {name!r} is a {type(part).__name__}, which has no forward: it is never called, and its parameters "
        f"would never be whole. Give classes of modules that are called, {give}"
    )

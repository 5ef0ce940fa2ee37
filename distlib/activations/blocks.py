"""The blocks of a module that are treated one by one: children of repeated lists, or modules of given classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from distlib.modules import has_forward, has_parameters, is_repeated


def find_blocks(module: nn.Module, blocks: str | Sequence[type[nn.Module]]) -> dict[str, nn.Module]:
    """Name -> block, in registration order; blocks do not nest (the outermost counts); a block that hangs in several
    places counts once.

    "auto": children of a ModuleList or Sequential that has at least two of the same class with parameters; a list of
    lists is divided down to the last that have modules of their own, or are no more than lists.

    Raises:
        ValueError: no block is found, or `blocks` is neither "auto" nor classes that the module has.
    """
    if isinstance(blocks, str):
        if blocks != "auto":
            raise ValueError(f'blocks={blocks!r}: must be "auto" or a list of module classes')
        found = dict(_repeated(module, ""))
        if not found:
            raise ValueError(
                f"{type(module).__name__} has no repeated blocks (two children of one class in a ModuleList or "
                "Sequential), so nothing would be saved: name the classes to treat, blocks=[MyBlock]"
            )
    elif isinstance(blocks, type) or not isinstance(blocks, Iterable):
        raise ValueError(f'blocks={blocks!r}: must be a list of module classes, as blocks=[MyBlock], or "auto"')
    else:
        found = dict(_of_classes(module, tuple(blocks)))
    seen: set[int] = set()
    return {name: block for name, block in found.items() if not (id(block) in seen or seen.add(id(block)))}  # type: ignore[func-returns-value]


def _repeated(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        name = f"{prefix}.{key}" if prefix else key
        if is_repeated(child):
            yield from _children(child, name)
        else:
            yield from _repeated(child, name)
    if not prefix and is_repeated(module):
        yield from _children(module, "")


def _children(repeated: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for key, block in repeated.named_children():
        inner = f"{name}.{key}" if name else key
        if not has_forward(block) or _is_stage(block):
            yield from _children(block, inner)  # what is never called keeps nothing
        elif has_parameters(block):
            yield inner, block


def _is_stage(block: nn.Module) -> bool:
    """Whether it is a list of blocks that have modules of their own; a Sequential of layers is a block itself."""
    return is_repeated(block) and any(True for child in block.children() for _ in child.children())


def _of_classes(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    if not classes:
        raise ValueError('blocks is empty: pass "auto" or a list of module classes')
    for one in classes:
        if not (isinstance(one, type) and issubclass(one, nn.Module)):
            raise ValueError(f"blocks: {one!r} is not a class of modules")
        if not any(isinstance(part, one) for part in module.modules()):
            raise ValueError(f"blocks: the module has no {one.__name__}")

    def walk(part: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        for key, child in part.named_children():
            inner = f"{name}.{key}" if name else key
            if isinstance(child, classes):
                yield inner, child
            else:
                yield from walk(child, inner)

    if isinstance(module, classes):
        yield "", module
    else:
        yield from walk(module, "")

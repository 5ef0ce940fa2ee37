"""What one run of a model did, as data: a straight list of calls of modules and of torch functions.

    tokens ---------------> embedding --v1--> + --v3--> blocks.0 --v4--> blocks.1 --v5--> head --v6--> output
    arange(12) --v0--> pos ----------v2------/             leaf             leaf          leaf

A *leaf* is a module that lies wholly in one stage; the *glue* between leaves are calls of torch functions. Arguments
refer to values by number; all else in them is constant, so a program belongs to one signature of the inputs.

A call that writes in place makes a new version of all values that share the memory. A *read* is hence a pair: a value,
and the call that wrote the version that is read (None: as it came in).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Read = tuple[int, int | None]


class Spec(NamedTuple):
    """A tensor without its data. requires_grad: a gradient comes back for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @staticmethod
    def of(tensor: Tensor) -> Spec:
        return Spec(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


# ---------------------------------------------------------------- arguments and results


@dataclass(frozen=True)
class Ref:
    """The place of a value in arguments or results."""

    value: int


@dataclass(frozen=True, eq=False)
class Const:
    """Anything that is no tensor, as it was when recorded."""

    value: Any


@dataclass(frozen=True, eq=False)
class Branch:
    """A container with a value in it. spec: how to make it of its leaves; for exact lists, tuples and dicts it is the
    class, or the dict's keys."""

    items: tuple[Template, ...]
    spec: Any


Template = Ref | Const | Branch


def template(tree: Any, value_of: Callable[[Tensor], int], check: Callable[[Any], None]) -> Template:
    """A pytree with numbers in place of tensors. check: is shown all leaves that are no tensors."""
    if isinstance(tree, Tensor):
        return Ref(value_of(tree))
    kind = type(tree)
    if kind is list or kind is tuple:
        items = tuple(template(item, value_of, check) for item in tree)
        return _branch(items, kind, tree)
    if kind is dict:
        items = tuple(template(item, value_of, check) for item in tree.values())
        return _branch(items, tuple(tree), tree)
    leaves, spec = pytree.tree_flatten(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        check(tree)
        return Const(tree)
    return _branch(tuple(template(leaf, value_of, check) for leaf in leaves), spec, tree)


def _branch(items: tuple[Template, ...], spec: Any, tree: Any) -> Template:
    if tree and all(isinstance(item, Const) for item in items):
        return Const(tree)
    return Branch(items, spec)  # empty ones too: a new one each time, for whoever fills it


def refs(tree: Template) -> Iterator[int]:
    """The values of a template, in order."""
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, Branch):
        for item in tree.items:
            yield from refs(item)


def rebuild(items: list[Any], spec: Any) -> Any:
    """The container of a Branch from its items."""
    if spec is list:
        return items
    if spec is tuple:
        return tuple(items)
    if type(spec) is tuple:
        return dict(zip(spec, items, strict=True))
    return pytree.tree_unflatten(items, spec)


def fill(tree: Template, lookup: Callable[[int], Any]) -> Any:
    """The pytree of a template, with what `lookup` gives for each value."""
    if isinstance(tree, Ref):
        return lookup(tree.value)
    if isinstance(tree, Const):
        return tree.value
    return rebuild([fill(item, lookup) for item in tree.items], tree.spec)


# ---------------------------------------------------------------- calls


class Context(NamedTuple):
    """The modes in which a call ran."""

    grad: bool
    device: str
    autocast: bool
    autocast_dtype: torch.dtype

    @staticmethod
    def now(device: str) -> Context:
        return Context(
            torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
            device,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.grad):
            with torch.autocast(self.device, dtype=self.autocast_dtype, enabled=self.autocast):
                yield


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the run. Values of one `memory` share storage.

    origin: the number of the input (a leaf of (args, kwargs)), the full name of a parameter or buffer, a constant
    tensor, or None for the result of a call.
    """

    origin: int | str | Tensor | None
    memory: int
    trained: bool = False  # a parameter


@dataclass(frozen=True, eq=False)
class Call:
    """One step of a run.

    target: the full name of a leaf, or a torch function. number: among the leaf calls; None for glue.
    reads: versions that it needs: of its arguments, and of values that it changes.
    writes: memories that it writes. changes: values there that came before and that somebody reads later.
    flows: result or changed value -> the values that it reads whose gradients come from it.
    context: modes, where they are others than around the model. random: draws from the generator.
    """

    index: int
    target: str | Callable[..., Any]
    number: int | None
    args: tuple[Template, ...]
    kwargs: Mapping[str, Template]
    result: Template
    reads: tuple[Read, ...]
    writes: frozenset[int]
    changes: tuple[int, ...]
    flows: Mapping[int, tuple[int, ...]]
    context: Context | None
    random: bool

    @property
    def is_leaf(self) -> bool:
        return self.number is not None

    def __str__(self) -> str:
        name = self.target if isinstance(self.target, str) else f"torch function {_name(self.target)}"
        return f"{name} (call {self.index})"


@dataclass(frozen=True)
class LeafCall:
    """A call of a leaf. number: among leaf calls; index: among all. inputs, outputs: its tensors, in pytree order.
    changed: names of parameters and buffers inside of it that it changed or replaced."""

    number: int
    name: str
    index: int
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    changed: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A run of a model for one signature of its inputs: pure data, the same on every rank that records it.

    leaves: all their names, of those never called too. inside: by leaf that was called, names of the parameters and
    buffers in it, each the first of its tensor in the model. specs: of every version of a value. output: the model's
    result; ends: the versions in it. inputs: how many leaves (args, kwargs) has. context: the modes around the model.
    dtype: that parameters and inputs were taken to have, if not their own.
    """

    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    specs: Mapping[Read, Spec]
    output: Template
    ends: tuple[Read, ...]
    leaf_calls: tuple[LeafCall, ...]
    leaves: tuple[str, ...]
    inside: Mapping[str, tuple[str, ...]]
    inputs: int
    context: Context
    dtype: torch.dtype | None

    @property
    def random(self) -> bool:
        """Whether any call draws random numbers."""
        return any(call.random for call in self.calls)

    def __str__(self) -> str:
        """A line per call: equal on all ranks whose programs are equal."""
        lines = []
        for call in self.calls:
            args = [_show(a) for a in call.args] + [f"{key}={_show(a)}" for key, a in call.kwargs.items()]
            made = ", ".join(f"v{v} {self.specs[v, call.index]}" for v in dict.fromkeys(refs(call.result)))
            name = call.target if isinstance(call.target, str) else _name(call.target)
            marks = ("  random" if call.random else "") + (
                f"  writes {sorted(call.writes)} {call.changes}" if call.writes else ""
            )
            lines.append(f"{made or '-'} = {name}({', '.join(args)}){marks}")
        origins = {f"v{k}": v.origin for k, v in enumerate(self.values) if isinstance(v.origin, (int, str))}
        return "\n".join([f"given {origins}", *lines, f"output {_show(self.output)}"])


def _name(function: Any) -> str:
    if hasattr(function, "__self__") and getattr(function, "__name__", "") in ("__get__", "__set__"):
        return f"{getattr(function.__self__, '__name__', '?')}.{function.__name__}"
    return getattr(function, "__qualname__", None) or type(function).__name__


def _show(tree: Template) -> str:
    if isinstance(tree, Ref):
        return f"v{tree.value}"
    if isinstance(tree, Const):
        return _say(tree.value)
    return f"[{', '.join(_show(item) for item in tree.items)}]"


def _say(value: Any) -> str:
    """A constant without addresses in memory."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_say, value))})"
    known = isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device))
    return repr(value) if known else type(value).__name__

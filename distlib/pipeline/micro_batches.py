"""Micro-batches: one batch of inputs and targets in, as many parts of about equal size out.

    batch of 10 rows, 4 micro-batches      rows 0-2 | 3-5 | 6-7 | 8-9      weights .3 .3 .2 .2

A micro-batch's loss is a mean over its own rows; the step's loss is the mean of these, weighted by rows. So it is the
mean over the batch, however the batch is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from distlib.calls import as_call

Weigh = Callable[[Any], float]


@dataclass(frozen=True)
class Whole:
    """Marks an argument that every micro-batch gets as it is: `Whole(mask)`."""

    value: Any


@dataclass(frozen=True)
class MicroBatch:
    """args, kwargs: of the model. target: of the loss. rows: of the batch. share: of the micro-batch's loss in the
    step's. weight: what the share comes from; that of all micro-batches together is the batch's."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    rows: int
    share: float
    weight: float


@dataclass(frozen=True)
class Batch:
    """What a step takes instead of inputs: divided already, and where the model computes."""

    micro_batches: Sequence[MicroBatch]

    @property
    def weight(self) -> float:
        return sum(batch.weight for batch in self.micro_batches)


class Prepares(Protocol):
    """A model that makes such batches."""

    def prepare(self, inputs: Any, target: Any, keywords: dict[str, Any], train: bool) -> Batch: ...


def batch_of(model: Prepares, inputs: Any, target: Any, keywords: dict[str, Any], train: bool) -> Batch:
    """What `model` makes of the arguments of a step; or the batch that it made before, given in place of inputs."""
    if not isinstance(inputs, Batch):
        batch = model.prepare(inputs, target, keywords, train)
        if not batch.weight:
            raise ValueError("weigh= gives all micro-batches the weight 0: nothing in this batch counts")
        return batch
    if target is not None or keywords:
        raise ValueError("a batch that was prepared has its target and keywords: give it alone")
    return inputs


def divide(
    inputs: Any, target: Any, count: int, keywords: dict[str, Any] | None = None, weigh: Weigh | None = None
) -> list[MicroBatch]:
    """`count` micro-batches of a batch.

    inputs: one argument of the model, a tuple of positional ones, or a dict of keyword arguments. keywords: further
    keyword arguments. The batch has as many rows as the first tensor of inputs has in its first dimension. Tensors
    with so many rows, anywhere in inputs, keywords and target, are divided along that dimension; everything else, and
    what is wrapped in `Whole`, goes to each micro-batch as it is. Views: nothing is copied.

    weigh: from a micro-batch's target, its weight in the step's loss, such as the number of tokens that count;
        default: its rows.

    Raises ValueError for a batch with no tensor or fewer rows than micro-batches, for a target of other rows, and for
    weights that are negative or not finite. If all are zero, so are the shares.
    """
    args, kwargs = as_call(inputs)
    kwargs = {**kwargs, **(keywords or {})}
    rows = rows_of((args, kwargs))
    if count < 1 or rows < 1:
        raise ValueError(f"a batch of {rows} rows cannot be divided into {count} micro-batches")
    if rows < count:
        raise ValueError(
            f"a batch of {rows} rows cannot be divided into {count} micro-batches: give larger batches, or fewer "
            "micro-batches"
        )
    _require_rows(target, rows)
    if weigh is not None and target is None:
        raise ValueError(
            "weigh= reads the target, and there is none: pass it, as in train_step(batch, batch['labels']), also where "
            "the model computes the loss"
        )
    parts = _parts((args, kwargs, target), rows, count)
    weights = [float(weigh(part[2])) if weigh is not None else float(size) for part, size in parts]
    total = sum(weights)
    if min(weights) < 0 or not math.isfinite(total):
        raise ValueError(f"the micro-batches' weights are {weights}: they must be finite, and none may be negative")
    return [
        MicroBatch(its_args, its_kwargs, its_target, size, weight / total if total else 0.0, weight)
        for ((its_args, its_kwargs, its_target), size), weight in zip(parts, weights, strict=True)
    ]


def divide_target(batches: Sequence[MicroBatch], target: Any) -> list[MicroBatch]:
    """The micro-batches of inputs that were divided without their target, with it. ValueError for one of other rows."""
    rows = sum(batch.rows for batch in batches)
    _require_rows(target, rows)
    parts = _parts(target, rows, len(batches))
    return [replace(batch, target=its) for batch, (its, _) in zip(batches, parts, strict=True)]


def _require_rows(target: Any, rows: int) -> None:
    for leaf in tree_leaves(target):
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] != rows:
            raise ValueError(
                f"the target has a tensor of shape {list(leaf.shape)}, the inputs have {rows} rows: wrap it in "
                "distlib.pipeline.Whole(...) if every micro-batch needs all of it"
            )


def moved(batches: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """The micro-batches of a step with their tensors where the model computes; on a CPU, as they are.

    Tensors in pinned memory are copied while the host goes on; what all micro-batches share is copied once. Weights
    were computed before (`divide`): where they come from targets on the CPU, the host need not wait for a GPU.
    """
    if device.type == "cpu":
        return list(batches)
    copies: dict[int, torch.Tensor] = {}

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta":
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.to(device, non_blocking=True)
        return copies[id(leaf)]

    return [
        replace(b, args=tree_map(move, b.args), kwargs=tree_map(move, b.kwargs), target=tree_map(move, b.target))
        for b in batches
    ]


def on_device(tree: Any, device: torch.device) -> Any:
    """The same outputs with their tensors on `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def rows_of(inputs: Any) -> int:
    """Rows of a batch: the length of the first dimension of its first tensor. Raises ValueError if there is none."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("the inputs hold no tensor with rows: a batch's first dimension is its rows")


def _parts(tree: Any, rows: int, count: int) -> list[tuple[Any, int]]:
    """(part of the tree, its rows), `count` times. Larger parts come first."""
    leaves, spec = tree_flatten(tree, is_leaf=lambda leaf: isinstance(leaf, Whole))
    small, larger = divmod(rows, count)
    sizes = [small + (number < larger) for number in range(count)]
    divided = [_divide(leaf, rows, sizes) for leaf in leaves]
    return [(tree_unflatten([d[k] for d in divided], spec), size) for k, size in enumerate(sizes)]


def _divide(leaf: Any, rows: int, sizes: Sequence[int]) -> Sequence[Any]:
    if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == rows:
        return leaf.split(list(sizes))
    return [leaf.value if isinstance(leaf, Whole) else leaf] * len(sizes)


def join(outputs: Sequence[Any], rows: Sequence[int]) -> Any:
    """The outputs of micro-batches as one: tensors that have their micro-batch's rows are put together along them,
    scalars become their mean weighted by rows, everything else is the first one's."""
    flat = [tree_flatten(output) for output in outputs]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        raise ValueError("the model's outputs differ in structure between micro-batches and cannot be joined")
    joined = [_join(leaves, rows) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    return tree_unflatten(joined, spec)


def _join(leaves: Sequence[Any], rows: Sequence[int]) -> Any:
    first = leaves[0]
    if not isinstance(first, torch.Tensor):
        return first
    if all(leaf.dim() and leaf.shape[0] == size for leaf, size in zip(leaves, rows, strict=True)):
        return torch.cat(list(leaves))
    if first.dim() == 0 and first.is_floating_point():
        return sum(leaf * (size / sum(rows)) for leaf, size in zip(leaves, rows, strict=True))
    return first

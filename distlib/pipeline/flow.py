"""Which arguments of a call get a gradient through which of its results, read from the autograd graph.

a ---> [ leaf: b.detach(), a * w ] ---> y          y -> {a}: no gradient ever comes back for b
b --->
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

_End = tuple[Any, int]  # a node of the graph and the number of its output


@dataclass
class Edges:
    """Where tensors hang in the graph. ids: of those that require a gradient. at: end -> ids of the tensors there."""

    ids: set[int] = field(default_factory=set)
    at: dict[_End, list[int]] = field(default_factory=dict)


def edges_of(tensors: Sequence[Tensor]) -> Edges:
    """Taken before a call, since a write in place moves a tensor in the graph."""
    found = Edges()
    for tensor in tensors:
        if is_trained(tensor) and id(tensor) not in found.ids:
            found.ids.add(id(tensor))
            found.at.setdefault(_end(tensor), []).append(id(tensor))
    return found


def flows(
    outputs: Sequence[tuple[Tensor, int]], edges: Edges, numbers: Mapping[int, int], exact: bool
) -> dict[int, tuple[int, ...]]:
    """Result -> arguments whose gradients come through it, both as numbers of values.

    outputs: results with their numbers. numbers: of the arguments, by id. exact: follow the graph; otherwise, as after
    writes in place which rewire it, take all arguments that require a gradient.
    """
    found = {}
    for tensor, number in outputs:
        if not is_trained(tensor):
            continue
        ids = _reached(tensor, edges) if exact else edges.ids
        found[number] = tuple(sorted({numbers[k] for k in ids}))
    return found


def is_trained(tensor: Tensor) -> bool:
    """Whether a gradient can come back for it. A view of a parameter that was made under no_grad says that it requires
    one, and hangs nowhere in the graph."""
    return tensor.requires_grad and not (tensor.grad_fn is None and tensor._is_view())


def _end(tensor: Tensor) -> _End:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _reached(tensor: Tensor, edges: Edges) -> set[int]:
    """The arguments that a walk from the result comes to first."""
    start = _end(tensor)
    if start in edges.at:
        return set(edges.at[start])
    found: set[int] = set()
    seen = {start[0]}
    waiting = [start[0]]
    while waiting:
        for end in waiting.pop().next_functions:
            if end in edges.at:
                found.update(edges.at[end])
            elif end[0] is not None and end[0] not in seen:
                seen.add(end[0])
                waiting.append(end[0])
    return found

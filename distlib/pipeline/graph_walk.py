"""The fallback: an input pass over autograd's graph that stops where paths to weights leave it, and their pass later.

    loss --- n3 --------- n2 --------- n1 --- x             input side: nodes that lead to something wanted now
              \\             \\            \\
               w3            t -- w2      w1               weight side: nodes that lead to deferred weights only

n1, n2, n3 are the frontier. The input pass runs the input side and notes what gradient each frontier node got. The
weight pass runs each frontier node again with that gradient, for its weight side only: torch's own operators compute
what is asked for, so a product is not computed twice. Where it would be, the weight is not deferred and its gradient
comes in the input pass: see `_Graph.settle`. The graph, and with it all activations, lives until the weight pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from distlib.pipeline.deferral import Entry, Hold

Node = Any  # torch.autograd.graph.Node
Root: TypeAlias = Tensor | GradientEdge  # where a backward starts


def _leaf(node: Node) -> Tensor | None:
    """The leaf that a node accumulates into."""
    return getattr(node, "variable", None) if node.name() == "torch::autograd::AccumulateGrad" else None


def _children(node: Node) -> list[Node]:
    """The nodes behind a node. Of Hold, only the anchor: its weights wait in the queue."""
    following = [child for child, _ in node.next_functions if child is not None]
    if isinstance(node, Hold._backward_cls):
        return following[-1:]
    return following


def _is_hooked(node: Node) -> bool:
    """Whether reading what the node saved calls a hook: a checkpoint recomputes, an offload reads back."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, (tuple, list)) else (saved,):
                # A torch that cannot tell: assume the worst, and say so in `kept`.
                if getattr(one, "unpack_hook", True) is not None:
                    return True
    return False


class _Graph:
    """The graph behind some edges, divided. later: leaves to defer, with their names."""

    def __init__(self, roots: Sequence[GradientEdge], later: Mapping[Tensor, str]) -> None:
        self.roots = roots
        self.order = _inputs_first([edge.node for edge in self.roots])
        self.kept: dict[str, str] = {}  # by name, why it is not deferred
        leaves = {node: leaf for node in self.order if (leaf := _leaf(node)) is not None}
        self.deferred = {node: leaf for node, leaf in leaves.items() if leaf in later}
        self._names = {node: later[leaf] for node, leaf in self.deferred.items()}
        self._leaves = leaves
        if self.deferred:
            self.settle()

    @property
    def now(self) -> list[Tensor]:
        """The leaves whose gradients come in the input pass."""
        return [leaf for node, leaf in self._leaves.items() if node not in self.deferred]

    def settle(self) -> None:
        """Divide, and drop from `deferred` what would make an operation run twice or a gradient wrong; again, until
        nothing is to be dropped."""
        for node, leaf in list(self.deferred.items()):
            if getattr(leaf, "_backward_hooks", None):
                self._drop({node}, "a hook of its own sees its gradient, and would see it twice")
            elif getattr(leaf, "_distlib_comes_and_goes", False):  # set by ShardedDataParallel
                self._drop({node}, "sharded, and freed before the weight pass: hold() the model over both passes")
        while not self._divide():
            pass

    def _drop(self, nodes: set[Node], why: str) -> None:
        for node in nodes & set(self.deferred):
            del self.deferred[node]
            self.kept[self._names[node]] = why

    def _divide(self) -> bool:
        self.inside: set[Node] = set()  # the input side
        reached: dict[Node, frozenset[Node]] = {}  # deferred leaves behind a node
        empty: frozenset[Node] = frozenset()
        for node in self.order:
            following = _children(node)
            if (node in self._leaves and node not in self.deferred) or any(c in self.inside for c in following):
                self.inside.add(node)
            behind = [reached[c] for c in following if reached[c]]
            reached[node] = frozenset((node,)) if node in self.deferred else (empty.union(*behind) if behind else empty)
        # Per frontier node, the deferred leaves of its weight side.
        self.frontier: dict[Node, list[Node]] = {}
        owner: dict[Node, Node] = {}  # of nodes of the weight side, the frontier node in front of them
        before = len(self.deferred)
        for node in self.order:
            if node not in self.inside:
                continue
            sides = [c for c in _children(node) if c not in self.inside and reached[c]]
            if not sides:
                continue
            mine = empty.union(*(reached[c] for c in sides))
            ahead = empty.union(*(reached[c] for c in _children(node) if c in self.inside))
            self._drop(set(mine & ahead), "used again by an earlier operation: passing it would run operations twice")
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                self._drop(set(mine), f"{node.name()} computes all of its gradients at once")
            elif _is_hooked(node):
                self._drop(set(mine), "inside a checkpoint or an offload, which each pass would run again")
            self._claim(node, sides, reached, owner)
            self.frontier[node] = [leaf for leaf in self.deferred if leaf in mine]
        outer = [edge.node for edge in self.roots if edge.node not in self.inside and reached[edge.node]]
        if outer:
            self._claim(None, outer, reached, owner)
        self.outer = outer
        return before == len(self.deferred)

    def _claim(self, front: Node, sides: list[Node], reached: dict[Node, Any], owner: dict[Node, Node]) -> None:
        """The weight side behind a frontier node must not be that of another, nor saved through hooks."""
        todo = [c for c in sides if c not in self._leaves]
        while todo:
            node = todo.pop()
            if owner.setdefault(node, front) is not front:
                self._drop(set(reached[node]), "computed once from its parameter, used several times")
            elif _is_hooked(node):
                self._drop(set(reached[node]), "inside a checkpoint or an offload, which each pass would run again")
            todo += [c for c in _children(node) if c not in self._leaves and reached[c] and c not in owner]


def _inputs_first(roots: Sequence[Node]) -> list[Node]:
    """All nodes behind the roots, each after those behind it."""
    order: list[Node] = []
    seen: set[Node] = set()
    todo = [(node, False) for node in roots]
    while todo:
        node, left = todo.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [(child, False) for child in _children(node) if child not in seen]
    return order


class Part:
    """The weight side of one frontier node, and the gradient that the node got. Holds the graph."""

    def __init__(self, edges: Sequence[GradientEdge], gradients: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        self.name = edges[0].node.name()
        self.leaves = tuple(leaves)
        self._edges = list(edges)
        self._gradients = list(gradients)
        self.replace: Callable[[Any], Any] | None = None  # what the node gets, in place of what its hooks make of it

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self._gradients

    def compute(self) -> tuple[Tensor | None, ...]:
        edges, gradients = self._edges, self._gradients
        self._edges, self._gradients = [], []
        handle = edges[0].node.register_prehook(self.replace) if self.replace is not None else None
        try:
            return torch.autograd.grad(edges, self.leaves, gradients, allow_unused=True)
        finally:
            self.replace = None
            if handle is not None:
                handle.remove()


def _initial(edges: Sequence[GradientEdge], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    found = []
    for edge, gradient in zip(edges, gradients, strict=True):
        made = edge.node._input_metadata[edge.output_nr]  # of the tensor
        if gradient is None and math.prod(made.shape) != 1:
            raise RuntimeError(f"the gradient of an output of shape {list(made.shape)} is needed: it is no scalar")
        found.append(torch.ones(made.shape, dtype=made.dtype, device=made.device) if gradient is None else gradient)
    return found


def input_pass(
    roots: Sequence[Root], gradients: Sequence[Tensor | None], later: Mapping[Tensor, str], entries: list[Entry]
) -> dict[str, str]:
    """Backward of `roots` without the leaves in `later` (leaf -> name) and those that wait in Hold.

    The parts of the weight pass are added to `entries`, in the order of backward: those of Hold come between them.
    Returns by name the leaves of `later` that were not deferred, with the reason: their gradients are there already.
    """
    edges = [get_gradient_edge(root) if isinstance(root, Tensor) else root for root in roots]
    graph = _Graph(edges, later)
    initial = _initial(edges, gradients)
    outer = [(e, g) for e, g in zip(graph.roots, initial, strict=True) if graph.deferred and e.node in graph.outer]
    if outer:
        behind = {node for node in _inputs_first([e.node for e, _ in outer])}
        leaves = [leaf for node, leaf in graph.deferred.items() if node in behind]
        entries.append(Part([e for e, _ in outer], [g for _, g in outer], leaves))
    frontier = graph.frontier if graph.deferred else {}
    handles = [
        node.register_prehook(_noting(node, [graph.deferred[leaf] for leaf in leaves], entries))
        for node, leaves in frontier.items()
    ]
    now = graph.now
    try:
        if now:
            torch.autograd.backward(edges, initial, retain_graph=bool(outer or handles), inputs=now)
    finally:
        for handle in handles:
            handle.remove()
    return graph.kept


def _noting(node: Node, leaves: list[Tensor], entries: list[Entry]) -> Callable[[Any], None]:
    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        there = [(GradientEdge(node, i), g) for i, g in enumerate(gradients) if g is not None]
        if there:
            part = Part([edge for edge, _ in there], [g for _, g in there], leaves)
            part.replace = lambda _: gradients
            entries.append(part)

    return hook

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
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from distlib.pipeline.deferral import Entry, Hold

Node = Any  # torch.autograd.graph.Node
Root: TypeAlias = Tensor | GradientEdge  # where a backward starts

_RECOMPUTED = "inside a checkpoint or an offload, which each pass would run again"


def _leaf(node: Node) -> Tensor | None:
    """The leaf that a node accumulates into."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


def _children(node: Node) -> list[Node]:
    """The nodes behind a node. Of Hold, only the anchor: its weights wait in the queue."""
    following = [child for child, _ in node.next_functions if child is not None]
    if isinstance(node, Hold._backward_cls):
        return following[-1:]
    return following


_saved_by: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()  # by a node's class, attributes


def _is_hooked(node: Node) -> bool:
    """Whether reading what the node saved calls a hook: a checkpoint recomputes, an offload reads back."""
    names = _saved_by.get(type(node))
    if names is None:
        names = _saved_by[type(node)] = [name for name in dir(node) if name.startswith("_raw_saved_")]
    for name in names:
        saved = getattr(node, name)
        for one in saved if isinstance(saved, (tuple, list)) else (saved,):
            # A torch that cannot tell: assume the worst, and say so in `kept`.
            if getattr(one, "unpack_hook", True) is not None:
                return True
    return False


def _inputs_first(roots: Sequence[Node]) -> tuple[list[Node], list[list[int]], list[int]]:
    """All nodes behind the roots, each after those behind it; of each, the numbers of those right behind it; and the
    numbers of the roots."""
    nodes: list[Node] = []
    behind: list[list[int]] = []
    number: dict[Node, int] = {}  # -1 until all behind it have theirs
    todo: list[tuple[Node, list[Node] | None]] = [(node, None) for node in roots]
    while todo:
        node, following = todo.pop()
        if following is not None:
            number[node] = len(nodes)
            nodes.append(node)
            behind.append([number[child] for child in following])
        elif node not in number:
            number[node] = -1
            following = _children(node)
            todo.append((node, following))
            todo += [(child, None) for child in following if child not in number]
    return nodes, behind, [number[node] for node in roots]


class _Graph:
    """The graph behind some edges, divided. later: leaves to defer, with their names.

    Every micro-batch walks it on the host. Hence numbers instead of nodes, and bits instead of sets of leaves.
    """

    def __init__(self, roots: Sequence[GradientEdge], later: Mapping[Tensor, str]) -> None:
        self.nodes, self._behind, self._roots = _inputs_first([edge.node for edge in roots])
        self.kept: dict[str, str] = {}  # by name, why it is not deferred
        self._leaves = {k: leaf for k, node in enumerate(self.nodes) if (leaf := _leaf(node)) is not None}
        deferred = [k for k, leaf in self._leaves.items() if leaf in later]
        self._bits = {k: 1 << at for at, k in enumerate(deferred)}  # of leaves that are deferred
        self._names = {k: later[self._leaves[k]] for k in deferred}
        # By number, the deferred leaves of its weight side, as bits.
        self._frontier: dict[int, int] = {}
        self._outer: list[tuple[int, int]] = []  # roots outside of the input side
        if deferred:
            self._settle()

    @property
    def now(self) -> list[Tensor]:
        """The leaves whose gradients come in the input pass."""
        return [leaf for k, leaf in self._leaves.items() if k not in self._bits]

    @property
    def frontier(self) -> list[tuple[Node, list[Tensor]]]:
        """Nodes of the input side, each with the leaves that are deferred behind it."""
        return [(self.nodes[k], self._deferred(bits)) for k, bits in self._frontier.items()]

    @property
    def outer(self) -> tuple[list[int], list[Tensor]]:
        """The roots, by their place, that lead to deferred leaves only; and those."""
        bits = 0
        for _, more in self._outer:
            bits |= more
        return [at for at, _ in self._outer], self._deferred(bits)

    def _deferred(self, bits: int) -> list[Tensor]:
        return [self._leaves[k] for k, bit in self._bits.items() if bits & bit]

    def _settle(self) -> None:
        """Divide, and let the input pass have what would make an operation run twice or a gradient wrong; again, until
        there is no more of that."""
        for k, bit in list(self._bits.items()):
            leaf = self._leaves[k]
            if getattr(leaf, "_backward_hooks", None):
                self._drop(bit, "a hook of its own sees its gradient, and would see it twice")
            elif getattr(leaf, "_distlib_comes_and_goes", False):  # set by ShardedDataParallel
                self._drop(bit, "sharded, and freed before the weight pass: hold() the model over both passes")
        while not self._divide():
            pass

    def _drop(self, bits: int, why: str) -> None:
        for k, bit in list(self._bits.items()) if bits else ():
            if bits & bit:
                del self._bits[k]
                self.kept[self._names[k]] = why

    def _divide(self) -> bool:
        inside, reached = self._sides()
        owner: dict[int, int] = {}  # of nodes of the weight side, the frontier node in front of them
        before = len(self._bits)
        self._frontier = {}
        for k, is_inside in enumerate(inside):
            if not is_inside:
                continue
            mine = ahead = 0
            for child in self._behind[k]:
                if inside[child]:
                    ahead |= reached[child]
                else:
                    mine |= reached[child]
            if not mine:
                continue
            node = self.nodes[k]
            self._drop(mine & ahead, "used again by an earlier operation: passing it would run operations twice")
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                self._drop(mine, f"{node.name()} computes all of its gradients at once")
            elif _is_hooked(node):
                self._drop(mine, _RECOMPUTED)
            self._claim(k, [child for child in self._behind[k] if not inside[child]], reached, owner)
            self._frontier[k] = mine
        self._outer = [(at, reached[k]) for at, k in enumerate(self._roots) if not inside[k] and reached[k]]
        self._claim(-1, [self._roots[at] for at, _ in self._outer], reached, owner)
        return before == len(self._bits)

    def _sides(self) -> tuple[list[bool], list[int]]:
        """By number: whether a node leads to something wanted now; the deferred leaves behind it."""
        inside: list[bool] = []
        reached: list[int] = []
        for k, behind in enumerate(self._behind):
            bits, is_inside = self._bits.get(k, 0), k in self._leaves and k not in self._bits
            for child in behind:
                bits |= reached[child]
                is_inside = is_inside or inside[child]
            inside.append(is_inside)
            reached.append(bits)
        return inside, reached

    def _claim(self, front: int, sides: Sequence[int], reached: Sequence[int], owner: dict[int, int]) -> None:
        """The weight side behind a frontier node must not be that of another, nor saved through hooks."""
        seen: set[int] = set()
        todo = list(sides)
        while todo:
            k = todo.pop()
            if k in seen or k in self._leaves or not reached[k]:
                continue
            seen.add(k)
            if owner.setdefault(k, front) != front:
                self._drop(reached[k], "computed once from its parameter, used several times")
                continue
            if _is_hooked(self.nodes[k]):
                self._drop(reached[k], _RECOMPUTED)
            todo += self._behind[k]


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
    outer, leaves = graph.outer
    if outer:
        entries.append(Part([edges[at] for at in outer], [initial[at] for at in outer], leaves))
    handles = [node.register_prehook(_noting(node, behind, entries)) for node, behind in graph.frontier]
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

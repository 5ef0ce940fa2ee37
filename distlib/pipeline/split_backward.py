"""A backward in two: the input pass (B) serves the stage before, the weight pass (W) comes when there is time.

    report = prepare(stage)                      # once; print(report) says what each module does
    queue = WeightQueue(report)
    queue.backward(outputs, gradients)           # B of one micro-batch: like torch.autograd.backward, without weights
    ...                                          # other micro-batches
    queue.run()                                  # W: adds to .grad of the weights, and fires their hooks

Main path: an operator keeps (input, output's gradient) until its weight gradient is computed (`deferral`). Fallback:
the graph is kept and walked twice (`graph_walk`). A backward without a queue is torch's own.

Zero Bubble Pipeline Parallelism (Qi et al., arXiv 2401.10241).
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from distlib.pipeline import deferral, graph_walk
from distlib.pipeline.deferral import Entry
from distlib.pipeline.graph_walk import Root

HOWS = ("auto", "deferral", "graph")


# ---------------------------------------------------------------- which module does what


@dataclass(frozen=True)
class Decision:
    """What one module with parameters of its own does.

    name: in the module tree. kind: its class. way: "deferral", "graph" or "input pass" (no split: its gradients come in
    B). reason: why not deferral, empty otherwise. elements: of its own parameters, tied ones included.
    """

    name: str
    kind: str
    way: str
    reason: str
    elements: int


@dataclass
class Report:
    """The decision for each module that has parameters of its own, in the order of the tree. Printable."""

    decisions: tuple[Decision, ...]
    later: Any = field(default_factory=WeakIdKeyDictionary, repr=False)  # leaves for the graph walk -> names
    _handles: list[Any] = field(default_factory=list, repr=False)

    def names(self, way: str) -> list[str]:
        """The modules that go this way."""
        return [d.name for d in self.decisions if d.way == way]

    @property
    def deferred_share(self) -> float:
        """Elements whose gradients wait for the weight pass, as a share of all."""
        total = sum(d.elements for d in self.decisions)
        return sum(d.elements for d in self.decisions if d.way != "input pass") / total if total else 0.0

    def __str__(self) -> str:
        width = max([len(d.name) for d in self.decisions] + [6])
        lines = [f"{'module':<{width}}  {'way':<10}  {'elements':>12}  why"]
        for d in self.decisions:
            lines.append(f"{d.name:<{width}}  {d.way:<10}  {d.elements:>12,}  {d.reason}".rstrip())
        return "\n".join([*lines, f"{self.deferred_share:.1%} of the elements wait for the weight pass"])


def prepare(module: nn.Module, how: str = "auto") -> Report:
    """Makes the backward of `module` divisible, in place; names, classes, hooks and state_dict stay as they are.

    how: "deferral" rewires nn.Linear, nn.Conv1d/2d/3d and nn.Embedding; all other gradients come in the input pass.
        "graph" defers every trained parameter by a walk over the graph, which keeps all activations until the weight
        pass. "auto": deferral where it can be, the graph walk for parameters of two and more dimensions elsewhere, and
        the input pass for the rest (norm scales: little work).

    Before or after wrapping for data parallelism; once per process and stage, no communication. Modules that were
    frozen, lazy or tied otherwise at this time keep what is decided here: call again after a change. Raises ValueError
    for another `how`.
    """
    if how not in HOWS:
        raise ValueError(f'how={how!r} is none of {", ".join(map(repr, HOWS))}; take how="auto"')
    restore(module)
    own = [(name, m, list(_trained(m))) for name, m in module.named_modules()]
    refusals = {id(m): _why_not(m, how) for _, m, _ in own}
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, m, parameters in own:
        for _, parameter in parameters:
            users.setdefault(id(parameter), []).append((name, m))
    changed = True
    while changed:  # one that does not defer takes those with it that share its weight
        changed = False
        for _, m, parameters in own:
            for other, n in (user for _, p in parameters for user in users[id(p)]):
                if refusals[id(m)] is None and refusals[id(n)] is not None:
                    refusals[id(m)] = f"tied with {other!r}, which cannot"
                    changed = True
    report = Report(())
    decisions = []
    for name, m, parameters in own:
        elements = sum(p.numel() for _, p in parameters if not isinstance(p, nn.parameter.UninitializedParameter))
        everything = [p for p in m._parameters.values() if p is not None]
        if not everything:
            continue
        reason = refusals[id(m)]
        way = "input pass"
        if not parameters:
            reason = "frozen"
        elif reason is None:
            way = "deferral"
            deferral.defer(m, name)
        elif any(isinstance(p, nn.parameter.UninitializedParameter) for _, p in parameters):
            reason = deferral.LAZY
        elif how == "graph" or (how == "auto" and any(p.dim() >= 2 for _, p in parameters)):
            way = "graph"
            _watch(report, m, name, how)
        decisions.append(Decision(name, type(m).__name__, way, reason or "", elements))
    report.decisions = tuple(decisions)
    _prepared[module] = report
    return report


_prepared: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


def restore(module: nn.Module) -> None:
    """Takes `prepare` back: every module of the tree has torch's own forward again."""
    for m in module.modules():
        deferral.undo(m)
        report = _prepared.pop(m, None)
        if report is not None:
            for handle in report._handles:
                handle.remove()


def _why_not(module: nn.Module, how: str) -> str | None:
    return 'how="graph"' if how == "graph" else deferral.why_not(module)


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.requires_grad:
            yield name, parameter


def _watch(report: Report, module: nn.Module, name: str, how: str) -> None:
    """Parameters for the graph walk: those that the module has now, and those that a wrapper shows in its forwards."""

    def note(m: nn.Module, *_: Any) -> None:
        for own, parameter in _trained(m):
            if (how == "graph" or parameter.dim() >= 2) and parameter not in report.later:
                report.later[parameter] = f"{name}.{own}".lstrip(".")

    note(module)
    report._handles.append(module.register_forward_pre_hook(note))


# ---------------------------------------------------------------- the two passes


class _Land(torch.autograd.Function):
    """A node whose backward computes what one entry waits with; autograd then does what it does with gradients."""

    @staticmethod
    def forward(ctx: Any, entry: Entry, *leaves: Tensor) -> Tensor:
        ctx.entry = entry
        return torch.empty((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        entry, ctx.entry = ctx.entry, None
        return None, *entry.compute()


class WeightQueue:
    """The weight gradients of one micro-batch, between its input pass and its weight pass.

    report: of `prepare`; needed for modules that go by the graph walk.
    on_ready: called with each weight after its gradient was added in `run`, after the weight's own hooks.

    As a context manager it drops what waits if the block raises, and a backward inside of the block that is not
    `queue.backward` is refused. One queue may be used again after `run`.
    """

    def __init__(self, report: Report | None = None, on_ready: Callable[[Tensor], None] | None = None) -> None:
        self._later: Mapping[Tensor, str] = {} if report is None else report.later
        self._on_ready = [] if on_ready is None else [on_ready]
        self._entries: list[Entry] = []
        self._running = False
        self.kept: dict[str, str] = {}  # graph walk: parameters whose gradients came in the input pass, and why

    def on_ready(self, callback: Callable[[Tensor], None]) -> None:
        """Another callback for each weight whose gradient was added."""
        self._on_ready.append(callback)

    def __len__(self) -> int:
        """Calls of operators whose weight gradients wait."""
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        """The modules that wait, in the order of backward; once per call."""
        return [entry.name for entry in self._entries]

    @property
    def nbytes(self) -> int:
        """Bytes kept for the weight pass; shared memory counts once. Not: the graph, where it is walked."""
        storages = {s.data_ptr(): s.nbytes() for e in self._entries for t in e.tensors for s in (t.untyped_storage(),)}
        return sum(storages.values())

    def backward(self, tensors: Root | Sequence[Root], gradients: Any = None) -> None:
        """The input pass: torch.autograd.backward(tensors, gradients) but for weights, which wait.

        tensors: outputs of the stage, or a loss, or their gradient edges. gradients: theirs, shapes and dtypes alike;
        None for scalars. Inputs, norm scales and all that cannot wait get their .grad, and hooks fire. Several calls
        before `run` add up.
        """
        tensors = [tensors] if isinstance(tensors, (Tensor, GradientEdge)) else list(tensors)
        if gradients is None:
            gradients = [None] * len(tensors)
        gradients = [gradients] if isinstance(gradients, Tensor) else list(gradients)
        if self._running:
            raise RuntimeError("an input pass inside of the weight pass of its queue; use a queue per micro-batch")
        if len(tensors) != len(gradients):
            raise ValueError(f"{len(tensors)} tensors and {len(gradients)} gradients; give one gradient each, or None")
        before = len(self._entries)
        try:
            with deferral.collecting(self._entries):
                kept = graph_walk.input_pass(tensors, gradients, self._later, self._entries)
        except BaseException:
            del self._entries[before:]
            raise
        self.kept.update(kept)

    def run(self) -> int:
        """The weight pass: adds the gradients to .grad of their weights, fires the weights' hooks, frees what was kept.

        Each weight lands once, whatever number of calls used it. Gradients are added as they are produced. Returns the
        number of calls served; 0 when nothing waits. An error leaves the queue empty and .grad partly added to.
        """
        if self._running:
            raise RuntimeError("the weight pass of this queue runs already")
        entries, self._entries = self._entries, []
        if not entries:
            return 0
        served = len(entries)
        leaves = {id(leaf): leaf for entry in entries for leaf in entry.leaves}
        handles = [
            leaf.register_post_accumulate_grad_hook(callback) for callback in self._on_ready for leaf in leaves.values()
        ]
        self._running = True
        try:
            with torch.enable_grad():
                # Autograd takes the youngest node first: made in reverse, they run in the order of a plain backward.
                tokens = [_Land.apply(entry, *entry.leaves) for entry in reversed(entries)]
            del entries
            torch.autograd.backward(tokens, [torch.ones_like(token) for token in tokens])
        finally:
            self._running = False
            for handle in handles:
                handle.remove()
        return served

    def drop(self) -> None:
        """Forgets what waits: these gradients are lost."""
        self._entries.clear()

    def __enter__(self) -> WeightQueue:
        self._block = deferral.refusing()
        self._block.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._block.__exit__(kind, error, at)
        if error is not None:
            self.drop()

    def __del__(self) -> None:
        if getattr(self, "_entries", None):
            warnings.warn(
                f"a WeightQueue is gone with {len(self._entries)} weight gradients that were never added: the first is "
                f"of {self._entries[0].name!r}. Call run(), or drop()",
                ResourceWarning,
                stacklevel=2,
            )


# ---------------------------------------------------------------- what the split costs


def extra_flops(module: nn.Module, *inputs: Any, how: str = "auto", **keywords: Any) -> tuple[int, int]:
    """(floating-point operations of both passes, of a plain backward) for a forward of these inputs.

    Runs copies of the module, so it needs twice its memory. Recomputation counts in both. Products and attention are
    counted, as in torch.utils.flop_counter.
    """

    def count(split: bool) -> int:
        one = copy.deepcopy(module)
        restore(one)
        report = prepare(one, how) if split else None
        devices = list({p.device for p in one.parameters() if p.device.type != "cpu"})
        kind = devices[0].type if devices else "cuda"  # torch wants one, also for no devices
        with torch.random.fork_rng(devices=devices, device_type=kind), torch.enable_grad():
            out = one(*inputs, **keywords)
            outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            gradients = [torch.ones_like(t) for t in outputs]
            with FlopCounterMode(display=False) as counter:
                if split:
                    queue = WeightQueue(report)
                    queue.backward(outputs, gradients)
                    queue.run()
                else:
                    torch.autograd.backward(outputs, gradients)
        return counter.get_total_flops()

    return count(True), count(False)

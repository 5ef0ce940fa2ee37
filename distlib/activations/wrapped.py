"""A block's forward, wrapped: it keeps what its kind says, and the rest of the block is as it was.

    keep       nothing changes
    full       inputs are kept; backward runs the forward again
    selective  inputs and results of chosen operations are kept; backward recomputes what lies between
    offload    saved tensors move to a store and come back in backward

Recomputation is torch's non-reentrant checkpoint: same random numbers, same autocast, hooks on inner modules run again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from distlib.activations.attributes import Attributes, as_now
from distlib.activations.buffers import BufferGuard
from distlib.activations.clock import Span
from distlib.activations.counting import Account, Counting, Hooks
from distlib.activations.lending import Stay
from distlib.activations.live import has_storage, storage_key, tensors_of, version
from distlib.activations.offload import Offloader, storages_of
from distlib.activations.origins import Remembered
from distlib.activations.parameters import Parameters
from distlib.activations.selective import Key, Policy, Selection
from distlib.activations.surroundings import Draws, OwnRandom

KINDS = ("keep", "selective", "full", "offload")
MOST_TIMES = 1024  # forwards of a block whose seconds are known: those that have no backward end no step


class Graph:
    """Lives as long as the graph of a forward, which holds it."""


class Record:
    """What one block did in the step that runs: bytes by accounting, seconds by the clock."""

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.kept_by_a_call = 0  # bytes, as last counted, of a block that keeps everything
        self.clear()
        self.clear_bytes()

    def clear_bytes(self) -> None:
        """A new step begins, in which bytes are counted."""
        self.baseline = 0  # bytes that it would keep if it kept everything
        self.kept = 0  # bytes that it keeps in memory
        self.counted = False
        self._graphs: list[weakref.ref[Graph]] = []  # of the forwards that were counted

    @property
    def went(self) -> bool:
        """Whether nothing is left of what was counted: nobody runs it backward."""
        return all(graph() is None for graph in self._graphs)

    def counts_in(self, graph: Graph) -> None:
        """What was counted belongs to this graph."""
        self._graphs.append(weakref.ref(graph))

    def clear(self) -> None:
        """A new step begins."""
        self.calls = 0
        self.moved = 0  # bytes that it moved to a store
        self.forwards: deque[Span] = deque(maxlen=MOST_TIMES)
        self.recomputations: deque[Span] = deque(maxlen=MOST_TIMES)
        self.backwards: deque[Span] = deque(maxlen=MOST_TIMES)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind}  # of a copied module, nothing ran yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"], state["kind"])  # type: ignore[misc]


class Watcher(Protocol):
    """Who is told of blocks' calls: the report."""

    def joins(self, block: Wrapped) -> None:
        """A block was copied, and its setting with it."""
        ...

    def entered(self, record: Record) -> bool:
        """A block's forward begins. Returns whether bytes are to be counted in it."""
        ...

    def backward_runs(self) -> None:
        """A block's backward or recomputation begins."""
        ...

    def accounts(self) -> tuple[Account, Account]:
        """Of what would be kept, and of what is."""
        ...


@dataclass
class Setting:
    """What all blocks of one call of `checkpoint_activations` share."""

    watcher: Watcher
    policy: Policy
    offloader: Offloader | None


class Wrapped:
    """Stands in a block's `__dict__` as its `forward`. Copies and pickles with the block."""

    def __init__(self, block: nn.Module, name: str, kind: str, setting: Setting) -> None:
        self.block = block
        self.name = name
        self.setting = setting
        self.record = Record(name, kind)
        self.seen: Callable[[Wrapped, Any, Any], None] | None = None  # told of inputs, while blocks are measured
        self._own = block.__dict__.get("forward")  # a forward that somebody else has put there
        self._wasted: set[Key] = set()
        self._casts = Remembered()
        self._draws = Draws()
        block.forward = self

    @property
    def kind(self) -> str:
        return self.record.kind

    @kind.setter
    def kind(self, kind: str) -> None:
        self.record.kind = kind

    def require_outermost(self) -> None:
        """Raises RuntimeError where the block's forward is not this one."""
        if self.block.__dict__.get("forward") is not self:
            raise RuntimeError(
                f"block {self.name!r}: its forward was wrapped again since: undo that first, or it would be lost"
            )

    def remove(self) -> None:
        """The block's forward is as it was."""
        self.require_outermost()
        del self.block.__dict__["forward"]
        if self._own is not None:
            self.block.forward = self._own

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wasted": set(), "_casts": Remembered(), "_draws": Draws(), "seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.setting.watcher.joins(self)

    # ------------------------------------------------------------ a call

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self.seen is not None:
            self.seen(self, args, kwargs)
        if not torch.is_grad_enabled() or not self._has_gradient(tensors):
            return self._inner(*args, **kwargs)
        transformed = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func: what is saved is not told
        counts = not transformed and self.setting.watcher.entered(self.record)
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        forward = Span(device).begin()
        stay: Stay | None = None
        if self.kind == "keep":
            result, stay = self._kept(args, kwargs, counts)
        elif self.kind == "offload":
            result = self._offloaded(args, kwargs, counts)
        else:
            result = self._checkpointed(args, kwargs, device, counts)
        self.record.forwards.append(forward.end())
        self.record.calls += 1
        graph = Graph() if counts else None
        if graph is not None:
            self.record.counts_in(graph)
        self._time_backward(tensors, result, device, stay, graph)
        return result

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)

    def _has_gradient(self, tensors: list[torch.Tensor]) -> bool:
        """Else backward will not come here."""
        return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in self.block.parameters())

    def _checkpointed(self, args: Any, kwargs: Any, device: torch.device, counts: bool) -> Any:
        given = [(args, kwargs)]  # the caller's own lists and dicts; the recomputation gets copies of what was in them
        leaves, spec = tree_flatten((args, kwargs))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in at]
        for i in at:
            leaves[i] = None  # torch keeps them, under version control; here they would be kept besides
        parts = dict(self.block.named_modules())
        guard = BufferGuard(self.block)
        own_random = OwnRandom(parts.values(), leaves, self._draws)
        leaves = [as_now(leaf) for leaf in leaves]
        attributes = Attributes(parts, self.name)
        selection = None
        if self.kind == "selective":
            selection = Selection(self.setting.policy, self._wasted, self._casts, self.block, tensors)
        parameters = Parameters(parts, self.name)
        versions = [version(tensor) for tensor in tensors]
        record, watcher = self.record, self.setting.watcher

        def run(*tensors: torch.Tensor) -> Any:
            if given:
                its_args, its_kwargs = given.pop()
                return self._forward(its_args, its_kwargs, counts)
            whole = [as_now(leaf) for leaf in leaves]
            for i, tensor in zip(at, tensors, strict=True):
                whole[i] = tensor
            its_args, its_kwargs = tree_unflatten(whole, spec)
            span = Span(device).begin()
            watcher.backward_runs()
            try:
                with attributes.as_before(), parameters.recomputing(), guard, own_random.as_before():
                    return self._inner(*its_args, **its_kwargs)
            finally:  # torch ends it by an exception as soon as nothing more is needed
                record.recomputations.append(span.end())
                if selection is not None:
                    freed = selection.learn()
                    record.kept -= freed if counts else 0

        if selection is None:
            result = checkpoint(run, *tensors, use_reentrant=False)
        else:
            result = checkpoint(run, *tensors, use_reentrant=False, context_fn=selection.modes)
            selection.ran()
        guard.ran()
        own_random.ran()
        parameters.ran()
        if [version(tensor) for tensor in tensors] != versions:
            on_first_gradient(result, self._refuse_changed_inputs)
        if counts:
            own = storages_of(self.block)
            kept = {storage_key(t): t for t in tensors if has_storage(t) and storage_key(t) not in own}
            bytes_of = sum(selection.storages().values()) if selection is not None else 0
            record.kept += watcher.accounts()[1].add(kept, bytes_of + guard.nbytes)
        return result

    def _refuse_changed_inputs(self, _: Any) -> None:
        raise RuntimeError(
            f"block {self.name!r} changes its input in place, and could not be recomputed from it: make its first "
            'operation one that is not in place (as ReLU(inplace=False)), use policy="offload", or leave the block '
            "out (blocks=)"
        )

    def _kept(self, args: Any, kwargs: Any, counts: bool) -> tuple[Any, Stay | None]:
        """Nothing changes; but who moves tensors of other blocks is told what stays here."""
        offloader = self.setting.offloader
        borrower = offloader if offloader is not None and offloader.lends else None
        if borrower is not None:
            borrower.make_room(self.record.kept_by_a_call)
        result = self._forward(args, kwargs, counts)
        if counts:
            self.record.kept = self.record.baseline
        return result, None if borrower is None else borrower.stay(self.record.kept_by_a_call)

    def _offloaded(self, args: Any, kwargs: Any, counts: bool) -> Any:
        offloader = self.setting.offloader
        assert offloader is not None
        hooks = offloader.hooks(self.block)
        with hooks:
            result = self._forward(args, kwargs, counts, (hooks.pack_hook, hooks.unpack_hook))
        self.record.moved += sum(hooks.moved.values())
        if counts:
            self.record.kept += sum(hooks.kept.values())
        return result

    # ------------------------------------------------------------ accounts

    def _forward(self, args: Any, kwargs: Any, counts: bool, around: Hooks | None = None) -> Any:
        """Runs it, inside of these hooks; `counts`: the bytes that it saves, or would save, if it kept everything."""
        if not counts:
            return self._inner(*args, **kwargs)
        counting = Counting(self.setting.watcher.accounts()[0], storages_of(self.block), around)
        with counting:
            result = self._inner(*args, **kwargs)
        self.record.kept_by_a_call = counting.nbytes
        self.record.baseline += counting.nbytes
        return result

    def _time_backward(
        self, tensors: list[torch.Tensor], result: Any, device: torch.device, stay: Stay | None, graph: Graph | None
    ) -> None:
        """From the first gradient of an output to the last of the inputs."""
        entering = [tensor for tensor in tensors if tensor.grad_fn is not None]
        record, watcher, span = self.record, self.setting.watcher, Span(device)
        offloader, missing = self.setting.offloader, len(entering)

        def begins(_: Any, held: tuple = (stay, graph)) -> None:  # the graph holds both, whatever enters
            watcher.backward_runs()
            span.begin()

        def ends(_: Any) -> None:
            nonlocal missing
            missing -= 1
            if not span.begun:  # the block's output was not used
                return
            if span.end() not in record.backwards:
                record.backwards.append(span)
            if stay is not None and offloader is not None and missing <= 0 and not graph_is_kept():
                offloader.left(stay)

        if entering or stay is not None or graph is not None:
            on_first_gradient(result, begins)
            for tensor in entering:
                tensor.register_hook(ends)


def graph_is_kept() -> bool:
    """Whether the backward that runs leaves saved tensors where they are (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def on_first_gradient(tree: Any, call: Callable[[Any], None]) -> None:
    """Calls it with the first gradient that comes to one of these tensors. Hooks that know their tensors, as those for
    several at once do, would keep a graph alive that nobody runs backward."""
    called = False

    def hook(gradient: Any) -> None:
        nonlocal called
        if not called:
            called = True
            call(gradient)

    for tensor in tensors_of(tree):
        if tensor.grad_fn is not None:
            tensor.register_hook(hook)


@contextlib.contextmanager
def same_random(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Random numbers drawn inside are drawn again outside."""
    places = [t.device for t in tensors if t.device.type not in ("cpu", "meta")]
    kind = places[0].type if places else "cuda"
    with torch.random.fork_rng(devices=sorted({place.index for place in places}), device_type=kind):
        yield

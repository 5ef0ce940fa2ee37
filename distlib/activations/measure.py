"""Measures what each block costs under each kind, alone, and what the rest of a step costs: the figures of a budget.

    block alone     input ---> forward ---> kept bytes ---> backward       under every kind: bytes, then seconds
    whole module    everything recomputed, once for bytes, some times for seconds

Blocks of one class with parameters and inputs of the same shapes are measured once. Nothing of it leaves a trace:
gradients go to copies of the parameters' handles, random numbers and buffers are put back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from distlib.activations.budget import Chain, Choice
from distlib.activations.buffers import BufferGuard
from distlib.activations.clock import Span
from distlib.activations.live import LiveBytes, has_storage, storage_key, tensors_of
from distlib.activations.offload import Offloader
from distlib.activations.surroundings import Draws, OwnRandom
from distlib.activations.wrapped import Wrapped, on_first_gradient, same_random

Loss = Callable[[Any], torch.Tensor]


@dataclass
class Profile:
    """Of the whole module, every block "full": the order of the blocks, bytes alive before each, peaks outside."""

    order: list[Wrapped] = field(default_factory=list)
    entry: list[int] = field(default_factory=list)
    outside: int = 0  # peak behind the last block's forward and before its backward
    floor: int = 0  # peak before the first block's forward and behind its backward
    seconds: float = 0.0  # outside of the blocks


@dataclass(frozen=True)
class Alone:
    """Of one block alone: bytes above what is there at its begin, its inputs included. kept: behind its forward.
    forward, backward: at their peaks. begin: when its backward begins; None if it has none. deferred: what is left of a
    divided backward until its weight pass."""

    kept: int
    forward: int
    backward: int
    begin: int | None
    deferred: int


class Queue(Protocol):
    """What divides a backward: as `distlib.pipeline.split_backward.WeightQueue`."""

    def backward(self, tensors: torch.Tensor) -> None: ...
    def run(self) -> object: ...


class _Sink(torch.autograd.Function):
    """Ends a block's graph with a gradient of real memory for its output."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.like = (output.shape, output.dtype, output.device)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        shape, dtype, device = ctx.like
        return torch.ones(shape, dtype=dtype, device=device)


def default_loss(output: Any) -> torch.Tensor:
    """The sum of all means, where nothing is known of the loss."""
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not found:
        raise ValueError("the module's output on example_inputs has no gradient: pass loss=, or train some parameter")
    return torch.stack([leaf.float().mean() for leaf in found]).sum()


def handles(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> a leaf on the same memory as the parameter, with a gradient of its own that is there already.

    Each place where a parameter hangs has one name, also in modules that hang in several; for `call_with`.
    """
    found: dict[int, torch.Tensor] = {}
    named = {}
    for prefix, part in module.named_modules():
        for key, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in found:
                handle = parameter.detach().requires_grad_(parameter.requires_grad)
                handle.grad = torch.zeros_like(handle) if parameter.requires_grad else None
                found[id(parameter)] = handle
            named[f"{prefix}.{key}" if prefix else key] = found[id(parameter)]
    return named


def call_with(own: dict[str, torch.Tensor], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The module's forward with these `handles` as parameters.

    torch would put the handle of a tied parameter to all its names, and so twice into a module that hangs in two
    places: the second time it would take the first handle for what is to be put back.
    """
    return functional_call(module, own, args, kwargs, tie_weights=False)


@contextmanager
def no_trace(module: nn.Module, inputs: Any) -> Iterator[None]:
    """Random numbers drawn inside are drawn again outside; buffers get back what they held."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    guard = BufferGuard.of_any_size(module)
    own_random = OwnRandom(list(module.modules()), tree_leaves(inputs), Draws())
    own_random.keep_all()
    try:
        with same_random(tensors), own_random.as_before():
            yield
    finally:
        guard.ran()
        guard.undo()


class Measurement:
    """Measures `module`, whose blocks are wrapped. inputs: (args, kwargs) of its forward."""

    def __init__(
        self, module: nn.Module, wrapped: Sequence[Wrapped], inputs: tuple[tuple, dict], loss: Loss | None, rounds: int
    ) -> None:
        self._module = module
        self._wrapped = list(wrapped)
        self._inputs = inputs
        self._loss = loss or default_loss
        self._rounds = rounds
        self._captured: dict[Wrapped, Any] = {}
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def chain(self, kinds: Sequence[str], offloader: Offloader | None) -> tuple[Chain, list[Wrapped], float]:
        """The chain, its blocks in the order of their forward, and the seconds of a step outside of them.

        kinds: what each block may do, "keep" and "full" among them.

        Raises:
            ValueError: a block runs not exactly once in the forward.
        """
        with no_trace(self._module, self._inputs), torch.enable_grad():
            own = handles(self._module)
            always = self._casts(lambda: self._run(own))
            for one in self._wrapped:
                one.kind = "full"
            profile = self._profile(own)
            choices = self._choices(profile.order, kinds, offloader)
        fixed, kept = [], 0
        for entry, of_block in zip(profile.entry, choices, strict=True):
            fixed.append(always + entry - kept)
            full = next(choice for choice in of_block if choice.name == "full")
            kept += full.kept
            profile.seconds -= full.seconds
        chain = Chain(choices, fixed, always + profile.outside - kept, always + profile.floor)
        return chain, profile.order, max(0.0, profile.seconds)

    def _choices(
        self, order: Sequence[Wrapped], kinds: Sequence[str], offloader: Offloader | None
    ) -> list[list[Choice]]:
        """Of each block; blocks that are alike are measured once."""
        signatures = {one: self._signature(one) for one in order}
        measured: dict[Any, list[Choice]] = {}
        for one in order:
            if signatures[one] not in measured:
                measured[signatures[one]] = self._measure(one, kinds, offloader)
            self._captured[one] = None  # its memory goes
        return [measured[signatures[one]] for one in order]

    # ------------------------------------------------------------ the whole module

    def _casts(self, run: Callable[[], None]) -> int:
        """Bytes of the copies in half precision that autocast makes of parameters, once for all of a step."""
        if not torch.is_autocast_enabled(self._device.type):
            return 0
        for one in self._wrapped:
            one.kind = "keep"
        run()  # allocates what is allocated once
        torch.clear_autocast_cache()
        with LiveBytes() as live:
            run()
            return live.live

    def _profile(self, own: dict[str, torch.Tensor]) -> Profile:
        profile = Profile()
        live = LiveBytes()
        seen: set[Wrapped] = set()

        def see(one: Wrapped, args: Any, kwargs: Any) -> None:
            if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
                return
            self._require_first(one, seen)
            if not seen:
                profile.floor = max(profile.floor, live.peak)
            seen.add(one)
            profile.order.append(one)
            profile.entry.append(live.live)
            self._capture(one, args, kwargs)

        first_over = False

        def first_ends(_: Any) -> None:
            nonlocal first_over
            first_over = True
            live.reset_peak()

        for one in self._wrapped:
            one.seen = see
        try:
            self._run(own)  # allocates what is allocated once, and tells the order
            last, first = profile.order[-1:], profile.order[:1]
            self._require_all(seen)
            seen.clear()
            profile.order, profile.entry = [], []

            def behind(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                live.reset_peak()
                on_first_gradient(output, back)

            def back(_: Any) -> None:
                profile.outside = max(profile.outside, live.peak)

            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                on_first_gradient((args, kwargs), first_ends)

            hooks = [last[0].block.register_forward_hook(behind, with_kwargs=True)]
            hooks.append(first[0].block.register_forward_pre_hook(before, with_kwargs=True))
            try:
                live.reset_peak()
                with live:
                    self._run(own)
                    if first_over:
                        profile.floor = max(profile.floor, live.peak)
            finally:
                for hook in hooks:
                    hook.remove()
        finally:
            for one in self._wrapped:
                one.seen = None
        # The blocks' own part is taken off as soon as it is known.
        # What else a machine does only makes it slower: the least of some times says what a step takes.
        profile.seconds = min(self._timed(lambda: self._run(own)) for _ in range(self._rounds))
        return profile

    def _require_first(self, one: Wrapped, seen: Collection[Wrapped]) -> None:
        if one in seen:
            raise ValueError(
                f"block {one.name!r} runs more than once in a forward: a budget plans blocks that run once. Use "
                'policy="full" or "selective", or name other blocks (blocks=)'
            )

    def _require_all(self, seen: Collection[Wrapped]) -> None:
        missing = [one.name for one in self._wrapped if one not in seen]
        if missing:
            raise ValueError(f"blocks {missing} do not run in the forward of example_inputs: leave them out (blocks=)")

    def _capture(self, one: Wrapped, args: Any, kwargs: Any) -> None:
        """Its inputs, to run it alone on; of equal blocks, one is measured."""
        plain = sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))
        if len(list(tensors_of((args, kwargs)))) > plain:
            raise ValueError(
                f"block {one.name!r} is given tensors in a dataclass or mapping: a budget measures blocks alone, on "
                'tensors, lists and dicts. Use policy="full" or "selective", or name other blocks (blocks=)'
            )
        if one not in self._captured:
            known = {self._signature(other) for other in self._captured}
            self._captured[one] = tree_map(_shape_of, (args, kwargs))
            if self._signature(one) not in known:
                self._captured[one] = tree_map(_copy, (args, kwargs))

    def _run(self, own: dict[str, torch.Tensor]) -> None:
        args, kwargs = tree_map(_leaf, self._inputs)
        loss = self._loss(call_with(own, self._module, args, kwargs))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise ValueError(f"loss= returns {shape}: it must be one number with a gradient, as in training")
        loss.backward()

    def _timed(self, call: Callable[[], None]) -> float:
        span = Span(self._device).begin()
        call()
        seconds = span.end().seconds
        assert seconds is not None
        return seconds

    # ------------------------------------------------------------ a block alone

    def _signature(self, one: Wrapped) -> Any:
        """Blocks that agree in it cost alike."""
        given = [
            (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else repr(leaf)
            for leaf in tree_leaves(self._captured.get(one, ()))
        ]
        return repr(([(name, _settings(part)) for name, part in one.block.named_modules()], given))

    def _measure(self, one: Wrapped, kinds: Sequence[str], offloader: Offloader | None) -> list[Choice]:
        own = handles(one.block)
        bytes_of: dict[str, dict[str, int]] = {}
        for kind in kinds:
            one.kind = kind
            self._alone(one, own, offloader)  # selective and offload learn from it
            bytes_of[kind] = self._bytes(one, own, offloader)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        again: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(self._rounds):
            for kind in kinds:  # in turns: what else the machine does hits all alike
                one.kind = kind
                seconds[kind].append(self._seconds(one, own, offloader))
                again[kind].append(sum(span.seconds or 0.0 for span in one.record.recomputations))
        base = min(seconds["keep"])
        choices = []
        for kind in kinds:
            more = statistics.median(s - keep for s, keep in zip(seconds[kind], seconds["keep"], strict=True))
            # On a busy machine differences drown; what is recomputed takes its time in any case.
            choices.append(Choice(kind, seconds=base + max(more, min(again[kind])), **bytes_of[kind]))
        return choices

    def _bytes(self, one: Wrapped, own: dict[str, torch.Tensor], offloader: Offloader | None) -> dict[str, int]:
        """Those of a Choice."""
        alone = self._alone(one, own, offloader)
        return {"kept": alone.kept, "forward": alone.forward, "backward": alone.backward}

    def _seconds(self, one: Wrapped, own: dict[str, torch.Tensor], offloader: Offloader | None) -> float:
        """Of one forward and backward. A block that offloads is done with its forward when all is written: the disk may
        be slower than the block, and then it decides how fast blocks follow each other."""
        args, kwargs = tree_map(_enter, tree_map(_leaf, self._captured[one]))
        one.record.clear()
        forward = Span(self._device).begin()
        output = call_with(own, one.block, args, kwargs)
        if offloader is not None:
            offloader.settle()
        forward.end()
        sink = _sink(output)
        del args, kwargs, output
        whole = Span(self._device).begin()
        if sink is not None:
            sink.backward()
        whole.end()
        inside = one.record.backwards  # without the sink's part; of blocks whose inputs have no gradient there is none
        found = (forward.seconds, inside[-1].seconds if inside else whole.seconds)
        assert found[0] is not None and found[1] is not None
        return found[0] + found[1]

    def _alone(
        self, one: Wrapped, own: dict[str, torch.Tensor], offloader: Offloader | None, queue: Queue | None = None
    ) -> Alone:
        """Forward and backward of one block. queue: divides the backward."""
        leaves = tree_map(_leaf, self._captured[one])
        live = LiveBytes()
        begins: list[int] = []
        with live:
            inputs = tree_map(_enter, leaves)
            start = live.live
            live.reset_peak()
            output = call_with(own, one.block, inputs[0], inputs[1])
            del inputs
            if offloader is not None:
                offloader.settle()
            forward, kept = live.peak - start, live.live - start
            live.reset_peak()
            sink = _sink(output)
            on_first_gradient(output, lambda _: begins.append(live.live))
            del output  # the next block has it no more when the backward comes here
            if sink is not None and queue is None:
                sink.backward()
            elif sink is not None and queue is not None:
                queue.backward(sink)
            backward, deferred = live.peak - start, 0
            del sink
            if queue is not None:
                grads = [leaf.grad for leaf in tree_leaves(leaves) if isinstance(leaf, torch.Tensor)]
                given = {storage_key(g): g.untyped_storage().nbytes() for g in grads if g is not None}
                deferred = max(0, live.live - sum(given.values()))
                queue.run()
            return Alone(max(0, kept), forward, backward, begins[0] - start if begins else None, deferred)


def _settings(part: nn.Module) -> list[Any]:
    """Of a module without its parts: class, tensors, and plain attributes; functions count as themselves."""
    tensors = [*part._parameters.items(), *part._buffers.items()]
    found: list[Any] = [type(part), id(type(part)), part.training, part.extra_repr()]
    found += [(name, t.shape, t.dtype, t.requires_grad) for name, t in tensors if t is not None]
    for name, value in part.__dict__.items():
        if isinstance(value, int | float | str | tuple | torch.dtype):
            found.append((name, repr(value)))
        elif callable(value) and not isinstance(value, Wrapped):
            found.append((name, id(value)))
    return found


def _sink(output: Any) -> torch.Tensor | None:
    """None where a block's output has no gradient: its backward does not run."""
    if not _with_gradient(output):
        return None
    return torch.stack([_Sink.apply(leaf).float() for leaf in _with_gradient(output)]).sum()


def _with_gradient(tree: Any) -> list[torch.Tensor]:
    return [tensor for tensor in tensors_of(tree) if tensor.grad_fn is not None]


def _copy(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _shape_of(leaf: Any) -> Any:
    if not has_storage(leaf):
        return leaf
    return torch.empty_like(leaf, device="meta").requires_grad_(leaf.requires_grad)


def _leaf(leaf: Any) -> Any:
    """A leaf on the same memory, whose gradient is this run's."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf


def _enter(leaf: Any) -> Any:
    """As it comes from the block before: made by an operation, and held by nobody else."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf

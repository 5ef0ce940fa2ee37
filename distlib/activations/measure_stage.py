"""Measures a stage of a pipeline: what one micro-batch takes in it, block by block, as F, BW, B and W.

    stage alone     arrives ---> F ---> held ---> BW            bytes at each block's begin, forward and back
                    arrives ---> F ---> held ---> B ---> late ---> W
    block alone     under every choice, as in measure.py

Blocks recompute everything while the stage is measured; what they then keep is taken off. So what is left is there
whatever they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from distlib.activations.live import LiveBytes
from distlib.activations.measure import Measurement, Queue, handles, no_trace
from distlib.activations.offload import Offloader
from distlib.activations.shares import Pass, StageChain
from distlib.activations.wrapped import Wrapped, on_first_gradient


class Micro(Protocol):
    """One micro-batch in a stage whose parameters are replaced by `own`. It makes what arrives, and lets go of what
    leaves."""

    def forward(self) -> None: ...
    def backward(self, split: bool) -> None: ...
    def weights(self) -> None: ...


@dataclass
class _Run:
    """Bytes alive in one micro-batch. entry, back: at each block's begin, in forward and backward. For F and for the
    backward: inner, outer as in `Pass`. held: behind F; late: behind B; weights: the peak of W."""

    order: list[Wrapped] = field(default_factory=list)
    entry: list[int] = field(default_factory=list)
    back: dict[Wrapped, int] = field(default_factory=dict)
    forward_inner: int = 0
    forward_outer: int = 0
    backward_inner: int = 0
    backward_outer: int = 0
    held: int = 0
    late: int = 0
    weights: int = 0


class StageMeasurement(Measurement):
    """Measures a stage whose blocks are wrapped.

    module: the stage's. inputs: tensors of which random numbers may depend. micro: makes a micro-batch, given the
    parameters to use. full, split: whether the table has BW, and B and W, of this stage. queue: divides a backward.
    """

    def __init__(
        self,
        module: nn.Module,
        wrapped: Sequence[Wrapped],
        inputs: Any,
        micro: Callable[[dict[str, torch.Tensor]], Micro],
        rounds: int,
        *,
        full: bool,
        split: bool,
        queue: Callable[[], Queue],
    ) -> None:
        super().__init__(module, wrapped, (inputs, {}), None, rounds)
        self._micro, self._queue = micro, queue
        self._ways = [split for split, there in ((False, full), (True, split)) if there]
        self._begins: dict[tuple[Any, bool], int | None] = {}  # of blocks that recompute everything, by signature

    def stage(self, kinds: Sequence[str], offloader: Offloader | None) -> tuple[StageChain, list[Wrapped]]:
        """The chain, and its blocks in the order of their forward. kinds: as for `Measurement.chain`.

        Raises:
            ValueError: a block runs not exactly once in the forward.
        """
        with no_trace(self._module, self._inputs), torch.enable_grad():
            own = handles(self._module)
            always = self._casts(lambda: self._whole(own, self._ways[0]))
            for one in self._wrapped:
                one.kind = "full"
            self._warm_up(own)
            runs = {split: self._measured(own, split) for split in self._ways}
            seconds = min(self._timed(lambda: self._whole(own, False)) for _ in range(self._rounds))
            order = next(iter(runs.values())).order
            signatures = [self._signature(one) for one in order]
            choices = self._choices(order, kinds, offloader)
        full = [next(choice for choice in of_block if choice.name == "full") for of_block in choices]
        kept, deferred = sum(choice.kept for choice in full), sum(choice.deferred for choice in full)
        run = next(iter(runs.values()))
        before, kept_before = 0, []
        for choice in full:
            kept_before.append(before)
            before += choice.kept
        entry = [at - b for at, b in zip(run.entry, kept_before, strict=True)]
        passes: dict[bool, Pass] = {}
        for split, its in runs.items():
            fixed, later = [], deferred
            for i, one in enumerate(order):
                later -= full[i].deferred
                begin = self._begins[signatures[i], split]
                if begin is None or one not in its.back:  # no gradient comes here
                    fixed.append(entry[i])
                else:
                    fixed.append(its.back[one] - begin - kept_before[i] - (later if split else 0))
            inner = its.backward_inner - (deferred if split else 0)
            passes[split] = Pass(fixed, its.backward_outer - kept, inner)
        late, weights = (runs[True].late - deferred, runs[True].weights - deferred) if True in runs else (0, 0)
        chain = StageChain(
            choices,
            Pass(entry, run.forward_outer - kept, run.forward_inner),
            passes.get(False),
            passes.get(True),
            run.held - kept,
            late,
            weights,
            max(0.0, seconds - sum(choice.seconds for choice in full)),
            always,
        )
        return chain, order

    # ------------------------------------------------------------ the stage alone

    def _warm_up(self, own: dict[str, torch.Tensor]) -> None:
        """Allocates what is allocated once, and takes the blocks' inputs."""
        seen: set[Wrapped] = set()

        def see(one: Wrapped, args: Any, kwargs: Any) -> None:
            if _in_forward():
                self._require_first(one, seen)
                seen.add(one)
                self._capture(one, args, kwargs)

        self._told(see, lambda: self._whole(own, self._ways[0]))
        self._require_all(seen)
        for split in self._ways[1:]:
            self._whole(own, split)

    def _whole(self, own: dict[str, torch.Tensor], split: bool) -> None:
        micro = self._micro(own)
        micro.forward()
        micro.backward(split)
        if split:
            micro.weights()

    def _told(self, see: Callable[[Wrapped, Any, Any], None], run: Callable[[], None]) -> None:
        for one in self._wrapped:
            one.seen = see
        try:
            run()
        finally:
            for one in self._wrapped:
                one.seen = None

    def _measured(self, own: dict[str, torch.Tensor], split: bool) -> _Run:
        """One micro-batch, each pass by itself."""
        run, live = _Run(), LiveBytes()
        first_over = False

        def first_ends(_: Any) -> None:
            nonlocal first_over
            first_over = True
            live.reset_peak()

        def see(one: Wrapped, args: Any, kwargs: Any) -> None:
            if not _in_forward():
                return
            if not run.order:
                run.forward_inner = live.peak
                on_first_gradient((args, kwargs), first_ends)
            run.order.append(one)
            run.entry.append(live.live)

        def behind(one: Wrapped, output: Any) -> None:
            live.reset_peak()
            on_first_gradient(output, lambda _: begins(one))

        def begins(one: Wrapped) -> None:
            if not run.back:
                run.backward_outer = live.peak
            run.back[one] = live.live

        hooks = [
            one.block.register_forward_hook(lambda _, __, output, one=one: behind(one, output)) for one in self._wrapped
        ]
        try:
            with live:
                micro = self._micro(own)
                self._told(see, micro.forward)
                run.forward_outer, run.held = live.peak, live.live
                live.reset_peak()
                micro.backward(split)
                if not run.back:  # no blocks, or none with a gradient
                    run.backward_outer = live.peak
                run.backward_inner = live.peak if first_over else 0
                run.late = live.live
                if split:
                    live.reset_peak()
                    micro.weights()
                    run.weights = live.peak
        finally:
            for hook in hooks:
                hook.remove()
        return run

    # ------------------------------------------------------------ a block alone

    def _bytes(self, one: Wrapped, own: dict[str, torch.Tensor], offloader: Offloader | None) -> dict[str, int]:
        found: dict[str, int] = {}
        for split in self._ways:
            alone = self._alone(one, own, offloader, self._queue() if split else None)
            found |= {"kept": alone.kept, "forward": alone.forward}
            found |= {"split": alone.backward, "deferred": alone.deferred} if split else {"backward": alone.backward}
            if one.kind == "full":
                self._begins[self._signature(one), split] = alone.begin
        return {"backward": 0, **found}


def _in_forward() -> bool:
    """Not in a recomputation, nor where bytes are counted without gradients."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

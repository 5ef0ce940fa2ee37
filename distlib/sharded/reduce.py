"""The path of a gradient: it lands in its unit's buffer, hop 1 adds it up in the partition group, hop 2 between them.

    backward   ... unit 2 ..... unit 1 ..... unit 0 .. root |          gradients land in the buffers of a small pool
    hop 1          |-- 2 --|   |-- 1 --|   |-- 0 --|   |root|   reduce-scatter, every micro-step
    hop 2                      |- bucket 0 (2, 1) -| |- bucket 1 -|   all-reduce, once a window

A *window* is what one optimizer step sees: micro-steps under no_sync(), then one backward that synchronises. Flats are
reduced in one order on all ranks: a flat that is complete waits for those before it. Both hops average.

On a GPU all that follows the landing runs on a stream of its own, which the stream that computes waits for at the end
of the backward: so finishing a hop 1 never waits, it queues what is to be done when it is over.

A backward in two passes makes hop 1 once, too: what lands in the input pass (norm scales, mostly) is set aside, without
a buffer, and goes with the next hop 1 of its flat.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from distlib import streams
from distlib.comm.work import Work
from distlib.data_parallel.backward import Passes, will_land
from distlib.sharded.flat import Flat
from distlib.sharded.gradients import Accumulator, BufferPool
from distlib.sharded.groups import Grid
from distlib.sharded.options import Options
from distlib.sharded.route import Route
from distlib.sharded.window import Window

_HOLDS = 1  # its slice of the buffer holds a gradient
_NOW = 2  # its gradient landed in this backward


@dataclass(eq=False)
class _Landing:
    """A trained flat during a backward."""

    flat: Flat
    dtype: torch.dtype  # of the buffer: what travels in hop 1
    left: int = 0  # parameters whose gradient has not landed in this backward
    touched: bytearray = field(default_factory=bytearray)  # by parameter: _HOLDS, _NOW
    early: dict[int, torch.Tensor] = field(default_factory=dict)  # by parameter: of input passes, for the next hop 1
    buffer: torch.Tensor | None = None
    views: Sequence[torch.Tensor] = ()
    sums: torch.Tensor | None = None  # where hop 2 finds them, where that is the buffer
    launched: bool = False
    filled: bool = False  # the accumulator holds something of this window

    def reset(self, weight_pass: bool) -> None:
        """A backward begins; `weight_pass`: what landed in the input pass does not come again."""
        self.left = sum(map(will_land, self.flat.full)) if weight_pass else len(self.flat.names)
        self.launched = False


@dataclass
class _Hop1:
    """A reduce-scatter under way; `added`: to be added to the accumulator when it is there."""

    landing: _Landing
    work: Work | None
    added: torch.Tensor | None


class Reduction:
    """Gradients of one model. flats: the trained ones, in the order in which they are reduced."""

    def __init__(self, flats: Sequence[Flat], grid: Grid, options: Options, device: torch.device) -> None:
        self._grid = grid
        self._whole_gradients = options.stage == 1
        self._hierarchical = None if options.hierarchical == "auto" else bool(options.hierarchical)
        reduce = options.mixed_precision.reduce
        self._landings = [
            _Landing(f, reduce if reduce is not None and f.compute.is_floating_point else f.compute) for f in flats
        ]
        self._device = device
        self._stream = streams.new(device, urgent=True)
        self._pool = BufferPool(grid.reduce, device, self.poll)
        self.accumulator = Accumulator(flats, grid, device, options.host)
        self._inflight: deque[_Hop1] = deque()
        self._next = 0  # the first landing that is not launched
        self._hop2: list[Work] = []
        self.window = Window(flats, self.accumulator, grid.world.rank)
        self._route = Route(grid)
        self._idle = True
        self.paused = False  # inside no_sync()
        self.forward_paused = False  # the last forward was
        self.passes = Passes()
        for landing in self._landings:
            landing.touched = bytearray(len(landing.flat.names))

    @property
    def buffer_bytes(self) -> int:
        """Bytes of gradient buffers, and of gradients set aside."""
        return self._pool.nbytes + sum(t.nbytes for landing in self._landings for t in landing.early.values())

    @property
    def _deferred(self) -> bool:
        return self.paused or self.forward_paused or self.passes.input

    # ------------------------------------------------------------ during backward

    def landed(self, index: int, i: int, full: torch.nn.Parameter) -> None:
        """The gradient of parameter i of a flat is there. The hot path: once per parameter and backward."""
        landing = self._landings[index]
        gradient = full.grad
        full.grad = None
        if self._idle:
            self._begin()
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError(
                f"rank {self._grid.world.rank}: parameter {self._landings[index].flat.names[i]!r} received a sparse "
                "gradient, which flat buffers cannot hold: call F.embedding, or F.embedding_bag, with sparse=False"
            )
        if self.passes.input and not self._whole_gradients:
            self._set_aside(index, i, gradient)
            return
        if landing.launched:
            raise RuntimeError(
                f"rank {self._grid.world.rank}: parameter {landing.flat.names[i]!r} received a second gradient in one "
                "backward after its unit was reduced. Re-entrant checkpoints do that to shared parameters: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        if landing.buffer is None:
            self._take_buffer(landing)
        if landing.touched[i] & _HOLDS:
            landing.views[i].add_(gradient)
        else:
            landing.views[i].copy_(gradient)
        if not landing.touched[i] & _NOW:
            landing.touched[i] = _HOLDS | _NOW
            self.window.use(index, i)
            landing.left -= 1
            if landing.left == 0:
                self._advance()

    def _set_aside(self, index: int, i: int, gradient: torch.Tensor) -> None:
        early = self._landings[index].early
        held = early.get(i)
        if held is not None:  # sums in fp32, as the accumulator's
            gradient = held.to(torch.promote_types(held.dtype, torch.float32)).add_(gradient)
        early[i] = gradient
        self.window.use(index, i)

    def _take_buffer(self, landing: _Landing) -> None:
        dtype = landing.dtype
        if self._lands_in_accumulator(landing):
            landing.buffer = landing.sums
            landing.views = landing.flat.view_on(landing.buffer)
            if landing.filled:
                landing.touched = bytearray(touched | _HOLDS for touched in landing.touched)
            return
        if self._whole_gradients and self._deferred:  # micro-steps add up here
            dtype = torch.promote_types(dtype, torch.float32)
        landing.buffer = self._pool.take(landing.flat.layout.numel, dtype)
        landing.views = landing.flat.view_on(landing.buffer)
        for begin, end in landing.flat.layout.gaps():
            landing.buffer[begin:end].zero_()

    def _lands_in_accumulator(self, landing: _Landing) -> bool:
        """A rank that holds all of a flat has no hop 1: gradients are added up where hop 2 finds them. Not where they
        would have been rounded on the way."""
        if self._grid.reduce is not None or self._whole_gradients or landing.flat.subparts > 1:
            return False
        if torch.promote_types(landing.dtype, landing.flat.compute) != landing.dtype:
            return False
        if landing.sums is None:
            landing.sums = self.accumulator.direct(landing.flat)
        return landing.sums is not None

    def _begin(self) -> None:
        """The first gradient of a backward: what do `.grad`s hold, and does this window start anew?"""
        self._idle = False
        self._next = 0
        for landing in self._landings:
            landing.reset(self.passes.weight)
            for i in range(len(landing.touched)):
                landing.touched[i] &= _HOLDS
        if self.window.open:
            for index, i in self.window.zeroed():
                self._clear(self._landings[index], i)
            return
        self.window.begin()
        for landing in self._landings:
            landing.filled = False
            landing.touched = bytearray(len(landing.touched))
            landing.early = {}

    def _clear(self, landing: _Landing, i: int) -> None:
        """Drops what parameter i has accumulated in this window."""
        if landing.touched[i] and landing.buffer is not None:
            landing.views[i].zero_()
        landing.early.pop(i, None)
        if landing.filled:
            self.accumulator.clear(landing.flat, i)

    def _advance(self) -> None:
        """Launches what is complete and next in order."""
        if self._whole_gradients and self._deferred:
            return
        while self._next < len(self._landings) and self._landings[self._next].left == 0:
            self._launch(self._landings[self._next])
            self._next += 1
        self.poll()

    def _launch(self, landing: _Landing) -> None:
        """Hop 1 of one flat."""
        landing.launched = True
        if landing.buffer is None:
            self._take_buffer(landing)
        buffer = landing.buffer
        assert buffer is not None
        early, landing.early = landing.early, {}
        for i, (touched, view) in enumerate(zip(landing.touched, landing.views, strict=True)):
            if i in early:
                view.add_(early[i]) if touched else view.copy_(early[i])
            elif not touched:
                view.zero_()
        if buffer is landing.sums:
            self._inflight.append(_Hop1(landing, None, None))
            return
        if buffer.dtype != landing.dtype:
            landing.buffer = self._pool.take(buffer.numel(), landing.dtype).copy_(buffer)
            self._pool.give(buffer)
            buffer = landing.buffer
        group = self._grid.reduce
        target = self.accumulator.direct(landing.flat)
        if group is None:
            self._inflight.append(_Hop1(landing, None, buffer))
            return
        added = None
        if landing.filled or target is None or target.dtype != landing.dtype:
            # Halves are summed in fp32; rounded to what travels only where they cross a network.
            target = added = self._pool.take(landing.flat.layout.part, landing.dtype)
        work = group.reduce_scatter(target, buffer, op="avg", async_op=True, hierarchical=self._hierarchical)
        self._inflight.append(_Hop1(landing, work, added))

    def poll(self, wait: bool = False) -> bool:
        """Finishes hop 1s that are done, in order; `wait`: the oldest one in any case. False: there is none."""
        if wait and not self._inflight:
            return False
        while self._inflight and (wait or self._is_done(self._inflight[0])):
            with self._aside():
                self._finish_hop1(self._inflight.popleft())
            wait = False
        return True

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of reductions, after all that the current stream holds."""
        streams.follow(self._stream, streams.current(self._device))
        with streams.on(self._stream):
            yield

    def _is_done(self, hop: _Hop1) -> bool:
        return self._stream is not None or hop.work is None or hop.work.is_completed()

    def _finish_hop1(self, hop: _Hop1) -> None:
        landing, buffer = hop.landing, hop.landing.buffer
        assert buffer is not None
        if hop.work is not None:
            hop.work.wait()
        if hop.added is not None:
            self.accumulator.add(landing.flat, hop.added, landing.filled)
            if hop.added is not buffer:
                self._pool.give(hop.added)
        landing.filled = True
        if buffer is not landing.sums:
            self._pool.give(buffer)
        landing.buffer, landing.views = None, ()
        landing.touched = bytearray(len(landing.touched))
        if not self._deferred:
            self._hop2 += self.accumulator.arrived(landing.flat)

    # ------------------------------------------------------------ the end of a backward

    @property
    def begun(self) -> bool:
        """Whether a gradient landed in this backward."""
        return not self._idle

    def finish(self, asked: Sequence[str]) -> None:
        """The backward, or its input pass, is over on this rank. asked: of the Source.

        A collective, but after an input pass, or where nothing was to be trained.
        """
        self._route.add(asked)
        if self.passes.input:
            if not self._idle:
                self.window.lend()
            self._idle = True
            return
        if self._idle:
            if not self._landings:
                return
            self._begin()  # no gradient here, but the other ranks may have some
        if not (self._whole_gradients and self._deferred):
            for landing in self._landings[self._next :]:
                self._launch(landing)
            self._next = len(self._landings)
        if self._deferred:
            while self.poll(wait=True):
                pass
            streams.follow(streams.current(self._device), self._stream)
            self.window.lend()
        else:
            self._synchronise()
        self._idle = True

    def _synchronise(self) -> None:
        used = self.window.used
        flags = torch.frombuffer(bytearray(used + self._route.checksum()), dtype=torch.uint8)
        agreed = None
        if self._grid.world.size > 1:
            agreed = self._grid.world.all_reduce(flags, "bor", async_op=True)
        while self.poll(wait=True):
            pass
        with self._aside():
            for work in self._hop2:
                work.wait()
            self._hop2 = []
            self.accumulator.settle()
        streams.follow(streams.current(self._device), self._stream)
        if agreed is not None:
            agreed.wait()
        together = flags.numpy().tobytes()
        self._route.check(together[len(used) :])
        self.window.close(together[: len(used)])

    def died(self) -> None:
        """The backward raised on this rank: with hop 1s under way nothing can be undone, and the groups end. So they do
        where it was one pass of two: nothing else of this rank can stand in for it."""
        if self.passes.input or self.passes.weight:
            when = f"in its {'input' if self.passes.input else 'weight'} pass"
        elif any(landing.launched for landing in self._landings) and not self._idle:
            when = "after gradients were under way"
        else:
            when = ""
        if when:
            self._grid.abort(
                f"rank {self._grid.world.ranks[self._grid.world.rank]}: backward stopped with an exception {when}; "
                "see that rank's own traceback"
            )
        self._idle = True

"""The path of a gradient: it lands, moves to its slice of a bucket, and the bucket is averaged.

    backward    ... d ... c ......... b ... a |           gradients land, in about reverse order of use
    copy           [d]   [c]         [b]   [a]            to its slice while in cache; then .grad = slice
    buckets         0------>  1-------------->            launched when the last gradient has landed and all
                                                          earlier buckets were: the same order on all ranks
    end of backward                           | wait, and nothing to copy out

A gradient that is its slice already (it was accumulated onto) is not copied at all.

On a GPU "wait" is an order of streams. The host waits for the other ranks' hosts only, which exchange what they have to
report while their GPUs are busy with what was queued.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distlib.buckets import MIB, Parameter, plan
from distlib.comm.group import Group
from distlib.comm.work import Work
from distlib.data_parallel.backward import BackwardWatch, Passes, will_land
from distlib.data_parallel.hooks import CommHook, GradientBucket, Handed
from distlib.data_parallel.memory import BucketMemory, empty, numbers_on
from distlib.data_parallel.report import Report


@dataclass(frozen=True)
class Options:
    """The arguments of `DataParallel` that concern gradients; described there."""

    bucket_mb: float = 25.0
    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_dtype: torch.dtype | None = None
    comm_hook: CommHook | None = None


class Reducer:
    """Averages the gradients of `parameters` over the ranks of `group` during each backward. Without parameters it
    counts forwards and backwards, and communicates nothing.

    Attributes:
        paused: inside no_sync(); gradients accumulate on this rank.
        pending: forwards recorded whose backwards have not ended.
        unsynchronised: `.grad` holds gradients that were not averaged.
        source: group rank whose arrival order decides the layout.
        scale: factor on the averages of the next backward (uneven inputs).
        arrivals: per bucket, time.monotonic_ns() when it was complete on this rank in the last backward.
    """

    def __init__(
        self,
        group: Group,
        names: Sequence[str],
        parameters: Sequence[torch.nn.Parameter],
        device: torch.device,
        options: Options,
    ) -> None:
        self._group = group
        self._parameters = list(parameters)
        self._device = device
        # Where it is the GPU, the report travels with the gradients, and is read late.
        self._report_device = numbers_on(group, device)
        self._hook = options.comm_hook
        self._wire = options.gradient_dtype
        self._tolerant = options.find_unused_parameters
        self._static = options.static_graph
        count = len(self._parameters)
        self._alone = not count or (group.size == 1 and self._hook is None)
        self._report = Report(group, names, self._report_device)
        self._expected = [0 if self._static else 1] * count  # landings per backward; static: yet to learn
        self._unused_here: list[int] = []  # static: averaged because others use them
        self._order: list[int] | None = []  # of arrival, recorded until the first averaged backward
        self._views: list[torch.Tensor | None] = [None] * count
        self._memory: BucketMemory | None = None
        self._numbers = torch.zeros(Report.numbers(count))
        self._report_apart = False
        if not self._alone:
            self._memory = self._lay_out(names, options)
        self._follow_layout()

        self.paused = self._forward_paused = False
        self.pending = 0
        self.unsynchronised = self._unread = False
        self.source, self.scale = 0, 1.0
        self.arrivals: list[int] = []
        self._touched = [False] * count  # landed in a micro-step whose gradients were not averaged yet
        self._deferred = False
        self._works: list[Work] = []
        self._handed: list[Handed] = []
        self._passes = Passes()
        self.watch = BackwardWatch(self._finish, self._died, self._passes)
        self._rest()
        _register(self, self._parameters)

    # ------------------------------------------------------------ set-up

    def _lay_out(self, names: Sequence[str], options: Options) -> BucketMemory:
        """Buckets, and room for the report: in the last bucket if it is exact there and in host memory, else on its
        own."""
        dtypes = [self._wire or p.dtype.to_real() for p in self._parameters]
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in self._parameters]
        specs = [Parameter(*spec) for spec in zip(names, sizes, dtypes, strict=True)]
        exact = {*dtypes} <= {torch.float32, torch.float64}
        self._report_apart = self._hook is not None or not exact or self._report_device != self._device
        numbers = Report.numbers(len(specs))
        layout = plan(
            specs,
            cap_bytes=max(1, int(options.bucket_mb * MIB)),
            align_bytes=1 if self._hook is not None else 64,
            tail=0 if self._report_apart else numbers,
        )
        if self._report_apart:
            self._numbers = empty(self._group, numbers, torch.float32, self._report_device).zero_()
        return BucketMemory(layout, self._parameters, self._group, self._device, self._hook is not None)

    def _follow_layout(self) -> None:
        """Tables of the current layout, one lookup each for a landing gradient."""
        self._bucket_of = [0] * len(self._parameters)
        if self._memory is None:
            self._members_due = [sum(map(bool, self._expected))]
            self._labels = []
            return
        self._views = self._memory.views
        if not self._report_apart:
            self._numbers = self._memory.tail
        buckets = self._memory.layout.buckets
        for bucket in buckets:
            for member in bucket.members:
                self._bucket_of[member.parameter] = bucket.index
        self._members_due = [sum(self._expected[m.parameter] > 0 for m in b.members) for b in buckets]
        self._labels = [f"bucket {b.index}" for b in buckets]

    def _rest(self) -> None:
        """Between two backwards."""
        self._idle = True
        self._due = list(self._expected)
        self._left = list(self._members_due)
        self._launched = 0
        self._works.clear()
        self._handed.clear()
        self._report.clear()
        self.watch.forget()

    # ------------------------------------------------------------ what the wrapper calls

    def before_forward(self, recording: bool) -> None:
        """At the start of each forward outside a backward."""
        self.settle()
        if recording:
            self._forward_paused = self.paused

    def after_forward(self, output: object) -> None:
        """At the end of each forward that records a graph."""
        watched = self.watch.outputs(output)
        if watched or self._parameters:  # else no backward will be seen
            self.pending += 1

    def traffic(self) -> tuple[int, int]:
        """(collectives, bytes handed to them) of one averaged backward on this rank, hooks not counted."""
        if self._memory is None:
            return 0, 0
        apart = self._numbers.nbytes if self._report_apart else 0
        sizes = [buffer.nbytes for buffer in self._memory.buffers]
        return sum(map(bool, sizes)) + bool(apart), sum(sizes) + apart

    # ------------------------------------------------------------ during backward

    def _begin(self) -> None:
        """The first gradient of a backward has landed."""
        if torch.is_grad_enabled():
            self._rest()
            raise RuntimeError(
                f"rank {self._group.rank}: backward(create_graph=True) through DataParallel is not "
                "supported: the averaged gradients would have no graph. Use torch.autograd.grad(..., "
                "create_graph=True) with respect to inputs or activations, add the penalty to the loss, and "
                "call loss.backward()."
            )
        self.watch.begin()
        self._open()
        if self._passes.weight and not self._deferred:
            self._expect_no_more_of(
                [i for i, p in enumerate(self._parameters) if self._touched[i] and not will_land(p)]
            )

    def _open(self) -> None:
        self.settle()
        self._idle = False
        self._deferred = self.paused or self._forward_paused or self._passes.input
        if not self._deferred:
            self.arrivals = [0] * len(self._labels)
            self._fill(self._unused_here)

    def _expect_no_more_of(self, early: Sequence[int]) -> None:
        """These landed in an input pass, and their buckets need not wait for them."""
        self._fill(early)
        for i in early:
            if self._due[i] > 0:
                self._due[i] = 0
                self._left[self._bucket_of[i]] -= 1

    def _adopt(self, index: int, parameter: torch.Tensor, view: torch.Tensor | None) -> None:
        """A gradient that is not its slice of the bucket: copy it there and make the slice the gradient."""
        gradient = parameter.grad
        if gradient is None:
            self._report.note("taken", index)
        elif gradient.layout is not torch.strided:
            self._report.note("sparse", index)
        elif view is not None:
            if self._wire is None:
                view.copy_(gradient)
                parameter.grad = view
            elif not self._deferred:
                view.copy_(gradient)

    def _surplus(self, index: int) -> None:
        if not self._static:
            self._report.note("surplus", index)
        elif self._order is None:
            self._report.note("changed", index)

    def _complete(self, index: int) -> None:
        """The last gradient of bucket `index` has landed.

        The last bucket waits for the end of the backward, a moment later: it carries the report.
        """
        if self._memory is None:
            return
        self.arrivals[index] = time.monotonic_ns()
        while self._launched < len(self._left) - 1 and not self._left[self._launched]:
            if self._handed and not self._handed[-1].done():
                return  # a hook may still communicate: the next bucket's messages must not overtake its own
            self._launch()

    def _launch(self) -> None:
        assert self._memory is not None
        index = self._launched
        buffer = self._memory.buffers[index]
        if self._hook is not None:
            last = index == len(self._left) - 1
            bucket = GradientBucket(self._memory.layout.buckets[index], buffer, self._parameters, last)
            self._handed.append(Handed(self._hook, bucket, buffer))
        elif buffer.numel():
            label, arrived = self._labels[index], self.arrivals[index]
            work = self._group.all_reduce(buffer, "avg", async_op=True, label=label, arrived_ns=arrived)
            assert work is not None
            self._works.append(work)
        self._launched += 1

    # ------------------------------------------------------------ end of backward

    def _finish(self) -> None:
        if self._idle and (self._passes.weight or not self._parameters):
            self._open()  # nothing landed in it: in its input pass, or never
        if self._idle:
            if not self._passes.input:
                self._check_no_gradients_bypassed()
            return
        try:
            if self._deferred:
                self.unsynchronised = True
            else:
                self._synchronise()
        finally:
            if not self._deferred:
                self.pending = 0
                self._touched = [False] * len(self._touched)
            elif not self._passes.input:
                self.pending = max(0, self.pending - 1)
            self._rest()

    def _died(self) -> None:
        """The backward raised on this rank; the others may be waiting for its gradients.

        With buckets under way nothing can be undone: the group ends. Before the first bucket, the next
        backward of this rank could stand in for this one, so it says in its report that it is a new start. Nothing
        can stand in for one of two passes.
        """
        when = f"after {self._launched} of {len(self._left)} gradient buckets were launched" if self._launched else ""
        if self._passes.input or self._passes.weight:
            when = f"in its {'input' if self._passes.input else 'weight'} pass"
        if when and self._group.size > 1:
            self._group.abort(
                f"rank {self._group.ranks[self._group.rank]}: backward stopped with an exception {when}; "
                "see that rank's own traceback"
            )
        self.pending = 0
        if self._group.size > 1 and not self._idle and not self._deferred:
            self._report.restarted = True
        self._rest()

    def _synchronise(self) -> None:
        learning = self._order is not None and self._static
        if learning:
            absent = [i for i, due in enumerate(self._due) if due == 0]
        else:
            absent = [i for i, due in enumerate(self._due) if due > 0]
        missing = []
        for i in absent:
            if not learning and self._due[i] < self._expected[i]:
                self._report.note("changed", i)
            elif not self._touched[i]:
                missing.append(i)
        if not (self._tolerant or learning):
            for i in missing:
                self._report.note("changed" if self._static else "missing", i)
        self._fill(absent)
        unused = self._exchange(missing)
        self._report.restarted = False
        self._hand_out([*absent, *self._unused_here], unused)
        if self._order is not None:
            if learning:
                self._expected = [-due for due in self._due]
            self._learn(unused)
        self.unsynchronised = False

    def _fill(self, absent: Sequence[int]) -> None:
        """Slices whose gradient did not land: what `.grad` holds from micro-steps before, or zeros."""
        for i in absent:
            gradient, view = self._parameters[i].grad, self._views[i]
            if view is None:
                continue
            if gradient is None:
                view.zero_()
            elif gradient is not view:
                self._adopt(i, self._parameters[i], view)

    def _exchange(self, missing: Sequence[int]) -> set[int]:
        """Launch what is left, wait for everything, read the reports. Gives the parameters no rank used."""
        if self._memory is None:
            if self._report:
                self._report.fail()
            return set(missing)
        self._report.write(self._numbers, missing)
        now = time.monotonic_ns()
        for index, arrival in enumerate(self.arrivals):
            if not arrival:
                self.arrivals[index] = now
        while self._launched < len(self._left):
            if self._handed:
                self._handed[-1].wait()
            self._launch()
        for handed in self._handed:
            handed.wait()
        for work in self._works:
            work.wait()
        if self._report_apart:
            self._group.all_reduce(self._numbers, op="avg")
        if self._report_device.type == "cpu" or missing or self._report or self._order is not None:
            return self._read_reports()
        self._unread = True  # reading now would make the host wait for the device
        return set()

    def settle(self) -> None:
        """Read reports that were left unread at the end of the last backward."""
        if self._unread:
            self._unread = False
            self._read_reports()

    def _read_reports(self) -> set[int]:
        counts = self._report.read(self._numbers)
        if counts is None:
            return set()
        learning = self._order is not None and self._static
        if self._report.complains(counts, missing_allowed=self._tolerant or learning):
            self._report.fail()
        return {i for i, ranks in enumerate(counts[: len(self._parameters)]) if ranks == self._group.size}

    def _hand_out(self, absent: Sequence[int], unused: set[int]) -> None:
        """Make the averages the gradients of parameters that had none here, and cast back what was cast."""
        for i in absent:
            parameter, view = self._parameters[i], self._views[i]
            if i not in unused and view is not None and parameter.grad is None:
                parameter.grad = view if self._wire is None else torch.empty_like(parameter)
        if self._memory is None or self._wire is None and self.scale == 1.0:
            return
        used = [i for i, view in enumerate(self._views) if view is not None and i not in unused]
        gradients = [self._parameters[i].grad for i in used]
        if self._wire is not None:
            torch._foreach_copy_(gradients, [self._views[i] for i in used])
        if self.scale != 1.0:
            torch._foreach_mul_(gradients, self.scale)

    def _learn(self, unused: set[int]) -> None:
        """After the first averaged backward: lay the buckets out in the order in which gradients arrive."""
        assert self._order is not None
        known = list(dict.fromkeys(reversed(self._order)))[::-1]  # by last landing, if there were several
        self._order = None
        if self._static:
            self._unused_here = [i for i, n in enumerate(self._expected) if n == 0 and i not in unused]
        if self._memory is None:
            self._follow_layout()
            return
        rest = [i for i in self._memory.layout.order if i not in set(known)]
        order = torch.tensor(known + rest, dtype=torch.int64, device=self._report_device)
        self._group.broadcast(order, self.source)
        excluded = unused if self._static else set()
        layout = self._memory.layout.rebuild([i for i in order.tolist() if i not in excluded])
        if layout != self._memory.layout:
            pairs = enumerate(zip(self._parameters, self._views, strict=True))
            held = {i: v.clone() for i, (p, v) in pairs if v is not None and p.grad is v}
            self._memory.arrange(layout)
            for i, gradient in held.items():
                view = self._memory.views[i]
                self._parameters[i].grad = gradient if view is None else view.copy_(gradient)
        self._follow_layout()

    def _check_no_gradients_bypassed(self) -> None:
        """A backward that gave no parameter a gradient: fine, unless it handed them out itself."""
        if self._alone or self.paused or self._forward_paused:
            return
        for parameter in filter(lambda p: p.requires_grad, self._parameters):
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            try:
                torch._C._will_engine_execute_node(node)
            except RuntimeError as error:  # how torch says that the node is a target of autograd.grad()
                raise RuntimeError(
                    f"rank {self._group.rank}: torch.autograd.grad() with respect to parameters of "
                    "DataParallel gives gradients that are not averaged over the ranks. Use backward(), or, "
                    "if gradients of this rank alone are wanted, run forward and autograd.grad() under "
                    "model.no_sync()."
                ) from error

    # ------------------------------------------------------------ uneven inputs

    def shadow(self) -> None:
        """Take part in one averaged backward of the other ranks, with zeros. `.grad` keeps no meaning."""
        if self._memory is None:
            return
        self._rest()
        learning = self._order is not None and self._static
        for buffer in self._memory.buffers:
            buffer.zero_()
        self.arrivals = [time.monotonic_ns()] * len(self._labels)
        everything = range(len(self._parameters))
        try:
            unused = self._exchange(everything if self._tolerant or learning else [])
            if self._order is not None:
                if learning:
                    self._expected = [0 if i in unused else 1 for i in everything]
                self._learn(unused)
        finally:
            self._rest()


def _register(reducer: Reducer, parameters: Sequence[torch.nn.Parameter]) -> None:
    """One hook per parameter. It holds the reducer weakly, and goes when the reducer goes."""
    reference = weakref.ref(reducer)
    handles = [p.register_post_accumulate_grad_hook(_landing(reference, i)) for i, p in enumerate(parameters)]
    weakref.finalize(reducer, _remove, handles).atexit = False


def _remove(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _landing(reference: weakref.ref[Reducer], index: int) -> Callable[[torch.Tensor], None]:
    """What happens when a gradient lands. The hot path: a few lookups, no allocation."""

    def landed(parameter: torch.Tensor) -> None:
        reducer = reference()
        if reducer is None:
            return
        if reducer._idle:
            reducer._begin()
        view = reducer._views[index]
        if parameter.grad is not view or view is None:
            reducer._adopt(index, parameter, view)
        if reducer._deferred:
            reducer._touched[index] = True
            return
        due = reducer._due[index] - 1
        reducer._due[index] = due
        if due == 0:
            bucket = reducer._bucket_of[index]
            left = reducer._left[bucket] - 1
            reducer._left[bucket] = left
            if left == 0:
                reducer._complete(bucket)
        elif due < 0:
            reducer._surplus(index)
        if reducer._order is not None:
            reducer._order.append(index)

    return landed

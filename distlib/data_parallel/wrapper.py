"""`DataParallel`: the module the user sees. A forward reads: check, agree, copy buffers, run, watch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from distlib.comm.group import Group
from distlib.data_parallel import checks, replicas
from distlib.data_parallel.agreement import require_equal
from distlib.data_parallel.hooks import CommHook
from distlib.data_parallel.join import ShadowHook, UnevenInputs
from distlib.data_parallel.memory import numbers_on
from distlib.data_parallel.naming import Transparent
from distlib.data_parallel.reducer import Options, Reducer
from distlib.memory import MemoryReport, replicated_report


class DataParallel(Transparent, Joinable):
    """Train one replica of `module` per rank: gradients are averaged over the ranks during backward.

    Every rank of the group must construct it, with the same module and the same options; parameters and
    buffers of group rank 0 are copied to all. Afterwards the ranks hold identical weights as long as each
    runs the same sequence of backwards and an optimizer that is a function of weights and gradients. On the
    `distlib` backend the averages do not depend, to the last bit, on `bucket_mb` nor on the order in which
    gradients arrive.

    `.grad` of a parameter is a slice of a bucket, rewritten by the next backward even after zero_grad():
    clone what must be kept. It is averaged when backward() returns, not before.

    Args:
        module: a module on one device. Freeze parameters (`requires_grad_(False)`) before wrapping. Where none is to be
            trained, as in a pipeline's frozen stage, buffers are copied as ever and nothing is averaged.
        bucket_mb: gradients are reduced in buckets of at most so many MiB; the first is 1 MiB at the most.
        find_unused_parameters: allow parameters without gradient in a backward. They count as zeros; where no
            rank had a gradient, `.grad` stays as it is. Without it such a backward raises on all ranks, by
            name.
        static_graph: every step uses the same parameters equally often. What is unused, or used several times
            by re-entrant checkpoints, is learnt in the first averaged backward, which does not overlap.
        broadcast_buffers: in training mode, copy buffers from group rank 0 to all ranks at the start of the
            first forward of each step; in a pipeline, of the first after it that begins with no other under way.
        gradient_dtype: torch.float16 or torch.bfloat16: communicate gradients in it (summed in float32), and
            cast back.
        comm_hook: `hook(bucket) -> Future or Tensor` that averages a bucket itself; see `GradientBucket`.
            torch's own hooks fit with their state bound: `functools.partial(fp16_compress_hook, None)`.
        process_group: any c10d group; default: all ranks.

    Raises:
        ValueError: options that contradict each other, or a module that cannot be wrapped.
        RuntimeError: on all ranks, naming ranks and parameters, if modules or options differ between ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        bucket_mb: float = 25.0,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        broadcast_buffers: bool = True,
        gradient_dtype: torch.dtype | None = None,
        comm_hook: CommHook | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = Options(bucket_mb, find_unused_parameters, static_graph, gradient_dtype, comm_hook)
        checks.options(options)
        names, parameters = checks.module(module, options)
        Transparent.__init__(self, module)
        Joinable.__init__(self)
        self._process_group = process_group
        self._group = Group.of(process_group)
        self._device = checks.device_of(module, self._group)
        self._uneven: ShadowHook | None = None
        self._places = checks.Places(
            module,
            replaced="its gradient would not be averaged. Change it in place (under torch.no_grad()), or wrap again",
            unfrozen="its gradient would not be averaged. Call requires_grad_(True) before wrapping",
            frozen=None if find_unused_parameters else "freeze before, or wrap with find_unused_parameters=True",
        )

        require_equal(
            self._group,
            "DataParallel: parameters, buffers and options",
            checks.facts(module, options, broadcast_buffers),
            numbers_on(self._group, self._device),
        )
        self._module_buffers = replicas.ModuleBuffers(module, self._group, self._device)
        self._copies_buffers = broadcast_buffers and len(self._module_buffers) > 0 and self._group.size > 1
        self._owes_buffers = False  # they were not copied when due: graphs of forwards under way may refer to them
        state = [p.detach() for p in module.parameters()] + self._module_buffers.tensors()
        replicas.broadcast(self._group, state, 0, self._device)
        self._reducer = Reducer(self._group, names, parameters, self._device, options)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward. Under no_grad(), in eval mode or in no_sync() nothing is communicated."""
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint recomputes within a backward
            self._prepare()
        output = self.module(*inputs, **kwargs)
        if torch.is_grad_enabled():
            self._reducer.after_forward(output)
        return output

    def _prepare(self) -> None:
        reducer = self._reducer
        reducer.watch.settle()
        recording = torch.is_grad_enabled()
        if recording and not reducer.paused:
            self._places.check(self._group.rank)
        reducer.before_forward(recording)
        due = self._copies_buffers and self.training and (self._owes_buffers or not reducer.paused)
        buffers = due and not reducer.pending
        self._owes_buffers = not buffers and (due or self._owes_buffers)
        source = 0
        if self._uneven is not None and self._join_config.enable:
            source = self._uneven.announce(buffers, recording and not reducer.paused)
        if buffers:
            self._module_buffers.broadcast(source)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, gradients accumulate on this rank and nothing is communicated.

        The first backward whose forward and backward are both outside averages all that was accumulated:

            with model.no_sync():
                loss(model(first)).backward()
            loss(model(second)).backward()      # averages the sum of both
        """
        before, self._reducer.paused = self._reducer.paused, True
        try:
            yield
        finally:
            self._reducer.paused = before

    # ------------------------------------------------------------ inside a pipeline

    def partial_backward(self) -> contextlib.AbstractContextManager[None]:
        """Around the input pass of a backward in two (B; see distlib.pipeline.split_backward): nothing is averaged.

        Local; an exception in it ends the group, since all other ranks wait for this micro-batch.
        """
        return self._reducer.watch.input_pass()

    def weight_backward(self) -> contextlib.AbstractContextManager[None]:
        """Around the weight pass (W): ends what `partial_backward` began, outside no_sync() by averaging all of it.

        Every rank must enter it, in the same order, even where nothing is left to compute. Exceptions as there.
        """
        return self._reducer.watch.weight_pass()

    @property
    def gathers(self) -> bool:
        """False: every rank holds whole parameters."""
        return False

    def hold(self) -> bool:
        """For code that also runs `ShardedDataParallel`: parameters are whole at all times. Returns False."""
        return False

    def release(self) -> bool:
        """See `hold`."""
        return False

    # ------------------------------------------------------------ ranks with different numbers of inputs

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Join:
        """`with model.join():` around the training loop lets ranks have different numbers of inputs.

        Ranks that finish early contribute zeros to the averages of the others, and end with the weights of
        one that trained to the end (the optimizer's state is not copied). Every rank must enter it. Within
        it, each forward outside no_sync() and no_grad() is followed by its backward. To join with other
        `Joinable`s, use `torch.distributed.algorithms.Join([model, optimizer])`.

        Args:
            divide_by_initial_world_size: divide sums by the group's size; False: by the number of ranks that
                still have inputs.
            enable: False does nothing, for loops that are known to be even.
            throw_on_early_termination: raise on all ranks as soon as one runs out of inputs.
        """
        return UnevenInputs(
            self, enable, throw_on_early_termination, divide_by_initial_world_size=divide_by_initial_world_size
        )

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale the averaged gradients so that their total norm is at most `max_norm`.

        Local: all ranks hold the same gradients, so each computes the same norm (to the bit, if they run the
        same number of threads). The norm does not depend on the layout of the buckets.

        Returns:
            The norm before scaling, a scalar tensor of the gradients' dtype, as torch's.

        Raises:
            RuntimeError: gradients are not averaged yet, or the norm is not finite and `error_if_nonfinite`.
        """
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if self._reducer.unsynchronised and any(p.grad is not None for p in parameters):
            raise RuntimeError(
                f"rank {self._group.rank}: clip_grad_norm_ after a backward under no_sync(): the ranks hold "
                "different gradients. Clip after the backward that averages them."
            )
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    @property
    def bucket_arrivals(self) -> list[int]:
        """When each bucket was complete on this rank in the last averaged backward: time.monotonic_ns()."""
        return list(self._reducer.arrivals)

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
        """Bytes of this rank's parameters, gradients and optimizer state, counted and by formula."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        gradients = {p.grad.data_ptr(): p.grad.nbytes for p in trained if p.grad is not None}
        return replicated_report(
            list(self.module.parameters()), max(sum(gradients.values()), self._reducer.traffic()[1]), optimizer
        )

    @property
    def process_groups(self) -> dict[str, Group | None]:
        """This rank's groups: "world", all ranks that average gradients."""
        return {"world": self._group}

    @property
    def traffic(self) -> tuple[int, int]:
        """(collectives, bytes) of one averaged backward: gradients, padding and report."""
        return self._reducer.traffic()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DataParallel:
        """`.to()`, `.half()`, `.cuda()`: refused where they change what buckets were made for."""
        super()._apply(fn, recurse)
        self._places.check_kinds(self._group.rank)
        return self

    # ------------------------------------------------------------ torch.distributed.algorithms.Joinable

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return ShadowHook(self, **kwargs)

    @property
    def join_device(self) -> torch.device:
        """Where torch's Join counts ranks."""
        return numbers_on(self._group, self._device)

    @property
    def join_process_group(self) -> Any:
        """The ranks that `torch.distributed.algorithms.join.Join` waits for."""
        return self._process_group if self._process_group is not None else dist.group.WORLD

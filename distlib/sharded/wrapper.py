"""`ShardedDataParallel`: the module the user sees. ZeRO stages 1 to 3 and MiCS, one code for all."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distlib.comm.group import Group
from distlib.data_parallel import checks, replicas
from distlib.data_parallel.agreement import require_equal
from distlib.data_parallel.naming import Transparent
from distlib.memory import MemoryReport, PerParameter, formula, state_bytes
from distlib.sharded import build, options, state
from distlib.sharded.gather import Gathers, SharedMapping, Source
from distlib.sharded.groups import make_grid, secondary_group
from distlib.sharded.guards import before_steps, refuse_clipping_by_parts, refuse_former, require_offload
from distlib.sharded.options import MixedPrecision, Options
from distlib.sharded.reduce import Reduction
from distlib.sharded.runtime import Runtime, outside, trained_flats
from distlib.sharded.units import divide
from distlib.shards import shard_of

_CPU = torch.device("cpu")


class ShardedDataParallel(Transparent):
    """Train one copy of `module` per partition group: each rank holds a part of what training needs in memory.

    Every rank of the group must construct it, with the same module and options; values are those of group rank 0.
    Afterwards `parameters()` are this rank's pieces: 1-D views of flat buffers, empty where the rank holds nothing of a
    parameter (`distlib.shards.shard_of` tells what each is). Any optimizer that treats elements alike works on them,
    with ordinary parameter groups. Forward and backward run as with the plain module; every rank must run them, in the
    same order. Gradients are averaged over all ranks when backward() returns.

    Where the ranks of a partition group share one host's memory, whole parameters are one mapping for all of them;
    write to parameters only between steps, by an optimizer, `load_state_dict` or `summon_full_params`.

    Papers: ZeRO (arXiv 1910.02054), MiCS (2205.00119), ZeRO++ (2306.10209). docs/sharding.md draws the paths.

    Args:
        module: on the CPU, on this rank's GPU or on the meta device (see `init`, `device`). Freeze parameters before
            wrapping.
        stage: what is divided: 1 the optimizer's state, 2 gradients too, 3 parameters too.
        partition_size: ranks that divide one copy: None: all (ZeRO); "node": those of a host; an int that divides the
            number of ranks (MiCS). Copies are kept equal by one all-reduce per optimizer step.
        units: "auto": one unit per repeated block; or classes of modules that are units.
        mixed_precision: dtypes to compute and reduce in; see MixedPrecision.
        reshard_after_forward: stage 3: free whole parameters after forward and gather them again for backward (True);
            keep them (False); or keep a secondary partition among so many ranks (int: ZeRO++'s hpZ), from which
            backward gathers.
        hierarchical: gather and reduce in two levels where a partition group spans hosts; "auto" chooses by topology
            and size.
        prefetch: units gathered ahead of use.
        offload: a folder: optimizers of distlib.optim keep their state in files there; others are refused. "cpu", for
            models on a GPU: pieces, gradients and optimizer state are in host memory, where any optimizer works on them
            (ZeRO-Offload, arXiv 2101.06840). With either, `parameters()` of a model on a GPU are CPU tensors.
        process_group: any c10d group; default: all ranks.
        shard_optimizer: "world" divides the optimizer's state over all ranks, not over the partition group only.
        gather_dtype: torch.int8: gather parameters block-quantized (ZeRO++'s qwZ): lossy.
        ownership: "whole" (stage 1): every parameter belongs to one rank, in its own shape, for optimizers that need
            whole matrices.
        init: initialises a module whose parameters are on the meta device; default: its reset_parameters().
        device: where the model computes; parameters on the CPU or the meta device go there one unit after the other.
            Default: where they are; the current GPU, if there is one, for a module on the meta device.

    Raises:
        ValueError: options that contradict each other or cannot take effect, a module that cannot be sharded.
        RuntimeError: on all ranks, naming ranks and parameters, if modules or options differ between ranks.
    """

    _instead_of_pickling = "call distlib.save(path, model=model) on all ranks, or save its full_state_dict()"

    def __init__(
        self,
        module: nn.Module,
        stage: int = 3,
        partition_size: int | str | None = None,
        units: str | Sequence[type[nn.Module]] = "auto",
        mixed_precision: MixedPrecision | None = None,
        reshard_after_forward: bool | int = True,
        hierarchical: bool | str = "auto",
        prefetch: int = 2,
        offload: str | Path | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        shard_optimizer: str = "partition",
        gather_dtype: torch.dtype | None = None,
        ownership: str = "flat",
        init: build.Init | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        build.check_module(module)
        world = Group.of(process_group)
        self._device = build.device_for(module, device, world)
        folder, on_host = options.offloaded(offload, self._device)
        chosen = Options(
            stage,
            MixedPrecision() if mixed_precision is None else mixed_precision,
            reshard_after_forward,
            hierarchical,
            prefetch,
            folder,
            shard_optimizer,
            gather_dtype,
            ownership,
            on_host,
        )
        options.check(chosen)
        super().__init__(module)
        divided = divide(module, units)
        require_equal(
            world,
            "ShardedDataParallel: parameters and options",
            build.facts(module, divided, chosen, partition_size, self._device),
            _CPU,
        )
        self._grid = make_grid(process_group, partition_size)
        self._options = chosen
        build.check_place(chosen, self._grid, self._device)

        checks.warn_of_hooks(module)
        former = list(module.parameters())
        self._units = build.make_flats(module, divided, self._grid, chosen, self._device)
        build.settle(self._units, self._grid, stage, chosen.offload, self._device)
        build.load_values(module, divided, self._units, self._grid, init, self._device)
        layout = "its place in the flat buffers depends on that. Freeze or unfreeze before wrapping"
        self._places = checks.Places(
            module,
            replaced="change it in place, under model.summon_full_params(), or wrap again",
            unfrozen=layout,
            frozen=layout,
        )
        buffers = replicas.ModuleBuffers(module, world, self._device)
        if len(buffers) and world.size > 1:
            buffers.broadcast(0)

        flats = [flat for unit in self._units for flat in unit.flats]
        self._source: Source
        if build.shares_memory(self._grid, self._device):
            self._source = SharedMapping(flats, self._grid)
        else:
            secondary = secondary_group(self._grid, reshard_after_forward)
            self._source = Gathers(self._units, self._grid, chosen, stage < 3, secondary)
        self._reduction = Reduction(list(trained_flats(self._units)), self._grid, chosen, self._device)
        refuse_former(self, former)
        refuse_clipping_by_parts()
        if chosen.offload is not None:
            require_offload(self, [piece for flat in flats for piece in flat.pieces])
        if on_host:
            before_steps(self, [piece for flat in flats for piece in flat.pieces], lambda _: build.writable(flats))
        modules = [[], *(unit.modules for unit in divided[1:])]
        reshards = reshard_after_forward is not False
        self._runtime = Runtime(self._units, modules, self._source, self._reduction, reshards, prefetch)
        module.register_forward_pre_hook(outside(self._runtime), prepend=True)
        self._told_of_pieces = False

    # ------------------------------------------------------------ training

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward. Every rank must call it."""
        if torch._C._current_graph_task_id() != -1:  # a checkpoint around the wrapper recomputes within a backward
            raise RuntimeError(
                "ShardedDataParallel was called within a backward: checkpoint modules inside of it, not the wrapper"
            )
        if self._runtime.summoned:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "within summon_full_params() gradients would stay on copies of the parameters: train outside of "
                    "it, or call under torch.no_grad()"
                )
            return self.module(*inputs, **kwargs)
        self._runtime.watch.settle()
        self._places.check(self._grid.world.rank)
        dtype = self._options.mixed_precision.param
        if dtype is not None:
            inputs, kwargs = options.cast((inputs, kwargs), dtype)
        self._runtime.begin()
        try:
            output = self.module(*inputs, **kwargs)
        except BaseException as error:
            self._runtime.rest()
            why = self._runtime.why_in_pieces(error, self.module)
            if why is None:
                raise
            raise RuntimeError(f"rank {self._grid.world.rank}: the model computed with pieces: {why}") from error
        self._runtime.end(output)
        wanted = self._options.mixed_precision.output
        return output if wanted is None else options.cast(output, wanted)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backwards are micro-steps: stages 2 and 3 make hop 1 only, stage 1 nothing.

        The first backward whose forward and backward are both outside averages over all ranks what was accumulated.
        Until then `.grad` holds unfinished sums, for zero_grad() only.
        """
        before, self._reduction.paused = self._reduction.paused, True
        try:
            yield
        finally:
            self._reduction.paused = before

    # ------------------------------------------------------------ inside a pipeline

    def partial_backward(self) -> contextlib.AbstractContextManager[None]:
        """Around the input pass of a backward in two (B; see distlib.pipeline.split_backward): nothing is reduced.

        Gradients that land in it, of norm scales and the like, go with the next weight pass. Local; an exception in it
        ends the groups, since all other ranks wait for this micro-batch.
        """
        return self._runtime.watch.input_pass()

    def weight_backward(self) -> contextlib.AbstractContextManager[None]:
        """Around the weight pass (W): ends what `partial_backward` began, with hop 1, and outside no_sync() hop 2.

        Every rank must enter it, in the same order, even where nothing is left to compute. Exceptions as there.
        """
        return self._runtime.watch.weight_pass()

    @property
    def gathers(self) -> bool:
        """Whether parameters move to be whole, and `hold` has something to do: stage 3 without a shared mapping."""
        return self._source.frees

    def hold(self) -> bool:
        """All parameters become whole, without waiting for it, and stay whole until `release`: one gather for any
        number of forwards and backwards.

        Every rank of the partition group must call it, in the same order as forwards and backwards. Returns False, and
        does nothing, where nothing is gathered (see `gathers`); outside of it units are gathered and freed as they are
        used. Parameters that an optimizer writes within it are gathered again.
        """
        return self._runtime.hold()

    def release(self) -> bool:
        """Ends `hold`: parameters are freed. Returns False where nothing was held."""
        return self._runtime.release()

    # ------------------------------------------------------------ gradients

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale the averaged gradients so that their total norm, over all ranks' pieces, is at most `max_norm`.

        Every rank must call it: one scalar is summed over the partition group.

        Returns:
            The norm before scaling, a scalar tensor in fp64, the same on all ranks.

        Raises:
            RuntimeError: gradients are not averaged yet, or the norm is not finite and `error_if_nonfinite`.
        """
        from distlib.optim.norm import clip_grad_norm_

        if self._reduction.window.open:
            raise RuntimeError(
                f"rank {self._grid.world.rank}: clip_grad_norm_ after a backward under no_sync(): gradients are not "
                "averaged yet. Clip after the backward that averages them"
            )
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return clip_grad_norm_(trained, max_norm, norm_type, error_if_nonfinite)

    # ------------------------------------------------------------ whole parameters

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This rank's pieces, and its buffers, by the module's own names: for `load_state_dict` of the same rank in a
        world of the same size. Warns once where they are not all of the model."""
        if self._grid.partition_size > 1 and not self._told_of_pieces:
            self._told_of_pieces = True
            warnings.warn(
                "state_dict() of a ShardedDataParallel is this rank's pieces: only the same rank of as many ranks can "
                "load them. For whole parameters call full_state_dict() on all ranks; for a checkpoint, distlib.save",
                stacklevel=2,
            )
        return super().state_dict(*args, **kwargs)

    def full_state_dict(self, rank0_only: bool = False) -> dict[str, torch.Tensor]:
        """The module's state dict with whole parameters (fp32 masters under mixed precision), copies, on the CPU.

        Every rank must call it. rank0_only: the other ranks get an empty dict, and never hold more than one unit.
        """
        self._runtime.watch.settle()
        return state.full_state_dict(self.module, self._units, self._grid, rank0_only)

    @contextlib.contextmanager
    def summon_full_params(self, writeback: bool = True) -> Iterator[None]:
        """`with model.summon_full_params():` the module holds whole parameters, a copy on every rank.

        Every rank must enter it; what is done inside is each rank's own affair. The module computes with its copies,
        without talking to other ranks; gradients stay with the copies. writeback: each rank keeps its part of what it
        changed, so all ranks must make the same changes.
        """
        self._runtime.watch.settle()
        self._runtime.written = True
        with state.summon(self._units, self._grid, writeback):
            before, self._runtime.summoned = self._runtime.summoned, True
            try:
                yield
            finally:
                self._runtime.summoned = before

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole parameters (as of the plain module), or this rank's pieces (as of `state_dict()`).

        Raises:
            ValueError: shapes that are neither, by name; `assign=True`, which would replace the pieces.
        """
        self.before_writing()
        loaded = super().load_state_dict(state.cut(self.module, state_dict), strict=strict, assign=assign)
        self.parameters_written()
        return loaded

    def before_writing(self) -> None:
        """Returns when parameters may be written by other means than an optimizer; say `parameters_written()` after."""
        self._runtime.watch.settle()
        build.writable([flat for unit in self._units for flat in unit.flats])

    def parameters_written(self) -> None:
        """Says that parameters were written by other means than an optimizer between two steps."""
        self._runtime.written = True
        for unit in self._units:
            for flat in unit.flats:
                flat.told = True

    # ------------------------------------------------------------ accounts

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
        """Bytes of this rank's parameters, gradients and optimizer state, counted and by formula."""
        grid, chosen = self._grid, self._options
        flats = [flat for unit in self._units for flat in unit.flats]
        shared = build.shares_memory(grid, self._device)
        keeps_whole = chosen.stage < 3 and not shared
        parameters = sum(f.whole.nbytes if keeps_whole else f.shard.nbytes for f in flats)
        master = sum(f.master.nbytes for f in flats if f.apart)
        master += sum(f.staged.nbytes for f in flats if f.host and f.mixed)
        expected = dict.fromkeys(("parameters", "gradients", "optimizer"), 0.0)
        for flat in flats:
            count = sum(entry.numel for entry in flat.layout.entries)
            each = PerParameter.of(flat.dtype, flat.compute)
            for kind, value in formula(
                count, each, chosen.stage, grid.partition_size, grid.world.size, chosen.shard_optimizer
            ).items():
                if flat.trained or kind == "parameters":
                    expected[kind] += value
        counted = {
            "parameters": parameters,
            "gradients": self._reduction.accumulator.nbytes,
            "optimizer": state_bytes(optimizer) + master,
            "unit buffers": self._reduction.buffer_bytes + self._gathered_bytes(),
        }
        return MemoryReport(counted, {kind: int(value) for kind, value in expected.items()})

    def _gathered_bytes(self) -> int:
        if not self._source.frees:
            return 0
        return sum(f.whole.untyped_storage().nbytes() for unit in self._units for f in unit.flats)

    @property
    def process_groups(self) -> dict[str, Group | None]:
        """This rank's groups: "world", "partition" (gathers), "reduction" (hop 1), "replication" (hop 2)."""
        grid = self._grid
        return {
            "world": grid.world,
            "partition": grid.gather,
            "reduction": grid.reduce,
            "replication": grid.replication,
        }

    def _apply(self, fn: Any, recurse: bool = True) -> ShardedDataParallel:
        """`.to()`, `.half()`, `.cuda()`: refused where they would change pieces."""
        before = [(p.data_ptr(), p.dtype, p.device) for p in self.module.parameters()]
        probe = [fn(torch.empty(0, dtype=d, device=v)) for _, d, v in before]
        for (_, dtype, device), after, (name, p) in zip(before, probe, self.module.named_parameters(), strict=True):
            if after.dtype != dtype or after.device != device:
                shard = shard_of(p)
                raise RuntimeError(
                    f"{shard.name if shard else name!r} cannot go from {dtype} on {device} to {after.dtype} on "
                    f"{after.device} after wrapping: call .to() on the module before, or use mixed_precision="
                )
        return self

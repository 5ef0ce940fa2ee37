"""`PipelineParallel`: the model the user sees. A step reads: divide the batch, look up its table, run it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from distlib.comm.channel import Timeout, seconds_of
from distlib.comm.group import Group
from distlib.data_parallel.agreement import from_rank
from distlib.data_parallel.naming import Transparent, under_one_name
from distlib.memory import KINDS, MemoryReport, replicated_report
from distlib.optim.norm import clip_grad_norm_
from distlib.pipeline import build, division, micro_batches
from distlib.pipeline.actions import Schedule
from distlib.pipeline.ghost import places
from distlib.pipeline.losses import LossShare
from distlib.pipeline.micro_batches import Batch, MicroBatch, Weigh, batch_of
from distlib.pipeline.random import Numbers, micro_batch_seeds
from distlib.pipeline.runtime import LossFunction, Runtime, own_loss
from distlib.pipeline.shape_header import ShapeHeader, Told
from distlib.pipeline.simulate import Simulation, played
from distlib.pipeline.stage import Stage
from distlib.pipeline.steps import Steps
from distlib.pipeline.ties import Ties
from distlib.pipeline.unchanged import Unchanged


class PipelineParallel(nn.Module):
    """Train one model over the ranks of a pipeline, each of which holds one or several of its stages.

    Every rank of the group must construct it, with the same module and options. Afterwards `parameters()` are those of
    this rank's stages, under the names that they have in the whole model; the rest of `module` is on the meta device.
    `train_step` runs forwards and backwards of all micro-batches and leaves the gradients of the mean loss in `.grad`;
    the optimizer is the caller's.

    The model is divided between calls of its modules, as one run on fake tensors records them; anything may flow
    between stages: skip connections, several tensors, keyword arguments. See docs/pipeline.md.

    Papers: GPipe (arXiv 1811.06965), PipeDream-Flush (2006.09503), interleaved (2104.04473), zero bubble (2401.10241).

    Args:
        module: the whole model, on one device or (to be initialised stage by stage, see `init`) on meta.
        stages: how many; default: one per rank, two for "zb-v", two or more for "interleaved".
        schedule: one of distlib.pipeline.NAMES, or a Schedule of compute actions.
        microbatches: parts of a batch; each batch has at least so many rows.
        loss_fn: (output of the model, target) -> scalar, the mean over the micro-batch. None: the model returns the
            loss itself, or something with a `loss`.
        split: "auto": so that the slowest stage is as fast as can be; or the names of the modules with which stages
            begin; or explicit stage modules, the output of one being the arguments of the next (`module` is then None).
        example_inputs: as for `train_step`; only shapes and dtypes are read. Needed unless `module` has no parameters
            of its own outside of the modules that are divided.
        process_group: the ranks of this pipeline; default: all.
        example_target: as for `train_step`; if given, split="auto" counts the cost of the loss.
        world: all ranks that train the model together, where there are replicas of the pipeline: they divide it alike.
        costs: for split="auto": "measured" (one rank runs each kind of module) or "estimated" (operations counted).
        data_parallel: wraps the module of each stage of this rank, for replicas of the pipeline.
        keep_less: told of this rank's stages, all together, before data_parallel wraps them: to change what their
            blocks keep for backward.
        compute_dtype: where data_parallel computes in another dtype than that of the parameters.
        weigh: from a micro-batch's target, its weight in the step's loss; default: its rows.
        init: initialises a module whose parameters are on the meta device; default: its reset_parameters().
        whole: sharded stages that are whole at a time on a rank, if data_parallel shards parameters.
        limit: most micro-batches whose activations a rank may hold: schedule="auto" keeps to it, and one that holds
            more is refused.
        timeout: for messages between stages; default: the group's.
        shape_header: the rank of the first stage tells the others what its batch looks like. They need not be given
            it, and lengths may change as only that rank knows; see `train_step`.
        device: where this rank's stages compute; those on the CPU or on meta go there after the model was divided, by
            `data_parallel` where it is given. Default: where the model is, the CPU for one on meta.

    Raises:
        ValueError: options that contradict each other, or a model that cannot be divided so.
        RuntimeError: on all ranks, if models or options differ between them.
    """

    def __init__(
        self,
        module: nn.Module | None,
        stages: int | None = None,
        schedule: str | Schedule = "1f1b",
        microbatches: int = 1,
        loss_fn: LossFunction | None = None,
        split: str | Sequence[str] | Sequence[nn.Module] = "auto",
        example_inputs: Any = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        example_target: Any = None,
        world: dist.ProcessGroup | None = None,
        costs: str = "measured",
        data_parallel: Callable[[nn.Module], nn.Module] | None = None,
        keep_less: Callable[[build.Held], Any] | None = None,
        compute_dtype: torch.dtype | None = None,
        weigh: Weigh | None = None,
        init: Callable[[nn.Module], Any] | None = None,
        whole: int = 2,
        limit: float | None = None,
        timeout: Timeout = None,
        shape_header: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        build.check(module, schedule, microbatches, loss_fn, timeout)
        group = Group.of(process_group)
        everyone = Group.of(world) if world is not None else group
        build.require_alike(
            everyone,
            stages=stages,
            schedule=schedule,
            microbatches=microbatches,
            split=split,
            example_inputs=example_inputs,
            costs=costs,
            compute_dtype=compute_dtype,
            whole=whole,
            limit=limit,
            shape_header=shape_header,
        )
        whole_model, names = division.whole_model(module, split)
        count = build.stages_of(schedule, stages, group.size)
        self._device = where = build.device_for(whole_model, device)
        example = build.example_of(example_inputs, microbatches, example_target, where)
        found = division.divide(
            whole_model,
            names,
            count,
            example,
            costs,
            compute_dtype,
            loss_fn,
            everyone,
            world if world is not None else process_group,
        )
        table = build.make_schedule(schedule, count, group.size, microbatches, found.stage_costs, limit)
        self._group, self._process_group, self._schedule = group, process_group, table
        self.division, self._weigh = found, weigh
        self._prepared_batches = 0

        modules = build.stage_modules(
            whole_model, found, table.stages_of(group.rank), init, everything=data_parallel is None
        )
        groups, holders = build.SharedGroups(group.timeout), build.holders(found, table)
        build.equalise(found, modules, holders, group, groups)
        if data_parallel is None:
            modules = {stage: part.to(where) for stage, part in modules.items()}
        reports = build.split_backwards(modules, table)
        if keep_less is not None:
            keep_less(build.Held(group.rank, found, table, modules, reports, example, compute_dtype))
        relies_on = {s: Unchanged(part, found.ghost, data_parallel is None) for s, part in modules.items()}
        parts = {stage: part if data_parallel is None else data_parallel(part) for stage, part in modules.items()}
        for stage, part in parts.items():
            self.add_module(f"stage_{stage}", part)
        self._parts = parts
        self.training = whole_model.training
        ties = build.tie(found, parts, holders, group, process_group, groups)
        self._distlib_part = build.mark_parameters(found, parts, group, everyone)

        if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
            warnings.warn(
                "loss_fn has parameters of its own, which are in no state dict of the pipeline and which its "
                "optimizers are not given: let the model compute the loss, and leave loss_fn out",
                stacklevel=2,
            )
        numbers = Numbers(where)
        self._steps = Steps(found, table, numbers.specs, build.gathered(parts, count), whole, compute_dtype, limit)
        stages_here = {
            stage: Stage(stage, part, part if data_parallel is not None else None, reports.get(stage), relies_on[stage])
            for stage, part in parts.items()
        }
        dtype = next((p.dtype for p in found.ghost.parameters() if p.is_floating_point()), torch.float32)
        limit = seconds_of(timeout, group.timeout)
        self._runtime = Runtime(
            group,
            table.placement,
            stages_here,
            Ties(ties),
            LossShare(group, table.placement[-1], torch.promote_types(dtype, torch.float32), limit, where),
            loss_fn or own_loss,
            numbers,
            limit,
            where,
        )
        self._runtime.connect(found.edges)
        self._header: ShapeHeader | None = None
        if shape_header and group.size > 1 and not group.counts_only:
            self._header = ShapeHeader(group, table.placement[0], table.placement[-1], where, limit)

    # ------------------------------------------------------------ training

    @property
    def needs_batch(self) -> bool:
        """Whether this rank must be given a step's inputs: with `shape_header` only that of the first stage must."""
        return self._header is None or self._group.rank == self._schedule.placement[0]

    def train_step(self, inputs: Any = None, target: Any = None, *, loss_scale: float = 1.0, **keywords: Any) -> Tensor:
        """Forwards and backwards of one batch. Adds the gradients of its mean loss to `.grad`; no optimizer step.

        Every rank must call it, with the same batch: ranks read what their stages use of it, and the shapes. With
        `shape_header` only the rank of the first stage needs inputs and keywords, and it or the rank of the last stage
        the target; what others are given is not looked at, and what their stages read comes from there.

        Args:
            inputs: the model's one argument, a tuple of positional ones, or a dict of keyword arguments. Tensors with
                as many rows as the first tensor are divided into micro-batches; others go to each as they are, as
                does what is wrapped in distlib.pipeline.Whole. Tensors on the CPU go to the stages' device, those in
                pinned memory while the host goes on.
            target: for loss_fn, divided likewise.
            loss_scale: gradients are those of the loss times this (see distlib.optim.GradScaler).
            keywords: further keyword arguments of the model.

        Returns:
            The loss, detached, a scalar on every rank.

        Raises:
            StageError: on the rank whose stage failed, naming stage, micro-batch and action; CollectiveError on the
                others, with the same words, within the timeout. ValueError: a batch with fewer rows than micro-batches.
                RuntimeError: under torch.no_grad().
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_step under torch.no_grad() would train nothing: call eval_step for a loss alone")
        batch = batch_of(self, inputs, target, keywords, train=True)
        loss, _ = self._run(batch, train=True, scale=loss_scale)
        assert loss is not None
        return loss

    @torch.no_grad()
    def eval_step(self, inputs: Any = None, target: Any = None, **keywords: Any) -> Tensor:
        """The loss of a batch, without gradients; arguments and result as of `train_step`. Every rank must call it.

        Batches with fewer rows than micro-batches are divided into as many as there are rows. Modules are in the mode
        that `train()` and `eval()` set.
        """
        batch = batch_of(self, inputs, target, keywords, train=False)
        loss, _ = self._run(batch, train=False)
        assert loss is not None
        return loss

    @torch.no_grad()
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's output for a batch, on every rank, without gradients. Every rank must call it.

        Tensors that have the micro-batches' rows are put together; floating scalars are averaged, and all else is the
        first micro-batch's.
        """
        batch = self._prepared(lambda: self._divide(inputs, None, keywords), None)
        _, outputs = self._run(batch, train=False, has_loss=False)
        root = self._group.ranks[self._schedule.placement[-1]]
        rows = [b.rows for b in batch.micro_batches]

        def joined() -> Any:  # a device has another name on each rank
            return micro_batches.on_device(micro_batches.join(outputs, rows), torch.device("cpu"))

        return micro_batches.on_device(from_rank(root, self._process_group, joined), self._device)

    def prepare(self, inputs: Any, target: Any, keywords: dict[str, Any], train: bool) -> Batch:
        """A batch as `train_step` and `eval_step` take it instead of inputs, target and keywords: divided, where the
        model computes, with its weight. Every rank must call it: with `shape_header` ranks talk to each other."""

        def divide() -> list[MicroBatch]:
            if not train:
                return self._divide(inputs, target, keywords, self._weigh)
            return micro_batches.divide(inputs, target, self._schedule.micro_batches, keywords, self._weigh)

        return self._prepared(divide, target)

    def _prepared(self, divide: Callable[[], list[MicroBatch]], target: Any) -> Batch:
        self._prepared_batches += 1  # also where the batch is refused
        if self._header is not None:
            return self._header.share(divide, target)
        return Batch(micro_batches.moved(divide(), self._device))

    def _divide(
        self, inputs: Any, target: Any, keywords: dict[str, Any], weigh: Weigh | None = None
    ) -> list[MicroBatch]:
        rows = micro_batches.rows_of((inputs, keywords))
        count = min(rows, self._schedule.micro_batches)
        return micro_batches.divide(inputs, target, count, keywords, weigh)

    def _run(self, batch: Batch, train: bool, scale: float = 1.0, has_loss: bool = True) -> Any:
        batches = batch.micro_batches
        step = self._steps.of(batches, train)
        self._runtime.connect(step.schedule.edges)
        if self._header is not None and isinstance(batch, Told):
            self._header.fill(batch, step)
        seeds = micro_batch_seeds(len(batches))
        return self._runtime.run(
            step, batches, seeds, train=train, scale=scale, has_loss=has_loss, number=self._prepared_batches
        )

    def timed_step(self, inputs: Any = None, target: Any = None, **keywords: Any) -> tuple[Tensor, Simulation]:
        """`train_step`, and what each rank computed when, measured: `print(draw(simulation))`, `simulation.bubble`.

        Every rank must call it; all get the same. Times are in seconds from the first computation, on the clocks of
        the ranks' hosts: compare ranks of one host only. On a GPU the host waits for each computation.
        """
        self._runtime.recorder = []
        try:
            loss = self.train_step(inputs, target, **keywords)
            own = self._runtime.recorder
        finally:
            self._runtime.recorder = None
        lines = [own]
        if self._group.size > 1:
            lines = [[] for _ in range(self._group.size)]
            dist.all_gather_object(lines, own, group=self._process_group)
        first = min(begin for line in lines for _, begin, _ in line)
        return loss, played(
            self._schedule, [[(action, begin - first, end - first) for action, begin, end in line] for line in lines]
        )

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale gradients so that their total norm, over all stages, is at most `max_norm`. Every rank must call it.

        Returns the norm before scaling, a scalar, the same on all ranks; tied weights count once.
        """
        return clip_grad_norm_(
            list(self.parameters()), max_norm, norm_type, error_if_nonfinite, pipeline=self._group, device=self._device
        )

    # ------------------------------------------------------------ a model like any other

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """This rank's stages share the empty name, so everything in them has the name it has in the whole model."""
        yield from under_one_name(self, self._parts.values(), memo, prefix, remove_duplicate)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Of this rank's stages. A tied weight goes by the first of its names in the model on every rank that has it; a
        second copy on this rank, by its own."""
        given: set[str] = set()
        start = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            first = start + self.division.aliases.get(own := name.removeprefix(start), own)
            name = name if not remove_duplicate or first in given else first
            given.add(name)
            yield name, parameter

    def train(self, mode: bool = True) -> PipelineParallel:
        """Training mode, or not, of this rank's stages; call it on every rank."""
        super().train(mode)
        self.division.ghost.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What this rank holds, under the whole model's names: its stages only, and pieces where they are sharded.
        `full_state_dict()` is the whole model's."""
        found: dict[str, Any] = {}
        for part in self._parts.values():
            found.update(part.state_dict(*args, **kwargs))
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what this rank holds from a state dict of the whole model, or from one of `state_dict()`. Returns
        missing and unexpected keys, as other modules do.

        Raises RuntimeError (strict) for names that the whole model does not have, and for own ones that are missing.
        """
        held = [(part, _bare(part).state_dict().keys()) for part in self._parts.values()]
        known = {name for name, _, _ in self.division.tensors}.union(self.division.aliases, *(own for _, own in held))
        unknown = sorted(k for k in state_dict.keys() - known if not k.endswith("_extra_state"))
        if unknown and strict:
            raise RuntimeError(f"load_state_dict: the model has no {', '.join(unknown[:8])}")
        missing: list[str] = []
        for part, own in held:
            found = part.load_state_dict({k: v for k, v in state_dict.items() if k in own}, strict, assign)
            missing += found.missing_keys
        return _IncompatibleKeys(missing, unknown)

    def full_state_dict(self) -> dict[str, Any]:
        """The whole model's state dict, copies on the CPU, on every rank. Every rank must call it."""
        own: dict[str, Any] = {}
        for part in self._parts.values():
            gather = getattr(part, "full_state_dict", None)
            whole = gather() if callable(gather) else part.state_dict()
            own.update({name: _copy(value) for name, value in whole.items()})
        found = [own]
        if self._group.size > 1:
            found = [{} for _ in range(self._group.size)]
            dist.all_gather_object(found, own, group=self._process_group)
        merged = {name: tensor for theirs in found for name, tensor in theirs.items()}
        for alias, name in self.division.aliases.items():
            if name in merged:
                merged.setdefault(alias, merged[name])
        order = [place.name for place in places(self.division.ghost) if place.persistent]
        return {name: merged[name] for name in dict.fromkeys((*order, *merged)) if name in merged}

    def before_writing(self) -> None:
        """Returns when parameters may be written by other means than an optimizer."""
        self._tell("before_writing")

    def parameters_written(self) -> None:
        """Says that parameters were written by other means than an optimizer."""
        self._tell("parameters_written")

    def _tell(self, what: str) -> None:
        for part in self._parts.values():
            told = getattr(part, what, None)
            if callable(told):
                told()

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
        """Bytes of this rank's parameters, gradients and optimizer state, counted and by formula."""
        counted, expected = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        for part in self._parts.values():
            parameters = list(part.parameters())
            held = {} if optimizer is None else {p: optimizer.state[p] for p in parameters if p in optimizer.state}
            its = None if optimizer is None else SimpleNamespace(state=held)
            report = getattr(part, "memory_report", None)
            gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            told = report(its) if callable(report) else replicated_report(parameters, gradients, its)
            for total, values in ((counted, told.counted), (expected, told.formula)):
                for kind, value in values.items():
                    total[kind] = total.get(kind, 0) + value
        return MemoryReport(counted, expected)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("PipelineParallel belongs to its process group and cannot be pickled; save full_state_dict()")


def _bare(part: nn.Module) -> nn.Module:
    """A stage without its data-parallel wrapper."""
    return part.module if isinstance(part, Transparent) else part


def _copy(value: Any) -> Any:
    """Of an entry of a state dict, on the CPU: a tensor, or a module's extra state."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)

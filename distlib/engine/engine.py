"""`Engine`: what a training loop holds. A step reads: gradients, clip, optimizer; the rest is accounts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlib.activations import ActivationReport
from distlib.checkpoint import SaveHandle, load, save
from distlib.checkpoint.loading import LoadedState
from distlib.comm.group import Group
from distlib.engine.as_in_training import autocast
from distlib.memory import MemoryReport
from distlib.optim import GradScaler
from distlib.optim.flat import FlatOptimizer
from distlib.optim.norm import Trained, clip_grad_norm_
from distlib.pipeline.micro_batches import Batch, Weigh
from distlib.pipeline.wrapper import PipelineParallel
from distlib.plan import Activations, Plan
from distlib.plan.mesh import Mesh
from distlib.plan.world import Ranks
from distlib.shards import shard_of

_KEPT_LESS = "activations above: where blocks keep everything; engine.activation_reports have what they keep"
_WITHIN = "activations above: the peak predicted for the budget, beside parameters, gradients and optimizer"


class Stepper(Protocol):
    """A model that trains in steps: `PipelineParallel` or `MicroSteps`."""

    @property
    def needs_batch(self) -> bool: ...
    def prepare(self, inputs: Any, target: Any, keywords: dict[str, Any], train: bool) -> Batch: ...
    def train_step(self, inputs: Any, target: Any = None, *, loss_scale: float = 1.0, **keywords: Any) -> Tensor: ...
    def eval_step(self, inputs: Any, target: Any = None, **keywords: Any) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


class Engine:
    """A model, its optimizer and its plan. `parallelize` makes it; every rank calls its methods, alike.

    plan, mesh: as chosen, and which rank does what. model: this rank's part. optimizer: of its parameters.
    data_rank, data_size: which part of the data this rank sees, of how many: ranks of one pipeline see the same.
    steps: optimizer steps done, those of a loaded checkpoint included. grad_norm: of the last step, before clipping;
    None without plan.clip. activation_reports: of this rank's stages. device: where the model computes; batches on the
    CPU go there. activation_peaks: with a budget, its predicted peaks by pipeline rank.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        model: Any,
        data_parallel: dist.ProcessGroup | None,
        optimizer: torch.optim.Optimizer,
        scaler: GradScaler | None,
        activation_reports: Sequence[ActivationReport] = (),
        device: torch.device | None = None,
        weigh: Weigh | None = None,
        activation_peaks: Sequence[int | None] = (),
        pipeline: dist.ProcessGroup | None = None,
    ) -> None:
        self.plan, self.mesh, self.model, self.optimizer, self.scaler = plan, mesh, model, optimizer, scaler
        if device is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.device = device
        self.activation_reports = list(activation_reports)
        self._weigh = weigh
        self._peaks = tuple(activation_peaks) or (None,) * plan.pipeline
        self._replicas = Group.of(data_parallel)
        self.data_rank, self.data_size = self._replicas.rank, self._replicas.size
        self.steps = 0
        self.grad_norm: Tensor | None = None
        if isinstance(optimizer, FlatOptimizer) and plan.clip is not None:
            if optimizer.max_norm not in (None, plan.clip):
                raise ValueError(
                    f"the plan clips at {plan.clip}, the optimizer at max_norm={optimizer.max_norm}: give one of them"
                )
            optimizer.max_norm = plan.clip  # in the same pass as the step
        self._trained = trained = Trained(
            tuple(model.parameters()),
            Group.of(pipeline) if plan.pipeline > 1 else None,
            device if plan.offload is None else torch.device("cpu"),
        )
        if isinstance(optimizer, FlatOptimizer):
            optimizer.trained = trained
        if scaler is not None:
            scaler.trained = trained

    # ------------------------------------------------------------ steps

    @property
    def needs_batch(self) -> bool:
        """Whether this rank must be given batches; all must, but with Plan(shape_header=True)."""
        return self.model.needs_batch

    def train_step(self, inputs: Any = None, target: Any = None, **keywords: Any) -> Tensor:
        """One optimizer step on a batch.

        Args:
            inputs, target, keywords: this rank's batch, the same on all ranks of a pipeline, another for each
                `data_rank`; with Plan(shape_header=True) for the rank of a pipeline's first stage only; see
                `PipelineParallel.train_step`.

        Returns:
            The mean loss over all ranks, a detached scalar.

        Raises:
            What a stage raised, see `PipelineParallel.train_step`; ValueError for a batch with too few rows, and on all
            ranks where `weigh` gave 0 for all batches.
        """
        scale = 1.0 if self.scaler is None else float(self.scaler.scale(torch.ones(())))
        batch = self._prepared(inputs, target, keywords, train=True)
        part = self._part(batch)
        try:
            with self._autocast():
                loss = self.model.train_step(batch, loss_scale=scale * part)
            self._optimize()
        except BaseException:
            self._forget_gradients()
            raise
        self.steps += 1
        return self._mean(loss * part)

    def measured_step(self, inputs: Any = None, target: Any = None, **keywords: Any) -> Tensor:
        """`train_step`, in which every tensor is counted while it lives: `activation_reports` have the peak afterwards,
        beside the predicted one. Slow: do not time it. Every rank must call it, after one step at least.

        Raises:
            RuntimeError: the plan has no setting for activations.
        """
        if self.plan.activations == Activations():
            raise RuntimeError("measured_step reports on activations: give Plan(activations=...)")
        if self.plan.stage == 0:  # gradients would count, where a step makes them; sharding has memory of its own
            for p in self._parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        with contextlib.ExitStack() as stack:
            for report in self.activation_reports:
                stack.enter_context(report.measuring())
            return self.train_step(inputs, target, **keywords)

    def _optimize(self) -> None:
        optimizer, scaler, clip = self.optimizer, self.scaler, self.plan.clip
        if clip is not None and not isinstance(optimizer, FlatOptimizer):
            if scaler is not None:
                scaler.unscale_(optimizer)
            model = self._trained
            self.grad_norm = clip_grad_norm_(model.parameters, clip, pipeline=model.pipeline, device=model.device)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if clip is not None and isinstance(optimizer, FlatOptimizer):
            self.grad_norm = optimizer.grad_norm
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """After a step, and after an error: what was summed is of no other step. Of all parameters: the optimizer may
        have some of them only."""
        self.optimizer.zero_grad()
        for p in self._trained.parameters:
            p.grad = None

    @torch.no_grad()
    def eval_step(self, inputs: Any = None, target: Any = None, **keywords: Any) -> Tensor:
        """The mean loss of a batch over all ranks, without gradients; call `eval()` before and `train()` after."""
        batch = self._prepared(inputs, target, keywords, train=False)
        part = self._part(batch)
        with self._autocast():
            return self._mean(self.model.eval_step(batch) * part)

    @torch.no_grad()
    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's output for this rank's batch, without gradients."""
        with self._autocast():
            return self.model(*inputs, **keywords)

    def train(self, mode: bool = True) -> Engine:
        """Modules in training mode, or not."""
        self.model.train(mode)
        return self

    def eval(self) -> Engine:
        """Modules in evaluation mode."""
        return self.train(False)

    def _prepared(self, inputs: Any, target: Any, keywords: dict[str, Any], train: bool) -> Batch:
        """The batch, divided. Where there are keywords alone, inputs are no argument of the model."""
        alone = inputs is None and bool(keywords)
        return self.model.prepare({} if alone else inputs, target, keywords, train)

    def _part(self, batch: Batch) -> float:
        """What this rank's loss counts in the mean over ranks, by the weights of all micro-batches; 1 on average."""
        if self._weigh is None:
            return 1.0
        total = torch.tensor([batch.weight], dtype=torch.float64)
        if self.data_size > 1:
            self._replicas.all_reduce(total)
        if not float(total) > 0:
            raise ValueError(
                "weigh= gave 0 for the batches of all ranks together: nothing in them counts. Leave such a step out, "
                "on all ranks"
            )
        return batch.weight * self.data_size / float(total)

    def _mean(self, loss: Tensor) -> Tensor:
        if self.data_size == 1:
            return loss
        mean = loss.detach().clone()
        self._replicas.all_reduce(mean, "avg")
        return mean

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.plan, self.device)

    # ------------------------------------------------------------ checkpoints

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        extra: dict[str, Any] | None = None,
        rng: bool = True,
        asynchronous: bool = False,
    ) -> SaveHandle | None:
        """Saves model, optimizer, loss scale and number of steps; any other plan and world size can load it.
        Arguments and errors as of `distlib.save`."""
        return save(
            path,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            step=self.steps,
            extra=extra,
            rng=rng,
            asynchronous=asynchronous,
        )

    def load(
        self, path: str | os.PathLike[str], *, extra: dict[str, Any] | None = None, rng: bool = True
    ) -> LoadedState:
        """Loads what `save` saved under any plan; where that had no loss scale, this plan's own stays as it is.
        Arguments, result and errors as of `distlib.load`."""
        state = load(
            path,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            extra=extra,
            rng=rng,
            scaler_required=False,
        )
        self.steps = state.step or 0
        return state

    # ------------------------------------------------------------ accounts

    def memory_report(self) -> MemoryReport:
        """Bytes that this rank holds, counted and by formula."""
        return self.model.memory_report(self.optimizer)

    def describe(self) -> str:
        """The plan, the mesh, the stages, and the bytes expected in memory and on the wire, as text. The same on all
        ranks; nothing is communicated. The optimizer's state is counted by its class: see `state_bytes`. It names the
        kind of device, where that is not the CPU."""
        stages = self.model.division if isinstance(self.model, PipelineParallel) else None
        if stages is None:
            told, parameters = "", sum(shape.numel() for shape in map(_whole_shape, self._parameters()))
            expected = self.plan.expected(parameters, self.mesh.topology, **self._sizes())
        else:
            told = f"\n\n{stages}"
            costs = stages.stage_costs
            held = 0 if costs is None else costs.activations
            expected = self.plan.expected(
                stages.parameters, self.mesh.topology, activations=held, messages=stages.sent, **self._sizes()
            )
        where = "" if self.device.type == "cpu" else f"\n\nEach rank computes on {self.device.type}."
        less = ""
        if any(peak is not None for peak in self._peaks):
            less = f"\n{_WITHIN}"
        elif self.plan.activations != Activations() and stages is not None:
            less = f"\n{_KEPT_LESS}"
        return f"{self.plan}\n\n{self.mesh}{where}{told}\n\n{expected.keeping(self._peaks)}{less}"

    def _parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def _sizes(self) -> dict[str, Any]:
        """What the formulas need to know of the machine and the optimizer."""
        shared = self.plan.stage > 0 and Ranks(self.mesh, self.device.type).share
        return {"shared": shared, "optimizer_bytes": state_bytes(self.optimizer)}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer keeps of an fp32 parameter, by its class: nothing (SGD), one tensor (with momentum; Lion,
    Adagrad), or two, as AdamW does and all others are taken to."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    if "SGD" in names:
        return 4 if any(group.get("momentum") for group in optimizer.param_groups) else 0
    return 4 if names & {"Lion", "Adagrad"} else 8


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    shard = shard_of(parameter)
    return parameter.shape if shard is None else shard.shape

"""Training steps without a pipeline: micro-batches one after the other, the same numbers as a pipeline gives."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distlib.data_parallel.naming import Transparent
from distlib.pipeline.micro_batches import Batch, MicroBatch, Weigh, batch_of, divide, join, moved, rows_of
from distlib.pipeline.random import Numbers, micro_batch_seeds
from distlib.pipeline.runtime import LossFunction, own_loss, scalar, weighed


class MicroSteps(Transparent):
    """What `PipelineParallel` is over ranks, on one: `train_step`, `eval_step` and forward over micro-batches.

    module: plain, or wrapped for data parallelism: all micro-batches but the last run under its no_sync(). Arguments as
    of PipelineParallel. device: where it computes; default: where its first parameter is.
    """

    def __init__(
        self,
        module: nn.Module,
        microbatches: int = 1,
        loss_fn: LossFunction | None = None,
        weigh: Weigh | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(module)
        self._count, self._weigh = microbatches, weigh
        self._loss_fn = loss_fn or own_loss
        if device is None:
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._device = device
        self._numbers = Numbers(device)

    @property
    def needs_batch(self) -> bool:
        """Every rank must be given its batch."""
        return True

    def prepare(self, inputs: Any, target: Any, keywords: dict[str, Any], train: bool) -> Batch:
        """As `PipelineParallel.prepare`."""
        if not train:
            return Batch(self._divide(inputs, target, keywords, self._weigh))
        return Batch(moved(divide(inputs, target, self._count, keywords, self._weigh), self._device))

    def train_step(self, inputs: Any, target: Any = None, *, loss_scale: float = 1.0, **keywords: Any) -> Tensor:
        """Forwards and backwards of one batch, as `PipelineParallel.train_step`. Returns the batch's loss, detached."""
        if not torch.is_grad_enabled():
            raise RuntimeError("train_step under torch.no_grad() would train nothing: call eval_step for a loss alone")
        batches = batch_of(self, inputs, target, keywords, train=True).micro_batches
        total: Tensor | None = None
        for k, (seed, part) in enumerate(zip(micro_batch_seeds(len(batches)), batches, strict=True)):
            with contextlib.nullcontext() if k == len(batches) - 1 else self._no_sync():
                with self._numbers.of(seed):
                    loss = self._loss(part)
                self._backward(loss * (part.share * loss_scale))
            share = weighed(loss.detach(), part.share)
            total = share if total is None else total + share
        assert total is not None
        return total

    @torch.no_grad()
    def eval_step(self, inputs: Any, target: Any = None, **keywords: Any) -> Tensor:
        """The loss of a batch, without gradients; `train()` and `eval()` are the caller's."""
        batches = batch_of(self, inputs, target, keywords, train=False).micro_batches
        total: Tensor | None = None
        for seed, part in zip(micro_batch_seeds(len(batches)), batches, strict=True):
            with self._numbers.of(seed):
                share = weighed(self._loss(part), part.share)
            total = share if total is None else total + share
        assert total is not None
        return total

    @torch.no_grad()
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's output for a batch, without gradients."""
        batches = self._divide(inputs, None, keywords)
        outputs = []
        for seed, batch in zip(micro_batch_seeds(len(batches)), batches, strict=True):
            with self._numbers.of(seed):
                outputs.append(self.module(*batch.args, **batch.kwargs))
        return join(outputs, [batch.rows for batch in batches])

    def _divide(
        self, inputs: Any, target: Any, keywords: dict[str, Any], weigh: Weigh | None = None
    ) -> list[MicroBatch]:
        count = min(self._count, rows_of((inputs, keywords)))
        return moved(divide(inputs, target, count, keywords, weigh), self._device)

    def _loss(self, batch: MicroBatch) -> Tensor:
        output = self.module(*batch.args, **batch.kwargs)
        loss = scalar(self._loss_fn(output, batch.target))
        return loss if batch.share or not torch.is_grad_enabled() else _nothing_of(output, loss)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        wrapped = getattr(self.module, "no_sync", None)
        return wrapped() if callable(wrapped) else contextlib.nullcontext()


def _nothing_of(output: Any, loss: Tensor) -> Tensor:
    """A loss that gives every parameter the gradient 0: a mean over nothing may be 0 / 0. The backward runs all the
    same, for the ranks meet in it."""
    made = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad and t.dim()]
    return sum((t.flatten()[:1] * 0).sum() for t in made) if made else loss

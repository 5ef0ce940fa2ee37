"""Executes a table of actions on one rank: the only place where a pipeline's schedule, stages and messages meet.

    for action in the rank's line:
        RECV           post: the message may come
        F              take what was received, compute, keep what goes on
        BW  B  W       take the gradients, compute, keep what goes back
        SEND           what F or B kept for another rank
        GATHER  FREE   parameters of a sharded stage become whole, and pieces again
        REDUCE         all gradients of the stage are there: those of tied weights may be summed

Between stages of one rank nothing is sent: what one keeps, the other takes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from distlib import streams
from distlib.comm.group import Group
from distlib.comm.slots import Room
from distlib.comm.work import CollectiveError
from distlib.pipeline.actions import Action, Kind
from distlib.pipeline.carrier import Carrier, carrier
from distlib.pipeline.losses import LossShare
from distlib.pipeline.micro_batches import MicroBatch
from distlib.pipeline.random import Numbers
from distlib.pipeline.stage import Gradients, Stage, Tensors
from distlib.pipeline.step import Message, Step
from distlib.pipeline.ties import Ties
from distlib.words import words_of

LossFunction = Callable[[Any, Any], Tensor]

_WORDS = {
    Kind.F: "forward",
    Kind.B: "backward, input gradients,",
    Kind.W: "weight gradients",
    Kind.FULL: "backward",
    Kind.SEND: "sending",
    Kind.RECV: "receiving",
    Kind.GATHER: "gathering parameters",
    Kind.FREE: "freeing parameters",
    Kind.REDUCE: "reducing gradients",
}


class StageError(RuntimeError):
    """A stage failed on this rank. The message names the stage, micro-batch and action; `__cause__` is the error."""


@dataclass
class _Running:
    """One step under way. kept: what stages left for others, to be sent or taken. loss: of the micro-batches so far,
    where the last stage is. outputs: of the model there, in evaluation, by micro-batch."""

    step: Step
    batches: Sequence[MicroBatch]
    seeds: Sequence[int]
    train: bool
    has_loss: bool
    scale: float
    kept: dict[Message, list[Any]] = field(default_factory=dict)
    loss: Tensor | None = None
    outputs: dict[int, Any] = field(default_factory=dict)


class Runtime:
    """The pipeline on one rank.

    group: of the pipeline. placement: per stage, its rank. stages: those of this rank, by index. loss_fn: (output,
    target of the micro-batch) -> scalar. timeout: seconds, of a message. device: where the stages compute.
    recorder: while it is a list, each computation is noted: (action, began, ended) in seconds of time.perf_counter; on
    a GPU the host then waits for each.
    """

    def __init__(
        self,
        group: Group,
        placement: Sequence[int],
        stages: dict[int, Stage],
        ties: Ties,
        losses: LossShare,
        loss_fn: LossFunction,
        numbers: Numbers,
        timeout: float,
        device: torch.device,
    ) -> None:
        self._group, self._placement, self._timeout = group, tuple(placement), timeout
        self._device = device
        self._rank = group.rank
        self._stages = stages
        self._edges: frozenset[tuple[int, int]] = frozenset()
        self._channels: Carrier | None = None
        self._ties = ties
        self._losses = losses
        self._loss_fn = loss_fn
        self._numbers = numbers
        self._ended: str | None = None  # by which error: the group is then of no further use
        self.recorder: list[tuple[Action, float, float]] | None = None
        self._do: dict[Kind, Callable[[_Running, Action], None]] = {
            Kind.RECV: self._receive,
            Kind.F: self._forward,
            Kind.FULL: self._backward,
            Kind.B: self._backward,
            Kind.W: self._weights,
            Kind.SEND: self._send,
            Kind.GATHER: self._gather,
            Kind.FREE: self._free,
            Kind.REDUCE: self._reduce,
        }

    def connect(self, edges: Iterable[tuple[int, int]]) -> None:
        """Makes the channels of `edges`, and of those there were, unless they are there. Every rank calls it, alike."""
        if self._channels is not None and self._edges.issuperset(edges):
            return
        if self._channels is not None:
            self._channels.close()
        self._edges |= frozenset(edges)
        self._channels = carrier(self._group, self._placement, sorted(self._edges), self._timeout, self._device)
        self._losses.direct = self._channels.direct

    @property
    def _transport(self) -> Carrier:
        assert self._channels is not None, "connect() comes first"
        return self._channels

    def run(
        self,
        step: Step,
        batches: Sequence[MicroBatch],
        seeds: Sequence[int],
        *,
        train: bool,
        has_loss: bool,
        scale: float = 1.0,
        number: int = 0,
    ) -> tuple[Tensor | None, list[Any]]:
        """One step; every rank of the pipeline calls it. Returns the loss (with `has_loss`), on every rank; in
        evaluation, where the last stage is, also the outputs of the micro-batches.

        seeds: of the micro-batches' random numbers. scale: gradients are those of the loss times this. number: of the
        step, by this rank's count.
        """
        if self._ended is not None:
            raise CollectiveError(f"this pipeline ended in an earlier step, and cannot go on: {self._ended}")
        running = _Running(step, batches, seeds, train, has_loss, scale)
        at: Action | str = "the beginning of the step"
        try:
            self._transport.begin(number)
            for stage in self._stages.values():
                stage.begin()
            if has_loss:
                self._losses.begin()
            if train:
                self._ties.begin()
            for at in step.schedule.actions[self._rank]:
                self._do[at.kind](running, at)
            at = "the end of the step"
            self._transport.finish()
            if train:
                self._ties.finish()
            loss = self._losses.result() if has_loss else None
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other ranks must be told
            self._fail(at if isinstance(at, str) else _describe(at), error)
        assert not running.kept, f"left over: {sorted(running.kept)}"
        return loss, [running.outputs[k] for k in sorted(running.outputs)]

    # ------------------------------------------------------------ compute

    def _forward(self, running: _Running, action: Action) -> None:
        stage, k = _place(action)
        step, batch = running.step, running.batches[k]
        numbers: int | Tensors = running.seeds[k]
        received = {}
        for source in step.schedule.producers[stage]:
            message = (source, stage, k)
            tensors, first = self._take(running, message), step.numbers(message)
            if first:
                numbers = tensors[:first]
            received[source] = tensors[first:]
        began = self._now()
        if step.is_random(stage, k):
            with self._numbers.of(numbers) as ended:
                sent = self._compute(running, action, received, batch)
            after = ended[0]
        else:
            sent, after = self._compute(running, action, received, batch), ()
        self._note(action, began)
        for target in step.schedule.consumers[stage]:
            message = (stage, target, k)
            self._keep(running, message, (*after[: step.numbers(message)], *sent.get(target, ())))

    def _compute(
        self, running: _Running, action: Action, received: dict[int, Tensors], batch: MicroBatch
    ) -> dict[int, Tensors]:
        """The forward of a stage and, after the last one, the loss."""
        stage, k = _place(action)
        part = running.step.parts[k][stage]
        sent, output = self._stages[stage].forward(
            k,
            part,
            received,
            batch.args,
            batch.kwargs,
            train=running.train,
            last=action in running.step.last,
            rooms={port.target: self._rooms(running, (stage, port.target, k)) for port in part.sends},
        )
        if part.last:
            if running.has_loss:
                with torch.set_grad_enabled(running.train):
                    loss = scalar(self._loss_fn(output, batch.target))
                share = weighed(loss.detach().to(torch.promote_types(loss.dtype, torch.float32)), batch.share)
                running.loss = share if running.loss is None else running.loss + share
                if running.train:
                    if not loss.requires_grad:
                        raise ValueError("the loss depends on nothing that is trained: is it detached, or all frozen?")
                    if batch.share:
                        self._stages[stage].set_loss(k, loss * (batch.share * running.scale))
                if action in running.step.last:
                    self._losses.tell(running.loss)
            if not running.train:
                running.outputs[k] = output
        return sent

    def _backward(self, running: _Running, action: Action) -> None:
        stage, k = _place(action)
        schedule = running.step.schedule
        gradients = {source: self._take_gradients(running, (source, stage, k)) for source in schedule.consumers[stage]}
        began = self._now()
        split, last = action.kind is Kind.B, action in running.step.last
        back = self._stages[stage].backward(k, gradients, split=split, last=last)
        self._note(action, began)
        for source in schedule.producers[stage]:
            self._keep_gradients(running, (stage, source, k), back.get(source, ()))

    def _weights(self, running: _Running, action: Action) -> None:
        stage, k = _place(action)
        began = self._now()
        self._stages[stage].weights(k, last=action in running.step.last)
        self._note(action, began)

    def _gather(self, _: _Running, action: Action) -> None:
        self._stages[action.stage].hold()

    def _free(self, _: _Running, action: Action) -> None:
        self._stages[action.stage].release()

    def _reduce(self, _: _Running, action: Action) -> None:
        self._ties.ready(action.stage)

    def _now(self) -> float:
        """The time, where it is asked for only by a recorder: once the device has come as far."""
        if self.recorder is not None:
            streams.finish(streams.current(self._device))
        return time.perf_counter()

    def _note(self, action: Action, began: float) -> None:
        if self.recorder is not None:
            self.recorder.append((action, began, self._now()))

    # ------------------------------------------------------------ messages

    def _receive(self, running: _Running, action: Action) -> None:
        if specs := running.step.specs(action.message):
            self._transport.post(*action.message, specs, running.step.numbers(action.message))

    def _send(self, running: _Running, action: Action) -> None:
        if running.step.specs(action.message):
            on_host = running.step.numbers(action.message)
            self._transport.send(*action.message, running.kept.pop(action.message), on_host)

    def _rooms(self, running: _Running, message: Message) -> tuple[Room, ...]:
        """Where the tensors that a forward makes for another rank are to be made, if anywhere in particular."""
        if running.step.schedule.placement[message[1]] == self._rank:
            return ()
        return self._transport.rooms(*message, running.step.specs(message))[running.step.numbers(message) :]

    def _keep(self, running: _Running, message: Message, tensors: tuple[Any, ...]) -> None:
        specs = running.step.specs(message)
        if len(tensors) != len(specs):
            raise AssertionError(f"message {message}: {len(tensors)} tensors for {len(specs)} specs")
        if specs:
            running.kept[message] = list(tensors)

    def _keep_gradients(self, running: _Running, message: Message, gradients: Gradients) -> None:
        """With them goes which there are: parameters that the loss does not depend on must get none."""
        specs = running.step.specs(message)
        if not specs:
            return
        given = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device="cpu")
        if running.step.schedule.placement[message[1]] != self._rank:
            gradients = tuple(
                torch.zeros(s.shape, dtype=s.dtype, device=self._device) if g is None else g
                for g, s in zip(gradients, specs[1:], strict=True)
            )
        self._keep(running, message, (given, *gradients))

    def _take_gradients(self, running: _Running, message: Message) -> Gradients:
        if not running.step.specs(message):
            return ()
        given, *gradients = self._take(running, message)
        if self._group.counts_only:
            return tuple(gradients)
        return tuple(g if there else None for g, there in zip(gradients, given.tolist(), strict=True))

    def _take(self, running: _Running, message: Message) -> tuple[Any, ...]:
        """What came, from another rank or from another stage of this one."""
        if not running.step.specs(message):
            return ()
        if running.step.schedule.placement[message[0]] == self._rank:
            return tuple(None if tensor is None else tensor.detach() for tensor in running.kept.pop(message))
        return self._transport.take(*message)

    # ------------------------------------------------------------ faults

    def _fail(self, at: str, error: BaseException) -> NoReturn:
        """Ends the step on all ranks of the pipeline and of its replicas, each naming what it was at."""
        kind = "" if isinstance(error, CollectiveError) else f"{type(error).__name__}: "
        said = words_of(error)
        text = f"rank {self._group.ranks[self._rank]}, {at}: {kind}{said}{self._lost(said)}"
        heard = isinstance(error, CollectiveError) and error.code == "aborted"
        told = said if heard else text
        self._ended = text
        assert self._transport is not None
        self._transport.abort(told)
        for stage in self._stages.values():
            stage.fail(told)
        if isinstance(error, CollectiveError):
            raise CollectiveError(text, error.code) from error
        if isinstance(error, Exception):
            raise StageError(text) from error
        raise error

    def _lost(self, text: str) -> str:
        """Which stages went with the ranks that, says `text`, ended: whoever saw it first may know of no stages. This
        rank may not have seen it yet."""
        gone = {int(rank) for rank in re.findall(r"rank (\d+) \(pid \d+\) (?:ended|left)", text)}
        stages = [str(stage) for stage, rank in enumerate(self._placement) if self._group.ranks[rank] in gone]
        return f"; with it went stage {', '.join(stages)}" if stages and "with it went stage" not in text else ""


def _place(action: Action) -> tuple[int, int]:
    assert action.micro_batch is not None
    return action.stage, action.micro_batch


def own_loss(output: Any, _: Any) -> Tensor:
    """The loss function of models that compute their loss: the output itself, or its `loss`, or its first element."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss"):
        loss = output.loss
    else:
        loss = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(loss, Tensor) and not loss.dim():
        return loss
    raise ValueError(
        f"no loss_fn= was given, and the model returned {_what(loss)} where its loss would be: give "
        "loss_fn=(output, target) -> scalar, or let the model return its loss"
    )


def scalar(loss: Any) -> Tensor:
    """The loss, if it is one. Raises ValueError otherwise."""
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(
            f"loss_fn returned {_what(loss)}; it must return a scalar tensor, the mean over the micro-batch"
        )
    return loss


def _what(loss: Any) -> str:
    return f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__


def weighed(loss: Tensor, share: float) -> Tensor:
    """What a micro-batch adds to the step's loss; nothing, where nothing in it counts, and its mean may be 0 / 0."""
    return loss * share if share else torch.zeros_like(loss)


def _describe(action: Action) -> str:
    of = "" if action.micro_batch is None else f" of micro-batch {action.micro_batch}"
    return f"stage {action.stage}, action {action}: {_WORDS[action.kind]}{of}"

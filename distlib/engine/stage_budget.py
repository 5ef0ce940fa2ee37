"""A budget for the activations of a pipeline's rank: its stages measured, the table looked at, their blocks told.

table, example --recorded--> parts ---> one micro-batch per stage, measured ---> chains      (first replica)
table ---> moments of this rank                                                    |
                            '------------------> the fastest choices <-------------'         (all replicas, alike)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distlib.activations import ActivationReport, apply
from distlib.activations.blocks import find_blocks
from distlib.activations.budget import Choice
from distlib.activations.measure import call_with, default_loss
from distlib.activations.measure_stage import StageMeasurement
from distlib.activations.report import Prediction, Whole
from distlib.activations.selective import make_policy
from distlib.activations.shares import Moment, StageChain, Together, combine, load, loads, solve
from distlib.activations.size import parse_size, show_size
from distlib.activations.wrapped import Setting, Wrapped
from distlib.engine.as_in_training import cast, in_dtype
from distlib.pipeline.actions import Kind, Schedule
from distlib.pipeline.build import Held
from distlib.pipeline.flight import moments, most_in_flight
from distlib.pipeline.micro_batches import on_device
from distlib.pipeline.program import Spec
from distlib.pipeline.runtime import LossFunction, own_loss, scalar
from distlib.pipeline.split_backward import WeightQueue
from distlib.pipeline.stage import Stage
from distlib.pipeline.stages import Part

Around = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Stages:
    """This rank's stages, with wrapped blocks. chains: what each takes, with the names of its blocks in the order of
    their forward."""

    held: Held
    report: ActivationReport
    wrapped: dict[int, list[Wrapped]]
    table: Schedule
    parts: tuple[Part, ...]
    chains: dict[int, tuple[StageChain, list[str]]]


def measure(held: Held, blocks: Sequence[type[nn.Module]], loss_fn: LossFunction | None, around: Around) -> Stages:
    """Measures a rank's stages, and wraps their blocks. No rank waits for another.

    held: of `PipelineParallel(keep_less=)`. blocks: their classes. loss_fn: counts on the last stage, where the example
    has a target. around: the context of a training step.

    Raises ValueError where a block runs not exactly once in a stage, or the model is on the meta device.
    """
    with around():
        table, parts = held.recorded()
    report = ActivationReport("budget", most_in_flight(table, held.rank))
    wrapped: dict[int, list[Wrapped]] = {}
    for stage in held.modules:
        wrapped[stage] = _wrap(held, stage, blocks, Setting(report, make_policy(None), None))
    report.attach([one for its in wrapped.values() for one in its], *held.modules.values())
    report.paused = True
    with _named(held):
        chains = {
            stage: _measured(held, table, parts[stage], wrapped[stage], loss_fn, around) for stage in held.modules
        }
    report.paused = False
    report.forget()
    return Stages(held, report, wrapped, table, parts, chains)


def keep_within(stages: Stages, budget: str | int | float, chains: dict[int, Any]) -> ActivationReport:
    """Makes the blocks of a rank's stages keep as much as its budget allows, as fast as can be.

    chains: of the first of the ranks that hold the same stages, so that all of them choose alike.

    Raises ValueError for a budget that cannot be met, with the smallest that can.
    """
    always = sum(chain.always for chain, _ in chains.values())
    when = _moments(stages.table, stages.held.rank, stages.parts, always)
    with _named(stages.held):
        _apply(stages.report, budget, chains, stages.wrapped, when)
    for module in stages.held.modules.values():
        stages.report.attach_arrivals(module, place=1)  # after its part of the program
    return stages.report


@contextlib.contextmanager
def _named(held: Held) -> Iterator[None]:
    """Errors say which rank and stages they are of."""
    try:
        yield
    except ValueError as error:
        stages = ", ".join(map(str, held.modules))
        raise ValueError(f"rank {held.rank} of the pipeline, stage {stages}: {error}") from error


def _wrap(held: Held, stage: int, blocks: Sequence[type[nn.Module]], setting: Setting) -> list[Wrapped]:
    """The stage's blocks. One that lies on several stages of this rank has their numbers in its names."""
    module = held.modules[stage]
    own = [kind for kind in blocks if any(isinstance(part, kind) for part in module.modules())]
    if not own:
        return []
    found = find_blocks(module, own)
    apply.require_plain(found)
    calls = {name for name, at in held.division.calls if at == stage}
    made = []
    for name, block in found.items():
        if not any(name == call or name.startswith(f"{call}.") or call.startswith(f"{name}.") for call in calls):
            continue  # it lies here for checkpoints' sake; the run does not use it
        elsewhere = any(
            other != stage and any(n == name for n, _ in part.named_modules()) for other, part in held.modules.items()
        )
        made.append(Wrapped(block, f"{name} (stage {stage})" if elsewhere else name, "full", setting))
    return made


# ---------------------------------------------------------------- measuring


class _Micro:
    """One micro-batch of a stage, as the runtime has it: what arrives is made here."""

    def __init__(
        self, held: Held, part: Part, own: dict[str, Tensor], loss_fn: LossFunction | None, device: torch.device
    ) -> None:
        module, example = held.modules[part.stage], held.example
        assert example is not None
        self._part, self._device = part, device
        self._args, self._kwargs = cast((example.args, example.kwargs), held.compute_dtype)
        self._target, self._loss_fn = example.target, loss_fn

        def play(*given: Any) -> Any:
            return call_with(own, module, given, {})

        self._stage = Stage(part.stage, play, None, held.reports.get(part.stage))

    def forward(self) -> None:
        received = {
            port.source: tuple(_made(spec, self._device) for spec in port.specs) for port in self._part.receives
        }
        _, output = self._stage.forward(0, self._part, received, self._args, self._kwargs, train=True)
        if not self._part.last:
            return
        if self._target is None and self._loss_fn is not None:
            loss = default_loss(output)  # nothing is known of the loss
        else:
            loss = scalar((self._loss_fn or own_loss)(output, self._target))
        self._stage.set_loss(0, loss * 1.0)

    def backward(self, split: bool) -> None:
        gradients = {
            port.target: tuple(_made(spec, self._device).detach() for spec in port.specs if spec.requires_grad)
            for port in self._part.sends
        }
        self._stage.backward(0, gradients, split=split, last=True)

    def weights(self) -> None:
        self._stage.weights(0, last=True)


def _measured(
    held: Held,
    table: Schedule,
    part: Part,
    wrapped: Sequence[Wrapped],
    loss_fn: LossFunction | None,
    around: Around,
) -> tuple[StageChain, list[str]]:
    """The chain of a stage, and the names of its blocks in the order of their forward."""
    stage, module = part.stage, held.modules[part.stage]
    if any(p.is_meta for p in module.parameters()):
        raise ValueError("a budget is measured: the module must not be on the meta device")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    kinds = {action.kind for action in table.actions[held.rank] if action.stage == stage}
    assert held.example is not None
    args, kwargs, target = on_device((held.example.args, held.example.kwargs, held.example.target), device)
    held = replace(held, example=replace(held.example, args=args, kwargs=kwargs, target=target))
    with around(), in_dtype(module, held.compute_dtype):
        measurement = StageMeasurement(
            module,
            wrapped,
            (args, kwargs),
            lambda own: _Micro(held, part, own, loss_fn, device),
            apply.ROUNDS,
            full=Kind.FULL in kinds,
            split=Kind.B in kinds,
            queue=lambda: WeightQueue(held.reports[stage]),
        )
        chain, order = measurement.stage(("keep", "selective", "full"), None)
    walked = held.reports[stage].later if Kind.B in kinds else {}
    choices = [
        [_until_weights(c) for c in of_block] if any(p in walked for p in one.block.parameters()) else of_block
        for one, of_block in zip(order, chain.choices, strict=True)
    ]
    return replace(chain, choices=choices), [one.name for one in order]


def _until_weights(choice: Choice) -> Choice:
    """Of a block with weights that a walk over its graph defers: that keeps the graph, and all that it holds, until the
    weight pass. Where the block is recomputed nothing is deferred so."""
    return replace(choice, deferred=choice.deferred + choice.kept) if choice.name == "keep" else choice


def _made(spec: Spec, device: torch.device) -> Tensor:
    """What might arrive: small numbers, index 0, True."""
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.empty(spec.shape, dtype=spec.dtype, device=device).normal_()
    return torch.full(spec.shape, spec.dtype is torch.bool, dtype=spec.dtype, device=device)


# ---------------------------------------------------------------- choosing


def _moments(table: Schedule, rank: int, parts: Sequence[Part], always: int) -> list[Moment]:
    """With the bytes of what waits between two stages of the rank, and of what is there always."""
    sizes: dict[tuple[int, int], int] = {}
    for port in (port for part in parts for port in part.sends):
        sizes[port.source, port.target] = port.nbytes
        sizes[port.target, port.source] = sum(spec.nbytes for spec in port.specs if spec.requires_grad)
    return [
        Moment(m.kind.value, m.stage, dict(m.whole), dict(m.late), always + sum(n * sizes[e] for e, n in m.waiting))
        for m in moments(table, rank)
    ]


def _apply(
    report: ActivationReport,
    budget: str | int | float,
    found: Mapping[int, tuple[StageChain, list[str]]],
    wrapped: Mapping[int, Sequence[Wrapped]],
    when: Sequence[Moment],
) -> None:
    """Solves, tells the blocks, and the report what is predicted."""
    chains = {stage: chain for stage, (chain, _) in found.items()}
    choices = combine({stage: loads(chain) for stage, chain in chains.items()}, when)
    limit = report.budget = _bytes_of(budget, chains, choices, when)
    best = solve(choices, limit)
    for stage, (chain, names) in found.items():
        by_name = {one.name: one for one in wrapped[stage]}
        for name, of_block, taken in zip(names, chain.choices, best.loads[stage].plan, strict=True):
            by_name[name].kind = of_block[taken].name
            report.predicted[name] = Prediction(of_block[taken].kept, of_block[taken].seconds)
    report.predicted_step = Whole(best.peak, best.seconds)
    if report.choices and set(report.choices.values()) == {"keep"}:
        warnings.warn(
            f"budget={budget!r}: keeping everything takes {show_size(best.peak)} at the peak of this rank, which is "
            f"within {show_size(limit)}: 0 bytes are saved",
            stacklevel=2,
        )


def _bytes_of(
    budget: str | int | float,
    chains: Mapping[int, StageChain],
    choices: Sequence[Together],
    when: Sequence[Moment],
) -> int:
    if not isinstance(budget, float):
        return parse_size("budget", budget)
    everything = {stage: [load(chain, [0] * len(chain.choices))] for stage, chain in chains.items()}
    least, most = min(one.peak for one in choices), combine(everything, when)[0].peak
    return least + round(budget * max(0, most - least))

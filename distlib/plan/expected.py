"""What a plan should take: bytes of memory and bytes on the wire, by the published formulas. Pure arithmetic.

psi parameters of a pipeline rank, p ranks in a partition group, r replicas, d = p r, m micro-batches; wire per step:

    stage 0         all-reduce of gradients 2 psi g (d-1)/d
    stages 1 to 3   in the partition group: gathers of parameters, and hop 1 psi g (p-1)/p
                    across replicas: hop 2, 2 (4 psi/p) (r-1)/r
    gathers         stages 1, 2: psi c (p-1)/p once; stage 3: before forward and before backward of each micro-batch, or
                    as often as the table of the pipeline says
    hop 1           stage 1: once; stages 2, 3: every micro-batch
    pipeline        the activation of each micro-batch to the next stage, its gradient back

c and g: bytes of a parameter and of a gradient as they travel. Sources: ZeRO (arXiv 1910.02054), MiCS (2205.00119).
Small change is left out: buffers, paddings, the agreement of ranks, scalars of norms and losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from distlib.memory import PerParameter, formula
from distlib.plan.mesh import Mesh, World
from distlib.plan.options import DTYPES, autocast

if TYPE_CHECKING:
    from distlib.pipeline.actions import Schedule
    from distlib.plan.plan import Plan

PerStage = float | Sequence[float]
_WHOLE = 2  # sharded stages that PipelineParallel keeps whole at a time
_INT8 = 1 + 4 / 256  # bytes of an element, with its block's scale


@dataclass(frozen=True)
class Expected:
    """Bytes per rank, by pipeline rank: all ranks at the same place of a pipeline take the same.

    memory: "parameters", "gradients", "optimizer", "whole stages" (of stage 3 in a pipeline), "activations". wire: sent
    per optimizer step: "partition", "replicas", "pipeline". bubble: idle part of a pipeline's time if forward, input
    gradient and weight gradient take equally long; 0 without a pipeline.
    """

    memory: tuple[dict[str, int], ...]
    wire: tuple[dict[str, int], ...]
    bubble: float

    def keeping(self, activations: Sequence[int | None]) -> Expected:
        """The same, where blocks keep less: bytes of activations by pipeline rank; None: as here."""
        pairs = zip(self.memory, activations, strict=True)
        memory = tuple(kinds if held is None else {**kinds, "activations": held} for kinds, held in pairs)
        return replace(self, memory=memory)

    def __str__(self) -> str:
        kinds = [*self.memory[0], *self.wire[0]]
        rows = [["pipeline rank", *kinds]]
        for i, (held, sent) in enumerate(zip(self.memory, self.wire, strict=True)):
            rows.append([str(i), *(f"{n:,}" for n in (*held.values(), *sent.values()))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(["Bytes per rank: in memory, and sent per step", *lines, f"pipeline bubble {self.bubble:.1%}"])


def expected(
    plan: Plan,
    parameters: PerStage,
    world: World,
    *,
    activations: PerStage = 0,
    messages: PerStage = 0,
    each: PerParameter | None = None,
    optimizer_bytes: int = 8,
    shared: bool = False,
) -> Expected:
    """What each rank takes. `plan.stages` stages: one number stands for each of them, a list has one per stage.

    Args:
        parameters: trained parameters (elements) of each stage.
        world: a World, a Topology, or a number of ranks on one host.
        activations: bytes that one micro-batch holds in each stage from forward to backward.
        messages: bytes that one micro-batch sends from each stage to the next.
        each: bytes of a parameter by kind; default: fp32, with a compute copy if the precision has one.
        optimizer_bytes: of state per fp32 parameter: 8 for AdamW, 4 for SGD with momentum and Lion, 0 for SGD.
        shared: ranks of a partition group share whole parameters (CPU ranks of one host): gathers move nothing.

    Raises ValueError for lists of another length, and for ranks that do not divide.
    """
    mesh = Mesh.of(plan, world)
    sizes = _per_stage("parameters", parameters, plan.stages)
    held = _per_stage("activations", activations, plan.stages)
    sent = _per_stage("messages", messages, plan.stages)
    schedule = _schedule(plan)
    each = each or PerParameter.of(torch.float32, _compute(plan), optimizer_bytes)
    from distlib.pipeline.simulate import Costs, simulate

    played = simulate(schedule, Costs(activations=held))
    memory, wire = [], []
    for rank in range(plan.pipeline):
        own = [stage for stage, place in enumerate(schedule.placement) if place == rank]
        psi = sum(sizes[stage] for stage in own)
        kinds = formula(
            int(psi),
            each,
            max(plan.stage, 1),
            mesh.partition_size,
            mesh.partition_size * mesh.replicas,
            plan.shard_optimizer,
        )
        if plan.stage == 3 and plan.pipeline > 1:
            most = sorted((sizes[stage] for stage in own), reverse=True)[:_WHOLE]
            kinds["whole stages"] = 0 if shared else sum(most) * each.compute
        kinds["activations"] = played.peak_bytes[rank]
        memory.append({kind: round(value) for kind, value in kinds.items()})
        sums = _gradients(plan, mesh, psi)
        if not shared:
            sums["partition"] += _gathers(plan, mesh, schedule, sizes, own)
        sums["pipeline"] = plan.microbatches * sum(sent[a] for a, b in _crossing(schedule) for s in (a, b) if s in own)
        wire.append({kind: round(value) for kind, value in sums.items()})
    return Expected(tuple(memory), tuple(wire), played.bubble if plan.pipeline > 1 else 0.0)


def _gradients(plan: Plan, mesh: Mesh, psi: float) -> dict[str, float]:
    """Bytes that the gradients of psi parameters send, by kind of group."""
    p, r = mesh.partition_size, mesh.replicas
    reduce = plan.precision.reduce
    if plan.stage == 0:
        wide = DTYPES[reduce or "fp32"].itemsize
        return {"partition": 0.0, "replicas": 2 * psi * wide * (r - 1) / r}
    wide = DTYPES[reduce or plan.precision.dtype].itemsize
    times = 1 if plan.stage == 1 else plan.microbatches
    return {"partition": psi * wide * (p - 1) / p * times, "replicas": 2 * (4 * psi / p) * (r - 1) / r}


def _gathers(plan: Plan, mesh: Mesh, schedule: Schedule, sizes: Sequence[float], own: Sequence[int]) -> float:
    """Bytes that gathers of this rank's stages send."""
    if plan.stage == 0:
        return 0.0
    p = mesh.partition_size
    wide = DTYPES[plan.precision.dtype].itemsize
    psi = sum(sizes[stage] for stage in own)
    if plan.stage < 3:
        return psi * wide * (p - 1) / p
    element = _INT8 if plan.gather_dtype == "int8" else wide
    once = element * (p - 1) / p
    if plan.pipeline > 1:
        from distlib.pipeline.actions import Kind
        from distlib.pipeline.passes import gather

        table = gather(schedule, own, _WHOLE)
        return sum(sizes[a.stage] * once for line in table.actions for a in line if a.kind is Kind.GATHER)
    kept = plan.reshard_after_forward
    again = once if kept is True else 0.0 if kept is False else wide * (kept - 1) / kept
    return psi * (once + again) * plan.microbatches


def _crossing(schedule: Schedule) -> list[tuple[int, int]]:
    """Neighbouring stages on different ranks."""
    return [(a, b) for a, b in schedule.edges if schedule.placement[a] != schedule.placement[b]]


def _schedule(plan: Plan) -> Schedule:
    from distlib.pipeline.schedules import generate

    virtual = plan.stages_per_rank if plan.schedule == "interleaved" else None
    return generate(plan.schedule, plan.pipeline, plan.microbatches, virtual=virtual, limit=plan.limit)


def _compute(plan: Plan) -> torch.dtype | None:
    return None if autocast(plan) is not None or plan.stage == 0 else DTYPES[plan.precision.dtype]


def _per_stage(what: str, value: PerStage, stages: int) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value] * stages
    if len(values) != stages:
        raise ValueError(f"{what}: {len(values)} values for {stages} stages; give one for each, or one number for all")
    for stage, v in enumerate(values):
        if not 0 <= v < float("inf"):
            raise ValueError(f"{what} of stage {stage} is {v}: must be a finite number, 0 or more")
    return [float(v) for v in values]

"""`parallelize`: a plan and a module in, an `Engine` out. Read top to bottom: each step calls another room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distlib.activations import ActivationReport, checkpoint_activations
from distlib.activations.blocks import find_blocks
from distlib.comm.group import Group
from distlib.data_parallel import DataParallel
from distlib.data_parallel.agreement import all_or_none, from_first, require_equal
from distlib.data_parallel.memory import numbers_on
from distlib.engine import stage_budget
from distlib.engine.as_in_training import autocast, cast, compute_dtype, in_dtype, where_it_computes
from distlib.engine.engine import Engine, Stepper
from distlib.engine.micro_steps import MicroSteps
from distlib.engine.pieces import check_optimizer
from distlib.optim import GradScaler
from distlib.pipeline.build import Held, device_for, example_of, materialise
from distlib.pipeline.micro_batches import Weigh
from distlib.pipeline.runtime import LossFunction, own_loss, scalar
from distlib.pipeline.wrapper import PipelineParallel
from distlib.plan import Plan, options
from distlib.plan.mesh import Mesh, Place
from distlib.sharded import ShardedDataParallel
from distlib.world import init

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
_NONE = "empty parameter list"  # torch's words, where an optimizer would have no parameters


def parallelize(
    module: nn.Module,
    plan: Plan | None = None,
    *,
    optimizer: MakeOptimizer,
    loss_fn: LossFunction | None = None,
    example_inputs: Any = None,
    example_target: Any = None,
    weigh: Weigh | None = None,
    initialize: Callable[[nn.Module], Any] | None = None,
) -> Engine:
    """Divides a model and its training over all ranks, as `plan` says. Every rank must call it, alike.

    Args:
        module: the whole model, on the CPU, on this rank's device or on meta; it is taken apart, and what this rank
            keeps of it goes to the device that `distlib.init()` gave the rank.
        plan: default: `Plan()`, replicated data parallelism.
        optimizer: makes one of this rank's parameters, as in `lambda p: distlib.optim.AdamW(p, lr=3e-4)`.
        loss_fn: (output, target) -> scalar, the mean over a micro-batch; None: the model returns its loss.
        example_inputs: as for `Engine.train_step`; a pipeline reads shapes only, a budget runs the model.
        example_target: as for `Engine.train_step`; a pipeline that divides itself, and a budget, then count the loss.
        weigh: from a micro-batch's target, its weight in the loss, over all ranks; default: its rows, and ranks alike.
        initialize: of a module whose parameters are on meta; default: its reset_parameters().

    Returns:
        The Engine: `train_step`, `eval_step`, `save`, `load`, `describe`.

    Raises:
        ValueError: what the plan asks for cannot be done, with all reasons; RuntimeError: ranks differ; ImportError:
            the plan wants DeepSpeed, and it is not installed.
    """
    plan = Plan() if plan is None else plan
    world = init()
    require_same_plan(plan, world.device)
    plan.check(world)
    if plan.engine == "deepspeed":
        from distlib.integrations.deepspeed_engine import deepspeed_engine

        return deepspeed_engine(module, plan, world, optimizer, loss_fn, weigh)
    mesh = Mesh.of(plan, world)
    place = mesh.place(world.rank)
    device = device_for(module, world.device)
    groups = make_groups(mesh, place, plan)
    seed(plan, place)

    reports: list[ActivationReport] = []
    blocks = block_classes(plan, module)
    whole = module if plan.pipeline > 1 else None

    if plan.stage == 0 and plan.pipeline == 1 and all(p.device.type != "meta" for p in module.parameters()):
        module.to(device)  # all of it stays on this rank

    budget = plan.activations.budget
    shares = plan.pipeline > 1 and budget is not None
    if budget is not None and example_inputs is None:
        raise ValueError("activations.budget needs example_inputs= of parallelize: blocks are measured on them")

    def share(held: Held) -> None:
        """One budget for all of this rank's stages."""
        if plan.stage == 0:
            for part in held.modules.values():  # they stay on this rank
                materialise(part, initialize).to(device)
        assert budget is not None
        around = partial(autocast, plan, device)
        with where_it_computes(held.modules.values(), device):
            stages = all_or_none(dist.group.WORLD, partial(stage_budget.measure, held, blocks, loss_fn, around))
        chains = from_first(groups["data_parallel"], lambda: stages.chains)
        reports.append(all_or_none(dist.group.WORLD, partial(stage_budget.keep_within, stages, budget, chains)))

    def prepare(part: nn.Module) -> nn.Module:
        """Of the whole model, or of each of this rank's stages."""
        if not shares:
            example = Example(example_inputs, example_target, loss_fn, groups["data_parallel"], device)
            reports.extend(keep_less(plan, part, module, blocks, example))
        return replicate(plan, part, whole, groups["data_parallel"], initialize, device)

    model: Stepper
    if plan.pipeline > 1:
        model = PipelineParallel(
            module,
            loss_fn=loss_fn,
            example_inputs=example_inputs,
            example_target=example_target,
            process_group=groups["pipeline"],
            world=dist.group.WORLD,
            data_parallel=prepare,
            keep_less=share if shares else None,
            weigh=weigh,
            init=initialize,
            device=device,
            **options.pipeline(plan),
        )
    else:
        model = MicroSteps(prepare(module), plan.microbatches, loss_fn, weigh, device)
    scaling = options.scaler(plan)
    scaler = None if scaling is None else GradScaler(**scaling)
    make = partial(optimizer_of, optimizer, list(model.parameters()))
    made = make() if plan.pipeline == 1 else all_or_none(dist.group.WORLD, make)
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the model again within its step, which no plan offers")
    if plan.stage > 0:
        check_optimizer(made)
    pipeline, replicas = groups["pipeline"], groups["data_parallel"]
    peaks = [None] * plan.pipeline if budget is None else predicted_peaks(reports, pipeline)
    return Engine(plan, mesh, model, replicas, made, scaler, reports, device, weigh, peaks, pipeline)


def require_same_plan(plan: Plan, device: torch.device) -> None:
    """RuntimeError on every rank, naming the settings, if plans differ by more than where folders are. A collective of
    all ranks."""
    values = plan.to_dict()
    if plan.offload not in (None, "cpu"):
        values["offload"] = "a folder"
    if plan.activations.folder is not None:
        values["activations"] = {**values["activations"], "folder": "a folder"}
    facts = [(name, str(value)) for name, value in values.items()]
    require_equal(Group.of(None), "Plan", facts, numbers_on(Group.of(None), device))


def optimizer_of(make: MakeOptimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What the rule makes, also of no parameters. ValueError for what is no optimizer."""
    try:
        made = make(parameters)
    except ValueError as error:
        if parameters and _NONE not in str(error):
            raise
        made = _without_parameters(make, error)
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer= made a {type(made).__name__}: it must return a torch.optim.Optimizer, as in "
            "lambda p: distlib.optim.AdamW(p, lr=3e-4)"
        )
    return made


def _without_parameters(make: MakeOptimizer, error: ValueError) -> torch.optim.Optimizer:
    """Where a rule chooses none of a rank's parameters, as in a stage that is frozen, torch's optimizers refuse to be
    made: it is shown one to choose, a matrix or a vector, which the optimizer then loses. error: the refusal."""
    for shape in ((1, 1), (1,)):
        try:
            made = make([nn.Parameter(torch.zeros(shape))])
        except ValueError:
            continue
        for group in made.param_groups:
            group["params"].clear()
        made.state.clear()
        return made
    raise error


def predicted_peaks(reports: Sequence[ActivationReport], pipeline: dist.ProcessGroup | None) -> list[int | None]:
    """By pipeline rank, the bytes that its budget came to; None for one without blocks. A collective of the pipeline's
    ranks."""
    own = next((report.predicted_step.peak for report in reports if report.predicted_step is not None), None)
    found: list[int | None] = [own]
    if pipeline is not None and Group.of(pipeline).size > 1:
        found = [None] * Group.of(pipeline).size
        dist.all_gather_object(found, own, group=pipeline)
    return found


def make_groups(mesh: Mesh, place: Place, plan: Plan) -> dict[str, dist.ProcessGroup | None]:
    """This rank's groups: of its pipeline, and of the ranks with the same stages. Made by all ranks in one order."""
    found: dict[str, dist.ProcessGroup | None] = {}
    world = Group.of(None)
    limit = options.timeout(plan) or timedelta(seconds=world.timeout)  # torch would take its own default
    serves = limit.total_seconds() == world.timeout
    for name, everyone in (("pipeline", mesh.pipelines), ("data_parallel", mesh.data_parallel)):
        own = getattr(place, name)
        for ranks in everyone:
            made = dist.group.WORLD if serves and len(ranks) == mesh.size else dist.new_group(ranks, timeout=limit)
            if ranks == own:
                found[name] = made
    return found


def seed(plan: Plan, place: Place) -> None:
    """Starts torch's generators, if the plan says from where."""
    number = options.seed(plan, place)
    if number is not None:
        torch.manual_seed(number)


def block_classes(plan: Plan, module: nn.Module) -> list[type[nn.Module]]:
    """The classes of the blocks that keep less for backward: those of the whole model, of which a stage has some."""
    wanted = options.activations(plan, module)
    if wanted is None:
        return []
    return list(dict.fromkeys(type(block) for block in find_blocks(module, wanted["blocks"]).values()))


@dataclass(frozen=True)
class Example:
    """For a budget: a batch and its target (or None), the loss (None: the model's own), and the ranks that hold the
    same blocks, which all follow the first one's plan. device: where the model will compute."""

    inputs: Any
    target: Any = None
    loss_fn: LossFunction | None = None
    replicas: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")


def keep_less(
    plan: Plan, part: nn.Module, whole: nn.Module, blocks: Sequence[type[nn.Module]], example: Example | None
) -> list[ActivationReport]:
    """Activation memory, of the blocks that this part of the whole model has. With a budget, a collective of the
    example's replicas."""
    wanted = options.activations(plan, part, whole)
    if wanted is None:
        return []
    here = [type(m) for m in part.modules() if type(m) in blocks]
    if not here:
        return []
    wanted["blocks"] = list(dict.fromkeys(here))
    if (
        wanted["policy"] == "offload" and plan.pipeline > 1
    ):  # backward does not follow at once on the stage's last block
        wanted["resident"] = min(wanted["resident"] or 0, len(here) - 1)
    if wanted["budget"] is None or example is None:
        return [checkpoint_activations(part, **wanted)]
    dtype = compute_dtype(plan)

    def measured() -> ActivationReport:
        where = next((p.device for p in part.parameters()), example.device)
        batch = example_of(example.inputs, plan.microbatches, example.target, where)
        assert batch is not None

        def loss(output: Any) -> torch.Tensor:
            return scalar((example.loss_fn or own_loss)(output, batch.target))

        known = loss if batch.target is not None or example.loss_fn is None else None
        with autocast(plan, where), in_dtype(part, dtype):
            inputs = cast(batch.kwargs or batch.args, dtype)
            return checkpoint_activations(part, **wanted, example_inputs=inputs, loss=known)

    with where_it_computes([part], example.device):
        report = all_or_none(example.replicas, measured)
    report.follow(from_first(example.replicas, lambda: report.plan))
    return [report]


def replicate(
    plan: Plan,
    part: nn.Module,
    whole: nn.Module | None,
    group: dist.ProcessGroup | None,
    initialize: Callable[[nn.Module], Any] | None,
    device: torch.device | None = None,
) -> nn.Module:
    """Data parallelism: replicated, or sharded by one of its stages. device: None is where the part is."""
    if plan.stage == 0:
        ready = materialise(part, initialize)
        ready = ready if device is None else ready.to(device)
        arguments = options.data_parallel(plan)
        if Group.of(group).size == 1:
            arguments["find_unused_parameters"] = True  # nothing is averaged: it trains as in one process
        return DataParallel(ready, process_group=group, **arguments)
    arguments = options.sharded(plan, part, whole)
    return ShardedDataParallel(part, process_group=group, init=initialize, device=device, **arguments)

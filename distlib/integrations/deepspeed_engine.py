"""A plan carried out by DeepSpeed: the same `Engine`, with DeepSpeed's ZeRO under it. For comparing, and for its users.

    Engine.train_step
      ZeroSteps       micro-batches, one after the other        ours: as without DeepSpeed
        forward       deepspeed engine                          stage 3: whole parameters as hooks fire
        backward      deepspeed engine.backward                 averages gradients in the last micro-batch
      engine.step     clip, loss scale, optimizer               DeepSpeed's

Numbers of a plan in fp32 are those of engine="distlib" up to the order of sums.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlib.checkpoint import SaveHandle, random_state
from distlib.checkpoint.loading import LoadedState
from distlib.checkpoint.model_state import is_divided
from distlib.checkpoint.saving import state_of_object
from distlib.engine.apply import block_classes, keep_less, seed
from distlib.engine.engine import Engine, state_bytes
from distlib.engine.micro_steps import MicroSteps
from distlib.integrations.deepspeed_config import write_deepspeed
from distlib.integrations.require import require
from distlib.memory import MemoryReport
from distlib.optim.flat import FlatOptimizer
from distlib.pipeline.micro_batches import Batch, Weigh
from distlib.pipeline.runtime import LossFunction
from distlib.plan import Plan
from distlib.plan.checked import SettingsError
from distlib.plan.mesh import Mesh
from distlib.world import World

_STATE = "distlib"  # our part of a checkpoint's client state


def deepspeed_engine(
    module: nn.Module,
    plan: Plan,
    world: World,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    loss_fn: LossFunction | None = None,
    weigh: Weigh | None = None,
) -> DeepSpeedEngine:
    """What `parallelize` returns for Plan(engine="deepspeed"). Every rank must call it, alike; arguments as there.

    Raises:
        ImportError: DeepSpeed is not installed, with the command that installs it.
        ValueError: the plan, module or optimizer asks for what DeepSpeed cannot do on these ranks, with all reasons.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    deepspeed = require("deepspeed", "deepspeed")
    mesh = Mesh.of(plan, world)
    _check(plan, module, world)
    config = configuration(plan)
    seed(plan, mesh.place(world.rank))
    reports = keep_less(plan, module, module, block_classes(plan, module), None)
    made = optimizer([p for p in module.parameters() if p.requires_grad])
    _check_optimizer(made, plan.stage)
    _use_process_group(deepspeed)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it knows few launchers, and none is none of them
    zero, *_ = deepspeed.initialize(
        model=module.to(world.device), optimizer=made, config=config, dist_init_required=False
    )
    return DeepSpeedEngine(plan, mesh, zero, ZeroSteps(zero, plan.microbatches, loss_fn, weigh), made, reports, weigh)


def configuration(plan: Plan) -> dict[str, Any]:
    """The plan as DeepSpeed's configuration, for an engine whose micro-batches are ours."""
    kind = plan.precision
    config = {
        **write_deepspeed(plan, 1),  # rows are used for its own counts only
        "gradient_accumulation_steps": 1,  # ZeroSteps weighs the micro-batches, and says which is the last
        "communication_data_type": kind.reduce or ("fp32" if plan.stage == 0 else kind.dtype),
        "steps_per_print": 2**31,
    }
    if plan.stage == 3:
        # Else it replaces torch.nn.functional.linear, for the whole process and for good.
        config["zero_optimization"]["memory_efficient_linear"] = False
    return config


def _check(plan: Plan, module: nn.Module, world: World) -> None:
    """Refuses what the table of refusals cannot know: devices, and what depends on the module."""
    wrong = []
    kind = plan.precision
    if kind.dtype == "fp16" and world.device.type == "cpu":
        wrong.append('precision "fp16": DeepSpeed has none on the CPU. Take "bf16"')
    if kind.dtype == "fp16" and plan.stage == 0:
        wrong.append('precision "fp16" with stage=0: its loss scale cannot be set there. Give stage=1, or take "bf16"')
    if kind.dtype == "fp16" and not math.log2(kind.init_scale).is_integer():
        wrong.append(f"precision.init_scale={kind.init_scale}: DeepSpeed begins with a power of 2. Give one")
    if plan.offload not in (None, "cpu"):
        wrong.append(
            f"offload={plan.offload!r}: DeepSpeed's files need its asynchronous-I/O module. "
            'Take "cpu", or engine="distlib"'
        )
    if plan.offload == "cpu" and world.device.type == "cpu":
        wrong.append('offload="cpu": the ranks are on the CPU, and so is all they hold. Leave it out')
    if plan.activations.budget is not None:
        wrong.append(
            "activations.budget: it measures the model without ZeRO's hooks. "
            'Choose a policy, such as activations="full"'
        )
    on_meta = [name for name, p in module.named_parameters() if p.device.type == "meta"]
    if on_meta:
        wrong.append(f"parameter {on_meta[0]} is on the meta device. Build the module on the CPU")
    if wrong:
        raise SettingsError('Plan with engine="deepspeed"', wrong)


def _check_optimizer(made: torch.optim.Optimizer, stage: int) -> None:
    """ValueError for optimizers that ZeRO does not step as they are."""
    if isinstance(made, FlatOptimizer):
        raise ValueError(
            f"engine='deepspeed' cannot use distlib.optim.{type(made).__name__}: ZeRO gives the optimizer parameters "
            f"of its own. Pass torch's, such as optimizer=lambda p: torch.optim.{type(made).__name__}(p, ...)"
        )
    if isinstance(made, torch.optim.Adagrad) and stage > 0:
        raise ValueError(
            f"engine='deepspeed' with stage={stage} cannot use Adagrad: ZeRO makes another one in its place, which "
            "learning-rate schedules and hyperparameters of groups do not reach. Take another optimizer, stage=0, or "
            "engine='distlib'"
        )


def _use_process_group(deepspeed: Any) -> None:
    """DeepSpeed communicates by the process group that is there, whatever its backend.

    On CPUs it would compile an all-reduce of its own for minutes; the group's does as well.
    """
    if not deepspeed.comm.is_initialized():
        operators = deepspeed.ops.__compatible_ops__
        before = dict(operators)
        operators["deepspeed_shm_comm"] = False
        try:
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        finally:
            operators.clear()
            operators.update(before)


class ZeroSteps(MicroSteps):
    """Micro-batches through DeepSpeed's engine, which averages gradients at the last.

    cut_off: the call of ZeRO's that an error ended; None: none.
    """

    def __init__(
        self, zero: Any, microbatches: int, loss_fn: LossFunction | None = None, weigh: Weigh | None = None
    ) -> None:
        super().__init__(zero, microbatches, loss_fn, weigh)
        self.cut_off: str | None = None

    def prepare(self, inputs: Any, target: Any, keywords: dict[str, Any], train: bool) -> Batch:
        """As `MicroSteps.prepare`. RuntimeError after an error that ZeRO cannot go on from."""
        if self.cut_off is not None:
            raise RuntimeError(
                f"engine='deepspeed' cannot go on: an error ended ZeRO's {self.cut_off}, which has no way to begin "
                "anew. Call parallelize again, and load a checkpoint"
            )
        return super().prepare(inputs, target, keywords, train)

    @contextlib.contextmanager
    def whole(self, call: str) -> Iterator[None]:
        """Around what ZeRO must finish."""
        try:
            yield
        except BaseException:
            self.cut_off = call
            raise

    def _backward(self, loss: Tensor) -> None:
        with self.whole("backward"):
            self.module.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(False)
        try:
            yield
            self.module.step()  # not at a boundary: counts the micro-batch, and leaves all else
        finally:
            self.module.set_gradient_accumulation_boundary(True)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.module.module.state_dict(*args, **kwargs)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's state dict, copies on the CPU, on every rank, in the dtype that it computes in. Every rank
        must call it."""
        zero = require("deepspeed", "deepspeed").zero
        divided = [p for p in self.module.module.parameters() if is_divided(p)]
        with zero.GatheredParameters(divided) if divided else contextlib.nullcontext():
            return {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}


class DeepSpeedEngine(Engine):
    """An Engine whose gradients, optimizer and checkpoints are DeepSpeed's. Interface as of `Engine`.

    zero: DeepSpeed's engine itself. optimizer: the one that the caller made, whose parameters ZeRO has replaced.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        zero: Any,
        model: ZeroSteps,
        optimizer: torch.optim.Optimizer,
        reports: Iterable[Any] = (),
        weigh: Weigh | None = None,
    ) -> None:
        super().__init__(plan, mesh, model, None, optimizer, None, list(reports), weigh=weigh)
        self.zero = zero
        zero.set_gradient_accumulation_boundary(True)

    def _optimize(self) -> None:
        clips, stage = self.plan.clip is not None, self.plan.stage
        if clips and stage == 0:  # where it clips, it keeps the norm to itself
            gradients = [p.grad for p in self.zero.module.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        with self.model.whole("step"):
            self.zero.step()
        if clips and stage > 0:
            self.grad_norm = torch.as_tensor(float(self.zero.get_global_grad_norm()))

    def _forget_gradients(self) -> None:
        """ZeRO keeps sums of its own. Those of micro-batches that ended are dropped; see `ZeroSteps.cut_off`."""
        self.zero.zero_grad()
        if self.plan.stage == 0:
            self.model.cut_off = None  # torch's optimizer and gradients: nothing else is held
            return
        if self.plan.offload is not None:
            self.model.cut_off = "accumulation on the CPU"
        held = self.zero.optimizer
        held.zero_grad()
        for sums in ("averaged_gradients", "all_grad_tensors"):  # of stages 1 to 3, of stages 1 and 2
            getattr(held, sums, {}).clear()

    # ------------------------------------------------------------ checkpoints

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        extra: dict[str, Any] | None = None,
        rng: bool = True,
        asynchronous: bool = False,
    ) -> SaveHandle | None:
        """Saves all that training needs in DeepSpeed's own format. Every rank must call it.

        Such a checkpoint is loaded by as many ranks, and replaced file by file. For other plans and world sizes
        `distlib.checkpoint.deepspeed.convert_deepspeed` makes one of ours of it, for stages 1 to 3.

        Raises ValueError for asynchronous=True: DeepSpeed's writer holds the ranks.
        """
        if asynchronous:
            raise ValueError("engine='deepspeed' cannot save in the background: leave asynchronous out")
        values = {key: state_of_object(value) for key, value in (extra or {}).items()}
        own = {"extra": values, "rng": random_state.capture() if rng else None}
        everyone: list[Any] = [None] * self.data_size
        dist.all_gather_object(everyone, own)
        state = {"steps": self.steps, "by_rank": everyone}
        self.zero.save_checkpoint(os.fspath(path), tag=f"step{self.steps}", client_state={_STATE: state})
        return None

    def load(
        self, path: str | os.PathLike[str], *, extra: dict[str, Any] | None = None, rng: bool = True
    ) -> LoadedState:
        """Loads the last that `save` saved at `path`, with the same plan and number of ranks. Every rank must call it.

        extra: objects with load_state_dict, by key, that are given what was saved of them.

        Raises ValueError if there is no such checkpoint, if other ranks saved it, or a key of `extra` is not in it.
        """
        _check_saved(Path(path), self.plan.stage, self.data_size)
        _, client = self.zero.load_checkpoint(os.fspath(path))
        if _STATE not in (client or {}):
            raise ValueError(f"{path} holds no checkpoint that Engine.save wrote with engine='deepspeed'")
        by_rank = client[_STATE]["by_rank"]
        own = by_rank[self.data_rank]
        for key, wanted in (extra or {}).items():
            if key not in own["extra"]:
                raise ValueError(f"{path} was saved without extra[{key!r}]; it has {sorted(own['extra'])}")
            wanted.load_state_dict(own["extra"][key])
        has_rng = rng and own["rng"] is not None
        if has_rng:
            random_state.restore(own["rng"])
        self.steps = int(client[_STATE]["steps"])
        return LoadedState(self.steps, len(by_rank), dict(own["extra"]), rng=has_rng)

    # ------------------------------------------------------------ accounts

    def memory_report(self) -> MemoryReport:
        """Not told by DeepSpeed's engine: raises NotImplementedError; `describe` has the formulas."""
        raise NotImplementedError("DeepSpeed does not say what it holds; describe() has the bytes by formula")

    def describe(self) -> str:
        """The plan, the ranks, and the bytes expected in memory and on the wire by ZeRO's formulas."""
        trained = [p for p in self.zero.module.parameters() if p.requires_grad]
        count = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        expected = self.plan.expected(count, self.mesh.topology, optimizer_bytes=state_bytes(self.optimizer))
        return f"{self.plan}\n\n{self.mesh}\n\nDeepSpeed, ZeRO stage {self.plan.stage}\n\n{expected}"


def _check_saved(path: Path, stage: int, ranks: int) -> None:
    """That so many ranks saved there; in stage 0 one file serves any number."""
    latest = path / "latest"
    if not latest.is_file():
        raise ValueError(f"{path} holds no checkpoint of DeepSpeed: it has no file named latest")
    if stage == 0:
        return
    saved = len(list((path / latest.read_text().strip()).glob("*_optim_states.pt")))
    if saved != ranks:
        raise ValueError(
            f"{path} was saved by {saved} ranks with ZeRO, there are {ranks}: convert it with "
            "distlib.checkpoint.deepspeed.convert_deepspeed, and load that with engine='distlib'"
        )

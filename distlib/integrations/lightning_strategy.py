"""A Strategy for Lightning's Trainer: the training loop is Lightning's, data parallelism and its plan are ours.

trainer = Trainer(strategy=DistlibStrategy(plan=Plan(stage=3)))      or strategy="distlib", once this is imported
trainer.fit(module)                                                  under torchrun, mpirun, srun, or alone

Trainer                 strategy                           distlib
training_step   ---->   forward of a wrapper       ---->   DataParallel | ShardedDataParallel
accumulation    ---->   block_backward_sync        ---->   no_sync()
clipping        ---->   a Precision plugin         ---->   norm over all ranks and pieces
checkpoints     ---->   save_checkpoint(folder)    ---->   distlib.save: any stage and world size can load it
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distlib
from distlib.engine.apply import block_classes, keep_less, replicate, require_same_plan, seed
from distlib.engine.pieces import check_optimizer
from distlib.integrations.require import require
from distlib.launchers import detect
from distlib.optim.norm import clip_grad_norm_
from distlib.plan import Plan, options
from distlib.plan.checked import SettingsError
from distlib.plan.mesh import Mesh
from distlib.shards import shard_of

require("lightning", "lightning")

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging  # noqa: E402
from lightning.pytorch.plugins.environments import ClusterEnvironment  # noqa: E402
from lightning.pytorch.plugins.precision import Precision  # noqa: E402
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry  # noqa: E402
from lightning.pytorch.trainer.states import TrainerFn  # noqa: E402

_STATE = "lightning"  # the Trainer's part of a checkpoint


class DistlibStrategy(ParallelStrategy):
    """Trains a LightningModule by a plan without a pipeline.

    plan: stage, partition_size, units, precision, activations and what else says how ranks share one model. Default:
    replicated. What the Trainer has arguments for is the Trainer's: accumulate_grad_batches, gradient_clip_val.

    Start one process per rank with a launcher that `distlib.init` knows; `devices` and `num_nodes` may be left out.
    Every `training_step` runs one forward and one backward. Optimizers are made after wrapping, of this rank's
    parameters, with `self.parameters()` as ever.

    Checkpoints are folders that `distlib.save` writes. The weights are not in the dict that on_save_checkpoint sees.

    settings: of Lightning's ParallelStrategy, such as checkpoint_io.

    Raises ValueError, with all reasons, for plans that Lightning's loop cannot carry out.
    """

    strategy_name = "distlib"

    def __init__(self, plan: Plan | None = None, **settings: Any) -> None:
        self.plan = Plan() if plan is None else plan
        _check(self.plan)
        super().__init__(cluster_environment=DistlibEnvironment(), **settings)
        self._num_nodes = 1
        self._wrapped: nn.Module | None = None
        self._world: Any = None

    # ------------------------------------------------------------ ranks

    @property
    def world(self) -> Any:
        """This rank's place: `distlib.World`."""
        if self._world is None:
            self._world = distlib.init()
        return self._world

    @property
    def root_device(self) -> torch.device:
        return self.world.device

    @property
    def is_distributed(self) -> bool:
        """So that the Trainer gives each rank rows of its own."""
        return True

    @property
    def num_nodes(self) -> int:
        """Not used: the launcher tells."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        self._num_nodes = count

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world.size, "rank": self.world.rank}

    def _configure_launcher(self) -> None:
        self._launcher = None  # ranks are there already

    def setup_environment(self) -> None:
        require_same_plan(self.plan, self.world.device)
        self.plan.check(self.world)
        super().setup_environment()
        seed(self.plan, Mesh.of(self.plan, self.world).place(self.world.rank))

    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        found = [obj]
        dist.broadcast_object_list(found, src)
        return found[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The sum or mean over ranks of a copy of a tensor; anything else as it is."""
        if not isinstance(tensor, Tensor):
            return tensor
        found = tensor.detach().clone()
        is_mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg") or reduce_op == dist.ReduceOp.AVG
        named = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        operation = named[reduce_op.lower()] if isinstance(reduce_op, str) and not is_mean else reduce_op
        dist.all_reduce(found, dist.ReduceOp.SUM if is_mean else operation, group=group)
        return found / dist.get_world_size(group) if is_mean else found

    # ------------------------------------------------------------ the model

    def setup(self, trainer: Any) -> None:
        self._check_trainer(trainer)
        super().setup(trainer)

    def _check_trainer(self, trainer: Any) -> None:
        wrong = []
        if self._layer_sync is not None:
            wrong.append("sync_batchnorm=True: batch norm is each rank's own. Leave it out")
        if self.precision_plugin.precision != "32-true":
            wrong.append(
                f"Trainer(precision={self.precision_plugin.precision!r}): the plan decides. "
                'Leave it out, and give Plan(precision="bf16")'
            )
        wrong += [
            f"Trainer(callbacks=[{type(callback).__name__}(...)]): it averages whole weights, and {why}"
            for callback in trainer.callbacks
            if (why := self._why_not(callback))
        ]
        if wrong:
            raise SettingsError("DistlibStrategy", wrong)

    def _why_not(self, callback: Any) -> str:
        """Why a callback that averages weights cannot do so; empty for any other."""
        if isinstance(callback, WeightAveraging):
            return (
                "puts them into the Trainer's dict of a checkpoint, where distlib.save does not look. Leave it out, or "
                "take StochasticWeightAveraging with stage=0"
            )
        if isinstance(callback, StochasticWeightAveraging) and self.plan.stage > 0:
            return f"with stage={self.plan.stage} ranks hold pieces of them. Leave it out, or take stage=0"
        return ""

    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        if not isinstance(self._wrapped, nn.Module):
            self.lightning_module.to(self.root_device)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wraps the module once: fit, validate and test may follow each other."""
        before = self._wrapped
        if before is not None and before.module is model:
            return before
        for parameter in model.parameters():
            shard = shard_of(parameter)
            if shard is not None:
                raise ValueError(
                    f"DistlibStrategy: {shard.name} is a piece: another Trainer, of stage 1, 2 or 3, has divided this "
                    "module. Go on with that Trainer, or build the module anew and load a checkpoint (ckpt_path=)"
                )
        keep_less(self.plan, model, model, block_classes(self.plan, model), None)
        self._wrapped = replicate(self.plan, model, None, None, None)
        return self._wrapped

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) > 1:
            raise ValueError(
                f"DistlibStrategy: configure_optimizers returned {len(self.optimizers)} optimizers; a checkpoint holds "
                "one. Give one with several parameter groups"
            )
        if self.plan.stage > 0:
            for made in self.optimizers:
                check_optimizer(made)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("training_step", self.precision_plugin.train_step_context, args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("validation_step", self.precision_plugin.val_step_context, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("test_step", self.precision_plugin.test_step_context, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("predict_step", self.precision_plugin.predict_step_context, args, kwargs)

    def _step(self, name: str, context: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.model is not None and self.lightning_module is not None
        self.model.training = self.lightning_module.training
        dtype = options.autocast(self.plan)
        autocast = contextlib.nullcontext() if dtype is None else torch.autocast(self.root_device.type, dtype)
        with context(), autocast:
            return self._forward_redirection(self.model, self.lightning_module, name, *args, **kwargs)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around forward and backward of all micro-batches of a step but the last."""
        assert self.model is not None
        with self.model.no_sync():
            yield

    @property
    def precision_plugin(self) -> Any:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        # None stays: a plugin that the strategy had of itself would hide Trainer(precision=...) from the check.
        self._precision_plugin = GlobalNorm() if type(plugin) is Precision else plugin

    # ------------------------------------------------------------ checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # into the pieces that this rank holds

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` writes each rank's pieces

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every rank calls it. filepath: of a folder."""
        if storage_options is not None:
            raise ValueError("DistlibStrategy: storage_options are for other writers than distlib.save")
        has_optimizer = "optimizer_states" in checkpoint  # not, if only weights are wanted
        emptied: dict[str, Any] = {"state_dict": {}, **({"optimizer_states": []} if has_optimizer else {})}
        distlib.save(
            filepath,
            model=self.model,
            optimizer=self._optimizer() if has_optimizer else None,
            step=checkpoint["global_step"],
            extra={_STATE: {**checkpoint, **emptied}},
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights, and while fitting the optimizer's state and generators. Returns the Trainer's part.

        Raises ValueError for weights_only=True, which Lightning 2.6 does not pass on, and for a module with
        strict_loading=False: they cannot be honoured.
        """
        assert self.lightning_module is not None
        if weights_only:
            raise ValueError(
                "DistlibStrategy: weights_only=True: the Trainer's part of a checkpoint is a pickle, which runs code. "
                "Leave it out for a checkpoint that you trust; distlib.export reads weights without running code"
            )
        if not self.lightning_module.strict_loading:
            raise ValueError(
                "DistlibStrategy: strict_loading=False: a checkpoint and the module must have the same weights, by "
                "name. Leave it at True"
            )
        fits = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        optimizer = self._optimizer() if fits else None
        state = distlib.load(checkpoint_path, model=self.model, optimizer=optimizer, rng=fits)
        if _STATE in state.extra:
            return dict(state.extra[_STATE])
        by_rank = state.extra_by_rank.get(_STATE)
        if not by_rank:
            raise ValueError(f"{checkpoint_path} was not saved by a Trainer: load it with distlib.load")
        return dict(by_rank[0])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` has."""

    def _optimizer(self) -> torch.optim.Optimizer | None:
        return self.optimizers[0] if self.optimizers else None

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(
            cls.strategy_name, cls, description="data parallelism by distlib: replicated, ZeRO, MiCS"
        )


class GlobalNorm(Precision):
    """The Trainer's gradient_clip_val over all ranks: a rank alone knows the norm of its pieces only."""

    def clip_grad_by_norm(self, optimizer: torch.optim.Optimizer, clip_val: int | float) -> None:
        clip_grad_norm_(list(self.main_params(optimizer)), float(clip_val))


class DistlibEnvironment(ClusterEnvironment):
    """Ranks as the launcher made them, whichever `distlib.init` knows."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"  # asked for by strategies that meet by address; this one has met

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False  # only with this strategy

    def world_size(self) -> int:
        return detect().size

    def set_world_size(self, size: int) -> None:
        """Nothing: the launcher has."""

    def global_rank(self) -> int:
        return detect().rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: the launcher has."""

    def local_rank(self) -> int:
        return detect().local_rank

    def node_rank(self) -> int:
        return distlib.init().node_rank


def _check(plan: Plan) -> None:
    wrong = []
    if plan.pipeline > 1:
        wrong.append(
            f"pipeline={plan.pipeline}: training_step computes the loss with Python of its own, which stages on "
            "several ranks cannot share. Use distlib.parallelize and a loop"
        )
    if plan.engine != "distlib":
        wrong.append(f'engine={plan.engine!r}: Trainer(strategy="deepspeed") is Lightning\'s own')
    if plan.microbatches > 1:
        wrong.append(f"microbatches={plan.microbatches}: give Trainer(accumulate_grad_batches={plan.microbatches})")
    if plan.clip is not None:
        wrong.append(f"clip={plan.clip}: give Trainer(gradient_clip_val={plan.clip})")
    if plan.precision.dtype == "fp16":
        wrong.append('precision "fp16": there is no loss scale here. Take "bf16"')
    if plan.activations.budget is not None:
        wrong.append('activations.budget: there are no example inputs here. Choose a policy, such as "selective"')
    if wrong:
        raise SettingsError("Plan for DistlibStrategy", wrong)


if DistlibStrategy.strategy_name not in StrategyRegistry:
    DistlibStrategy.register_strategies(StrategyRegistry)

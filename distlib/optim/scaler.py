"""`GradScaler`: torch's loss scaler, whose decision to skip a step is the same on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from distlib import reach
from distlib.comm.group import Group
from distlib.optim import norm
from distlib.optim.flat import FlatOptimizer
from distlib.shards import shard_of


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler on any device: `scale`, `unscale_`, `step`, `update`, `get_scale`, state_dict as there.

    A gradient that is infinite or NaN on one rank makes all ranks skip the step, so they keep the same scale, too. A
    step that is skipped changes no bit of parameters and optimizer state. The ranks that decide together are those that
    train the model: `world` of its shards; else `process_group`; else the world, once it is initialised. All of them
    must call `unscale_` and `step`.

    distlib's optimizers are not unscaled beforehand: one pass reads the gradients for infinities (and their norm, with
    max_norm), and the step multiplies by 1 / scale as it goes: on a GPU the host waits for none of it. Gradients are
    fp32, bf16 or fp16.
    """

    # The model whose gradients are scaled; None: an optimizer's parameters are all of it.
    trained: norm.Trained | None = None

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        for name, value, good in (
            ("init_scale", init_scale, 0 < init_scale <= 2.0**127),  # it is kept in fp32
            ("growth_factor", growth_factor, growth_factor > 1),
            ("backoff_factor", backoff_factor, 0 < backoff_factor < 1),
            ("growth_interval", growth_interval, growth_interval >= 1),
        ):
            if not good:
                raise ValueError(
                    f"{name}={value}: init_scale is above 0 and at most 2.0**127, growth_factor above 1, "
                    "backoff_factor between 0 and 1, growth_interval at least 1"
                )
        super().__init__("cpu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._process_group = process_group

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        """Multiplies gradients by `inv_scale`, in place. Returns what all ranks found together."""
        params, device = self._scaled(optimizer)
        scaled: Any = SimpleNamespace(param_groups=[{"params": params}])
        # Where the loss is on a GPU and the parameters are not, torch would copy the scale without waiting for it.
        found = super()._unscale_grads_(scaled, inv_scale.to(device), found_inf.to(device), True)
        values = [value.to(device).view(()) for value in found.values()]
        return self._agreed(torch.stack(values).amax() if values else torch.zeros((), device=device), optimizer)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What torch calls before the step of an optimizer that unscales by itself: here a pass that only reads."""
        if not isinstance(optimizer, FlatOptimizer):
            return super()._check_inf_per_device(optimizer)
        params, device = self._scaled(optimizer)
        # fp64 squares of fp32 and shorter gradients cannot overflow: their sum is finite exactly if all of them are.
        if optimizer.max_norm is None:
            squares = norm.local_squares(params, device)
        else:
            optimizer._measured = squares = optimizer._squares()
        infinite = ~squares.isfinite()
        if any(p.grad is not None and p.grad.dtype is torch.float64 for p in params):
            infinite = ~torch.stack([p.grad.isfinite().all() for p in params if p.grad is not None]).all()
        found = self._agreed(infinite.float(), optimizer)
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found

    def _scaled(self, optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], torch.device]:
        """The parameters whose gradients are scaled, and where they are, on any rank."""
        own, trained = [p for group in optimizer.param_groups for p in group["params"]], self.trained
        if trained is None:
            return own, norm.device_of(own)
        params = trained.after(own)
        return params, norm.device_of(params, trained.device)

    def _agreed(self, found: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[torch.device, torch.Tensor]:
        """By device, as torch keeps it: 1 where any rank found an infinity, else 0."""
        group = self._ranks(optimizer)
        if group is not None and group.size > 1:
            reach.all_reduce(group, found, "max")
        return {found.device: found}

    def _ranks(self, optimizer: torch.optim.Optimizer) -> Group | None:
        shards = [shard_of(p) for group in optimizer.param_groups for p in group["params"]]
        worlds = list({id(s.world): s.world for s in shards if s is not None and s.world is not None}.values())
        if len(worlds) > 1:
            raise ValueError(
                f"GradScaler: the optimizer's parameters belong to models trained by different ranks "
                f"({worlds[0].ranks} and {worlds[1].ranks}): use an optimizer for each"
            )
        if worlds:
            return worlds[0]
        if self._process_group is not None:
            return Group.of(self._process_group)
        return Group.of() if dist.is_available() and dist.is_initialized() else None

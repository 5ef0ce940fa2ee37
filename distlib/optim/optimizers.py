"""AdamW, SGD and Lion: what each keeps of a parameter, and the scalars of its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distlib.cuda.step import Recipe
from distlib.optim.flat import FlatOptimizer
from distlib.optim.kernels import Hyper
from distlib.optim.memory import REMAINDER


class AdamW(FlatOptimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101), stepped in one pass; a drop-in for torch.optim.AdamW.

    params: parameters or groups, as in torch. lr, betas, eps, weight_decay: per group; lr may be a tensor. max_norm:
    the gradients of all groups together are clipped to this norm on the fly; `grad_norm` then holds their norm.
    offload: a folder to keep the state in, streamed through some 40 MiB of memory. lr, as a tensor on the parameters'
    device, is read there, so that schedules can change it for CUDA graphs.

    remainders: for bf16 parameters. Each has 16 more bits, which with the parameter's own are its fp32 master: 26 bytes
    are moved per parameter in a step with a bf16 gradient, instead of 28 with a master beside a bf16 copy, and 12 bytes
    are kept instead of 14. On a GPU with the kernels of csrc/cuda; elsewhere by torch's operators.

    State: step, exp_avg, exp_avg_sq, as torch's; remainder. Raises ValueError for values that cannot be right and for
    parameters that are not fp32 or fp64 (bf16, with remainders).
    """

    _counts_steps = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
        *,
        offload: Path | None = None,
        remainders: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "remainders": remainders}
        super().__init__(params, defaults, max_norm, offload)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _at_least_zero(group, "lr", "eps", "weight_decay")
        _betas(group)
        if group.get("decoupled_weight_decay") is False:
            raise ValueError("AdamW: the loaded state is of torch.optim.Adam, whose weight decay is not decoupled")
        if group.setdefault("remainders", False):
            if self.offload is not None:
                raise ValueError("remainders=True with offload: files hold no remainders; leave one of them out")
            for index, p in enumerate(group["params"]):
                if p.dtype is not torch.bfloat16:
                    raise ValueError(
                        f"remainders=True: parameter {index} of the group is {p.dtype}; remainders are for bf16 ones. "
                        "Put the others into a group with remainders=False"
                    )

    def _states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", REMAINDER) if group.get("remainders") else ("exp_avg", "exp_avg_sq")

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        beta1, beta2 = map(float, group["betas"])
        eps, decay = float(group["eps"]), float(group["weight_decay"])
        return Recipe("ADAMW", float(group["lr"]), beta1, beta2, eps, decay)

    def _hyper(self, group: dict[str, Any], step: float, first: bool) -> Hyper:
        lr = float(group["lr"])
        beta1, beta2 = map(float, group["betas"])
        return Hyper(
            "ADAMW",
            rate=lr / (1 - beta1**step),
            decay=1 - lr * group["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            root_scale=(1 - beta2**step) ** -0.5,
        )


class SGD(FlatOptimizer):
    """Stochastic gradient descent with momentum, dampening, Nesterov's variant and weight decay, as torch.optim.SGD.

    State: momentum_buffer where momentum is not 0; the first gradient fills it undamped. max_norm, offload, errors: see
    AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_norm: float | None = None,
        *,
        offload: Path | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, max_norm, offload)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _at_least_zero(group, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"SGD: nesterov=True needs momentum above 0 and dampening 0; they are {group['momentum']} and "
                f"{group['dampening']}"
            )

    def _states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        return Recipe(
            "SGD",
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
        )

    def _hyper(self, group: dict[str, Any], step: float, first: bool) -> Hyper:
        return Hyper(
            "SGD",
            rate=float(group["lr"]),
            l2=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            first=first,
        )


class Lion(FlatOptimizer):
    """Sign of an interpolated momentum, decoupled weight decay (arXiv 2302.06675, algorithm 2).

    A tenth to a third of AdamW's lr, and as much more weight_decay, is its authors' advice. State: exp_avg. max_norm,
    offload, errors: see AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        *,
        offload: Path | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, max_norm, offload)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _at_least_zero(group, "lr", "weight_decay")
        _betas(group)

    def _states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        beta1, beta2 = map(float, group["betas"])
        return Recipe("LION", float(group["lr"]), beta1, beta2, weight_decay=float(group["weight_decay"]))

    def _hyper(self, group: dict[str, Any], step: float, first: bool) -> Hyper:
        beta1, beta2 = map(float, group["betas"])
        return Hyper("LION", rate=float(group["lr"]), l2=float(group["weight_decay"]), beta1=beta1, beta2=beta2)


def _at_least_zero(group: dict[str, Any], *names: str) -> None:
    for name in names:
        if not float(group[name]) >= 0:
            raise ValueError(f"{name}={group[name]}: must be 0 or more")


def _betas(group: dict[str, Any]) -> None:
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"betas={betas}: must be two numbers from 0 up to, and without, 1")

"""The norm of all gradients of a model, whole or sharded: one pass over them, and one scalar all-reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from distlib.comm.group import Group
from distlib.optim import kernels
from distlib.shards import shard_of


def global_norm(parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The norm of the gradients of all parameters as one vector: a 0-dim fp64 tensor, the same bits on every rank.

    parameters: a tensor or several; those without a gradient count as zero. Gradients of a sharded parameter are summed
    (norm_type inf: maximized) over its Shard's group: every rank of that group must call this with the pieces of the
    same parameters, even where it holds nothing of them. Those of a pipeline's stages are summed over its ranks, which
    must all call this. Others count once: each rank must hold the same.

    norm_type: above 0, or inf. Raises ValueError for others, and for gradients that are not on the CPU.
    """
    params = _listed(parameters)
    if norm_type == math.inf:
        return torch.tensor([0.0, *_over_groups(params, _largest, "max")], dtype=torch.float64).amax()
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type}: must be above 0, or inf")
    if norm_type == 2:
        return _tensor(math.sqrt(total_squares(params)))
    powers = sum(_over_groups(params, lambda grads: _powers(grads, norm_type), "sum"))
    return _tensor(powers ** (1 / norm_type))


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scales the gradients of all parameters, in place, so that their norm is at most `max_norm`.

    Arithmetic and result as torch.nn.utils.clip_grad_norm_'s: the factor is max_norm / (norm + 1e-6) where that is
    below 1; the norm before clipping is returned. Which ranks must call, and errors: see `global_norm`.
    error_if_nonfinite: RuntimeError, on all ranks, instead of gradients that are no numbers.
    """
    params = _listed(parameters)
    norm = global_norm(params, norm_type)
    value = float(norm)
    if error_if_nonfinite and not math.isfinite(value):
        raise RuntimeError(
            f"the gradients' norm of order {norm_type} is {value}, so they cannot be clipped; find the step that made "
            "them so, or pass error_if_nonfinite=False"
        )
    factor = coefficient(value, max_norm)
    if not factor == 1:
        with torch.no_grad():
            for grad in _gradients(params):
                grad.mul_(factor)
    return norm


def coefficient(norm: float, max_norm: float) -> float:
    """What gradients are multiplied by to be clipped; NaN for a norm that is."""
    factor = float(max_norm) / (norm + 1e-6)
    return 1.0 if factor > 1 else factor


def total_squares(params: Sequence[torch.Tensor]) -> float:
    """The sum of the squares of all gradients, over all ranks that hold pieces. All ranks that `global_norm` names."""
    return sum(_over_groups(params, kernels.sum_of_squares, "sum"))


def local_squares(params: Sequence[torch.Tensor]) -> float:
    """The same of what this rank holds, without communication."""
    return kernels.sum_of_squares(_gradients(params))


def _over_groups(
    params: Sequence[torch.Tensor], measure: Callable[[list[torch.Tensor]], float], op: str
) -> list[float]:
    """`measure` of the gradients, of those that are not sharded first, then by group, reduced over the group; of those
    in the stages of a pipeline all together, reduced over its ranks, too."""
    divided: dict[tuple[Group | None, Group | None], list[torch.Tensor]] = {}
    for p in params:
        shard = shard_of(p)
        members = divided.setdefault((None, None) if shard is None else (shard.group, shard.pipeline), [])
        if shard is None or shard.counted:
            members.append(p)
    found: list[float] = []
    of_stages: dict[Group, list[float]] = {}
    for (group, pipeline), members in divided.items():
        value = _over(group, measure(_gradients(members)), op)
        (found if pipeline is None else of_stages.setdefault(pipeline, [])).append(value)
    for pipeline, values in of_stages.items():
        found.append(
            _over(pipeline, float(torch.tensor(values, dtype=torch.float64).amax()) if op == "max" else sum(values), op)
        )
    return found


def _over(group: Group | None, value: float, op: str) -> float:
    if group is None or group.size == 1:
        return value
    scalar = torch.tensor(value, dtype=torch.float64)
    group.all_reduce(scalar, op)
    return float(scalar)


def _largest(grads: Sequence[torch.Tensor]) -> float:
    found = [g.abs().amax().double() for g in grads if g.numel()]
    return float(torch.stack(found).amax()) if found else 0.0  # amax, unlike max(), lets a NaN through


def _powers(grads: Sequence[torch.Tensor], order: float) -> float:
    return sum(float(torch.linalg.vector_norm(g, order, dtype=torch.float64)) ** order for g in grads if g.numel())


def _gradients(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    grads = []
    for p in params:
        if p.grad is None:
            continue
        if p.grad.device.type != "cpu" or p.grad.layout is not torch.strided:
            raise ValueError(
                f"a gradient of shape {tuple(p.shape)} is {p.grad.layout} on {p.grad.device}: only dense ones on the "
                "CPU have a norm here"
            )
        grads.append(p.grad)
    return grads


def _listed(parameters: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _tensor(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)

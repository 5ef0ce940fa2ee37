"""The norm of all gradients of a model, whole or sharded: one pass over them, and one scalar all-reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from distlib import reach
from distlib.comm.group import Group
from distlib.optim import kernels
from distlib.shards import shard_of


@dataclass(frozen=True)
class Trained:
    """What this rank has of a model that is trained: its gradients have one norm, and are scaled together.

    parameters: maybe none, where the model's other stages lie on other ranks. pipeline: these ranks; None: the model is
    not divided so. device: where parameters are, on any rank.
    """

    parameters: tuple[torch.Tensor, ...]
    pipeline: Group | None = None
    device: torch.device | None = None

    def after(self, own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`own`, an optimizer's parameters in its order, then those of the model that it does not have."""
        known = set(map(id, own))
        return [*own, *(p for p in self.parameters if id(p) not in known)]


def global_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    *,
    pipeline: Group | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The norm of the gradients of all parameters as one vector: a 0-dim fp64 tensor, the same bits on every rank.

    It is on the parameters' device; the host does not wait for a GPU, unless a group carries no tensors of it: then one
    number goes through host memory.

    parameters: a tensor or several; those without a gradient count as zero. Gradients of a sharded parameter are summed
    (norm_type inf: maximized) over its Shard's group: every rank of that group must call this with the pieces of the
    same parameters, even where it holds nothing of them. Those of a pipeline's stages are summed over its ranks, which
    must all call this. Others count once: each rank must hold the same.

    norm_type: above 0, or inf. pipeline: the ranks of a pipeline, for those whose stages may have no parameters that
    tell; device: where the parameters of the other ranks are. Raises ValueError for other norm types, and for
    parameters on several devices.
    """
    params = _listed(parameters)
    where = device_of(params, device)
    if norm_type == math.inf:
        return torch.stack([_zero(where), *_over_groups(params, _largest, "max", pipeline, where)]).amax()
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type}: must be above 0, or inf")
    if norm_type == 2:
        return total_squares(params, pipeline, where).sqrt()
    powers = _over_groups(params, lambda grads: _powers(grads, norm_type), "sum", pipeline, where)
    return _sum(powers, where) ** (1 / norm_type)


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    pipeline: Group | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Scales the gradients of all parameters, in place, so that their norm is at most `max_norm`.

    Arithmetic and result as torch.nn.utils.clip_grad_norm_'s: the factor is max_norm / (norm + 1e-6) where that is
    below 1; the norm before clipping is returned. Which ranks must call, pipeline, device, errors: see `global_norm`.
    error_if_nonfinite: RuntimeError, on all ranks, instead of gradients that are no numbers (the host waits for a GPU).
    """
    params = _listed(parameters)
    norm = global_norm(params, norm_type, pipeline=pipeline, device=device)
    if error_if_nonfinite and not math.isfinite(float(norm)):
        raise RuntimeError(
            f"the gradients' norm of order {norm_type} is {float(norm)}, so they cannot be clipped; find the step that "
            "made them so, or pass error_if_nonfinite=False"
        )
    grads = _gradients(params)
    factor = coefficient(norm, max_norm)
    with torch.no_grad():
        if norm.is_cpu:
            value = float(factor)
            for grad in grads if not value == 1 else []:
                grad.mul_(value)
        elif grads:
            torch._foreach_mul_(grads, factor.float())
    return norm


def coefficient(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients are multiplied by to be clipped, at most 1; NaN for a norm that is. 0-dim fp64."""
    return (float(max_norm) / (norm + 1e-6)).clamp(max=1)


def total_squares(
    params: Sequence[torch.Tensor], pipeline: Group | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """The sum of the squares of all gradients, over all ranks that hold pieces: 0-dim, fp64. All ranks that
    `global_norm` names; pipeline and device as there."""
    where = device_of(params, device)
    return _sum(_over_groups(params, kernels.sum_of_squares, "sum", pipeline, where), where)


def local_squares(params: Sequence[torch.Tensor], device: torch.device | None = None) -> torch.Tensor:
    """The same of what this rank holds, without communication."""
    grads = _gradients(params)
    return kernels.sum_of_squares(grads) if grads else _zero(device_of(params, device))


def device_of(params: Iterable[torch.Tensor], otherwise: torch.device | None = None) -> torch.device:
    """The one device that parameters are on; where there are none, `otherwise`, or the CPU. ValueError where there are
    several."""
    found = list(dict.fromkeys(p.device for p in params))
    if len(found) > 1:
        raise ValueError(
            f"parameters are on {' and on '.join(map(str, found))}: their gradients have a norm only on one device"
        )
    return found[0] if found else otherwise or torch.device("cpu")


def _over_groups(
    params: Sequence[torch.Tensor],
    measure: Callable[[list[torch.Tensor]], torch.Tensor],
    op: str,
    pipeline: Group | None,
    device: torch.device,
) -> list[torch.Tensor]:
    """`measure` of the gradients, of those that are not sharded first, then by group, reduced over the group; of those
    in the stages of a pipeline all together, reduced over its ranks, too. This rank takes part in the reduction over
    `pipeline` even where it has no parameters."""
    divided: dict[tuple[Group | None, Group | None], list[torch.Tensor]] = {}
    for p in params:
        shard = shard_of(p)
        members = divided.setdefault((None, None) if shard is None else (shard.group, shard.pipeline), [])
        if shard is None or shard.counted:
            members.append(p)
    found: list[torch.Tensor] = []
    of_stages: dict[Group, list[torch.Tensor]] = {} if pipeline is None else {pipeline: []}
    for (group, stages), members in divided.items():
        grads = [g for g in _gradients(members) if g.numel()]
        value = _over(group, measure(grads) if grads else _zero(device), op)
        (found if stages is None else of_stages.setdefault(stages, [])).append(value)
    for stages, values in of_stages.items():
        together = torch.stack([_zero(device), *values]).amax() if op == "max" else _sum(values, device)
        found.append(_over(stages, together, op))
    return found


def _over(group: Group | None, value: torch.Tensor, op: str) -> torch.Tensor:
    if group is not None and group.size > 1:
        reach.all_reduce(group, value, op)
    return value


def _largest(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([g.abs().amax().double() for g in grads]).amax()  # amax, unlike max(), lets a NaN through


def _powers(grads: Sequence[torch.Tensor], order: float) -> torch.Tensor:
    return _sum([torch.linalg.vector_norm(g, order, dtype=torch.float64) ** order for g in grads], grads[0].device)


def _gradients(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    grads = []
    for p in params:
        if p.grad is None:
            continue
        if p.grad.layout is not torch.strided:
            raise ValueError(f"a gradient of shape {tuple(p.shape)} is {p.grad.layout}: dense ones have a norm here")
        grads.append(p.grad)
    return grads


def _listed(parameters: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _zero(device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64, device=device)


def _sum(values: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """In order, one by one: torch's own sum may add in another."""
    total = _zero(device)
    for value in values:
        total = total + value
    return total

"""Bytes of memory per rank: by the formulas of ZeRO and MiCS, as counted, and the smallest partition that fits.

psi parameters, each p bytes in the dtype that the model computes in, m bytes of fp32 master where that is another, g
bytes of gradient, o bytes of optimizer state:

                parameters            gradients    optimizer       divided by
    stage 1     psi p                 psi g        psi (m + o)/d   d = p ranks of the partition group, or all n
    stage 2     psi p                 psi g/P      psi (m + o)/d       with shard_optimizer="world"
    stage 3     psi p/P               psi g/P      psi (m + o)/d   P = p
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distlib.shown import Shown

KINDS = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True)
class PerParameter:
    """Bytes of one parameter: in computing, of its master copy beside that, of its gradient, of its optimizer state."""

    compute: int = 4
    master: int = 0
    gradient: int = 4
    optimizer: int = 8

    @staticmethod
    def of(dtype: torch.dtype, compute: torch.dtype | None, optimizer: int = 8) -> PerParameter:
        """For parameters that the optimizer sees in `dtype` and the model computes with in `compute` (None: the same).

        optimizer: bytes of its state for an fp32 parameter; state is in the parameter's dtype.
        """
        state = optimizer * dtype.itemsize // 4
        if compute is None or compute == dtype:
            return PerParameter(dtype.itemsize, 0, max(4, dtype.itemsize), state)
        return PerParameter(compute.itemsize, dtype.itemsize, max(4, dtype.itemsize), state)


def formula(
    parameters: int, each: PerParameter, stage: int, partition: int, world: int, shard_optimizer: str = "partition"
) -> dict[str, float]:
    """Bytes per rank (NUMBERS: 16 psi in all, undivided) by kind. partition: p; world: n."""
    divided = world if shard_optimizer == "world" else partition
    return {
        "parameters": parameters * each.compute / (partition if stage == 3 else 1),
        "gradients": parameters * each.gradient / (partition if stage > 1 else 1),
        "optimizer": parameters * (each.master + each.optimizer) / divided,
    }


@dataclass(frozen=True)
class MemoryReport(Shown):
    """Bytes of this rank by kind, counted and by formula, and the buffers through which units pass.

    A mapping that several ranks share counts for each of them by its part.
    """

    counted: dict[str, int]
    formula: dict[str, int]

    @property
    def total(self) -> int:
        """Counted bytes of parameters, gradients and optimizer state."""
        return sum(self.counted[kind] for kind in KINDS)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title="Memory of this rank, bytes")
        for column in ("", "counted", "formula"):
            table.add_column(column, justify="left" if not column else "right")
        for kind, counted in self.counted.items():
            expected = self.formula.get(kind)
            table.add_row(kind, f"{counted:,}", "" if expected is None else f"{expected:,}")
        return table


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of an optimizer's state tensors; its scalars do not count."""
    held = optimizer.state.values() if optimizer is not None else ()
    return sum(v.nbytes for own in held for v in own.values() if isinstance(v, torch.Tensor) and v.dim())


def replicated_report(
    parameters: list[torch.nn.Parameter], gradient_bytes: int, optimizer: torch.optim.Optimizer | None
) -> MemoryReport:
    """The report of a model that every rank holds whole."""
    expected = dict.fromkeys(KINDS, 0.0)
    for p in parameters:
        for kind, value in formula(p.numel(), PerParameter.of(p.dtype, None), 1, 1, 1).items():
            if p.requires_grad or kind == "parameters":
                expected[kind] += value
    counted = {
        "parameters": sum(p.nbytes for p in parameters),
        "gradients": gradient_bytes,
        "optimizer": state_bytes(optimizer),
    }
    return MemoryReport(counted, {kind: int(value) for kind, value in expected.items()})

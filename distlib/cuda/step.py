"""Optimizer steps on tables of segments in device memory, and the scalars that such a step reads there.

    Scalars.set(hyper)        of the host's numbers          |
    Scalars.prepare(recipe)   of the device's: step, lr,     |  ->  step(table, scalars)
                              norm, loss scale, found_inf    |

Nothing waits for the GPU, and all of it can be captured in a CUDA graph. Bits are those of csrc/cpu/optimizers.hpp.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distlib.cuda import library
from distlib.cuda.tables import CHUNK, CODES, address, cut, exact, extent, require_scalar, stream_of, upload

RULES = {"ADAMW": 0, "SGD": 1, "LION": 2}
_GRADS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Hyper:
    """The scalars of a step, as csrc/cpu/optimizers.hpp defines them, which also gives the formulas."""

    rule: str  # "ADAMW", "SGD", "LION"
    scale: float = 1.0
    rate: float = 0.0
    decay: float = 1.0
    l2: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    root_scale: float = 1.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    first: bool = False


_DOUBLES = ("scale", "rate", "decay", "l2", "beta1", "beta2", "eps", "root_scale", "momentum", "dampening")
_FLAGS = ("nesterov", "first", "skip")


class _CScalars(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in _DOUBLES] + [(name, ctypes.c_int64) for name in _FLAGS]


class _CPrepare(ctypes.Structure):
    _fields_ = [
        ("rule", ctypes.c_int64),
        *((n, ctypes.c_double) for n in ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "dampening")),
        *((name, ctypes.c_int64) for name in ("nesterov", "maximize")),
        *((name, ctypes.c_double) for name in ("step", "scale", "max_norm")),
        *((n, ctypes.c_uint64) for n in ("device_lr", "squares", "loss_scale", "found_inf", "device_step", "norm")),
    ]


@dataclass(frozen=True)
class Recipe:
    """What the scalars of a step are made from, as far as the host knows it. scale: of all gradients."""

    rule: str
    lr: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    step: float = 1.0  # the number of this step, from 1, where the device does not count
    scale: float = 1.0
    max_norm: float = 0.0  # 0: no clipping


class Scalars:
    """The scalars of a step, in device memory. Who writes them and steps that read them must be ordered."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.zeros(ctypes.sizeof(_CScalars) // 8, dtype=torch.float64, device=device)
        self.device = self.memory.device

    def set(self, hyper: Hyper) -> None:
        """Of the host's numbers. On the current stream."""
        given = _CScalars(*(float(getattr(hyper, name)) for name in _DOUBLES))
        given.nesterov, given.first = int(hyper.nesterov), int(hyper.first)
        if library.observed():
            library.tell("distlib_cuda_step_scalars", [], [extent(self.memory)])
        library.call("distlib_cuda_step_scalars", self.memory.data_ptr(), ctypes.byref(given), stream_of(self.device))

    def prepare(
        self,
        recipe: Recipe,
        *,
        lr: torch.Tensor | None = None,
        squares: torch.Tensor | None = None,
        loss_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
        steps: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
    ) -> None:
        """Of numbers that the device has when the stream gets there. All are one element on its device; fp32, but for
        squares and norm, which are fp64.

        lr: instead of the recipe's. squares: the sum of the squares of all gradients, for max_norm. loss_scale:
        gradients are divided by it. found_inf: not 0 skips the step. steps: those taken; counted up, unless this one is
        skipped. norm: becomes the norm of the scaled gradients, before clipping.
        """
        if recipe.max_norm and squares is None:
            raise ValueError(f"max_norm={recipe.max_norm} needs squares: the sum of the squares of all gradients")
        if norm is not None and squares is None:
            raise ValueError("norm is made of squares: the sum of the squares of all gradients is needed")
        single = {"lr": lr, "loss_scale": loss_scale, "found_inf": found_inf, "steps": steps}
        for name, tensor in single.items():
            require_scalar(name, tensor, torch.float32, self.device)
        for name, tensor in (("squares", squares), ("norm", norm)):
            require_scalar(name, tensor, torch.float64, self.device)
        if library.observed():
            reads = [extent(t) for t in (lr, squares, loss_scale, found_inf) if t is not None]
            writes = [extent(t) for t in (self.memory, steps, norm) if t is not None]
            library.tell("distlib_cuda_step_prepare", reads, writes)
        given = _CPrepare(RULES[recipe.rule])
        for name, value in vars(recipe).items():
            if name != "rule":
                setattr(given, name, int(value) if isinstance(value, bool) else float(value))
        given.device_lr, given.squares, given.loss_scale = address(lr), address(squares), address(loss_scale)
        given.found_inf, given.device_step, given.norm = address(found_inf), address(steps), address(norm)
        library.call("distlib_cuda_step_prepare", self.memory.data_ptr(), ctypes.byref(given), stream_of(self.device))

    def read(self) -> dict[str, float]:
        """What they are; waits for the device."""
        taken = _CScalars.from_buffer_copy(self.memory.cpu().numpy().tobytes())
        return {name: getattr(taken, name) for name in _DOUBLES + _FLAGS}


class DeviceTable:
    """Segments that are stepped alike, in device memory. It keeps no tensor alive: they must be, while it is used.

    rows: of each segment the addresses of parameter, gradient, m, v and copy (0: none), and its elements; a tensor of
    (rows, 6) int64 or the like. param: fp32, with gradients of fp32, bf16 or fp16 and a copy of None, bf16 or fp16; or
    fp64 with fp64 gradients and no copy; or bf16 with a copy of int16, for AdamW alone: copies are remainders, which
    make fp32 masters with the parameters (see `split_master`). Raises ValueError for other dtypes and for rows of which
    some have an m, v or copy and some not.
    """

    def __init__(
        self,
        rows: torch.Tensor | Sequence[Sequence[int]],
        device: torch.device,
        param: torch.dtype,
        grad: torch.dtype,
        copy: torch.dtype | None = None,
        chunk: int = CHUNK,
    ) -> None:
        halves = param is torch.bfloat16 and copy is torch.int16 and grad in _GRADS
        single = param is torch.float32 and grad in _GRADS and copy in (None, torch.bfloat16, torch.float16)
        if not (halves or single or (param is torch.float64 and grad is torch.float64 and copy is None)):
            raise ValueError(
                f"parameters of {param} with gradients of {grad} and copies of {copy}: there are fp32 with fp32, bf16 "
                "or fp16 gradients and no, bf16 or fp16 copies; fp64 with fp64; bf16 with remainders (int16)"
            )
        words = np.asarray(rows, dtype=np.int64).reshape(-1, 6)
        words = words[words[:, 5] > 0]
        self.has_m, self.has_v, has_copy = (_all_or_none(words[:, i], name) for i, name in _OPTIONAL)
        if len(words) and has_copy != (copy is not None):
            raise ValueError(f"copies are of {copy}, but rows have {'addresses' if has_copy else 'none'} of copies")
        device = exact(device)
        self.device, self.param, self.grad, self.copy = device, param, grad, copy
        self.chunk = chunk
        self._words = words
        first_chunk, chunk_rows = cut(words[:, 5], chunk)
        self.chunks = len(chunk_rows)
        self.elements = int(words[:, 5].sum())
        self._rows = upload(np.column_stack([words, first_chunk, np.zeros_like(first_chunk)]), device)
        self._chunk_rows = upload(chunk_rows, device)
        self.scalars = Scalars(device)  # for `step_tables`

    def step(self, rule: str, scalars: Scalars) -> None:
        """One step of all rows, on the current stream. ValueError where the rule needs other state than rows have."""
        if not self.chunks:
            return
        wanted = (rule != "SGD" or self.has_m, rule == "ADAMW")
        if (self.has_m, self.has_v) != wanted or (self.param is torch.bfloat16 and rule != "ADAMW"):
            raise ValueError(
                f"{rule} on rows of {self.param} {'with' if self.has_m else 'without'} m and "
                f"{'with' if self.has_v else 'without'} v: ADAMW has both, LION m, SGD m where momentum is not 0; "
                "remainders are for ADAMW"
            )
        if library.observed():
            library.tell("distlib_cuda_step", [*self._extents(1), extent(scalars.memory)], self._extents(0, 2, 3, 4))
        library.call(
            "distlib_cuda_step",
            self._rows.data_ptr(),
            self._chunk_rows.data_ptr(),
            self.chunks,
            self.chunk,
            RULES[rule],
            CODES[self.param],
            CODES[self.grad],
            CODES.get(self.copy, 0),  # no copy is 0, as fp32 would be; remainders have no code
            int(self.has_m),
            scalars.memory.data_ptr(),
            stream_of(self.device),
        )

    def _extents(self, *columns: int) -> list[library.Extent]:
        wide = max(self.param.itemsize, 4)
        sizes = (self.param.itemsize, self.grad.itemsize, wide, wide, 2)
        return [(int(row[i]), int(row[5]) * sizes[i]) for i in columns for row in self._words if row[i]]


_OPTIONAL = ((2, "m"), (3, "v"), (4, "copy"))


def _all_or_none(addresses: np.ndarray, name: str) -> bool:
    present = addresses != 0
    if len(present) and present.any() != present.all():
        raise ValueError(f"row {int(np.argmin(present))} has no {name}, others of its table have: use a table for each")
    return bool(present.any())


def step_tables(batches: Sequence[tuple[Hyper, DeviceTable]]) -> None:
    """One step of all tables, of the host's scalars. Every tensor behind them must live. On the current stream."""
    for hyper, table in batches:
        _check_momentum(hyper, table)
        table.scalars.set(hyper)
        table.step(hyper.rule, table.scalars)


def _check_momentum(hyper: Hyper, table: DeviceTable) -> None:
    if hyper.rule == "SGD" and table.chunks and table.has_m != (hyper.momentum != 0):
        raise ValueError(f"momentum={hyper.momentum}, but rows {'have' if table.has_m else 'have no'} momentum buffers")


# ---------------------------------------------------------------- masters of two halves


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An fp32 tensor as (bf16 parameter, int16 remainder), which together are its bits.

    The parameter is the master rounded to nearest, ties away from zero: bits = (parameter's bits << 16) + remainder.
    """
    bits = master.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    high, low = ((bits + 0x8000) >> 16) & 0xFFFF, bits & 0xFFFF
    return _as_int16(high).view(torch.bfloat16), _as_int16(low)


def join_master(param: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 parameter and its int16 remainder."""
    high = param.contiguous().view(torch.int16).long() & 0xFFFF
    bits = ((high << 16) + remainder.long()) & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _as_int16(bits: torch.Tensor) -> torch.Tensor:
    return torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16)


# ---------------------------------------------------------------- plain versions


def prepare_plainly(
    recipe: Recipe,
    *,
    lr: float | None = None,
    squares: float | None = None,
    loss_scale: float = 1.0,
    found_inf: float = 0.0,
    steps: float | None = None,
) -> dict[str, float]:
    """What `Scalars.prepare` writes, by name, in Python's fp64; and `steps` and `norm` where they are given."""
    r = recipe
    result: dict[str, Any] = {name: 0.0 for name in _DOUBLES + _FLAGS}
    scale = r.scale * (1.0 / loss_scale)
    if squares is not None:
        result["norm"] = norm = math.sqrt(squares) * scale
        if r.max_norm:
            factor = r.max_norm / (norm + 1e-6)
            scale *= 1.0 if factor > 1 else factor
    step = r.step
    if steps is not None:
        step = steps + 1
        result["steps"] = steps if found_inf else step
    rate = r.lr if lr is None else lr
    result |= {"scale": -scale if r.maximize else scale, "rate": rate, "decay": 1.0, "root_scale": 1.0}
    result |= {"beta1": r.beta1, "beta2": r.beta2, "eps": r.eps, "skip": int(found_inf != 0)}
    if r.rule == "ADAMW":
        result |= {"rate": rate / (1 - r.beta1**step), "decay": 1 - rate * r.weight_decay}
        result["root_scale"] = (1 - r.beta2**step) ** -0.5
    else:
        result |= {"l2": r.weight_decay, "momentum": r.momentum, "dampening": r.dampening}
        result |= {"nesterov": int(r.nesterov), "first": int(step == 1)}
    return result


def step_plainly(
    hyper: Hyper,
    param: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> None:
    """One step with torch's operators, each rounded by itself, in the order of csrc/cpu/optimizers.hpp: the same bits,
    but for those of NaNs and for roots in fp64. copy: of int16 beside a bf16 parameter, its remainders."""
    halves = copy is not None and copy.dtype is torch.int16
    p = join_master(param, copy) if halves else param
    h, g = hyper, grad.to(p.dtype) * hyper.scale
    if h.l2 != 0 and h.rule != "LION":
        g = g + h.l2 * p
    if h.rule == "ADAMW":
        assert m is not None and v is not None
        p = h.decay * p
        m.copy_(_towards(m, g, h.beta1))
        v.copy_(h.beta2 * v + ((1 - h.beta2) * g) * g)
        p = p - (h.rate * m) / (_root(v) * h.root_scale + h.eps)
    elif h.rule == "SGD":
        if m is not None:
            m.copy_(g if h.first else h.momentum * m + (1 - h.dampening) * g)
            g = g + h.momentum * m if h.nesterov else m
        p = p - h.rate * g
    else:
        assert m is not None
        between = _towards(m, g, h.beta1)
        way = torch.where(between.isnan(), between, between.sign())
        p = p - h.rate * (way + h.l2 * p)
        m.copy_(_towards(m, g, h.beta2))
    if halves:
        assert copy is not None
        high, low = split_master(p)
        param.copy_(high)
        copy.copy_(low)
        return
    param.copy_(p)
    if copy is not None:
        copy.copy_(p.reshape(copy.shape))


def _root(values: torch.Tensor) -> torch.Tensor:
    """Rounded as IEEE has it, which torch's own is not everywhere: of fp32, by way of fp64."""
    return values.double().sqrt().to(values.dtype)


def _towards(start: torch.Tensor, end: torch.Tensor, rest: float) -> torch.Tensor:
    """start + (1 - rest) (end - start), as the core computes it."""
    way = end - start
    weight = torch.tensor(1 - rest, dtype=start.dtype)
    return start + (1 - rest) * way if weight < 0.5 else end - rest * way

"""One optimizer step on lists of segments: in the C++ core, or with torch where there is none.

A segment is a run of elements: of a parameter, its gradient, its state (m, v) and its compute copy, each contiguous.
Segments whose memory follows each other in every one of these are one segment to the core:

    parameters   | a       | b     |  c  | d |        a, b: neighbours everywhere       -> one row
    gradients    | a       | b     | c   |            c: its parameter lies elsewhere   -> a row
    exp_avg      | a       | b     | c   |            d: has no gradient                -> not stepped
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from distlib import native
from distlib.cuda import library
from distlib.cuda.step import Hyper
from distlib.cuda.step import step_plainly as step_halves_plainly
from distlib.optim import device_norm
from distlib.optim.memory import state_dtype

COPY_CODES = {torch.bfloat16: 1, torch.float16: 2, torch.int16: 3}
COPIES = (torch.bfloat16, torch.float16)  # what a step's pass rounds to
_SQUARED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Segment(NamedTuple):
    """Tensors of equal shape; m, v and copy where the rule or the parameter has them."""

    param: torch.Tensor
    grad: torch.Tensor
    m: torch.Tensor | None = None
    v: torch.Tensor | None = None
    copy: torch.Tensor | None = None


class Kind(NamedTuple):
    """What segments must share to be stepped by one kernel. copy: 0 none, 1 bf16, 2 fp16, 3 a remainder (int16)."""

    param: torch.dtype
    grad: torch.dtype
    copy: int


class Row(NamedTuple):
    """A segment as addresses (0: none) and a number of elements."""

    param: int
    grad: int
    m: int
    v: int
    copy: int
    elements: int


@dataclass
class Table:
    """Rows in memory, as the core reads them."""

    kind: Kind
    words: torch.Tensor  # (rows, 6) int64

    @staticmethod
    def of(kind: Kind, rows: Iterable[Row]) -> Table:
        """Neighbours merged."""
        words = torch.tensor(merged(kind, rows), dtype=torch.int64).reshape(-1, 6)
        return Table(kind, words)


def merged(kind: Kind, rows: Iterable[Row]) -> list[Row]:
    """Rows in order; those that continue the one before, in all of their memory, are joined to it. Pure."""
    size, grad_size, copy_size = kind.param.itemsize, kind.grad.itemsize, 2
    state_size = state_dtype("", kind.param).itemsize
    found: list[Row] = []
    for row in rows:
        if row.elements == 0:
            continue
        if found:
            last = found[-1]
            n = last.elements
            if (
                row.param == last.param + n * size
                and row.grad == last.grad + n * grad_size
                and row.m == (last.m + n * state_size if last.m else 0)
                and row.v == (last.v + n * state_size if last.v else 0)
                and row.copy == (last.copy + n * copy_size if last.copy else 0)
            ):
                found[-1] = last._replace(elements=n + row.elements)
                continue
        found.append(row)
    return found


def kind_of(segment: Segment) -> Kind:
    """The Kind of a segment that the core can step."""
    copy = 0 if segment.copy is None else COPY_CODES[segment.copy.dtype]
    return Kind(segment.param.dtype, segment.grad.dtype, copy)


def row_of(segment: Segment) -> Row:
    """The addresses of a segment of contiguous tensors."""
    p, g, m, v, c = segment
    return Row(
        p.data_ptr(),
        g.data_ptr(),
        0 if m is None else m.data_ptr(),
        0 if v is None else v.data_ptr(),
        0 if c is None else c.data_ptr(),
        p.numel(),
    )


def step_tables(batches: Sequence[tuple[Hyper, Table]]) -> None:
    """One step of all tables in the core, by torch.get_num_threads() threads. Every tensor behind them must live."""
    core = native.core()
    given = []
    for hyper, table in batches:
        if not len(table.words):
            continue
        dtypes = native.dtype_codes(table.kind.param)[0], native.dtype_codes(table.kind.grad)[0]
        given.append((_core_hyper(core, hyper), *dtypes, table.kind.copy, table.words.data_ptr(), len(table.words)))
    if given:
        core.optimizer_update(given, torch.get_num_threads())


def step_segments(batches: Iterable[tuple[Hyper, Segment]]) -> None:
    """One step of segments of contiguous tensors, in the core where there is one, else with torch."""
    if native.core() is None:
        for hyper, segment in batches:
            step_plainly(hyper, segment)
        return
    tables: dict[tuple[Hyper, Kind], list[Row]] = {}
    for hyper, segment in batches:
        tables.setdefault((hyper, kind_of(segment)), []).append(row_of(segment))
    step_tables([(hyper, Table.of(kind, rows)) for (hyper, kind), rows in tables.items()])


def step_plainly(hyper: Hyper, segment: Segment) -> None:
    """The formulas of csrc/cpu/optimizers.hpp with torch's operators: the core's oracle, and its stand-in.

    Equal to the core to 1e-6, not bit for bit: torch may fuse a multiplication with an addition. Any strides.
    """
    h = hyper
    p, g, m, v, copy = segment
    if copy is not None and copy.dtype is torch.int16:
        step_halves_plainly(h, p, g, m, v, copy)
        return
    g = g.to(p.dtype) * h.scale
    if h.l2 != 0 and h.rule != "LION":
        g = g + h.l2 * p
    if h.rule == "ADAMW":
        assert m is not None and v is not None
        p.mul_(h.decay)
        m.lerp_(g, 1 - h.beta1)
        v.mul_(h.beta2).addcmul_(g, g, value=1 - h.beta2)
        p.addcdiv_(m, v.sqrt().mul_(h.root_scale).add_(h.eps), value=-h.rate)
    elif h.rule == "SGD":
        if m is not None:
            if h.first:
                m.copy_(g)
            else:
                m.mul_(h.momentum).add_(g, alpha=1 - h.dampening)
            g = g + h.momentum * m if h.nesterov else m
        p.add_(g, alpha=-h.rate)
    else:
        assert m is not None
        between = torch.lerp(m, g, 1 - h.beta1)
        way = torch.where(between.isnan(), between, between.sign())
        p.sub_(h.rate * (way + h.l2 * p))
        m.lerp_(g, 1 - h.beta2)
    if copy is not None:
        copy.copy_(p.reshape(copy.shape))


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements: 0-dim, fp64, on the tensors' device.

    Its bits do not depend on the number of threads.
    Tensors of any floating dtype and layout, at least one; those that are not contiguous are copied. In the core the
    bits depend only on the elements and their order.
    """
    core = native.core()
    if core is None or not tensors[0].is_cpu:
        return device_norm.sum_of_squares(tensors)
    runs: list[tuple[torch.dtype, list[tuple[int, int]]]] = []
    alive = []
    for tensor in tensors:
        given = tensor if tensor.dtype in _SQUARED else tensor.double()
        given = given if given.is_contiguous() else given.contiguous()
        alive.append(given)
        if not runs or runs[-1][0] is not given.dtype:
            runs.append((given.dtype, []))
        runs[-1][1].append((given.data_ptr(), given.numel()))
    words = [torch.tensor(pairs, dtype=torch.int64) for _, pairs in runs]
    squares = [(native.dtype_codes(dtype)[0], w.data_ptr(), len(w)) for (dtype, _), w in zip(runs, words, strict=True)]
    return torch.tensor(core.sum_of_squares(squares, torch.get_num_threads()), dtype=torch.float64)


def _core_hyper(core: Any, hyper: Hyper) -> Any:
    fields = {**vars(hyper), "rule": getattr(core.Rule, hyper.rule)}
    return core.Hyper(**fields)


@lru_cache(maxsize=2)
def warn_once(on_cpu: bool) -> None:
    """Says that steps go through torch, if they do."""
    if not on_cpu:
        warnings.warn(
            f"distlib's CUDA kernels are not in use: {library.why_not()}. distlib.optim steps with torch's operators: "
            "the same results to 1e-6, but slower, and the host waits for the GPU. `distlib doctor` says more",
            stacklevel=3,
        )
    elif native.core() is None:
        warnings.warn(
            f"distlib's C++ core is not in use: {native.why_not()}. distlib.optim steps with torch's operators: the "
            "same results to 1e-6, but slower. `distlib doctor` says more",
            stacklevel=3,
        )

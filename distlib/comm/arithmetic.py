"""Sums in rank order: in the core where it is there, in torch where it is not. The same bits either way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distlib import native

_TORCH = {
    "sum": torch.add,
    "avg": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "product": torch.mul,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
_TORCH_BOOL = {
    "sum": torch.logical_or,
    "product": torch.logical_and,
    "min": torch.logical_and,
    "max": torch.logical_or,
    "band": torch.logical_and,
    "bor": torch.logical_or,
    "bxor": torch.logical_xor,
}


def reduce_in_order(out: torch.Tensor, sources: Sequence[torch.Tensor], op: str, divisor: int) -> None:
    """out = sources[0] op sources[1] op ..., half types in fp32 and rounded once; "avg" divides the sum by `divisor`.

    All contiguous, of one dtype and size; `out` may be one of the sources.
    """
    core = native.core()
    dtype = native.dtype_codes(out.dtype)[0]
    if core is not None and dtype is not None:
        pointers = [s.data_ptr() for s in sources]
        core.reduce([out.data_ptr()], pointers, out.numel(), dtype, native.OPS.index(op), divisor)
        return
    out.copy_(reduce_by_torch(sources, op, divisor).view_as(out))


def reduce_by_torch(sources: Sequence[torch.Tensor], op: str, divisor: int) -> torch.Tensor:
    """The plain version, and the oracle that the core's kernels are compared with."""
    dtype = sources[0].dtype
    combine = (_TORCH_BOOL if dtype is torch.bool else _TORCH)[op]
    half = dtype in (torch.float16, torch.bfloat16)
    total = sources[0].float() if half else sources[0].clone()
    for source in sources[1:]:
        total = combine(total, source.float() if half else source)
    if op == "avg":
        total = total / divisor if dtype.is_floating_point else torch.div(total, divisor, rounding_mode="trunc")
    return total.to(dtype)

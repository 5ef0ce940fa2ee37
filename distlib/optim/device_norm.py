"""Sums of squares of tensors on a GPU, whose tables are kept from step to step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from distlib import streams
from distlib.cuda import library
from distlib.cuda.squares import SquareTable
from distlib.cuda.tables import CODES

_KEPT = 64  # tables: parameter groups of a few models

_tables: OrderedDict[tuple[object, ...], SquareTable] = OrderedDict()


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements: 0-dim, fp64, on their device, at least one tensor.

    With kernels it has the bits of the CPU core's, in one pass over memory.
    """
    device = tensors[0].device
    out = torch.zeros((), dtype=torch.float64, device=device)
    if not library.serves(device):
        for t in tensors:
            out = out + torch.linalg.vector_norm(t, dtype=torch.float64) ** 2
        return out
    given = [t if t.dtype in CODES else t.double() for t in tensors]
    given = [t if t.is_contiguous() else t.contiguous() for t in given]
    # A table's launches are to be ordered, so each stream has its own.
    stream = streams.raw(streams.current(device))
    key = (device, stream, len(given), given[0].data_ptr(), given[-1].data_ptr())
    table = _tables.pop(key, None)
    if table is None or not table.matches(given):
        table = SquareTable(given, device)
    _tables[key] = table
    if len(_tables) > _KEPT:
        _tables.popitem(last=False)
    table.sum(out)
    return out

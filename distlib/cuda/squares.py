"""Sums of squares over many tensors on a device: in fp64, to the bit of the CPU core's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distlib.cuda import library
from distlib.cuda.tables import CODES, address, exact, extent, require_dense, require_scalar, stream_of, upload

BLOCK = 16384  # elements whose squares add up before they meet the others: csrc/cpu/optimizers.cpp's


class SquareTable:
    """Where tensors lie, uploaded once. It keeps none alive: they must be, while it is used.

    tensors: contiguous, of fp32, fp64, fp16 or bf16 (they may differ), on `device`. Launches of one table must be
    ordered: they share scratch memory. Raises ValueError for others.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        device = exact(device)
        require_dense("tensor", tensors)
        for index, tensor in enumerate(tensors):
            if tensor.dtype not in CODES or tensor.device != device:
                raise ValueError(
                    f"tensor {index} is {tensor.dtype} on {tensor.device}: only fp32, fp64, fp16 and bf16 on {device} "
                    "are squared here"
                )
        self.device = device
        self._extents = [extent(t) for t in tensors]
        self._signature = _signature(tensors)
        counts = np.asarray([t.numel() for t in tensors if t.numel()], dtype=np.int64)
        ends = np.cumsum(counts)
        self.elements = int(counts.sum())
        rows = [
            (t.data_ptr(), count, end - count, CODES[t.dtype])
            for t, count, end in zip((t for t in tensors if t.numel()), counts, ends, strict=True)
        ]
        blocks = np.arange(0, self.elements, BLOCK)
        self._rows = upload(np.asarray(rows, dtype=np.int64).reshape(-1, 4), device)
        self._block_rows = upload(np.searchsorted(ends, blocks, side="right").astype(np.int32), device)
        self._scratch = torch.zeros(1 + len(blocks), dtype=torch.float64, device=device)

    def matches(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the table is still that of these tensors: addresses, sizes, dtypes."""
        return self._signature == _signature(tensors)

    def sum(self, out: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        """out (one fp64 element) = the sum of the squares of all elements. On the current stream.

        The bits depend on the elements and their order alone. found_inf: one fp32 element; becomes 1 if the sum is
        infinite or NaN, which for all but fp64 tensors means that an element is; else stays.
        """
        require_scalar("out", out, torch.float64, self.device)
        require_scalar("found_inf", found_inf, torch.float32, self.device)
        if library.observed():
            written = [extent(t) for t in (out, found_inf) if t is not None]
            library.tell("distlib_cuda_sum_of_squares", self._extents, written)
        library.call(
            "distlib_cuda_sum_of_squares",
            self._rows.data_ptr(),
            self._block_rows.data_ptr(),
            self.elements,
            self._scratch.data_ptr(),
            out.data_ptr(),
            address(found_inf),
            stream_of(self.device),
        )


def sum_plainly(tensors: Sequence[torch.Tensor]) -> float:
    """`SquareTable.sum` with torch's operators; added up in another order."""
    return sum(float(t.double().square().sum()) for t in tensors)


def _signature(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int, torch.dtype]]:
    return [(t.data_ptr(), t.numel(), t.dtype) for t in tensors]

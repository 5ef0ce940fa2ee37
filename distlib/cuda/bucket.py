"""Many tensors into one flat buffer, or out of it, in one launch: cast, scaled, searched for infinities, squared.

A table of addresses is made and uploaded once, and used for as long as no address changes:

    tensors   | a: fp32 |   | b: fp32     |  | c |          pack:    flat = (dtype of flat) scale * tensors
    flat      | a: bf16 | b: bf16 | c |                     unpack:  tensors = (their dtype) scale * flat
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from distlib.cuda import library
from distlib.cuda.tables import (
    BYTES,
    CODES,
    address,
    cut,
    extent,
    require_dense,
    require_same,
    require_scalar,
    stream_of,
    upload,
)

_HALF = (torch.float16, torch.bfloat16)
CHUNK = 16384  # elements that one block of threads moves


class PackTable:
    """Where tensors lie, and where in `flat`. It keeps no tensor alive: they must be, while it is used.

    tensors: contiguous, of one dtype, on one device. flat: 1-D, contiguous, on that device; of the same dtype, or fp32
    where they are fp16 or bf16, or the other way round. offsets: where in `flat` each of them begins, in elements; one
    after the other by default. Launches of one table must be ordered: they share scratch memory. chunk: elements per
    block of threads. Raises ValueError for tensors that do not fit or that overlap in `flat`.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        flat: torch.Tensor,
        offsets: Sequence[int] | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.device = flat.device
        counts = [t.numel() for t in tensors]
        places = _places(counts, flat, offsets)
        dtype = require_same("tensor", tensors, flat.device) if tensors else flat.dtype
        require_dense("tensor", tensors)
        if dtype is not flat.dtype and not (
            (dtype is torch.float32 and flat.dtype in _HALF) or (flat.dtype is torch.float32 and dtype in _HALF)
        ):
            raise ValueError(f"tensors of {dtype} and a buffer of {flat.dtype}: equal ones, or fp32 with fp16 or bf16")
        self._codes = CODES.get(dtype, BYTES), CODES.get(flat.dtype, BYTES)
        self._signature = _signature(tensors, flat)
        size = dtype.itemsize if self._codes[0] == BYTES else 1  # elements that are only moved are that many bytes
        self._chunk = chunk * size
        at = [t.data_ptr() for t in tensors]
        rows = [
            (a, flat.data_ptr() + place * flat.dtype.itemsize, count * size)
            for a, place, count in zip(at, places, counts, strict=True)
            if count
        ]
        self._extents = (
            [(a, count * (dtype.itemsize // size)) for a, _, count in rows],
            [(f, count * (flat.dtype.itemsize // size)) for _, f, count in rows],
        )
        first_chunk, chunk_rows = cut([count for _, _, count in rows], self._chunk)
        self._chunks = len(chunk_rows)
        words = np.asarray(rows, dtype=np.int64).reshape(-1, 3)
        forth = np.column_stack([words, first_chunk])
        back = forth[:, [1, 0, 2, 3]]
        self._rows = upload(np.stack([forth, back]), self.device)
        self._chunk_rows = upload(chunk_rows, self.device)
        self._scratch = torch.zeros(1 + self._chunks, dtype=torch.float64, device=self.device)

    def matches(self, tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> bool:
        """Whether the table is still that of these tensors: addresses, sizes, dtypes."""
        return self._signature == _signature(tensors, flat)

    def pack(
        self,
        scale: float = 1.0,
        device_scale: torch.Tensor | None = None,
        squares: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """flat = tensors, in its dtype, times scale * device_scale (one fp32 element). Ordered on the current stream.

        squares: one fp64 element; becomes the sum of the squares of the values as they are stored. found_inf: one fp32
        element; becomes 1 if one of them is infinite or NaN, else stays. With neither and no scale, values of equal
        dtypes are moved bit for bit; otherwise a NaN is stored as the positive quiet one. Elements of `flat` between
        tensors are left as they are.
        """
        self._run(0, scale, device_scale, squares, found_inf)

    def unpack(
        self,
        scale: float = 1.0,
        device_scale: torch.Tensor | None = None,
        squares: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """tensors = flat, in their dtype, scaled; everything as in `pack`."""
        self._run(1, scale, device_scale, squares, found_inf)

    def _run(
        self,
        way: int,
        scale: float,
        device_scale: torch.Tensor | None,
        squares: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        require_scalar("device_scale", device_scale, torch.float32, self.device)
        require_scalar("squares", squares, torch.float64, self.device)
        require_scalar("found_inf", found_inf, torch.float32, self.device)
        if BYTES in self._codes and (scale != 1 or (device_scale, squares, found_inf) != (None, None, None)):
            raise ValueError("only tensors of fp32, fp64, fp16 and bf16 can be scaled or squared; others are moved")
        if library.observed():
            reads, writes = self._extents if way == 0 else self._extents[::-1]
            given, found = (
                [extent(t) for t in pair if t is not None] for pair in ((device_scale,), (squares, found_inf))
            )
            library.tell("distlib_cuda_pack", [*reads, *given], [*writes, *found])
        from_code, to_code = self._codes if way == 0 else self._codes[::-1]
        library.call(
            "distlib_cuda_pack",
            self._rows[way].data_ptr(),
            self._chunk_rows.data_ptr(),
            self._chunks,
            self._chunk,
            from_code,
            to_code,
            float(scale),
            address(device_scale),
            self._scratch.data_ptr(),
            address(squares),
            address(found_inf),
            stream_of(self.device),
        )


def pack_plainly(
    tensors: Sequence[torch.Tensor],
    flat: torch.Tensor,
    offsets: Sequence[int] | None = None,
    scale: float = 1.0,
    device_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`PackTable.pack` with torch's operators. Returns (squares, found_inf), of the values as they are stored."""
    return _convert(tensors, _slices(tensors, flat, offsets), scale, device_scale)


def unpack_plainly(
    tensors: Sequence[torch.Tensor],
    flat: torch.Tensor,
    offsets: Sequence[int] | None = None,
    scale: float = 1.0,
    device_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`PackTable.unpack` with torch's operators, as `pack_plainly`."""
    return _convert(_slices(tensors, flat, offsets), tensors, scale, device_scale)


def _slices(tensors: Sequence[torch.Tensor], flat: torch.Tensor, offsets: Sequence[int] | None) -> list[torch.Tensor]:
    """Each tensor's place in the buffer."""
    places = _places([t.numel() for t in tensors], flat, offsets)
    return [flat[place : place + t.numel()] for place, t in zip(places, tensors, strict=True)]


def _convert(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], scale: float, device_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    device = sources[0].device if sources else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    found = torch.zeros((), dtype=torch.float32, device=device)
    for source, target in zip(sources, targets, strict=True):
        values = source
        if scale != 1 or device_scale is not None:
            factor = torch.tensor(float(scale), dtype=torch.float64, device=device)
            if device_scale is not None:
                factor = factor * device_scale.reshape(()).double()
            wide = torch.float64 if source.dtype is torch.float64 else torch.float32
            values = source.to(wide) * factor.to(wide)
        target.copy_(values.reshape(target.shape))
        if target.is_floating_point():
            squares += target.double().square().sum()
            found = torch.maximum(found, (~target.isfinite().all()).float())
    return squares, found


def _places(counts: Sequence[int], flat: torch.Tensor, offsets: Sequence[int] | None) -> list[int]:
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(f"the buffer of shape {tuple(flat.shape)} and strides {flat.stride()} is not 1-D, contiguous")
    places = [0, *itertools.accumulate(counts)][: len(counts)] if offsets is None else list(offsets)
    if len(places) != len(counts):
        raise ValueError(f"{len(counts)} tensors and {len(places)} offsets: one for each needed")
    end = 0
    for place, index in sorted((place, index) for index, place in enumerate(places) if counts[index]):
        if place < end or place + counts[index] > flat.numel():
            raise ValueError(
                f"tensor {index} would lie at {place} to {place + counts[index]} of a buffer of {flat.numel()}, where "
                f"{end} elements are taken"
            )
        end = place + counts[index]
    return places


def _signature(tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> list[tuple[int, int, torch.dtype]]:
    return [(t.data_ptr(), t.numel(), t.dtype) for t in (flat, *tensors)]

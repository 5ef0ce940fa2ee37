"""What all tables of kernels have in common: codes of dtypes, rows cut into chunks, checks, the stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from distlib import streams
from distlib.cuda import library

# As csrc/cuda/elements.cuh numbers them. Other dtypes are only moved, as bytes.
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
BYTES = 7
CHUNK = 16384  # elements that one block of threads works on


def stream_of(device: torch.device) -> int:
    """The current stream of `device`, as kernels take it. ValueError for memory that kernels cannot reach, and where
    `device` is not the one that this thread launches on."""
    if device.type == "cpu":
        if not library.is_stand_in():
            raise ValueError("kernels of csrc/cuda cannot reach tensors on the CPU: use the function's plain version")
    elif device.index not in (None, torch.accelerator.current_device_index()):
        raise ValueError(
            f"tensors are on {device}, but this thread's current device has index "
            f"{torch.accelerator.current_device_index()}: call torch.accelerator.set_device_index({device.index}) in it"
        )
    return streams.raw(streams.current(device))


def exact(device: torch.device) -> torch.device:
    """`device` with its index, as tensors tell theirs."""
    return torch.empty(0, device=device).device


def cut(counts: Sequence[int], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """For rows of so many elements, each cut into chunks: (first chunk of each row, row of each chunk). Pure."""
    if chunk <= 0 or chunk % 16:
        raise ValueError(f"chunk={chunk}: must be a multiple of 16, above 0")
    elements = np.asarray(counts, dtype=np.int64)
    chunks = -(-elements // chunk)
    return np.cumsum(chunks) - chunks, np.repeat(np.arange(len(chunks), dtype=np.int32), chunks)


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of `array` on `device`, ordered on its current stream; the host does not wait for it."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a contiguous tensor lies, and its bytes."""
    return tensor.data_ptr(), tensor.nbytes


def address(tensor: torch.Tensor | None) -> int:
    """Where its elements begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def require_dense(what: str, tensors: Iterable[torch.Tensor]) -> None:
    """Raises ValueError naming the tensor that is not contiguous."""
    for index, tensor in enumerate(tensors):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{what} {index} of shape {tuple(tensor.shape)} has strides {tensor.stride()}: kernels need contiguous "
                "tensors; call contiguous()"
            )


def require_same(what: str, tensors: Sequence[torch.Tensor], device: torch.device) -> torch.dtype:
    """The dtype that all of them have. ValueError naming one that has another, or lies on another device."""
    dtype = tensors[0].dtype
    for index, tensor in enumerate(tensors):
        if tensor.dtype is not dtype or tensor.device != device:
            raise ValueError(
                f"{what} {index} is {tensor.dtype} on {tensor.device}; all of a table are of one dtype and on one "
                f"device, here {dtype} and {device}"
            )
    return dtype


def require_scalar(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless it is None or one element of `dtype` on `device`."""
    if tensor is not None and (tensor.numel() != 1 or tensor.dtype is not dtype or tensor.device != device):
        raise ValueError(
            f"{name} has {tensor.numel()} elements of {tensor.dtype} on {tensor.device}; one of {dtype} on {device} is "
            "needed"
        )

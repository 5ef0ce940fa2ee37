"""Tensors whose memory is a file: the system keeps of them in memory what it has room for."""

from __future__ import annotations

from pathlib import Path

import torch

from distlib.nameless import NamelessFile


def file_zeros(folder: Path, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D tensor of zeros in a new file under `folder`, which has no name: it goes with the tensor.

    Raises OSError, naming the folder, where there is no room for it.
    """
    nbytes = numel * dtype.itemsize
    if nbytes == 0:
        return torch.zeros(numel, dtype=dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = NamelessFile(folder, nbytes)
    except OSError as error:
        raise OSError(error.errno, f"offload: no {nbytes:,} bytes in {folder}: {error.strerror}") from error
    return torch.from_file(file.path, shared=True, size=numel, dtype=dtype)

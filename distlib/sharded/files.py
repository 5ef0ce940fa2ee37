"""Tensors whose memory is a file: the system keeps of them in memory what it has room for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


def file_zeros(folder: Path, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D tensor of zeros in a new file under `folder`, which has no name any more: it goes with the tensor.

    Raises OSError, naming the folder, where there is no room for it.
    """
    nbytes = numel * dtype.itemsize
    if nbytes == 0:
        return torch.zeros(numel, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".distlib-masters-", dir=folder)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)  # a full disk is an error here, not a signal later
        return torch.from_file(name, shared=True, size=numel, dtype=dtype)
    except OSError as error:
        raise OSError(error.errno, f"offload: no {nbytes:,} bytes in {folder}: {error.strerror}") from error
    finally:
        os.close(descriptor)
        os.unlink(name)

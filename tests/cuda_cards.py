"""The cards that tests of kernels run on: the emulated one, whose memory is the CPU's, and a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cuda_on_cpu import build

from distlib.cuda import library

CARDS = ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)]


@contextmanager
def a_card(name: str) -> Iterator[torch.device]:
    """The device to make tensors on; kernels run there meanwhile."""
    if name == "gpu":
        assert library.present(), library.why_not()
        yield torch.device("cuda", torch.cuda.current_device())
        return
    library.use(build.library())
    try:
        assert library.present(), library.why_not()
        yield torch.device("cpu")
    finally:
        library.use(None)

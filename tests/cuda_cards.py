"""The cards that tests of kernels run on: the emulated one, whose memory is the CPU's, and a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cuda_on_cpu import build

from distlib.cuda import library

CARDS = ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)]


def some(examples: int) -> int:
    """Of so many drawn examples those that are tried here. On a GPU a quarter: other tests take turns on it, and each
    look at a result then takes milliseconds."""
    return examples // 4 if torch.cuda.is_available() else examples


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

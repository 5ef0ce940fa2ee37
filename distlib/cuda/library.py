"""The one binding to csrc/cuda: `_cuda.so`, opened by ctypes, or why it cannot be used.

Integers go over as 64 bits, floats as doubles, as csrc/cuda/library.h says; so functions need no prototypes here.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

VERSION = 1  # of the interface, as distlib_cuda_version() tells it


class CudaError(RuntimeError):
    """A function of csrc/cuda failed. code: CUDA's."""

    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(f"{function} failed: {text} (CUDA error {code})")
        self.function = function
        self.code = code

    def __reduce__(self) -> Any:
        return _error_again, (self.args[0], self.function, self.code)


def _error_again(message: str, function: str, code: int) -> CudaError:
    error = CudaError(function, code, "")
    error.args = (message,)
    return error


_used: Path | None = None  # instead of distlib/_cuda.so


def use(path: Path | None) -> None:
    """From now on this process uses the library at `path`; None: its own again. For tests, before any state is made."""
    global _used
    _used = path
    _load.cache_clear()


def is_stand_in() -> bool:
    """Whether `use` put another library in the place of distlib's own: one whose device memory may be the host's."""
    return _used is not None


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    own = Path(__file__).parents[1] / "_cuda.so"
    path = _used or own
    if not path.exists():
        try:
            built = importlib.import_module("distlib._build_info").CUDA
        except ImportError:
            return None, "distlib is not installed here, only imported from its source folder"
        return None, built["why_not"] or f"it was built, but {own.name} is missing: install distlib again"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"it was built, but cannot be loaded: {error}"
    library.distlib_cuda_version.restype = ctypes.c_int64
    found = library.distlib_cuda_version()
    if found != VERSION:
        return None, f"{path.name} has interface {found}, this distlib needs {VERSION}: install distlib again"
    library.distlib_cuda_error_text.restype = ctypes.c_char_p
    library.distlib_cuda_error_text.argtypes = [ctypes.c_int64]
    return library, ""


Extent = tuple[int, int]  # an address, and bytes from there
Observer = Callable[[str, Sequence[Extent], Sequence[Extent]], None]
_observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """`observer` is told, before each launch, its name, what it reads and what it writes, on the current stream; None:
    nobody is. For tests that check how streams are ordered."""
    global _observer
    _observer = observer


def observed() -> bool:
    """Whether somebody wants to know."""
    return _observer is not None


def tell(name: str, reads: Sequence[Extent], writes: Sequence[Extent]) -> None:
    """What a launch is about to read and write, to who observes."""
    if _observer is not None:
        _observer(name, reads, writes)


def present() -> bool:
    """Whether the library can be called. It needs a GPU only where something is launched."""
    return _load()[0] is not None


def serves(device: torch.device) -> bool:
    """Whether the library works on memory of `device`."""
    return (device.type == "cuda" or (device.type != "cpu" and is_stand_in())) and present()


def why_not() -> str:
    """Why the library cannot be used, in one sentence; empty if it can."""
    return _load()[1]


def call(name: str, *arguments: Any) -> None:
    """Call a function that returns 0 or an error code. Arguments: integers and addresses, floats, ctypes' objects.

    Raises CudaError, or RuntimeError where there is no library.
    """
    library = _load()[0]
    if library is None:
        raise RuntimeError(f"{name}: the CUDA library cannot be used: {why_not()}")
    code = getattr(library, name)(*map(_as_c, arguments))
    if code:
        raise CudaError(name, code, library.distlib_cuda_error_text(code).decode())


def _as_c(value: Any) -> Any:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else value

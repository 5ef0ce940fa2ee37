"""The one binding to the C++ core: what it can do here, or why it cannot be used."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch

from distlib import settings

# dtype -> (how the core computes with it, or None: bytes to be moved; what messages call it). The order is the core's.
_DTYPES: dict[torch.dtype, tuple[int | None, int]] = {
    torch.float32: (0, 0),
    torch.float64: (1, 1),
    torch.float16: (2, 2),
    torch.bfloat16: (3, 3),
    torch.int8: (4, 4),
    torch.int32: (5, 5),
    torch.int64: (6, 6),
    torch.uint8: (7, 7),
    torch.bool: (8, 8),
    torch.int16: (9, 9),
    torch.complex64: (None, 10),
    torch.complex128: (None, 11),
}
BYTES = 7  # moved, not reduced
_OTHERS = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)} - _DTYPES.keys(), key=str)
_DTYPES.update((dtype, (None, code)) for code, dtype in enumerate(_OTHERS, len(_DTYPES)))  # only moved

OPS = ("sum", "avg", "min", "max", "product", "band", "bor", "bxor")
KINDS = (
    "barrier",
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "gather",
    "scatter",
    "all_to_all",
)
CODES = ("ok", "timeout", "dead", "mismatch", "aborted", "memory", "forked", "interrupted", "invalid")


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str]:
    if not settings.switch("DISTLIB_CORE", True):
        return None, "DISTLIB_CORE=0 is set"
    try:
        module = importlib.import_module("distlib._native")
    except ImportError as error:
        try:
            built = importlib.import_module("distlib._build_info").NATIVE
        except ImportError:
            return None, f"distlib is not installed here, only imported from its source folder ({error})"
        return None, built["why_not"] or f"it was built, but cannot be loaded: {error}"
    if module.simd_error():
        raise ValueError(module.simd_error())
    return module, ""


def core() -> Any:
    """The extension module, or None; then `why_not()` says why."""
    return _load()[0]


def why_not() -> str:
    """Why the core cannot be used, in one sentence; empty if it can."""
    return _load()[1]


def dtype_codes(dtype: torch.dtype) -> tuple[int | None, int]:
    """The core's codes of a dtype: (for arithmetic, or None; for messages)."""
    return _DTYPES[dtype]


def reducible(dtype: torch.dtype, op: str) -> bool:
    """Whether `op` is defined on `dtype`: bitwise operations on integers and bool only, no average of bool."""
    if dtype_codes(dtype)[0] is None:
        return False
    if op in ("band", "bor", "bxor"):
        return not dtype.is_floating_point
    return not (op == "avg" and dtype is torch.bool)


def require_reducible(what: str, dtype: torch.dtype, op: str) -> None:
    """Raises ValueError naming the operation, the dtype and what can be done instead."""
    if op not in OPS:
        raise ValueError(f"{what}: there is no op {op!r}; there are {', '.join(OPS)}")
    if reducible(dtype, op):
        return
    name = str(dtype).removeprefix("torch.")
    if dtype_codes(dtype)[0] is None:
        raise ValueError(f"{what}: dtype {name} cannot be reduced (cast to float32 first; complex: view_as_real)")
    kinds = "integers and bool" if op in ("band", "bor", "bxor") else "numbers"
    raise ValueError(f"{what}: op '{op}' is not defined on {name}, only on {kinds}")

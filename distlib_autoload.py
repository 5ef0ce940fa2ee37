"""Entry point `torch.backends`: `import torch` alone makes the c10d backend "distlib" known.

torch turns any exception here into a failed `import torch`, so everything that can go wrong is told as one
warning that names the fix, and never raised. It is a module of its own because the package `distlib` may have
been overwritten by its namesake (see distlib/_clash.py), and then this file is the only one left to say so.
"""

from __future__ import annotations

import sys
import warnings

DISTRIBUTION = "distlib-train"
FIX = (
    "Fix: `pip uninstall -y distlib`, then `pip install --force-reinstall --no-deps distlib-train`. "
    "If virtualenv or another tool needs the packaging library, give it a virtual environment of its own."
)


def register() -> None:
    """Called by torch at the end of `import torch`. Registers the backend, or warns why it cannot."""
    try:
        import distlib
    except Exception as error:  # noqa: BLE001 - told below; raising would break `import torch`
        _warn(f"{DISTRIBUTION} is installed but cannot be imported: {type(error).__name__}: {error}")
        return
    if getattr(distlib, "__distribution__", None) != DISTRIBUTION:
        where = getattr(distlib, "__file__", None) or list(distlib.__path__)  # no __init__.py: a namespace
        _warn(
            f"{DISTRIBUTION} is installed, but `import distlib` finds another package of that name at "
            f"{where} (virtualenv uses a packaging library called distlib). The c10d backend `distlib` is "
            f"not registered. {FIX}"
        )


def _warn(message: str) -> None:
    """A warning, on stderr where warnings are errors: that choice must not break `import torch` either."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        print(message, file=sys.stderr)

"""Libraries that distlib works with but does not need: imported when asked for, with one message where missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(library: str, extra: str) -> ModuleType:
    """The library's module. extra: that of distlib which installs it.

    Raises ImportError, with the command that installs it, if it is missing.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise  # it is there, and lacks something itself
        raise ImportError(f"{library} is not installed: pip install 'distlib-train[{extra}]'", name=library) from None

"""Finds the packaging library that also imports as `distlib`, and says how to get rid of the clash.

virtualenv depends on that library. Two distributions cannot share one import name in one folder: whichever
was installed last has overwritten files of the other, and both are broken.
"""

from __future__ import annotations

import os

DISTRIBUTION = "distlib-train"

# Modules of the packaging library; distlib-train has none of these names at its top level.
THEIR_FILES = ("database.py", "index.py", "locators.py", "markers.py", "metadata.py", "scripts.py")

FIX = (
    "Fix: `pip uninstall -y distlib`, then `pip install --force-reinstall --no-deps distlib-train`. "
    "If virtualenv or another tool needs the packaging library, give it a virtual environment of its own."
)


class ClashError(ImportError):
    """Two distributions own the import name `distlib` in one folder."""


def traces(package_folder: str) -> list[str]:
    """Paths of what the packaging library left in and beside `package_folder`; empty when it was never there.

    Looks for its modules inside the folder and for its `distlib-*.dist-info` (or `.egg-info`) beside it.
    """
    parent = os.path.dirname(os.path.abspath(package_folder))
    inside = [name for name in THEIR_FILES if os.path.exists(os.path.join(package_folder, name))]
    beside = [
        name
        for name in sorted(os.listdir(parent))
        if name.startswith("distlib-") and name.endswith((".dist-info", ".egg-info"))
    ]
    found = [os.path.join(package_folder, name) for name in inside]
    return found + [os.path.join(parent, name) for name in beside]


def check(package_folder: str) -> None:
    """Raises ClashError, naming what was found and the fix, if the packaging library is in that folder."""
    found = traces(package_folder)
    if found:
        raise ClashError(
            f"The packaging library `distlib` (virtualenv uses it) and {DISTRIBUTION} have the same import "
            f"name and are installed in one folder: found {', '.join(found)}. {FIX}"
        )

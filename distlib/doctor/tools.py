"""Other programs, asked for a moment: what they print, or nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def output_of(*command: str) -> str:
    """What a program prints; empty if it is not there, fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def find(name: str, *folders: str) -> str | None:
    """A program on PATH, else in one of `folders`."""
    return shutil.which(name) or next((path for f in folders if (path := shutil.which(name, path=f))), None)


def text_of(file: Path) -> str:
    """A small file of the kernel's; empty if it is not there, or not for this user."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""

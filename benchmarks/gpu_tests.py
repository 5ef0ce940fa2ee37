"""Which tests `make gpu` runs: those that are for a GPU, as far as this machine has the packages that they import."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tests", "examples", "benchmarks", ".")  # where tests find modules of this repository
MARK = re.compile(r"\bmark\.(gpu|card)\b")
MARKED = "gpu or card"
LIMIT = 60  # seconds of a test: one that hangs is not to take the time of all others
AT_ONCE = 4 if (os.cpu_count() or 1) >= 8 else 2  # starting processes takes longer than what they do on the GPU
# Has a stand-in, beside which the other tests of a file run.
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
WITH_STAND_IN = {"hypothesis": "tests over drawn values are skipped"}
# Plugins that pyproject.toml has options for; without one of them those options are refused by pytest.
PLUGINS = {"pytest_timeout": "no test has a time limit of its own"}
LENIENT = ("-o", "addopts=-ra", "-W", "ignore::pytest.PytestUnknownMarkWarning")


@dataclass(frozen=True)
class Selection:
    """Arguments for pytest; sentences about what is left out for want of a package; why nothing can run, or ""."""

    arguments: list[str]
    notes: list[str]
    why_not: str = ""
    path: tuple[str, ...] = ()  # folders where Python is to find stand-ins


def is_installed(package: str) -> bool:
    return package in sys.stdlib_module_names or importlib.util.find_spec(package) is not None


def select(root: Path = ROOT, installed: Callable[[str], bool] = is_installed) -> Selection:
    """Test files that mention the marker `gpu` or `card`, or whose helpers do; of these pytest runs what has it."""
    if not installed("pytest"):
        return Selection([], [], "pytest is missing: no test was run. `pip install pytest`")
    files, notes = [], []
    for path in sorted((root / "tests").glob("test_*.py")):
        read, missing = imports(path, root, installed)
        helpers = (file for file in read if file.parent == path.parent and not file.name.startswith("test_"))
        if not any(MARK.search(file.read_text()) for file in (path, *helpers)):
            continue
        missing = [package for package in missing if package not in WITH_STAND_IN]
        if missing:
            notes.append(f"tests/{path.name} is left out: {', '.join(missing)} not installed")
        else:
            files.append(f"tests/{path.name}")
    if not files:
        why = "; ".join(notes) or "no file in tests/ has tests marked gpu or card"
        return Selection([], notes, f"no test can run: {why}")
    absent = [plugin for plugin in PLUGINS if not installed(plugin)]
    replaced = [package for package in WITH_STAND_IN if not installed(package)]
    for package in (*absent, *replaced):
        notes.append(f"{package.replace('_', '-')} is not installed: {(PLUGINS | WITH_STAND_IN)[package]}")
    at_once = ("--numprocesses", str(AT_ONCE), "--dist", "load") if installed("xdist") else ()
    limits = () if "pytest_timeout" in absent else ("--timeout", str(LIMIT))
    arguments = ["-m", MARKED, *at_once, *limits, *(LENIENT if absent else ()), *files]
    return Selection(arguments, notes, path=(str(STAND_INS),) if replaced else ())


def imports(path: Path, root: Path, installed: Callable[[str], bool]) -> tuple[set[Path], list[str]]:
    """The files of this repository that are run when a test file is collected, and the packages that they lack."""
    missing: set[str] = set()
    seen: set[Path] = set()
    ahead = [path, root / "tests" / "conftest.py"]
    while ahead:
        file = ahead.pop()
        if file in seen or not file.exists():
            continue
        seen.add(file)
        for name in _imported(file):
            own = _files_of(name, root)
            if own:
                ahead += own
            elif (root / "tests" / name.split(".")[0]).is_dir():  # a folder of helpers without an __init__.py
                continue
            elif not installed(name.split(".")[0]):
                missing.add(name.split(".")[0])
    return seen, sorted(missing)


@cache
def _imported(file: Path) -> list[str]:
    """Names of modules imported at the top of a file: not within functions, nor for types only."""
    names = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@cache
def _files_of(name: str, root: Path) -> list[Path]:
    """The files of this repository that an import of `name` runs: its packages' and its own."""
    parts = name.split(".")
    for folder in FOLDERS:
        bases = [root / folder / Path(*parts[:depth]) for depth in range(1, len(parts) + 1)]
        files = [file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()]
        if files:
            return files
    return []


def command(selection: Selection) -> Sequence[str]:
    """pytest, which goes on where a file cannot be collected, and leaves nothing in the checkout."""
    options = ["-p", "gpu_outcomes", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *options, *selection.arguments]

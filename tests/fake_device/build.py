"""Compiles the fake device against the installed torch, once per set of sources, torch and compiler."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "src").iterdir())
TORCH = Path(torch.__file__).parent
ABI = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-pthread", ABI]
JOBS = 2


class CannotBuild(Exception):
    """Why there is no fake device here."""


def library() -> Path:
    """The compiled library; CannotBuild says what is missing. Processes that ask at once build it once."""
    compiler = _compiler()
    key = hashlib.sha256()
    for part in (*(p.read_bytes() for p in SOURCES), torch.__version__.encode(), *map(str.encode, (*compiler, *FLAGS))):
        key.update(hashlib.sha256(part).digest())
    folder = HERE.parent.parent / "build" / f"fake_device-{key.hexdigest()[:16]}"
    result = folder / "fake_device.so"
    if result.exists():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            _build(compiler, folder, result)
    return result


def why_not() -> str | None:
    """Why the library cannot be built here, or None. Builds it if it can."""
    try:
        library()
    except CannotBuild as error:
        return f"no fake device: {error}"
    return None


def _compiler() -> list[str]:
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"it is written for Linux, not {sys.platform}")
    for command in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(shlex.split(command)[0]):
            break
    else:
        raise CannotBuild("no C++ compiler on PATH; install g++")
    if not (TORCH / "include" / "torch" / "library.h").exists():
        raise CannotBuild(f"torch {torch.__version__} is installed without its headers")
    return shlex.split(command)


def _build(compiler: list[str], folder: Path, result: Path) -> None:
    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        _run([*compiler, *FLAGS, "-isystem", str(TORCH / "include"), "-c", str(source), "-o", target])
        return target

    # Those that include most of torch first, so that two jobs end together.
    quick = ("machine", "streams", "controls")
    sources = sorted((p for p in SOURCES if p.suffix == ".cpp"), key=lambda p: p.stem in quick)
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = folder / "partial.so"
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run([*compiler, "-shared", "-pthread", *objects, *libraries, "-o", str(partial)])
    partial.rename(result)
    for name in objects:
        os.unlink(name)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise CannotBuild(f"{shlex.join(command)} failed:\n" + "\n".join(lines[:10]))

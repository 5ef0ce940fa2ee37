"""Builds csrc/cuda with the C++ compiler, by way of cuda_on_cpu.hpp, into build/: once for each content."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "cuda_on_cpu"
FLAGS = [
    *("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-fno-gnu-unique", "-fvisibility=hidden"),  # two libraries in one process share nothing
    *("-DDISTLIB_CUDA_ON_CPU", "-include", str(HERE / "cuda_on_cpu.hpp"), f"-I{HERE}", f"-I{ROOT / 'csrc'}"),
]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


@cache
def library(sanitize: bool = False) -> Path:
    """The emulated library. sanitize: with AddressSanitizer and UBSan, whose runtimes a process must preload."""
    return _linked(sorted(CUDA.glob("*.cu")), SANITIZE if sanitize else [], ["-shared"], "_cuda.so")


@cache
def program(source: Path, sanitize: bool = True) -> Path:
    """A C++ program with a main() of its own, linked with csrc/cuda."""
    return _linked([*sorted(CUDA.glob("*.cu")), source], SANITIZE if sanitize else [], [], source.stem)


def _linked(sources: Sequence[Path], more: list[str], link: list[str], name: str) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:  # processes that need the same build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [*_compiler(), *FLAGS, *more]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _object(source, command), sources))
        key = hashlib.sha256(repr((objects, command, link, name)).encode()).hexdigest()[:16]
        target = FOLDER / f"{key}-{name}"
        if not target.exists():
            _run([*command, *link, *(str(o) for o in objects)], target)
        return target


def _object(source: Path, command: list[str]) -> Path:
    """Compiled from this content of it and of all headers."""
    inputs = [source, *sorted(HERE.glob("*.hpp")), *sorted(CUDA.glob("*.h")), *sorted(CUDA.glob("*.cuh"))]
    inputs += sorted((ROOT / "csrc" / "cpu").glob("*.hpp"))
    contents = [(path.name, path.read_bytes()) for path in inputs]
    key = hashlib.sha256(repr((command, contents)).encode()).hexdigest()[:16]
    target = FOLDER / f"{key}-{source.stem}.o"
    if not target.exists():
        _run([*command, "-x", "c++", "-c", str(source)], target)
    return target


def _run(command: list[str], target: Path) -> None:
    unfinished = target.with_name(f"{os.getpid()}-{target.name}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[:10_000]}")
    os.replace(unfinished, target)


@lru_cache(maxsize=1)
def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(command[0]):
        raise RuntimeError(f"{command[0]} is not on PATH: CUDA on the CPU needs a C++ compiler; set CXX")
    return command

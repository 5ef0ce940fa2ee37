"""Builds csrc/cuda with the C++ compiler, by way of cuda_on_cpu.hpp, into build/: once for each content."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "cuda_on_cpu"
FLAGS = [
    *("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-fno-gnu-unique", "-fvisibility=hidden"),  # two libraries in one process share nothing
    *("-DDISTLIB_CUDA_ON_CPU", "-include", str(HERE / "cuda_on_cpu.hpp"), f"-I{HERE}", f"-I{ROOT / 'csrc'}"),
]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
NVCC_FLAGS = ["-std=c++17", "-fmad=false", "-cudart=static", "-arch=sm_90", "-Xcompiler=-fPIC,-fvisibility=hidden"]


@cache
def library() -> Path:
    """The emulated library."""
    command = [*compiler(), *FLAGS]
    return _linked(sorted(CUDA.glob("*.cu")), [*command, "-x", "c++"], [*command, "-shared"], "_cuda.so")


@cache
def program(source: Path, *parts: str) -> Path:
    """A C++ program with a main() of its own and these parts (names) of csrc/cuda, under AddressSanitizer and UBSan."""
    command = [*compiler(), *FLAGS, *SANITIZE]
    sources = [source, *(CUDA / f"{part}.cu" for part in parts)]
    return _linked(sources, [*command, "-x", "c++"], command, source.stem)


@cache
def library_of_nvcc(nvcc: str) -> Path:
    """What nvcc makes of the same sources, for one architecture: it can be opened without a GPU, not run."""
    command = [nvcc, *NVCC_FLAGS, f"-I{ROOT / 'csrc'}"]
    return _linked(sorted(CUDA.glob("*.cu")), command, [*command, "-shared"], "nvcc_cuda.so")


def _linked(sources: Sequence[Path], compile_: list[str], link: list[str], name: str) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:  # processes that need the same build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _object(source, compile_), sources))
        key = hashlib.sha256(repr((objects, link, name)).encode()).hexdigest()[:16]
        target = FOLDER / f"{key}-{name}"
        if not target.exists():
            _run([*link, *(str(o) for o in objects)], target)
        return target


def _object(source: Path, command: list[str]) -> Path:
    """Compiled from this content of it and of the headers that it includes."""
    inputs: dict[Path, bytes] = {}
    _read(source, inputs)
    _read(HERE / "cuda_on_cpu.hpp", inputs)
    contents = [(path.name, content) for path, content in sorted(inputs.items())]
    key = hashlib.sha256(repr((command, contents)).encode()).hexdigest()[:16]
    target = FOLDER / f"{key}-{source.stem}.o"
    if not target.exists():
        _run([*command, "-c", str(source)], target)
    return target


def _read(path: Path, into: dict[Path, bytes]) -> None:
    """Contents of a file and of all that it includes in quotes."""
    if path in into:
        return
    into[path] = path.read_bytes()
    for name in re.findall(rb'^#include "([^"]+)"', into[path], re.MULTILINE):
        found = [folder / name.decode() for folder in (path.parent, HERE, ROOT / "csrc")]
        for header in (h.resolve() for h in found if h.exists()):
            _read(header, into)


def _run(command: list[str], target: Path) -> None:
    unfinished = target.with_name(f"{os.getpid()}-{target.name}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[:10_000]}")
    os.replace(unfinished, target)


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else g++."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(command[0]):
        raise RuntimeError(f"{command[0]} is not on PATH: CUDA on the CPU needs a C++ compiler; set CXX")
    return command

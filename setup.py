"""Compiles the C++ core, and CUDA where nvcc is, at install time. Without a compiler it still installs.

What was built, or why not, is written to distlib/_build_info.py, which `distlib doctor` reads. Environment:

DISTLIB_NATIVE     0: leave the C++ core out; 1: fail if it cannot be built; auto (default): build it if possible;
                   keep: leave what is there as it is, for an in-place build of the other part
DISTLIB_CUDA       the same for csrc/cuda
DISTLIB_CUDA_ARCH  what nvcc compiles for: all-major (default; see GPUS), or one card's (sm_90), which takes less time
CXX, NVCC          the compilers to use

Neither part includes a torch header: one build serves every torch version, and building needs no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pprint
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / f"objects-{sys.implementation.cache_tag}"  # kept for the next build
NATIVE_SOURCES = ("csrc/core/*.cpp", "csrc/cpu/*.cpp")
CUDA_SOURCES = ("csrc/cuda/*.cu",)
CXX_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-fPIC", "-DNDEBUG"]
# -fmad=false: multiplications and additions are rounded one by one, as in the C++ core, for the same bits.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
GPUS = (80, 90, 100)  # architectures with code of their own (8.6 and 8.9 run that of 8.0); newer ones get PTX


class CannotBuild(Exception):
    """A part cannot be built here. The message says why, and names the fix."""


def sources(patterns: tuple[str, ...]) -> list[str]:
    """Source files matching the patterns, relative to this folder, sorted so that builds repeat."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def wish(variable: str) -> str:
    """What the environment asks of a part: "0", "1", "auto" or "keep"."""
    value = os.environ.get(variable, "").strip().lower() or "auto"
    if value not in ("0", "1", "auto", "keep"):
        wishes = "0 (leave out), 1 (must build), auto (if possible) or keep (as it is)"
        raise SystemExit(f"{variable}={value!r}: use {wishes}")
    return value


def run(command: list[str], what: str) -> None:
    """Runs a compiler; CannotBuild with its errors if it fails. `what`: what it makes, for the log."""
    print(f"{command[0]}: {what}", flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    output = done.stdout + done.stderr
    if output:
        print(f"{shlex.join(command)}\n{output}", flush=True)
    if done.returncode:
        errors = [line for line in output.splitlines() if "error" in line] or output.splitlines()
        raise CannotBuild(f"{command[0]} failed (exit {done.returncode}): " + "\n".join(errors[:10]))


def find_cxx() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of c++, g++, clang++ on PATH."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked and not shutil.which(asked[0]):
        raise CannotBuild(f"CXX={os.environ['CXX']!r} is not on PATH; unset CXX or install that compiler")
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild("no C++ compiler: none of c++, g++, clang++ is on PATH; `apt install g++`, say")


def find_nvcc() -> list[str]:
    """nvcc as a command: $NVCC, or $CUDA_HOME/bin/nvcc, or the one on PATH, or in /usr/local/cuda/bin."""
    named = os.environ.get("NVCC") or os.environ.get("CUDA_HOME") and f"{os.environ['CUDA_HOME']}/bin/nvcc"
    for candidate in [named] if named else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if shutil.which(candidate):
            return [candidate]
    where = f"at {named}" if named else "on PATH or in /usr/local/cuda/bin"
    raise CannotBuild(f"no nvcc {where}; install the CUDA toolkit, or set CUDA_HOME or NVCC to where it is")


def find_pybind11() -> tuple[Path, str]:
    """The folder of pybind11's headers, and its version: the package, else the copy that torch comes with."""
    for package in ("pybind11", "torch"):  # found, not imported: torch takes seconds, and here lends its headers only
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            continue
        folder = Path(found.origin).parent / "include"
        parts = folder / "pybind11" / "detail" / "common.h"
        if parts.exists():
            numbers = re.findall(r"#\s*define PYBIND11_VERSION_(?:MAJOR|MINOR|MICRO|PATCH)\s+(\w+)", parts.read_text())
            return folder, ".".join(numbers[:3])
    raise CannotBuild("pybind11 is missing: `pip install pybind11`, or use build isolation")


def version_of(command: list[str], line: int) -> str:
    """The line of `command --version` that tells the version (compilers differ in which)."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    lines = [text.strip() for text in done.stdout.splitlines() if re.search(r"\d+\.\d+", text)]
    if done.returncode or not lines:
        raise CannotBuild(f"{command[0]} --version failed (exit {done.returncode}): {done.stderr[-500:]}")
    return lines[line]


def dependencies(target: Path) -> list[Path]:
    """What `target` was compiled from, as the compiler listed it (-MMD); empty before the first time."""
    listed = target.with_suffix(".d")
    names = listed.read_text().replace("\\\n", " ").split(":", 1)[1].split() if listed.exists() else []
    return [ROOT / name for name in names]


def fingerprint(files: list[Path], command: list[str], versions: str) -> str:
    """What an object is made from. Contents, not times: a copied file may be old and yet differ."""
    contents = [(str(file), file.read_bytes() if file.exists() else None) for file in files]
    return hashlib.sha256(repr((command, versions, contents)).encode()).hexdigest()


def compile_all(files: list[str], command: list[str], includes: list[str], versions: str) -> list[str]:
    """Object files of `files`, compiled in parallel; those that are fresh are kept."""
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        target = OBJECTS / (source.replace("/", "_") + ".o")
        stamp = target.with_suffix(".stamp")
        made_from = stamp.read_text() if target.exists() and stamp.exists() else ""
        if made_from != fingerprint(dependencies(target), [*command, source], versions):
            begin = time.time()
            unfinished = target.with_suffix(f".{os.getpid()}.o")
            listing = ["-MMD", "-MF", str(target.with_suffix(".d")), "-MT", target.name]
            stamp.unlink(missing_ok=True)
            run([*command, *includes, *listing, "-c", source, "-o", str(unfinished)], source)
            os.replace(unfinished, target)
            inputs = dependencies(target)
            if all(file.stat().st_mtime < begin for file in inputs):  # else edited meanwhile: compile again
                stamp.write_text(fingerprint(inputs, [*command, source], versions))
        return str(target)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(compile_one, files))


def link(command: list[str], target: Path) -> None:
    """Links beside `target`, then renames: a process that has the old library mapped keeps the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    run([*command, "-o", str(unfinished)], target.name)
    os.replace(unfinished, target)


def build_native(files: list[str], target: Path) -> dict[str, str]:
    """distlib/_native*.so from csrc/core and csrc/cpu. Returns what built it."""
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the shared-memory core needs Linux (memfd, futex); this is {sys.platform}")
    if not files:
        raise CannotBuild("no sources: csrc/core and csrc/cpu hold no .cpp file")
    cxx = find_cxx()
    headers, pybind11 = find_pybind11()
    # -isystem: no warnings from these, and not in the dependency lists (isolated builds move them every time)
    includes = [f"-isystem{path}" for path in (headers, sysconfig.get_path("include"))]
    version = version_of(cxx, 0)
    versions = f"{version}, pybind11 {pybind11}, Python {sys.version}"
    objects = compile_all(files, [*cxx, *CXX_FLAGS, "-Icsrc"], includes, versions)
    link([*cxx, "-shared", "-pthread", *objects], target)
    return {"compiler": version, "flags": " ".join(CXX_FLAGS)}


def build_cuda(files: list[str], target: Path) -> dict[str, str]:
    """distlib/_cuda.so from csrc/cuda: a plain C interface, opened with ctypes. Returns what built it."""
    if not files:
        raise CannotBuild("this version has no CUDA sources: csrc/cuda holds no .cu file")
    nvcc = find_nvcc()
    version = version_of(nvcc, -1)
    flags = [*NVCC_FLAGS, *architectures(nvcc)]
    objects = compile_all(files, [*nvcc, *flags, "-Icsrc"], [], version)
    link([*nvcc, *flags, "-shared", *objects], target)
    return {"compiler": version, "flags": " ".join(flags)}


def architectures(nvcc: list[str]) -> list[str]:
    """nvcc's flags for $DISTLIB_CUDA_ARCH; else for those of GPUS that it knows, and PTX of the newest of them."""
    asked = os.environ.get("DISTLIB_CUDA_ARCH") or "all-major"
    if asked != "all-major":
        return [f"-arch={asked}"]
    done = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, errors="replace")
    known = [gpu for gpu in GPUS if f"compute_{gpu}" in done.stdout.split()]
    if not known:
        raise CannotBuild(f"{nvcc[0]} knows none of the architectures {GPUS}: install CUDA 12.8 or newer")
    flags = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def build_part(
    variable: str, build: Callable[[list[str], Path], dict[str, str]], files: list[str], target: Path
) -> dict[str, object]:
    """Builds one part if `variable` allows. Returns its record; a part that is left out leaves no file."""
    asked = wish(variable)
    try:
        if asked == "0":
            raise CannotBuild(f"{variable}=0 was set when distlib was installed")
        if asked == "keep":
            return kept(target, variable.removeprefix("DISTLIB_"))
        return {"built": True, "why_not": "", **build(files, target), "sources": files, "digest": digest(files)}
    except CannotBuild as error:
        target.unlink(missing_ok=True)
        if asked == "1":
            raise SystemExit(f"{variable}=1, but it cannot be built: {error}") from None
        print(f"distlib: going on without {target.name}: {error}", file=sys.stderr, flush=True)
        return {"built": False, "why_not": str(error)}


def kept(target: Path, part: str) -> dict[str, object]:
    """Takes over the library that is beside the sources. Returns the record it came with, if any."""
    home, info = ROOT / "distlib" / target.name, ROOT / "distlib" / "_build_info.py"
    if not home.exists():
        raise SystemExit(f"DISTLIB_{part}=keep, but there is no distlib/{target.name} to keep: use auto or 1")
    shutil.copy2(home, target)
    known = runpy.run_path(str(info)).get(part) if info.exists() else None
    return known if known and known["built"] else {"built": True, "why_not": "", "compiler": "unknown: built elsewhere"}


def digest(files: list[str]) -> str:
    """Of the sources and what lies beside them: tells whether a library that came from elsewhere is of these files."""
    folders = sorted({(ROOT / file).parent for file in files})
    inputs = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256(repr([(path.name, path.read_bytes()) for path in inputs]).encode()).hexdigest()


def build_into(folder: Path, extension: str) -> None:
    """Leaves _native*.so (as `extension` names it), _cuda.so and _build_info.py in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    native = build_part("DISTLIB_NATIVE", build_native, sources(NATIVE_SOURCES), folder / extension)
    cuda = build_part("DISTLIB_CUDA", build_cuda, sources(CUDA_SOURCES), folder / "_cuda.so")
    lines = ['"""Written by setup.py: what was compiled, with what, or why not."""', ""]
    for name, record in (("NATIVE", native), ("CUDA", cuda)):
        lines.append(f"{name} = {pprint.pformat(record, width=110, sort_dicts=False)}")
    (folder / "_build_info.py").write_text("\n".join(lines) + "\n")


class Build(build_ext):
    """build_ext with our own compiler calls: parallel, incremental, and with a recorded reason on failure."""

    def build_extensions(self) -> None:
        """Into the package folder of the build."""
        extension = Path(self.get_ext_fullpath("distlib._native")).resolve()
        build_into(extension.parent, extension.name)

    def copy_extensions_to_source(self) -> None:
        """Editable and in-place builds: all three go beside the sources; what was not built goes away."""
        native = Path(self.get_ext_filename("distlib._native")).name
        for name in (native, "_cuda.so", "_build_info.py"):
            built, home = Path(self.build_lib).resolve() / "distlib" / name, ROOT / "distlib" / name
            if built.exists():
                unfinished = home.with_name(f"{name}.{os.getpid()}")
                shutil.copy2(built, unfinished)
                os.replace(unfinished, home)
            else:
                home.unlink(missing_ok=True)


if __name__ == "__main__":  # benchmarks/gpu_build.py takes functions from here: it is to work with any setuptools
    setup(
        ext_modules=[Extension("distlib._native", sources=sources(NATIVE_SOURCES), optional=True)],
        cmdclass={"build_ext": Build},
    )

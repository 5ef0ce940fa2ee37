"""Gathers the facts of this process: software, build, launcher, network, and the rest from its neighbours here."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

import distlib
from distlib import _clash, launchers, native
from distlib.comm import interfaces
from distlib.cuda import library
from distlib.doctor import machine
from distlib.doctor.fabric import fabric
from distlib.doctor.facts import Build, Facts, Launched, Network, Versions
from distlib.doctor.gpus import architectures, gpus, loaded_nccl
from distlib.doctor.tools import output_of

_MAX_ARENA = 1 << 38


def gather() -> Facts:
    """All facts. Any rank may call it, alone; it takes a second at most where torch is imported.

    What takes longest is the same for all ranks of a host, and left to the first of them.
    """
    environ = dict(os.environ)  # as it was given: torch sets some variables itself when it first uses a GPU
    launched = launch(environ)
    return Facts(
        versions=versions(),
        gpus=gpus(whole_host=launched.local_rank == 0),
        build=build(),
        launched=launched,
        machine=machine.machine(arena_bytes(environ)),
        limits=machine.limits(),
        kernel=machine.kernel(),
        network=network(environ, environ.get("MASTER_ADDR")),
        fabric=fabric(environ),
        settings={name: value for name, value in sorted(environ.items()) if name.startswith("DISTLIB_")},
        namesakes=namesakes(sys.path),
    )


def versions() -> Versions:
    """What is installed. MPI is looked up, not imported: importing starts it."""
    has_distributed = dist.is_available()
    nccl_loaded, nccl_file = loaded_nccl()
    return Versions(
        distlib=distlib.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        torch=torch.__version__,
        has_distributed=has_distributed,
        has_gloo=has_distributed and dist.is_gloo_available(),
        cuda=torch.version.cuda,
        nccl=_nccl_version() if has_distributed and dist.is_nccl_available() else None,
        nccl_loaded=nccl_loaded,
        nccl_file=nccl_file,
        mpi4py=_installed("mpi4py"),
        mpirun=_mpirun_version(),
    )


def _nccl_version() -> str:
    version = torch.cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mpirun_version() -> str | None:
    beside = str(Path(sys.executable).parent)
    path = shutil.which("mpirun", path=beside) or shutil.which("mpirun")
    if path is None:
        return None
    lines = [line.strip() for line in output_of(path, "--version").splitlines()]
    return next((line for line in lines if re.search(r"\d\.\d", line)), "there, of unknown version")


def build() -> Build:
    """What setup.py wrote down, and whether the core can be used."""
    core, why_not, refuses = None, "", ""
    try:
        core, why_not = native.core(), native.why_not()
    except ValueError as error:  # DISTLIB_CORE or DISTLIB_SIMD
        refuses = str(error)
    try:
        info = importlib.import_module("distlib._build_info")
        built, cuda = info.NATIVE, info.CUDA
    except ImportError:  # imported from a source folder where nothing was built; native.why_not() says so
        built = cuda = {"built": False, "why_not": "distlib is not installed, only imported from its sources"}
    return Build(
        is_built=built["built"],
        compiler=built.get("compiler", ""),
        core_works=core is not None,
        core_why_not=why_not,
        core_refuses=refuses,
        simd=core.simd_name() if core else "",
        cuda_built=cuda["built"],
        cuda_why_not=cuda["why_not"],
        cuda_compiler=cuda.get("compiler", ""),
        cuda_architectures=architectures(cuda.get("flags", "")),
        cuda_error=library.why_not() if cuda["built"] else "",
    )


def launch(environ: Mapping[str, str]) -> Launched:
    """The launcher and its numbers, or its complaint."""
    threads = torch.get_num_threads()
    try:
        found = launchers.detect(environ)
    except launchers.LaunchError as error:
        return Launched(launcher=launchers.launcher_name(environ), error=str(error), threads=threads)
    return Launched(
        launcher=found.launcher,
        rank=found.rank,
        size=found.size,
        local_rank=found.local_rank,
        local_size=found.local_size,
        threads=threads,
    )


def arena_bytes(environ: Mapping[str, str]) -> int:
    """Address space that a rank's shared memory takes: all of the machine's memory, unless it is set."""
    text = environ.get("DISTLIB_ARENA_MB", "").strip()
    return int(text) << 20 if text.isdigit() else min(machine.total_memory(), _MAX_ARENA)


def network(environ: Mapping[str, str], master: str | None) -> Network:
    """Interfaces, and the choice between them of a job whose ranks meet at `master` (None: not known yet)."""
    try:
        by_name = socket.gethostbyname(socket.gethostname())
    except OSError:
        by_name = None
    found = Network(addresses=interfaces.addresses(), master=master, by_name=by_name, lookup=_lookup())
    try:
        found.chosen = interfaces.choose(master)
    except ValueError as error:
        found.error = str(error)
    variables = [name for name in (interfaces.VARIABLE, "GLOO_SOCKET_IFNAME") if environ.get(name)]
    if variables:
        found.reason = f"{variables[0]} is set"
    else:
        found.reason = f"on the way to {master}" if found.chosen else f"no way to {master} is known"
    return found


@functools.cache
def _lookup() -> float:
    """How long the question takes that torch's store asks of each address that connects to it: what is it called?"""
    begin = time.monotonic()
    with contextlib.suppress(OSError):  # that there is no name is an answer
        socket.getnameinfo(("::ffff:127.0.0.1", 0, 0, 0), socket.NI_NUMERICSERV)
    return time.monotonic() - begin


def namesakes(path: list[str]) -> list[str]:
    """Traces of the packaging library distlib in other folders that Python imports from."""
    ours = Path(distlib.__file__).resolve().parent
    found: list[str] = []
    for folder in dict.fromkeys(Path(entry or os.curdir).resolve() for entry in path):
        if folder != ours.parent and folder.is_dir() and os.access(folder, os.R_OK):
            found += _clash.traces(str(folder / "distlib"))
    return found

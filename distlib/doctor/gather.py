"""Gathers the facts of this process: software, GPUs, launcher, network, fabric. Talks to no other rank."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

import distlib
from distlib import _clash, launchers, native
from distlib.comm import interfaces
from distlib.doctor import machine
from distlib.doctor.facts import Build, Fabric, Facts, Gpus, Launched, Network, Versions

_PLUGIN_FOLDERS = (  # where aws-ofi-nccl and its deep-learning images install, besides LD_LIBRARY_PATH
    "/opt/amazon/ofi-nccl/lib",
    "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu",
    "/opt/amazon/ofi-nccl/lib/aarch64-linux-gnu",
    "/opt/aws-ofi-nccl/lib",
)
_EFA_TOOLS = "/opt/amazon/efa/bin"
_MAX_ARENA = 1 << 38


def gather() -> Facts:
    """All facts. Any rank may call it, alone; it takes well below a second where torch is imported."""
    launched = launch(os.environ)
    return Facts(
        versions=versions(),
        gpus=gpus(),
        build=build(),
        launched=launched,
        machine=machine.machine(arena_bytes(os.environ)),
        limits=machine.limits(),
        kernel=machine.kernel(),
        network=network(os.environ, os.environ.get("MASTER_ADDR")),
        fabric=fabric(os.environ),
        settings={name: value for name, value in sorted(os.environ.items()) if name.startswith("DISTLIB_")},
        namesakes=namesakes(sys.path),
    )


def versions() -> Versions:
    """What is installed. MPI is looked up, not imported: importing starts it."""
    has_distributed = dist.is_available()
    return Versions(
        distlib=distlib.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        torch=torch.__version__,
        has_distributed=has_distributed,
        has_gloo=has_distributed and dist.is_gloo_available(),
        cuda=torch.version.cuda,
        nccl=_nccl_version() if has_distributed and dist.is_nccl_available() else None,
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
    lines = [line.strip() for line in _output_of(path, "--version").splitlines()]
    return next((line for line in lines if re.search(r"\d\.\d", line)), "there, of unknown version")


def _output_of(*command: str) -> str:
    """What a program prints; empty if it fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpus() -> Gpus:
    """GPUs as torch sees them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Gpus(
        names=[torch.cuda.get_device_name(index) for index in range(count)],
        has_driver=os.path.exists("/dev/nvidiactl"),
        complaint=" ".join(str(warning.message) for warning in said),
    )


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
    found = Network(addresses=interfaces.addresses(), master=master, by_name=by_name)
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


def fabric(environ: Mapping[str, str], devices: Path = Path("/sys/class/infiniband")) -> Fabric:
    """RDMA devices with their drivers, NCCL's network plugins, libfabric, and variables that steer them."""
    found = sorted(devices.iterdir()) if devices.is_dir() else []
    folders = [*environ.get("LD_LIBRARY_PATH", "").split(":"), *_PLUGIN_FOLDERS]
    plugins = [str(p) for f in dict.fromkeys(folders) if f for p in sorted(Path(f).glob("libnccl-net*.so"))]
    tool = shutil.which("fi_info") or shutil.which("fi_info", path=_EFA_TOOLS)
    version = re.search(r"^libfabric:\s*(\S+)", _output_of(tool, "--version") if tool else "", re.MULTILINE)
    return Fabric(
        devices={d.name: os.path.basename(os.path.realpath(d / "device" / "driver")) for d in found},
        plugins=plugins,
        libfabric=version[1] if version else None,
        variables={n: v for n, v in sorted(environ.items()) if n.startswith(("FI_", "NCCL_", "RDMAV_"))},
    )


def namesakes(path: list[str]) -> list[str]:
    """Traces of the packaging library distlib in other folders that Python imports from."""
    ours = Path(distlib.__file__).resolve().parent
    found: list[str] = []
    for folder in dict.fromkeys(Path(entry or os.curdir).resolve() for entry in path):
        if folder != ours.parent and folder.is_dir() and os.access(folder, os.R_OK):
            found += _clash.traces(str(folder / "distlib"))
    return found

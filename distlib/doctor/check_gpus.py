"""Facts in, problems out, for GPUs: driver and CUDA, NCCL, the CUDA part, access between GPUs. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from distlib.doctor.facts import Facts, Gpu, Problem, error, warning
from distlib.words import plural, version_numbers

_BUILD_CUDA = "DISTLIB_CUDA=1 pip install --force-reinstall --no-deps distlib-train"


def check_gpus(facts: Facts) -> Iterator[Problem]:
    """GPUs that are there and cannot be used, or not well. (A machine without any is no problem.)"""
    versions, gpus = facts.versions, facts.gpus
    if gpus.has_driver and not gpus.devices:
        yield warning(
            "gpu",
            what=f"an NVIDIA driver is loaded, but torch finds no GPU: {_why_none(facts)}",
            why="Training would run on the CPU.",
            fix="Match torch's CUDA with the driver (see nvidia-smi), and look at CUDA_VISIBLE_DEVICES."
            if versions.cuda
            else "Install a build of torch with CUDA (pytorch.org/get-started).",
        )
    if gpus.devices and versions.nccl is None:
        yield error(
            "gpu",
            what="torch finds GPUs, but is built without NCCL",
            why="CUDA tensors travel between ranks over NCCL.",
            fix="Install a build of torch from PyPI, or build it with USE_NCCL=1.",
        )
    if gpus.strangers:
        a, b = gpus.strangers[0]
        more = f", and {len(gpus.strangers) - 1} more pairs" if len(gpus.strangers) > 1 else ""
        yield warning(
            "gpu",
            what=f"GPUs {a} and {b} cannot access each other's memory{more}",
            why="All that passes between them is copied through host memory, and small tensors cannot go by "
            "distlib's own kernels.",
            fix="See `nvidia-smi topo -p2p r`. On a machine of your own turn the IOMMU and PCIe ACS off; in a "
            "virtual machine or container ask for GPUs that are joined by NVLink.",
        )
    if gpus.memory_errors:
        which = ", ".join(map(str, gpus.memory_errors))
        yield warning(
            "gpu",
            what=f"memory errors that could not be corrected on {'GPU' if len(gpus.memory_errors) == 1 else 'GPUs'} "
            f"{which}",
            why="Jobs on it end with an Xid error, or have ended so since the driver was loaded.",
            fix="Reset the GPU or restart the host (nvidia-smi -q -d ECC,ROW_REMAPPER tells more); replace it if "
            "they come back.",
        )


def _why_none(facts: Facts) -> str:
    """Why torch finds no GPU where a driver is, in numbers if both are known."""
    versions, gpus = facts.versions, facts.gpus
    if versions.cuda and gpus.driver_cuda and version_numbers(gpus.driver_cuda) < version_numbers(versions.cuda)[:1]:
        return f"torch is built for CUDA {versions.cuda}, driver {gpus.driver} serves CUDA {gpus.driver_cuda} at most"
    built = f"CUDA {versions.cuda}" if versions.cuda else "the CPU only"
    return gpus.complaint or f"torch {versions.torch} is built for {built}"


def check_nccl(facts: Facts) -> Iterator[Problem]:
    """The NCCL in the process beside the one that torch was built with."""
    versions = facts.versions
    built, loaded = version_numbers(versions.nccl or ""), version_numbers(versions.nccl_loaded)
    if built and loaded and loaded < built:
        yield warning(
            "torch",
            what=f"torch was built with NCCL {versions.nccl}, but loads {versions.nccl_loaded} from "
            f"{versions.nccl_file}",
            why="What torch asks for may be missing in the older one: jobs fail as they make groups, or later.",
            fix="Take its folder from LD_LIBRARY_PATH and unset LD_PRELOAD: torch then finds the one it brought; "
            "or install a newer NCCL there.",
        )


# ---- the CUDA part -----------------------------------------------------------------------------------------


def check_cuda(facts: Facts) -> Iterator[Problem]:
    """distlib's own kernels on the GPUs that are here."""
    build, gpus = facts.build, facts.gpus
    if not gpus.devices:
        return
    if not build.cuda_built:
        yield warning(
            "cuda part",
            what=f"there are GPUs, but the CUDA part of distlib is not compiled: {build.cuda_why_not}",
            why="Buckets, optimizers and small collectives then run as many operations of torch and NCCL: right, "
            "but slower.",
            fix=f"Install nvcc of CUDA 12.8 or later, or set CUDA_HOME to where it is, then {_BUILD_CUDA}",
        )
        return
    if build.cuda_error:
        yield error(
            "cuda part",
            what=f"the CUDA part cannot be used: {build.cuda_error}",
            why="Ranks with GPUs will fail, or run slower.",
            fix=f"Reinstall it on this system: {_BUILD_CUDA}",
        )
    for gpu in _kinds(gpus.devices):
        yield from _runs_on(gpu, facts)


def _kinds(devices: list[Gpu]) -> list[Gpu]:
    """One GPU of each compute capability."""
    return list({gpu.capability: gpu for gpu in devices if gpu.capability}.values())


def _runs_on(gpu: Gpu, facts: Facts) -> Iterator[Problem]:
    """Whether there is code for a GPU, and whether the driver can use it."""
    build, serves = facts.build, facts.gpus.driver_cuda
    way = code_for(gpu.capability, build.cuda_architectures)
    if build.cuda_architectures and not way:
        yield error(
            "cuda part",
            what=f"compiled for {', '.join(build.cuda_architectures)}: nothing that {gpu.name} (compute capability "
            f"{gpu.capability}) can run",
            why="The first kernel will fail with 'no kernel image is available'.",
            fix=f"Reinstall it with this GPU's architecture among setup.py's: {_BUILD_CUDA}",
        )
        return
    made = re.search(r"cuda_([0-9]+\.[0-9]+)", build.cuda_compiler)
    if made is None or not serves:
        return
    # Machine code runs on any driver of the same major version; PTX is translated by the driver, which must know it.
    digits = 2 if way == "ptx" else 1
    if version_numbers(serves)[:digits] < version_numbers(made[1])[:digits]:
        yield error(
            "cuda part",
            what=f"compiled by CUDA {made[1]}, but driver {facts.gpus.driver} serves CUDA {serves} at most",
            why="The driver cannot run what that compiler made for these GPUs.",
            fix=f"Update the driver, or compile with nvcc {serves}: NVCC=/path/to/nvcc {_BUILD_CUDA}",
        )


def code_for(capability: str, architectures: list[str]) -> str:
    """What of `architectures` a GPU of this compute capability runs: "machine code", else "ptx", else ""."""
    have = version_numbers(capability)
    ways: set[str] = set()
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = re.sub(r"[af]$", "", number)
        made_for = (int(digits[:-1]), int(digits[-1]))
        if number.endswith("a"):  # one architecture's own instructions: nothing else runs them
            fits = have == made_for
        elif kind == "sm" or number.endswith("f"):
            fits = have[0] == made_for[0] and have >= made_for
        else:
            fits = have >= made_for
        if fits:
            ways.add("machine code" if kind == "sm" else "ptx")
    return min(ways, default="")  # machine code comes first in the alphabet too


def cards_shared(facts: list[Facts]) -> Iterator[Problem]:
    """Ranks of one host (their facts) that use the same GPU."""
    users: dict[str, list[int]] = {}
    for f in facts:
        if f.gpus.mine:
            users.setdefault(f.gpus.mine, []).append(f.launched.rank)
    crowded = max(users.values(), key=len, default=[])
    if len(crowded) > 1:
        count = len(facts[0].gpus.devices)
        yield warning(
            "gpu",
            what=f"{len(facts)} ranks use {plural(len(users), 'GPU')}: ranks {', '.join(map(str, crowded))} share one",
            why="They take turns on it, each needs its memory, and NCCL refuses two ranks on one GPU: a job on several "
            "hosts fails.",
            fix=f"Start {plural(count, 'rank')} on this host, one a GPU. If its launcher hides GPUs, let each rank see "
            "a different one (CUDA_VISIBLE_DEVICES).",
        )

"""Facts of one process in, problems out: what is wrong, why it matters, what to do. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from distlib import _clash
from distlib.doctor.check_fabric import check_fabric
from distlib.doctor.check_gpus import check_cuda, check_gpus, check_nccl
from distlib.doctor.check_settings import check_settings
from distlib.doctor.facts import GIB, Facts, Problem, error, warning
from distlib.words import gib, plural, version_numbers

OLDEST_TORCH = (2, 6)
_TORCH_BYTES = 8 * GIB  # address space of Python with torch, generously
_SHM_OF_NCCL = GIB // 2
_SLOW_LOOKUP = 2.0  # seconds
_REINSTALL = "pip install --force-reinstall --no-deps distlib-train"


def check(facts: Facts) -> list[Problem]:
    """The problems that one process can see, in the order of the report's lines."""
    checks = (
        check_software,
        check_nccl,
        check_core,
        check_cuda,
        check_gpus,
        check_launcher,
        check_cores,
        check_memory,
        check_limits,
        check_kernel,
        check_network,
        check_fabric,
        check_settings,
    )
    return [problem for one in checks for problem in one(facts)]


def check_software(facts: Facts) -> Iterator[Problem]:
    """torch, and the other distlib."""
    versions = facts.versions
    if facts.namesakes:
        yield warning(
            "distlib",
            what=f"the packaging library `distlib` is importable too: {', '.join(facts.namesakes)}",
            why="Whichever of the two comes first on sys.path is what `import distlib` finds.",
            fix=_clash.FIX.removeprefix("Fix: "),
        )
    if version_numbers(versions.torch) < OLDEST_TORCH:
        yield error(
            "torch",
            what=f"torch {versions.torch} is older than 2.6",
            why="The c10d interface that the backend distlib implements is not there yet.",
            fix="pip install 'torch>=2.6'",
        )
    missing = "gloo" if versions.has_distributed else "torch.distributed"
    if not versions.has_gloo:
        yield error(
            "torch",
            what=f"this torch is built without {missing}",
            why="Ranks meet and, between hosts or without the C++ core, communicate through it.",
            fix="Install a build of torch from PyPI, or build it with USE_DISTRIBUTED=1 and USE_GLOO=1.",
        )


def check_core(facts: Facts) -> Iterator[Problem]:
    """Whether shared memory can be used."""
    build = facts.build
    if build.core_refuses:
        yield error(
            "core",
            what=build.core_refuses.rstrip("."),
            why="Ranks will fail as they start.",
            fix="Correct it, or unset it.",
        )
    elif not build.core_works:
        fix = f"Install a C++ compiler (apt install g++), then {_REINSTALL}"
        if "DISTLIB_CORE" in build.core_why_not:
            fix = "Unset DISTLIB_CORE."
        elif not facts.versions.system.startswith("Linux"):
            fix = "Nothing: on this system gloo is the way. Linux has the faster one."
        elif build.is_built:
            fix = f"Reinstall it for this Python: {_REINSTALL}"
        yield warning(
            "core",
            what=f"the C++ core cannot be used: {build.core_why_not}",
            why="Ranks of one host communicate over gloo (TCP), not shared memory: right, but slower.",
            fix=fix,
        )


def check_launcher(facts: Facts) -> Iterator[Problem]:
    """The launcher's variables."""
    if facts.launched.error:
        what, fix = split_fix(facts.launched.error)
        yield error("launcher", what=what, why="distlib.init() would fail with this message.", fix=fix)


def check_cores(facts: Facts) -> Iterator[Problem]:
    """The container's share of time."""
    machine = facts.machine
    if machine.cores_quota is not None and machine.cores_quota < len(machine.affinity):
        seen = plural(len(machine.affinity), "core")
        yield warning(
            "cores",
            what=f"the container may use {machine.cores_quota:g} of the {seen} it sees",
            why="Whoever uses more is stopped by the kernel for many milliseconds at a time.",
            fix=f"Keep ranks x OMP_NUM_THREADS to {max(1, int(machine.cores_quota))}, or raise the limit.",
        )


def check_memory(facts: Facts) -> Iterator[Problem]:
    """What is left for ranks."""
    machine = facts.machine
    limit = machine.memory_limit
    whose = f"the container's limit is {gib(limit)}" if limit else f"the machine has {gib(machine.memory)}"
    if machine.memory_available < GIB:
        yield warning(
            "memory",
            what=f"only {gib(machine.memory_available)} are available ({whose})",
            why="A rank needs some 0.4 GiB before its model; the kernel kills what does not fit.",
            fix="End what uses the memory, or raise the limit (docker --memory, Slurm --mem, Kubernetes).",
        )
    if len(facts.gpus.devices) > 1 and machine.shm is not None and machine.shm < _SHM_OF_NCCL:
        yield warning(
            "memory",
            what=f"/dev/shm is {gib(machine.shm)}, and there are {len(facts.gpus.devices)} GPUs",
            why="NCCL keeps buffers there between ranks of a host, and fails where they do not fit.",
            fix="docker --shm-size=1g; in Kubernetes an emptyDir with medium: Memory at /dev/shm.",
        )


def check_limits(facts: Facts) -> Iterator[Problem]:
    """ulimits that ranks would run into."""
    limits = facts.limits
    ranks = max(2, facts.launched.local_size)
    need = facts.machine.arena * ranks + _TORCH_BYTES
    if limits.address_space is not None and facts.build.core_works and limits.address_space < need:
        fits = (limits.address_space - _TORCH_BYTES) // (ranks << 20)
        yield error(
            "limits",
            what=f"ulimit -v is {gib(limits.address_space)}; {ranks} ranks on a host need {gib(need)}",
            why="A rank maps the shared memory of all ranks of its host: addresses, not memory in use.",
            fix="ulimit -v unlimited" + (f", or DISTLIB_ARENA_MB={fits}" if fits >= 64 else ""),
        )
    files = max(1024, 256 + 8 * facts.launched.size)
    if limits.open_files is not None and limits.open_files < files:
        yield warning(
            "limits",
            what=f"ulimit -n is {limits.open_files}; a rank may open {files} files and sockets",
            why="'Too many open files' then ends a rank, often as groups or data loaders are made.",
            fix=f"ulimit -n {max(files, 65536)}",
        )
    if facts.fabric.devices and limits.locked_memory is not None:
        yield warning(
            "limits",
            what=f"ulimit -l is {gib(limits.locked_memory)}, and this host has RDMA devices",
            why="RDMA locks what it sends; where it may not, NCCL fails or falls back to TCP.",
            fix="ulimit -l unlimited (docker --ulimit memlock=-1; /etc/security/limits.conf)",
        )


def check_kernel(facts: Facts) -> Iterator[Problem]:
    """Services that the core needs; without the core nobody asks for them."""
    for name, reason in facts.kernel.model_dump().items():
        if reason and facts.build.core_works:
            yield error(
                "kernel",
                what=f"{name.replace('_', ' ')} cannot be used: {reason}",
                why="Shared memory needs it: ranks that share a host will fail as they start.",
                fix="Allow it in the container's seccomp profile, or set DISTLIB_CORE=0 (gloo, slower).",
            )


def check_network(facts: Facts) -> Iterator[Problem]:
    """The interface that carries what goes between hosts."""
    network, launched = facts.network, facts.launched
    if network.error:
        yield error(
            "network",
            what=network.error,
            why="Groups that span hosts cannot be made.",
            fix="Set it to one of these, or unset it.",
        )
    elif network.master and launched.size > launched.local_size:
        address = network.addresses[network.chosen] if network.chosen else network.by_name
        if (address or "").startswith("127."):
            reason = network.reason if network.chosen else "this host's name"
            yield error(
                "network",
                what=f"the address for other hosts is {address} ({reason})",
                why="It leads other hosts to themselves: groups that span hosts cannot be made.",
                fix="Set DISTLIB_INTERFACE to the interface that joins the hosts.",
            )
    if network.lookup > _SLOW_LOOKUP:
        yield warning(
            "network",
            what=f"the name server took {network.lookup:.0f} s to say what 127.0.0.1 is called, or that it cannot",
            why="torch asks it that of each rank's address, and its store serves nobody meanwhile: jobs start slowly.",
            fix="Mend /etc/resolv.conf, or set RES_OPTIONS='timeout:1 attempts:1' for all ranks.",
        )


def split_fix(message: str) -> tuple[str, str]:
    """A message of distlib's own as (what is wrong, the fix); the fix is empty where the message has none."""
    what, _, fix = message.partition(" Fix: ")
    fix = re.sub(r"\s+", " ", fix).strip()
    return what.strip().rstrip("."), fix[:1].upper() + fix[1:]

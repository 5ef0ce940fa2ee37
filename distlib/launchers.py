"""Environment in, `Launch` out: one small class per launcher, pure, without torch or MPI.

A rank may carry the variables of several launchers, because launchers start one another:

    sbatch -> srun -> mpirun -> torchrun -> the script        (any part of this chain)

The innermost one started the script, so it counts: torchrun before Open MPI and MPICH, these before Slurm.
SageMaker is the place rather than the starter: its containers run torchrun or mpirun, whose numbers then
count, and the launch is called "sagemaker". Without either it is one rank per container, as SageMaker
documents.
"""

import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Env = Mapping[str, str]


class LaunchError(RuntimeError):
    """A launcher's variable is missing or contradicts another. Names it, the launcher and the fix."""


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    `local_rank` and `local_size` are the launcher's claim, good for choosing a GPU and nothing else: which
    ranks share a host is proved later. `master_addr` or `master_port` None: the ranks must still agree on it.
    `job` tells this job from another one that meets at the same address; empty if the launcher gives none.
    """

    launcher: str  # "torchrun" | "openmpi" | "mpich" | "slurm" | "sagemaker" | "single"
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str | None
    master_port: int | None
    job: str = ""


def detect(environ: Env = os.environ) -> Launch:
    """The launch that `environ` describes. Called by any rank, alone; raises LaunchError."""
    present = [launcher for launcher in LAUNCHERS if launcher.present(environ)]
    inner, *outer = present
    launch = inner.read(environ)
    for other in outer:
        if not inner.may_run_inside(other, environ):
            _must_agree(launch, other.read(environ))
    return replace(launch, launcher=launcher_name(environ))


def launcher_name(environ: Env = os.environ) -> str:
    """The launcher's name alone; reads no numbers and so never raises."""
    if SageMaker().present(environ):
        return SageMaker.name
    return next(launcher.name for launcher in LAUNCHERS if launcher.present(environ))


def _must_agree(inner: Launch, outer: Launch) -> None:
    if (inner.rank, inner.size) != (outer.rank, outer.size):
        raise LaunchError(
            f"two launchers disagree: {inner.launcher} says rank {inner.rank} of {inner.size}, "
            f"{outer.launcher} says rank {outer.rank} of {outer.size}. Fix: unset the variables of the one "
            f"that did not start this script: {', '.join(VARIABLES[inner.launcher])}, or "
            f"{', '.join(VARIABLES[outer.launcher])}."
        )


class Launcher(ABC):
    """What all launchers share: reading variables so that each complaint names variable, launcher and fix."""

    name: str
    fix: str

    @abstractmethod
    def present(self, env: Env) -> bool:
        """Whether this launcher left its mark in `env`."""

    @abstractmethod
    def read(self, env: Env) -> Launch:
        """The launch it describes; LaunchError when a variable is missing or wrong."""

    def may_run_inside(self, other: "Launcher", env: Env) -> bool:
        """Whether `other` may have started this launcher, so that its numbers count daemons, not ranks."""
        return True

    def error(self, what: str) -> LaunchError:
        return LaunchError(f"{self.name}: {what}. Fix: {self.fix}.")

    def text(self, env: Env, *names: str) -> str:
        """The first of `names` that is set."""
        for name in names:
            if env.get(name):
                return env[name]
        seen = [name for name in VARIABLES[self.name] if env.get(name)]
        raise self.error(f"{' or '.join(names)} is not set (seen: {', '.join(seen) or 'nothing else'})")

    def integer(self, env: Env, *names: str) -> int:
        value = self.text(env, *names)
        if not re.fullmatch(r"\d+", value.strip(), re.ASCII):
            name = next(name for name in names if env.get(name))
            raise self.error(f"{name}={value!r} is not a whole number >= 0")
        return int(value)

    def four_integers(self, env: Env) -> tuple[int, int, int, int]:
        """Rank, size, local rank and local size, where each is a variable of its own."""
        rank, size, local_rank, local_size = VARIABLES[self.name]
        return (
            self.integer(env, rank),
            self.integer(env, size),
            self.integer(env, local_rank),
            self.integer(env, local_size),
        )

    def port(self, env: Env) -> int | None:
        if not env.get("MASTER_PORT"):
            return None
        port = self.integer(env, "MASTER_PORT")
        if not 1 <= port <= 65535:
            raise self.error(f"MASTER_PORT={port} is not a port (1 to 65535)")
        return port

    def launch(self, numbers: tuple[int, int, int, int], addr: str | None, port: int | None, job: str = "") -> Launch:
        """A `Launch`, after checking that its rank, size, local rank and local size fit together."""
        rank, size, local_rank, local_size = numbers
        rank_name, size_name, local_rank_name, local_size_name = VARIABLES[self.name]
        for small, small_name, large, large_name in (
            (rank, rank_name, size, size_name),
            (local_rank, local_rank_name, local_size, local_size_name),
        ):
            if small >= large:
                raise self.error(f"{small_name}={small} must be below {large_name}={large}")
        if local_size > size:
            raise self.error(f"{local_size_name}={local_size} exceeds {size_name}={size}")
        return Launch(self.name, rank, size, local_rank, local_size, addr, port, job)


def _master_addr(env: Env) -> str | None:
    return env.get("DISTLIB_MASTER_ADDR") or env.get("MASTER_ADDR") or None


# Rank, size, local rank, local size, as each launcher spells them.
VARIABLES: dict[str, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),
    "sagemaker": ("SM_CURRENT_HOST", "SM_HOSTS", "SM_CURRENT_HOST", "SM_NUM_GPUS"),
}


class Torchrun(Launcher):
    """torchrun, and scripts that set the same variables by hand (torch's env:// convention)."""

    name = "torchrun"
    fix = (
        "start the script with `torchrun --nproc-per-node N script.py`, which sets RANK, WORLD_SIZE, "
        "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; or set all six; or unset RANK"
    )

    def present(self, env: Env) -> bool:
        return bool(env.get("RANK") or env.get("TORCHELASTIC_RUN_ID"))

    def may_run_inside(self, other: Launcher, env: Env) -> bool:
        # Set by hand, RANK may be a leftover: then it must agree with the launcher around it.
        return bool(env.get("TORCHELASTIC_RUN_ID")) or isinstance(other, SageMaker | Single)

    def read(self, env: Env) -> Launch:
        numbers = self.four_integers(env)
        self.integer(env, "MASTER_PORT")
        addr = self.text(env, "MASTER_ADDR")
        return self.launch(numbers, addr, self.port(env), env.get("TORCHELASTIC_RUN_ID", ""))


class OpenMPI(Launcher):
    """Open MPI's mpirun. OMPI_COMM_WORLD_NODE_RANK is not read: it is no node index."""

    name = "openmpi"
    fix = "start the script with `mpirun -np N python script.py`, which sets all OMPI_COMM_WORLD_ variables"

    def present(self, env: Env) -> bool:
        return bool(env.get("OMPI_COMM_WORLD_RANK") or env.get("OMPI_COMM_WORLD_SIZE"))

    def may_run_inside(self, other: Launcher, env: Env) -> bool:
        return not isinstance(other, MPICH)

    def read(self, env: Env) -> Launch:
        numbers = self.four_integers(env)
        return self.launch(numbers, _master_addr(env), self.port(env), env.get("PMIX_NAMESPACE", ""))


class MPICH(Launcher):
    """The Hydra mpiexec of MPICH and Intel MPI.

    srun --mpi=pmi2 sets PMI_RANK too, without MPI_LOCALRANKID: that is Slurm's launch, not Hydra's.
    """

    name = "mpich"
    fix = "start the script with `mpiexec -n N python script.py`, which sets PMI_ and MPI_LOCAL variables"

    def present(self, env: Env) -> bool:
        return bool(env.get("PMI_RANK")) and (bool(env.get("MPI_LOCALRANKID")) or not Slurm().present(env))

    def read(self, env: Env) -> Launch:
        numbers = self.four_integers(env)
        return self.launch(numbers, _master_addr(env), self.port(env))


class Slurm(Launcher):
    """srun. What it did not launch (sbatch's script, salloc's shell) has no step id, or a reserved one."""

    name = "slurm"
    fix = "start the script with `srun python script.py` and leave the SLURM_ variables as srun sets them"
    reserved_steps = 0xFFFFFFF0  # the highest id of an ordinary step (slurm.h, SLURM_MAX_NORMAL_STEP_ID)

    def present(self, env: Env) -> bool:
        step = env.get("SLURM_STEP_ID") or env.get("SLURM_STEPID") or ""
        return step.isascii() and step.isdigit() and int(step) <= self.reserved_steps

    def read(self, env: Env) -> Launch:
        job = self.integer(env, "SLURM_JOB_ID", "SLURM_JOBID")
        step = self.integer(env, "SLURM_STEP_ID", "SLURM_STEPID")
        # Sixty-one steps apart, so jobs that follow each other on a host do not share a port; and below the
        # kernel's range for outgoing connections.
        derived_port = 10_000 + (61 * job + step) % 20_000
        numbers = (
            self.integer(env, "SLURM_PROCID"),
            self.integer(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
            self.integer(env, "SLURM_LOCALID"),
            self._tasks_on_this_node(env),
        )
        addr, port = _master_addr(env) or self._first_host(env), self.port(env) or derived_port
        return self.launch(numbers, addr, port, f"{job}.{step}")

    def _tasks_on_this_node(self, env: Env) -> int:
        counts = self.text(env, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
        node = self.integer(env, "SLURM_NODEID")
        try:
            return expand_counts(counts)[node]
        except ValueError as error:
            raise self.error(f"SLURM_TASKS_PER_NODE: {error}") from error
        except IndexError as error:
            raise self.error(f"SLURM_TASKS_PER_NODE={counts} has no node SLURM_NODEID={node}") from error

    def _first_host(self, env: Env) -> str:
        """Where rank 0 runs: the step's first host.

        Where srun was typed (SLURM_LAUNCH_NODE_IPADDR) is often a login node, so it comes last.
        """
        hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
        if not hosts:
            return self.text(env, "SLURM_LAUNCH_NODE_IPADDR", "SLURM_JOB_NODELIST")
        try:
            first, *others = expand_hostlist(hosts)
        except ValueError as error:
            raise self.error(f"SLURM_JOB_NODELIST: {error}") from error
        return first if others else "127.0.0.1"


class SageMaker(Launcher):
    """A SageMaker training container without torchrun or mpirun inside: one rank per container.

    To use every GPU of a container, give the estimator
    `distribution={"torch_distributed": {"enabled": True}}`, which starts torchrun.
    """

    name = "sagemaker"
    fix = "leave SM_HOSTS, SM_CURRENT_HOST and SM_RESOURCE_CONFIG as SageMaker's training toolkit sets them"
    default_port = 7777  # the port of SageMaker's PyTorch containers

    def present(self, env: Env) -> bool:
        return bool(env.get("SM_HOSTS") or env.get("SM_RESOURCE_CONFIG"))

    def read(self, env: Env) -> Launch:
        config = self._json(env, "SM_RESOURCE_CONFIG", dict) if env.get("SM_RESOURCE_CONFIG") else {}
        hosts = self._json(env, "SM_HOSTS", list) if env.get("SM_HOSTS") else config.get("hosts")
        host = env.get("SM_CURRENT_HOST") or config.get("current_host")
        if not hosts or not host:
            missing = "SM_CURRENT_HOST" if hosts else "SM_HOSTS"
            raise self.error(f"{missing} is not set, and SM_RESOURCE_CONFIG does not say it either")
        if host not in hosts:
            raise self.error(f"SM_CURRENT_HOST={host} is not among SM_HOSTS={hosts}")
        if env.get("SM_NUM_GPUS"):
            self.integer(env, "SM_NUM_GPUS")
        addr, port = _master_addr(env) or hosts[0], self.port(env) or self.default_port
        return self.launch((hosts.index(host), len(hosts), 0, 1), addr, port)

    def _json(self, env: Env, name: str, kind: type) -> Any:
        try:
            value = json.loads(env[name])
        except json.JSONDecodeError as error:
            raise self.error(f"{name}={env[name]!r} is not JSON ({error})") from error
        if not isinstance(value, kind):
            raise self.error(f"{name}={env[name]!r} is not a JSON {kind.__name__}")
        return value


class Single(Launcher):
    """Plain `python script.py`: a world of one."""

    name = "single"
    fix = "start the script with torchrun, mpirun or srun, or unset the variable to run alone"

    def present(self, env: Env) -> bool:
        return True

    def read(self, env: Env) -> Launch:
        for name, alone in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("PMI_SIZE", "1")):
            if env.get(name, alone) != alone:
                raise self.error(f"{name}={env[name]} promises other ranks, but no launcher gave a rank")
        return Launch(self.name, 0, 1, 0, 1, None, None)


# From the innermost outwards; exactly one line per launcher, and Single is always present.
LAUNCHERS: tuple[Launcher, ...] = (Torchrun(), OpenMPI(), MPICH(), Slurm(), SageMaker(), Single())


def expand_counts(text: str) -> list[int]:
    """Slurm's counts per node, written out: "4(x2),3" -> [4, 4, 3]. Raises ValueError."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip(), re.ASCII)
        if not match:
            raise ValueError(f"{text!r} is not of the form 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hostlist(text: str) -> list[str]:
    """Slurm's host names, written out: "a[01-02]x[1-2],b" -> a01x1 a01x2 a02x1 a02x2 b. Raises ValueError."""
    items = re.findall(r"(?:[^][,\s]|\[[^][]*\])+", text)
    if not items or ",".join(items) != text.strip():
        raise ValueError(f"{text!r} is not a list of host names such as a[01-03,7],b")
    hosts: list[str] = []
    for item in items:
        literals_and_ranges = re.split(r"\[(.*?)\]", item)  # alternating, a literal first
        choices = [[part] if i % 2 == 0 else _numbers(part) for i, part in enumerate(literals_and_ranges)]
        hosts += map("".join, itertools.product(*choices))
    return hosts


def _numbers(text: str) -> list[str]:
    """The numbers in one bracket, with their leading zeros: "01-03,7" -> 01, 02, 03, 7."""
    numbers: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item, re.ASCII)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"[{text}] is not a list of ranges such as [01-03,7]")
        first, last = match[1], match[2] or match[1]
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers

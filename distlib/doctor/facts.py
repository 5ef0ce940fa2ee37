"""What the doctor finds out, as plain data: facts of one process, the self-test, problems, the report."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

GIB = 2**30


class Versions(BaseModel):
    """Software. None: not there."""

    distlib: str
    python: str
    system: str  # kernel, release and machine
    torch: str
    has_distributed: bool  # torch.distributed
    has_gloo: bool
    cuda: str | None  # that torch was built for
    nccl: str | None  # that torch was built for
    nccl_loaded: str = ""  # that is in this process; empty: built into torch, or not known
    nccl_file: str = ""
    mpi4py: str | None
    mpirun: str | None  # what `mpirun --version` says first


class Gpu(BaseModel):
    """A GPU that torch can use."""

    name: str
    memory: int = 0  # bytes
    capability: str = ""  # such as 9.0
    identity: str = ""


class Gpus(BaseModel):
    """GPUs that torch can use, signs of some that it cannot, and how they are joined."""

    devices: list[Gpu] = []
    has_driver: bool = False  # the kernel has an NVIDIA device
    driver: str = ""  # its version
    driver_is_open: bool = False  # its kernel module is the open one
    driver_cuda: str = ""  # the newest CUDA that it serves
    complaint: str = ""  # torch's own, while looking for them
    strangers: list[tuple[int, int]] = []  # pairs that cannot access each other's memory
    links: dict[str, int] = {}  # pairs by the kind of way between them, in nvidia-smi's words: NV18, PHB, SYS
    memory_errors: list[int] = []  # GPUs with errors that ECC could not correct
    mine: str = ""  # in a job: the identity of the GPU that this rank uses


class Build(BaseModel):
    """What was compiled when distlib was installed, and what of it works here."""

    is_built: bool
    compiler: str = ""
    core_works: bool
    core_why_not: str = ""
    core_refuses: str = ""  # a setting that it cannot follow: ranks fail
    simd: str = ""
    cuda_built: bool = False
    cuda_why_not: str = ""
    cuda_compiler: str = ""  # what nvcc says of itself
    cuda_architectures: list[str] = []  # machine code (sm_90) and PTX (compute_100); empty: unknown
    cuda_error: str = ""  # it was compiled, but cannot be loaded


class Launched(BaseModel):
    """How this process was started."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    error: str = ""  # the launcher's variables are incomplete or contradict one another
    threads: int = 1  # that torch computes with in this process


class Machine(BaseModel):
    """Cores and memory (bytes) that this process may use."""

    host: str
    cores: int
    affinity: list[int]  # the cores that this process may run on
    cores_quota: float | None = None  # of the container
    memory: int
    memory_available: int  # by the machine and the container
    memory_limit: int | None = None  # of the container
    arena: int = 0  # address space that each rank asks for, for shared memory
    shm: int | None = None  # size of /dev/shm; None: there is none


class Limits(BaseModel):
    """ulimits in force. None: unlimited."""

    address_space: int | None = None  # -v, bytes
    open_files: int | None = None  # -n
    locked_memory: int | None = None  # -l, bytes


class Kernel(BaseModel):
    """Kernel services that shared memory needs, tried out. Empty: it works; else why not."""

    memfd: str = ""
    futex: str = ""
    abstract_sockets: str = ""


class Network(BaseModel):
    """Interfaces that are up, and which one carries what goes between hosts."""

    addresses: dict[str, str] = {}
    master: str | None = None  # where the ranks meet
    chosen: str | None = None  # None: with a master, gloo takes the one that the host's name resolves to
    reason: str = ""
    error: str = ""
    by_name: str | None = None  # the address that the host's name resolves to
    lookup: float = 0.0  # seconds until it is known what an address of this host is called, or that nobody knows


class NcclSaid(BaseModel):
    """What NCCL's log tells of the network that it took."""

    network: str = ""  # Libfabric, IB or Socket
    has_ofi_line: bool = False  # NET/OFI: the plugin for libfabric spoke
    plugin: str = ""  # version of aws-ofi-nccl
    provider: str = ""  # of libfabric, such as efa
    gpudirect: bool = False  # GPUs send without a copy in host memory


class Fabric(BaseModel):
    """RDMA devices, and what NCCL has to use them."""

    devices: dict[str, str] = {}  # driver by device, such as efa or mlx5_core
    ports: dict[str, str] = {}  # state by device: "ACTIVE, 400 Gb/sec, InfiniBand"
    closed: list[str] = []  # devices that this process may not use
    plugins: dict[str, str] = {}  # libnccl-net*.so on the library path -> version of aws-ofi-nccl; "": another plugin
    faults: dict[str, str] = {}  # of those plugins: what keeps them from being loaded
    libfabric: str | None = None
    gpudirect: list[str] = []  # kernel modules that let a network card read a GPU's memory
    gdrcopy: bool = False  # its device is here
    variables: dict[str, str] = {}  # of the environment: FI_*, NCCL_*, RDMAV_*, CUDA_DEVICE_MAX_CONNECTIONS
    said: NcclSaid | None = None  # in a job with GPUs, during the self-test


class Facts(BaseModel):
    """All that one process finds out without talking to another."""

    versions: Versions
    gpus: Gpus
    build: Build
    launched: Launched
    machine: Machine
    limits: Limits
    kernel: Kernel
    network: Network
    fabric: Fabric
    settings: dict[str, str] = {}  # DISTLIB_* variables
    namesakes: list[str] = []  # traces of the packaging library called distlib


class SelfTest(BaseModel):
    """Collectives tried out on real ranks. Bandwidths: tensor bytes over seconds."""

    ranks: int
    in_job: bool  # on the job's own ranks; else on ranks that the doctor started
    error: str = ""  # what failed, and on which rank
    right: list[str] = []  # operations with the expected result on every rank
    wrong: list[str] = []
    small_bytes: int = 0
    small_seconds: float = 0
    large_bytes: int = 0
    registered_seconds: float = 0  # in registered memory
    ordinary_seconds: float = 0  # the same in an ordinary tensor


class Node(BaseModel):
    """Ranks that share a host."""

    host: str
    ranks: list[int]


class Problem(BaseModel):
    """Something wrong. An error keeps jobs from running, or from being right; a warning makes them slower."""

    level: Literal["error", "warning"]
    topic: str  # the line of the report that it belongs to
    what: str
    why: str
    fix: str
    hosts: list[str] = []  # where; empty: everywhere


def error(topic: str, *, what: str, why: str, fix: str) -> Problem:
    """What keeps jobs from running, or from being right."""
    return Problem(level="error", topic=topic, what=what, why=why, fix=fix)


def warning(topic: str, *, what: str, why: str, fix: str) -> Problem:
    """What makes jobs slower, or fail later."""
    return Problem(level="warning", topic=topic, what=what, why=why, fix=fix)


class Report(BaseModel):
    """The doctor's findings; `facts` are rank 0's."""

    facts: Facts
    nodes: list[Node] = []  # of the job; empty outside one
    selftest: SelfTest | None = None
    problems: list[Problem] = []

    @property
    def exit_code(self) -> int:
        """1 if there is an error, else 0."""
        return int(any(problem.level == "error" for problem in self.problems))

"""`init()`: launcher in, `World` out; the process group in between. `shutdown()` undoes it."""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from distlib.cuda import library
from distlib.launchers import Launch, detect, launcher_name
from distlib.rendezvous import meet
from distlib.roll_call import Patience, leave_together
from distlib.topology import Topology

DEFAULT_TIMEOUT = timedelta(minutes=10)
LONGEST_TIMEOUT = timedelta(days=3650)


@dataclass(frozen=True)
class World:
    """This process's place among all ranks. As a context manager it shuts down at the end of the block."""

    rank: int
    topology: Topology  # which ranks share a host: proved, or pretended by `nodes`
    device: torch.device  # cuda:i, or cpu
    launcher: str  # "torchrun" | "openmpi" | "mpich" | "slurm" | "sagemaker" | "single"

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.topology.size

    @property
    def local_rank(self) -> int:
        """This rank's place among the ranks of its node."""
        return self.topology.local_ranks(self.rank).index(self.rank)

    @property
    def local_size(self) -> int:
        """Ranks on this rank's host."""
        return len(self.topology.local_ranks(self.rank))

    @property
    def node_rank(self) -> int:
        """The number of this rank's host."""
        return self.topology.node_of(self.rank)

    @property
    def node_count(self) -> int:
        """Hosts in all."""
        return len(self.topology.nodes)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutdown()


@dataclass
class _Live:
    """What init() made, so that shutdown() can undo exactly that."""

    world: World
    group: dist.ProcessGroup
    owned: bool  # init() made the group, so shutdown() destroys it
    settings: dict[str, object]
    nodes_before: str | None = None  # DISTLIB_NODES before init() set it
    pid: int = field(default_factory=os.getpid)


_live: _Live | None = None


def init(backend: str = "auto", timeout: timedelta = DEFAULT_TIMEOUT, nodes: int | None = None) -> World:
    """Join the ranks of this job, whatever launcher started them. Every rank must call it, alike.

    backend: "auto" is "cpu:distlib,cuda:nccl" with a GPU, else "distlib"; or any other of torch's.
    timeout: for the ranks to meet, and for each collective afterwards.
    nodes: pretend that one host is this many nodes, for tests; None: DISTLIB_NODES, else the real hosts.

    Called again it returns the same World; an argument that is then neither the first call's nor the default
    raises ValueError. A process group that the script has made already is adopted, and outlives shutdown().
    Raises LaunchError; and RuntimeError on every rank within `timeout` when ranks are missing, disagree, or
    meet a stale rendezvous.
    """
    global _live
    _check_arguments(backend, timeout, nodes)
    asked: dict[str, object] = {}
    if backend != "auto":
        asked["backend"] = backend
    if timeout != DEFAULT_TIMEOUT:
        asked["timeout"] = timeout
    if nodes is not None:
        asked["nodes"] = nodes

    if _live is not None and _live.pid != os.getpid():
        raise RuntimeError(
            f"this process was forked from rank {_live.world.rank} after distlib.init() and cannot use its "
            f"connections. Fix: call distlib.init() after forking, or start processes by spawn."
        )
    if _live is not None and not _is_current(_live.group):
        shutdown()  # the script has destroyed the group by itself
    if _live is None:
        _live = _adopt() if dist.is_initialized() else _start(backend, timeout, nodes)
        atexit.unregister(shutdown)
        atexit.register(shutdown)
    for name, value in asked.items():
        if _live.settings[name] != value:
            raise ValueError(
                f"distlib.init({name}={value!r}), but this process already runs with "
                f"{name}={_live.settings[name]!r}. Fix: pass it to the first distlib.init() or "
                f"init_process_group(), or call distlib.shutdown() first."
            )
    return _live.world


_unfinished: list[Callable[[], None]] = []


def before_shutdown(finish: Callable[[], None]) -> None:
    """Have `finish` called at the beginning of every shutdown(): what goes on in the background needs the groups."""
    if finish not in _unfinished:
        _unfinished.append(finish)


def shutdown() -> None:
    """Destroy the process group if init() made it. Every rank calls it; calling again does nothing.

    Waits for saves in the background, and raises what went wrong in one that nobody waited for.
    """
    global _live
    live, _live = _live, None
    if live is None or live.pid != os.getpid():
        return
    try:
        for finish in _unfinished:
            finish()
    finally:
        if live.owned:
            _restore_nodes(live.nodes_before)
            if _is_current(live.group):
                dist.destroy_process_group()


def _start(backend: str, timeout: timedelta, nodes: int | None) -> _Live:
    """The steps from a lone process to a world."""
    _tell_cuda()
    launch = detect()
    nodes_before = os.environ.get("DISTLIB_NODES")
    nodes = _pretended_nodes(nodes, nodes_before, launch.size)
    if backend == "auto":
        backend = "cpu:distlib,cuda:nccl" if torch.cuda.is_available() else "distlib"
    device = _pick_device(backend, launch)
    gpu = _gpu_identity(device) if _needs_own_gpu(backend) else None
    record = {"backend": backend, "nodes": nodes, "gpu": gpu}

    store, where = meet(launch, record, timeout)
    if nodes is not None:
        os.environ["DISTLIB_NODES"] = str(nodes)  # the backend reads it as it finds the hosts
    try:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=launch.rank, world_size=launch.size)
        topology = _proved_topology()
        if nodes is not None and len(topology.nodes) != nodes:
            raise RuntimeError(
                f"nodes={nodes} took no effect: the topology has {len(topology.nodes)} nodes. "
                f"Fix: use backend='distlib', or leave nodes (DISTLIB_NODES) unset."
            )
        leave_together(store, where, Patience(launch, timeout))
    except BaseException:
        _restore_nodes(nodes_before)
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    world = World(launch.rank, topology, device, launch.launcher)
    settings = {"backend": backend, "timeout": timeout, "nodes": nodes}
    return _Live(world, _world_group(), True, settings, nodes_before)


def _adopt() -> _Live:
    """A world over the process group that the script made; the script has chosen its GPU too."""
    uses_cuda = _serves_cuda(dist.get_backend())
    device = torch.device("cuda", torch.cuda.current_device()) if uses_cuda else torch.device("cpu")
    topology = _proved_topology()
    settings = {
        "backend": dist.get_backend(),
        "timeout": "the process group's own",
        "nodes": len(topology.nodes),
    }
    return _Live(World(dist.get_rank(), topology, device, launcher_name()), _world_group(), False, settings)


def _proved_topology() -> Topology:
    """Which ranks share a host, as the backend has proved it. Every rank must call it."""
    from distlib.comm.group import Group  # as late as that: `import distlib` stays quick

    return Group.of(None).topology


def _check_arguments(backend: str, timeout: timedelta, nodes: int | None) -> None:
    if not isinstance(backend, str) or not backend:
        raise ValueError(f"backend={backend!r} must name a backend, such as 'auto', 'distlib' or 'gloo'")
    if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
        raise ValueError(f"timeout={timeout!r} must be a positive timedelta, such as timedelta(minutes=10)")
    if timeout > LONGEST_TIMEOUT:
        raise ValueError(f"timeout={timeout!r} must be at most {LONGEST_TIMEOUT.days} days: no clock goes much further")
    if nodes is not None and (not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1):
        raise ValueError(f"nodes={nodes!r} must be a whole number from 1 to the number of ranks, or None")


def _pretended_nodes(argument: int | None, variable: str | None, size: int) -> int | None:
    """How many nodes to pretend; None: none. Argument and DISTLIB_NODES must not contradict each other."""
    if variable and not (variable.isascii() and variable.isdigit()):
        raise ValueError(f"DISTLIB_NODES={variable!r} is no whole number. Fix: set 1 to {size}, or unset it.")
    if variable and argument is not None and int(variable) != argument:
        raise ValueError(f"nodes={argument}, but DISTLIB_NODES={variable}. Fix: unset one of them.")
    nodes = int(variable) if variable else argument
    if nodes is not None and not 1 <= nodes <= size:
        name = "DISTLIB_NODES" if variable else "nodes"
        raise ValueError(f"{name}={nodes} is not possible with {size} ranks. Fix: choose 1 to {size}.")
    return nodes


def _restore_nodes(before: str | None) -> None:
    if before is None:
        os.environ.pop("DISTLIB_NODES", None)
    else:
        os.environ["DISTLIB_NODES"] = before


def _tell_cuda() -> None:
    """What kernels that wait for other ranks need. CUDA reads it when this process first asks for a GPU."""
    # Streams that share a queue of the GPU run in turn. Where a kernel waits for another rank, what that rank waits for
    # must not be behind it; there are streams for each group, and for each neighbour in a pipeline. CUDA's default: 8.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    # A kernel that is loaded as it is first used may have to wait until all others are over (CUDA's default).
    if library.present():
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


def _pick_device(backend: str, launch: Launch) -> torch.device:
    """The GPU at this rank's place among those it sees (one, if its launcher hides the rest), or the CPU."""
    if not _serves_cuda(backend):
        return torch.device("cpu")
    device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _serves_cuda(backend: str) -> bool:
    """Whether a backend communicates tensors on GPUs: a plain name does, except "distlib"."""
    named = "cuda:" in backend if ":" in backend else backend != "distlib"
    return named and torch.cuda.is_available()


def _needs_own_gpu(backend: str) -> bool:
    """Whether no two ranks may share a GPU: NCCL refuses that, and only distlib's own kernels can do without NCCL."""
    return "nccl" in backend and not ("distlib" in backend and library.present())


def _gpu_identity(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _is_current(group: dist.ProcessGroup) -> bool:
    return dist.is_initialized() and _world_group() is group


def _world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "asked for only after init_process_group"
    return group

"""Bring the ranks of one launch together: `Launch` in, a key-value store that all of them share out.

    open a store     torchrun's own; a TCPStore at the launcher's address; or, under MPI, one whose address
                     rank 0 chooses and tells by mpi4py
    call the roll    every rank answers with its settings, and all get one verdict (roll_call.py)

Each step ends within the timeout, also when the other side is silent.
"""

import ctypes
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import HashStore, PrefixStore, Store, TCPStore, rendezvous

from distlib.launchers import Launch
from distlib.roll_call import Patience, Record, call_roll

OTHER_PORT = {
    "torchrun": "give torchrun another --master-port, or set another MASTER_PORT",
    "slurm": "export another MASTER_PORT before srun",
    "sagemaker": "set another MASTER_PORT",
}
OTHER_ADDRESS = {
    "torchrun": "check MASTER_ADDR (torchrun --master-addr or --rdzv-endpoint)",
    "slurm": "export MASTER_ADDR before srun: an address of the step's first host",
    "sagemaker": "set MASTER_ADDR: the first host of SM_HOSTS",
}
MPI_ADDRESS = "set DISTLIB_MASTER_ADDR to an address of rank 0's host that the other hosts reach"

# One store per launch for the life of the process: rank 0 serves it, and a rank that calls init() again must
# not meet the old server as it goes away.
_opened: dict[tuple[int, Launch], "Meeting"] = {}


class Meeting(NamedTuple):
    """A store that all ranks share."""

    store: Store
    where: str  # "address:port", for messages


def meet(launch: Launch, record: Record, timeout: timedelta) -> Meeting:
    """A store shared by all `launch.size` ranks and still empty, once all of them are there.

    Every rank calls it. Raises RuntimeError within `timeout`, on every rank, naming rank, launcher, address,
    port, the ranks that are missing or differ, and the fix.
    """
    if launch.size == 1:
        return Meeting(HashStore(), "")
    patience = Patience(launch, timeout)
    place = (os.getpid(), launch)  # a forked child must not use its parent's connection
    if place not in _opened:
        _opened[place] = _open(launch, patience)
    store, where = _opened[place]
    job = PrefixStore(f"distlib/{launch.job}", store)
    return Meeting(PrefixStore(call_roll(job, where, record, patience), job), where)


# ---- open a store ------------------------------------------------------------------------------------------


def _open(launch: Launch, patience: Patience) -> Meeting:
    if launch.master_addr is None or launch.master_port is None:
        return _open_by_mpi(launch, patience)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _connect(launch.master_addr, launch.master_port, patience, _torchrun_client)
    if launch.rank == 0:
        return _serve(launch.master_addr, launch.master_port, patience)
    return _connect(launch.master_addr, launch.master_port, patience)


def _serve(addr: str, port: int, patience: Patience) -> Meeting:
    """Rank 0's store. Port 0: the kernel picks a free one."""
    launcher = patience.launch.launcher
    where = f"{addr}:{port}" if port else addr

    def serve() -> TCPStore:
        return TCPStore(addr, port, None, True, timedelta(seconds=patience.left), wait_for_workers=False)

    def late() -> RuntimeError:
        return patience.error(
            f"serves the rendezvous, but does not reach itself at {where} within {patience.waited}",
            OTHER_ADDRESS.get(launcher, MPI_ADDRESS),
        )

    try:
        store = patience.run(serve, late)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise patience.error(
            f"cannot serve the rendezvous at {where}: the port is in use, by another job or by a "
            f"process left over from one",
            OTHER_PORT.get(launcher, "unset MASTER_PORT"),
        ) from error
    return Meeting(store, f"{addr}:{store.port}")


def _tcp_client(addr: str, port: int, seconds: float) -> Store:
    return TCPStore(addr, port, None, False, timedelta(seconds=seconds))


def _torchrun_client(addr: str, port: int, seconds: float) -> Store:
    """The store that torchrun's agent serves; torch takes the address from the environment again."""
    return next(rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]


def _connect(
    addr: str, port: int, patience: Patience, client: Callable[[str, int, float], Store] = _tcp_client
) -> Meeting:
    """A client of the store at addr:port, which may still have to start."""
    where = f"{addr}:{port}"
    other_address = OTHER_ADDRESS.get(patience.launch.launcher, MPI_ADDRESS)
    other_port = OTHER_PORT.get(patience.launch.launcher, "unset MASTER_PORT")

    # torch retries for up to twice its timeout and prints a C++ stack each time, so the waiting is done here.
    while True:
        try:
            socket.create_connection((addr, port), timeout=patience.left).close()
            break
        except OSError as error:
            if patience.left < 0.1:
                raise patience.error(
                    f"nobody answers at {where}, where rank 0 should serve the rendezvous, within "
                    f"{patience.waited} ({error})",
                    f"see whether rank 0 started; {other_address}; open the port between the hosts",
                ) from error
            time.sleep(0.05)

    def late() -> RuntimeError:
        return patience.error(
            f"what listens at {where} is silent for {patience.waited}: another program, or rank 0 is stopped",
            f"{other_port}; or {other_address}",
        )

    return Meeting(patience.run(lambda: client(addr, port, patience.left), late), where)


# ---- MPI: rank 0 chooses an address and tells it by mpi4py -------------------------------------------------


def _open_by_mpi(launch: Launch, patience: Patience) -> Meeting:
    """mpi4py carries one message, rank 0's address; then MPI is finalised, unless the script had started it.

    Left running, MPI would make a failing rank wait in MPI_Finalize for ranks that wait for it. A script that
    wants MPI for itself imports mpi4py.MPI before distlib.init().
    """
    MPI, is_ours = _import_mpi(patience)

    def late() -> RuntimeError:
        return patience.error(
            f"not all ranks came to the rendezvous by MPI within {patience.waited}",
            "see which rank's output stops before distlib.init(); raise timeout= if ranks start slowly",
        )

    def talk() -> Meeting:
        if is_ours:
            # By ctypes, which frees the interpreter lock while it waits for other ranks; mpi4py keeps it.
            start = ctypes.CDLL(MPI.__file__).MPI_Init_thread
            if code := start(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int())):
                raise patience.error(f"MPI_Init_thread failed with code {code}", "see MPI's own message")
        opened = _agree(MPI, launch, patience)
        if is_ours:
            MPI.Finalize()
        return opened

    if not is_ours and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        return talk()  # the script asked MPI for this thread only
    return patience.run(talk, late, grace=0.5)


def _import_mpi(patience: Patience) -> tuple[Any, bool]:
    """mpi4py.MPI, and whether it is ours to initialise and finalise."""
    if "mpi4py.MPI" not in sys.modules:
        try:
            import mpi4py

            mpi4py.rc.initialize = False
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
            raise patience.error(
                f"under {patience.launch.launcher} the ranks find each other through mpi4py, which does not "
                f"work here: {error}",
                "pip install 'distlib-train[mpi]'; or set MASTER_ADDR and MASTER_PORT to do without it",
            ) from error
    MPI = sys.modules["mpi4py.MPI"]
    if MPI.Is_finalized():
        raise patience.error("MPI is already finalised", "call distlib.init() before MPI.Finalize()")
    return MPI, not MPI.Is_initialized()


def _agree(MPI: Any, launch: Launch, patience: Patience) -> Meeting:
    """Rank 0 serves a store and tells the others where, or what went wrong."""
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.size):
        raise patience.error(
            f"mpi4py says rank {world.Get_rank()} of {world.Get_size()}: it is built for another MPI than "
            f"the mpirun that started it ({MPI.Get_library_version().splitlines()[0]})",
            "use the mpirun of that MPI, or pip install --force-reinstall --no-binary mpi4py mpi4py",
        )
    names = world.allgather(MPI.Get_processor_name())
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = len(set(names)) == 1 and host.Get_size() == world.Get_size()
    host.Free()
    if launch.rank != 0:
        addr, port, problem = world.bcast(None)
        if problem:
            raise RuntimeError(problem)
        return _connect(addr, port, patience)
    try:
        addr = launch.master_addr or ("127.0.0.1" if one_host else _own_address(patience))
        half = Patience(launch, timedelta(seconds=patience.left / 2))  # the others hear of it in time
        opened = _serve(addr, launch.master_port or 0, half)
    except RuntimeError as error:
        world.bcast(("", 0, str(error)))
        raise
    world.bcast((addr, int(opened.where.rpartition(":")[2]), ""))
    return opened


def _own_address(patience: Patience) -> str:
    """An address of this host that other hosts can reach: its name's, else the one it sends from."""
    name = socket.gethostname()
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except socket.gaierror:
        found = []  # the name is not known to the resolver
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks the kernel which address it would send from
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # no route to other networks
    addresses = [ipaddress.ip_address(address.split("%")[0]) for address in found]
    usable = [address for address in addresses if not (address.is_loopback or address.is_link_local)]
    if not usable:
        raise patience.error(f"host {name} has no address that others could reach ({found})", MPI_ADDRESS)
    return str(min(usable, key=lambda address: address.version))  # IPv4 first

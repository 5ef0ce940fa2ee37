"""Which way tensors of a device travel in a group: memory that ranks map (ipc.py), NCCL (nccl.py), or both by size."""

from __future__ import annotations

import ctypes
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from distlib.comm.channel import Channel, Collective, Traffic
from distlib.comm.work import Operation
from distlib.cuda import collectives, library

if TYPE_CHECKING:
    from distlib.comm.group import Group

# Bytes of one rank's tensor up to which kernels in mapped memory are expected to be ahead of NCCL, by number of ranks.
# From the number of bytes each way reads; to be replaced by what several cards measure.
_IPC_TO = {2: 8 << 20, 4: 1 << 20, 8: 512 << 10, 16: 256 << 10}


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others of its device. host: which machine it is on, whatever nodes are pretended."""

    device_type: str
    gpu: str  # equal where it is the same device
    host: str
    no_ipc: str  # why it has no kernels for mapped memory; empty: it has
    no_nccl: str  # why it cannot use NCCL; empty: it can


@dataclass(frozen=True)
class Plan:
    """What to try, and what is left if that fails. why_not_nccl: empty where NCCL can be used."""

    try_ipc: bool
    why_not_ipc: str
    why_not_nccl: str


@dataclass(frozen=True)
class Way:
    """What was settled: at least one is true."""

    ipc: bool
    nccl: bool

    def by_ipc(self, nbytes: int, ranks: int) -> bool:
        """Whether a tensor of so many bytes goes through mapped memory."""
        return self.ipc and (not self.nccl or nbytes <= ipc_to(ranks))


def ipc_to(ranks: int) -> int:
    """Bytes of one rank's tensor up to which mapped memory is used where there is NCCL too; 0 for more ranks than it
    serves."""
    return next((limit for most, limit in _IPC_TO.items() if ranks <= most), 0)


def plan(facts: Sequence[Facts], labels: Sequence[int]) -> Plan:
    """What ranks with these devices can use; by rank, `labels` being what messages call them.

    Raises ValueError, the same on all ranks: their devices are of several types, or no way is left.
    """
    types = sorted({f.device_type for f in facts})
    if len(types) > 1:
        said = ", ".join(f"rank {label}: {f.device_type}" for label, f in zip(labels, facts, strict=True))
        raise ValueError(f"the ranks gave tensors on devices of several types: {said}. Give all the same")
    no_nccl = _shared_gpu(facts, labels) or _first("no_nccl", facts, labels)
    no_ipc = _first("no_ipc", facts, labels)
    if len({f.host for f in facts}) > 1:
        no_ipc = "the ranks are on several hosts"
    elif len(facts) > collectives.RANKS:
        no_ipc = f"the group has {len(facts)} ranks; mapped memory serves {collectives.RANKS} of a host"
    chosen = Plan(not no_ipc, no_ipc, no_nccl)
    if no_ipc and no_nccl:
        raise ValueError(_no_way(types[0], chosen))
    return chosen


def settle(chosen: Plan, device_type: str, ipc_error: str) -> Way:
    """What is used once mapping was tried: `ipc_error` tells why it failed on some rank, empty where it did not."""
    ipc = chosen.try_ipc and not ipc_error
    if not ipc and chosen.why_not_nccl:
        raise ValueError(_no_way(device_type, Plan(False, ipc_error or chosen.why_not_ipc, chosen.why_not_nccl)))
    return Way(ipc, not chosen.why_not_nccl)


def _no_way(device_type: str, chosen: Plan) -> str:
    return (
        f"tensors on {device_type} cannot be communicated in this group. NCCL: {chosen.why_not_nccl}. Mapped memory: "
        f"{chosen.why_not_ipc}. Fix: give every rank a GPU of its own, or make one of the two ways possible "
        "(`distlib doctor` says more)"
    )


def _first(field: str, facts: Sequence[Facts], labels: Sequence[int]) -> str:
    """The first rank's reason, with its name."""
    for label, f in zip(labels, facts, strict=True):
        if reason := getattr(f, field):
            return f"rank {label}: {reason}"
    return ""


def _shared_gpu(facts: Sequence[Facts], labels: Sequence[int]) -> str:
    """The ranks that share a GPU, in words; empty where none do."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for label, f in zip(labels, facts, strict=True):
        ranks.setdefault((f.host, f.gpu), []).append(label)
    for (_, gpu), sharing in ranks.items():
        if len(sharing) > 1:
            return f"ranks {', '.join(map(str, sharing))} share GPU {gpu}, which NCCL refuses"
    return ""


def facts_here(device: torch.device) -> Facts:
    """This rank's."""
    from distlib.comm.meeting import Host

    card = Host.here().card(0, 1 << 30)
    gpu = f"{device.type}:{device.index or 0}"
    if device.type == "cuda" and torch.cuda.is_available():
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    no_nccl = ""
    if device.type != "cuda":
        no_nccl = f"it serves CUDA, not {device.type}"
    elif not dist.is_nccl_available():
        no_nccl = "this torch was built without it"
    elif not torch.cuda.is_available():
        no_nccl = "torch finds no GPU"
    no_ipc = library.why_not()
    # A stand-in serves whatever device keeps its memory where the stand-in can reach it.
    if not no_ipc and device.type != "cuda" and not (library.is_stand_in() and _is_here(device)):
        no_ipc = f"the kernels are CUDA's, not those of {device.type}"
    host = f"{card.boot}/{card.network}/{card.user}"
    return Facts(device.type, gpu, host, no_ipc, no_nccl)


def _is_here(device: torch.device) -> bool:
    """Whether this process has such a device."""
    if device.type == "cpu":
        return True
    return torch.accelerator.is_available() and device.type == torch.accelerator.current_accelerator().type


def may_connect(device: torch.device) -> bool:
    """Whether this rank has any way for tensors on `device`; the others' facts may still rule it out."""
    facts = facts_here(device)
    return not facts.no_ipc or not facts.no_nccl


def connect(group: Group, device: torch.device) -> DeviceChannel:
    """The channel for tensors on `device` between the ranks of `group`, all of which call.

    Raises ValueError or RuntimeError, on all ranks, where there is no way.
    """
    from distlib.comm.ipc_memory import text_exchange

    exchange = text_exchange(group)
    labels = list(group.ranks)
    facts = [Facts(**json.loads(text)) for text in exchange(json.dumps(asdict(facts_here(device))))]
    chosen = plan(facts, labels)
    ipc, error = None, ""
    if chosen.try_ipc:
        try:
            ipc = _connect_ipc(group, device, labels)
        except RuntimeError as failed:
            error = str(failed)
    try:
        way = settle(chosen, device.type, next((text for text in exchange(error) if text), ""))
    except ValueError:
        if ipc is not None:
            ipc.close()
        raise
    if ipc is not None and not way.ipc:  # another rank could not
        ipc.close()
        ipc = None
    nccl = None
    if way.nccl:
        from distlib.comm.nccl import connect_nccl

        nccl = connect_nccl(group, device)
    return DeviceChannel(device, way, ipc, nccl)


def _warn_if_lazy(device: torch.device) -> None:
    """Says that CUDA loads kernels only as they are first used, which may take until all kernels that wait are over."""
    mode = ctypes.c_int(0)
    if device.type != "cuda" or ctypes.CDLL("libcuda.so.1").cuModuleGetLoadingMode(ctypes.byref(mode)):
        return
    if mode.value == 2:  # CU_MODULE_LAZY_LOADING
        warnings.warn(
            "CUDA loads kernels as they are first used (CUDA_MODULE_LOADING). While one of distlib's waits for another "
            "rank, that may take until it is over: ranks that call groups in different orders may stop until the "
            "timeout. Call distlib.init() before anything else uses a GPU, or set CUDA_MODULE_LOADING=EAGER",
            stacklevel=2,
        )


def _connect_ipc(group: Group, device: torch.device, labels: list[int]) -> Any:
    from distlib.comm.ipc import IpcChannel
    from distlib.comm.ipc_memory import SharedMemory, text_exchange
    from distlib.comm.links import Links

    exchange = text_exchange(group)
    links, error = None, ""
    try:
        links = Links(group.rank, labels, exchange, group.timeout)
    except RuntimeError as failed:
        error = str(failed)
    errors = [text for text in exchange(error) if text]
    if links is None or errors:
        if links is not None:
            links.close()
        raise RuntimeError("; ".join(errors))
    try:
        memory = SharedMemory(group.rank, labels, device, links, exchange)
    except BaseException:
        links.close()
        raise
    if group.rank == 0:
        _warn_if_lazy(device)
    return IpcChannel(group.name, group.rank, labels, device, memory, links, group.cpu_channel)


class DeviceChannel:
    """A group's channel for one device: each collective goes one of the ways, the same on all ranks, by its size.

    Messages go through NCCL where it is there: their ranks could not agree on a way by size alone.
    """

    by_streams = True

    def __init__(self, device: torch.device, way: Way, ipc: Any, nccl: Any) -> None:
        self.device, self.way = device, way
        self.ipc, self.nccl = ipc, nccl
        self.size = (ipc or nccl).size

    def _for(self, c: Collective) -> Channel:
        # What ranks agree on: all_to_all has no common size, and a scatter's root has more tensors than the others.
        nbytes = c.count * c.dtype.itemsize if c.kind != "all_to_all" else ipc_to(self.size) + 1
        channel: Channel = self.ipc if self.way.by_ipc(nbytes, self.size) else self.nccl
        return channel

    @property
    def has_levels(self) -> bool:
        """Memory reaches all ranks at once: there are no levels."""
        return self.nccl is not None and not self.way.ipc

    def start(self, collective: Collective, timeout: float, sync: bool) -> Operation:
        return self._for(collective).start(collective, timeout, sync)

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout: float) -> Operation:
        channel: Channel = self.nccl or self.ipc
        return channel.send(tensor, dst, tag, timeout)

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout: float) -> Operation:
        channel: Channel = self.nccl or self.ipc
        return channel.recv(tensor, src, tag, timeout)

    def traffic(self, kind: str, root: int, sent: int, received: int, operation: Any) -> list[Traffic]:
        channel: Channel = operation.channel
        return channel.traffic(kind, root, sent, received, operation)

    def lateness(self) -> dict[str, tuple[list[float], int]]:
        """Not known on devices."""
        return {}

    def _channels(self) -> list[Channel]:
        return [channel for channel in (self.ipc, self.nccl) if channel is not None]

    def abort(self, text: str) -> None:
        for channel in self._channels():
            channel.abort(text)

    def aborted(self) -> str | None:
        return next((text for channel in self._channels() if (text := channel.aborted())), None)

    def ended(self) -> list[int]:
        """Not known here."""
        return []

    def close(self) -> None:
        for channel in self._channels():
            channel.close()

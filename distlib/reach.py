"""Whether a group carries tensors of a device, settled once by all of its ranks; collectives that work either way.

reached       by the group's own channel for the device: in the order of streams, the host goes on
not reached   copied to host memory, over the group there, copied back: the host waits
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from distlib.comm.group import Group
from distlib.comm.work import CollectiveError

_settled: weakref.WeakKeyDictionary[Group, dict[str, str]] = weakref.WeakKeyDictionary()


def why_not(group: Group, device: torch.device) -> str:
    """Why tensors on `device` cannot travel in this group; empty where they can. The same on all ranks.

    A collective of the group when it is first asked for a type of device.
    """
    if device.type == "cpu":
        return ""
    known = _settled.setdefault(group, {})
    if device.type not in known:
        known[device.type] = _settle(group, device)
    return known[device.type]


def _settle(group: Group, device: torch.device) -> str:
    if group.size == 1 or group.counts_only:
        return ""
    mine = torch.tensor([int(group.on_device(device))])
    all = torch.empty(group.size, dtype=mine.dtype)
    group.all_gather(all, mine)
    without = [group.ranks[r] for r, can in enumerate(all.tolist()) if not can]
    if without:
        return f"ranks {without} have no way for tensors on {device.type}"
    try:
        group.connect(device)
    except CollectiveError:
        raise
    except (ValueError, RuntimeError) as error:  # on all ranks: there is no way
        return str(error)
    return ""


def all_reduce(group: Group, tensor: Tensor, op: str = "sum") -> None:
    """Reduces `tensor` over the ranks, in place, wherever it lies."""
    if not why_not(group, tensor.device):
        group.all_reduce(tensor, op)
        return
    copy = tensor.cpu()
    group.all_reduce(copy, op)
    tensor.copy_(copy)


def broadcast(group: Group, tensor: Tensor, src: int) -> None:
    """Copies `tensor` of group rank `src` to all, wherever it lies."""
    if not why_not(group, tensor.device):
        group.broadcast(tensor, src)
        return
    copy = tensor.cpu()
    group.broadcast(copy, src)
    if group.rank != src:
        tensor.copy_(copy)

"""The c10d backend "distlib": how torch comes to know it. Cheap: what it needs is imported with its first group."""

from __future__ import annotations

import functools
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from distlib.comm.process_group import ProcessGroup

NAME = "distlib"


def _create(options: Any, pg_options: Any = None) -> ProcessGroup:
    from distlib.comm.process_group import ProcessGroup

    if pg_options is not None:
        raise ValueError("backend distlib takes no pg_options")
    return ProcessGroup(options)


def _own(group: Any) -> Any:
    """The group (None: the world's) if it is one of ours, else None."""
    pg = group if group is not None else dist.group.WORLD
    return pg if getattr(pg, "distlib_group", None) is not None else None


def _patch_torch() -> None:
    """Two functions of torch ask for gloo by name before they call a method that this backend has too; a third needs
    C++ objects where others do."""
    torch_barrier, torch_timeout = c10d.monitored_barrier, c10d._set_pg_timeout

    @functools.wraps(torch_barrier)
    def barrier(group: Any = None, timeout: Any = None, wait_all_ranks: bool = False) -> Any:
        own = _own(group)
        if own is None or c10d._rank_not_in_group(group):
            return torch_barrier(group, timeout, wait_all_ranks)
        if isinstance(timeout, float):
            warnings.warn(f"monitored_barrier: timeout={timeout} is taken as seconds; give a timedelta", stacklevel=2)
            timeout = timedelta(seconds=timeout)
        if timeout is not None:
            c10d._check_valid_timeout(timeout)
        return own.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)

    @functools.wraps(torch_timeout)
    def set_pg_timeout(timeout: timedelta, group: Any = None) -> None:
        own = _own(group)
        if own is not None:
            c10d._check_valid_timeout(timeout)
            own.set_timeout(timeout)
        else:
            torch_timeout(timeout, group)

    builtin_hook = DistributedDataParallel._register_builtin_comm_hook

    @functools.wraps(builtin_hook)
    def register_builtin_hook(ddp: Any, comm_hook_type: Any) -> None:
        """C++'s half-precision hook reads typed futures, which Python cannot make; its Python twin does the same."""
        if _own(ddp.process_group) is not None and comm_hook_type == dist.BuiltinCommHookType.FP16_COMPRESS:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

            ddp.register_comm_hook(ddp.process_group, fp16_compress_hook)
        else:
            builtin_hook(ddp, comm_hook_type)

    DistributedDataParallel._register_builtin_comm_hook = register_builtin_hook
    dist.monitored_barrier = c10d.monitored_barrier = barrier
    c10d._set_pg_timeout = set_pg_timeout


def register() -> None:
    """Makes "distlib" known to torch.distributed; once, and cheaply. CUDA tensors are served by NCCL."""
    if NAME in c10d.Backend.backend_list:
        return
    c10d.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    _patch_torch()

"""Where torch asks for gloo by name, or for C++ objects, and would get along with this backend as well."""

from __future__ import annotations

import functools
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel

c10d_core: Any = _distributed_c10d  # parts that its type stubs do not mention
_DEVICES = ("CPU", "CUDA", "PrivateUse1")
_kernels: dict[str, Any] = {}  # what they hold is served while they live


def _own(group: Any) -> Any:
    """The group (None: the world's) if it is one of ours, else None."""
    pg = group if group is not None else dist.group.WORLD
    return pg if getattr(pg, "distlib_group", None) is not None else None


def patch_torch() -> None:
    """Two functions ask for gloo by name before they call a method that this backend has too; a third starts messages
    together for torch's own class alone; two methods of DDP give what we return to C++, which needs objects that Python
    cannot make."""
    torch_barrier, torch_timeout = c10d.monitored_barrier, c10d._set_pg_timeout
    torch_batch = c10d.batch_isend_irecv

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

    @functools.wraps(torch_batch)
    def batch_isend_irecv(p2p_op_list: list[Any]) -> list[Any]:
        c10d._check_p2p_op_list(p2p_op_list)
        own = _own(p2p_op_list[0].group)
        return torch_batch(p2p_op_list) if own is None else own.batch_isend_irecv(p2p_op_list)

    builtin_hook = DistributedDataParallel._register_builtin_comm_hook

    @functools.wraps(builtin_hook)
    def register_builtin_hook(ddp: Any, comm_hook_type: Any) -> None:
        """C++'s half-precision hook reads typed futures, which Python cannot make; its Python twin does the same."""
        if _own(ddp.process_group) is not None and comm_hook_type == dist.BuiltinCommHookType.FP16_COMPRESS:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

            ddp.register_comm_hook(ddp.process_group, fp16_compress_hook)
            ddp.logger._set_comm_hook_name(str(comm_hook_type))
        else:
            builtin_hook(ddp, comm_hook_type)

    keep_handle = c10d_core.Reducer._set_forward_pass_work_handle

    @functools.wraps(keep_handle)
    def keep_own_handle(reducer: Any, work: Any, use_static_world_size: bool) -> None:
        """DDP's join drops the Python object, and C++ would wait for what is left of it."""
        if getattr(work, "operation", None) is not None:
            work = c10d_core._create_work_from_future(work.get_future())
        keep_handle(reducer, work, use_static_world_size)

    c10d_core.Reducer._set_forward_pass_work_handle = keep_own_handle
    DistributedDataParallel._register_builtin_comm_hook = register_builtin_hook
    dist.monitored_barrier = c10d.monitored_barrier = barrier
    c10d._set_pg_timeout = set_pg_timeout
    dist.batch_isend_irecv = c10d.batch_isend_irecv = batch_isend_irecv


def gather_into(input: torch.Tensor, group_size: int, group: Any, *, out: torch.Tensor) -> torch.Tensor:
    """torch's `all_gather_into_tensor_out`, as compiled programs call it. torch's own asks for a C++ backend; this one
    calls the group. It calls the C++ base class, which finds our method, and whose work keeps ours alive."""
    base: Any = dist.ProcessGroup
    pg = c10d_core._resolve_process_group(group) if isinstance(group, str) else group
    if _own(pg) is not None:
        work = base.allgather_into_tensor_coalesced(pg, [out], [input.contiguous()])
    else:
        work = base._allgather_base(pg, out, input.contiguous(), c10d_core.AllgatherOptions())
    c10d_core._register_work(out, work)
    return out


def patch_functional() -> None:
    """Registers `gather_into`, by kinds of device; with the first group of ours, so that others keep torch's."""
    for device in _DEVICES:
        _kernels[device] = torch.library.Library("_c10d_functional", "IMPL", device)
        _kernels[device].impl("all_gather_into_tensor_out", gather_into)

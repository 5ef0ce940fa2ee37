"""`ProcessGroup`: torch's calls in, `Group`'s calls out.

torch lets a backend from Python be a ProcessGroup (a C++ `Backend` cannot be subclassed without torch's headers), and
uses that object in place of its own. So everything torch or its C++ parts ask of a process group is answered here, and
goes to the Group, whatever device its tensors are on. Only the calls that torch brackets as one operation go to NCCL
themselves; what comes of them is looked after by the Group, too (batches.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distlib.comm.batches import Bracket, exchange
from distlib.comm.c10d import OPS
from distlib.comm.channel import Message
from distlib.comm.group import Group
from distlib.comm.joined import joined
from distlib.comm.monitored import monitored_barrier
from distlib.comm.patches import patch_functional
from distlib.comm.sparse import all_reduce_sparse
from distlib.comm.stream_work import StreamWork
from distlib.comm.work import Work, finished

NAME = "distlib"
_CPU = torch.device("cpu")


def op_name(op: Any) -> str:
    """Our name of a torch ReduceOp."""
    for name, torch_op in OPS.items():
        if op == torch_op:
            return name
    raise ValueError(f"backend distlib does not support {op}; it has {', '.join(OPS)}")


class _Backend:
    """What torch asks of "the backend for tensors of a device" of a group, besides collectives."""

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def __init__(self, group: Group) -> None:
        self._group = group

    def name(self) -> str:
        return NAME

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """FSDP2 may put its buffers into the arena, where collectives copy nothing."""
        return torch.device(device).type == "cpu"

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._group.registered_empty(size, dtype=dtype)


def _collective(method: Callable[..., Any]) -> Callable[..., Any]:
    """Sends a call inside a bracket to NCCL: the C++ base class dispatches by device to what is registered there."""

    @functools.wraps(method)
    def dispatch(self: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        if self._bracket is not None:
            self._bracket.called(method.__name__)
            return getattr(dist.ProcessGroup, method.__name__)(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return dispatch


def _accelerator() -> torch.device | None:
    """The type of this process's accelerator, if it has one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


class ProcessGroup(dist.ProcessGroup):
    """A c10d process group over a `Group`."""

    def __init__(self, options: Any) -> None:
        super().__init__(options.group_rank, options.group_size)
        ranks = list(options.global_ranks_in_group)
        self._store = options.store
        self._group_name = str(options.group_id)
        self._group_desc = "undefined"
        self._global_ranks = ranks
        self._timeout = options.timeout
        name = "world" if not ranks else self._group_name
        self.distlib_group = Group.create(
            options.store, options.group_rank, options.group_size, options.timeout, name, ranks
        )
        self._sequence = 0
        self._lock = threading.Lock()
        self._has_nccl = False
        self._bracket: Bracket | None = None
        self._backend = _Backend(self.distlib_group)

    # ------------------------------------------------------------ identity

    def _set_group_name(self, name: str) -> None:
        self._group_name = str(name)

    def _set_group_desc(self, desc: str) -> None:
        self._group_desc = desc

    setGroupName, setGroupDesc = _set_group_name, _set_group_desc

    @property
    def group_name(self) -> str:
        return self._group_name

    @property
    def group_desc(self) -> str:
        return self._group_desc

    def getGroupName(self) -> str:
        return self._group_name

    def getGroupDesc(self) -> str:
        return self._group_desc

    def getBackendName(self) -> str:
        return NAME

    _get_backend_name = name = getBackendName

    def get_group_store(self) -> Any:
        return self._store

    def __repr__(self) -> str:
        return f"<distlib.ProcessGroup {self._group_name!r}: rank {self.rank()} of {self.size()}>"

    @property
    def _device_types(self) -> list[torch.device]:
        found = _accelerator()
        return [_CPU, found] if found is not None and self.distlib_group.on_device(found) else [_CPU]

    def _get_backend(self, device: torch.device) -> Any:
        device = torch.device(device)
        if not self.distlib_group.on_device(device):
            raise RuntimeError(
                f"backend distlib cannot communicate tensors on {device.type!r} here: `distlib doctor` says why"
            )
        if device.type == "cuda" and self._connect_nccl(device):
            return super()._get_backend(device)
        return self._backend

    def _connect_nccl(self, device: torch.device) -> bool:
        """Makes the way for tensors on CUDA; every rank comes here. True where NCCL is a part of it: torch gets it."""
        with self._lock:
            configured = str(c10d._world.pg_backend_config.get(self, ""))
            wanted = dict(part.split(":") for part in configured.split(",") if ":" in part).get("cuda", "nccl")
            if wanted not in ("nccl", NAME):
                raise RuntimeError(f"cuda:{wanted} beside cpu:distlib is not supported: use 'cpu:distlib,cuda:nccl'")
            if device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
            nccl = self.distlib_group.nccl_on(device)
            if nccl is not None and not self._has_nccl:
                self._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl.pg)
                self._has_nccl = True
            return self._has_nccl

    # ------------------------------------------------------------ collectives

    def _run(self, method: Callable[..., Work | None], *args: Any, opts: Any = None, **kwargs: Any) -> Work:
        """Starts a call of the Group. Where torch says that it will wait at once, it runs on this thread."""
        if torch.autograd._profiler_enabled():
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            with torch._C._profiler._RecordFunctionFast(f"{NAME}:{method.__name__}", tensors):
                return self._start(method, args, opts, kwargs)
        return self._start(method, args, opts, kwargs)

    def _start(self, method: Callable[..., Work | None], args: tuple[Any, ...], opts: Any, kwargs: Any) -> Work:
        self._sequence += 1
        waits = opts is not None and getattr(opts, "asyncOp", True) is False
        timeout = getattr(opts, "timeout", None)
        with torch.no_grad():
            work = method(*args, async_op=not waits, timeout=timeout, **kwargs)
        return finished([a for a in args if isinstance(a, torch.Tensor)]) if work is None else _as_torchs(work)

    @_collective
    def allreduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: timedelta | None = None) -> Work:
        tensor = _only("allreduce", tensors)
        reduce_op, opts = _op(opts, op), _options(opts, timeout)
        if tensor.is_sparse:
            return all_reduce_sparse(self.distlib_group, tensor, op_name(reduce_op))
        return self._run(self.distlib_group.all_reduce, tensor, op_name(reduce_op), opts=opts)

    @_collective
    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Work:
        name = op_name(_op(opts, None))
        return joined(
            [self._run(self.distlib_group.all_reduce, t, name, opts=_asynchronous(opts)) for t in tensors], tensors
        )

    @_collective
    def broadcast(self, tensors: Any, opts: Any = None, root: int = 0, timeout: timedelta | None = None) -> Work:
        src = opts.rootRank if hasattr(opts, "rootRank") else (root if opts is None else opts)
        return self._run(self.distlib_group.broadcast, _only("broadcast", tensors), src, opts=_options(opts, timeout))

    @_collective
    def reduce(
        self, tensors: Any, opts: Any = None, op: Any = None, root: int = 0, timeout: timedelta | None = None
    ) -> Work:
        dst = opts.rootRank if hasattr(opts, "rootRank") else (root if opts is None else opts)
        reduce_op = _op(opts if hasattr(opts, "reduceOp") else None, op)
        tensor = _only("reduce", tensors)
        return self._run(self.distlib_group.reduce, tensor, dst, op_name(reduce_op), opts=_options(opts, timeout))

    @_collective
    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: timedelta | None = None) -> Work:
        outputs = outputs[0] if outputs and isinstance(outputs[0], (list, tuple)) else outputs
        return self._run(
            self.distlib_group.all_gather, outputs, _only("allgather", inputs), opts=_options(opts, timeout)
        )

    @_collective
    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work:
        return self._run(self.distlib_group.all_gather, output, input, opts=opts)

    @_collective
    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        works = []
        for i, tensor in enumerate(inputs):
            pieces = [of_rank[i] for of_rank in outputs]
            works.append(self._run(self.distlib_group.all_gather, pieces, tensor, opts=_asynchronous(opts)))
        return joined(works, [t for of_rank in outputs for t in of_rank])

    @_collective
    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        run = functools.partial(self._run, self.distlib_group.all_gather, opts=_asynchronous(opts))
        return joined([run(out, given) for out, given in zip(outputs, inputs, strict=True)], outputs)

    @_collective
    def gather(
        self, outputs: Any, inputs: Any, opts: Any = None, root: int = 0, timeout: timedelta | None = None
    ) -> Work:
        outputs = outputs[0] if outputs and isinstance(outputs[0], (list, tuple)) else outputs
        dst = opts.rootRank if hasattr(opts, "rootRank") else (root if opts is None else opts)
        given = _only("gather", inputs)
        return self._run(self.distlib_group.gather, outputs or None, given, dst, opts=_options(opts, timeout))

    @_collective
    def scatter(
        self, outputs: Any, inputs: Any, opts: Any = None, root: int = 0, timeout: timedelta | None = None
    ) -> Work:
        inputs = inputs[0] if inputs and isinstance(inputs[0], (list, tuple)) else inputs
        src = opts.rootRank if hasattr(opts, "rootRank") else (root if opts is None else opts)
        out = _only("scatter", outputs)
        return self._run(self.distlib_group.scatter, out, inputs or None, src, opts=_options(opts, timeout))

    @_collective
    def reduce_scatter(
        self, outputs: Any, inputs: Any, opts: Any = None, op: Any = None, timeout: timedelta | None = None
    ) -> Work:
        inputs = inputs[0] if inputs and isinstance(inputs[0], (list, tuple)) else inputs
        name, out = op_name(_op(opts, op)), _only("reduce_scatter", outputs)
        return self._run(self.distlib_group.reduce_scatter, out, inputs, name, opts=_options(opts, timeout))

    @_collective
    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work:
        return self._run(self.distlib_group.reduce_scatter, output, input, op_name(_op(opts, None)), opts=opts)

    @_collective
    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        name = op_name(_op(opts, None))
        run = functools.partial(self._run, self.distlib_group.reduce_scatter, op=name, opts=_asynchronous(opts))
        return joined([run(out, given) for out, given in zip(outputs, inputs, strict=True)], outputs)

    @_collective
    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        opts: Any = None,
        timeout: timedelta | None = None,
    ) -> Work:
        given = _split("input", input, input_split_sizes, self.size())
        stand_in = output if output.is_contiguous() else output.contiguous()
        pieces = _split("output", stand_in, output_split_sizes, self.size())
        opts = _options(opts, timeout)
        if stand_in is output:
            return self._run(self.distlib_group.all_to_all, pieces, given, opts=opts)
        self._run(self.distlib_group.all_to_all, pieces, given, opts=opts).wait()
        output.copy_(stand_in)
        return finished([output])

    @_collective
    def alltoall(
        self,
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        opts: Any = None,
        timeout: timedelta | None = None,
    ) -> Work:
        return self._run(self.distlib_group.all_to_all, outputs, inputs, opts=_options(opts, timeout))

    @_collective
    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Work:
        return self._run(self.distlib_group.barrier, opts=_options(opts, timeout))

    @_collective
    def send(self, tensors: list[torch.Tensor], dst: int, tag: int = 0) -> Work:
        return self._run(self.distlib_group.send, _only("send", tensors), dst, tag)

    @_collective
    def recv(self, tensors: list[torch.Tensor], src: int, tag: int = 0) -> Work:
        return self._run(self.distlib_group.recv, _only("recv", tensors), src, tag)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> Work:
        return self._run(self.distlib_group.recv, _only("recv_anysource", tensors), None, tag)

    def batch_isend_irecv(self, ops: list[Any]) -> list[Work]:
        """torch's function of this name (patches.py), for its P2POps: messages that do not wait for each other."""
        messages = [Message(op.tensor, op.group_peer, op.tag, op.op is dist.isend) for op in ops]
        with torch.no_grad():
            return [_as_torchs(work) for work in exchange(self.distlib_group, messages)]

    # Names up to torch 2.12.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier in which rank 0 names the ranks that did not come. See torch.distributed.monitored_barrier."""
        limit = (self._timeout if timeout is None else timeout).total_seconds()
        monitored_barrier(self._store, self.distlib_group, limit, wait_all_ranks)

    # ------------------------------------------------------------ the rest of a process group

    def set_timeout(self, timeout: timedelta) -> None:
        """The timeout of calls that give none, from now on."""
        self._timeout = timeout
        self.distlib_group.timeout = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def abort(self) -> None:
        """Ends the group for all its ranks."""
        self.distlib_group.abort(f"group '{self._group_name}' was aborted by rank {self.rank()} (abort() was called)")

    def shutdown(self) -> None:
        """Leaves the group; torch calls it from destroy_process_group."""
        self.distlib_group.close()
        if not self._global_ranks:
            from distlib.comm.membership import forget_world

            forget_world()

    def _set_sequence_number_for_group(self) -> None:
        """Ranks count from zero together: there is nothing to agree on."""

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _has_hooks(self) -> bool:
        return False

    def _refuse(self, what: str) -> RuntimeError:
        return RuntimeError(f"backend distlib does not support {what}")

    def split_group(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse("split_group; use torch.distributed.new_group")

    def merge_remote_group(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse("merge_remote_group")

    splitGroup, mergeRemoteGroup = split_group, merge_remote_group

    def _start_coalescing(self, device: torch.device) -> None:
        if torch.device(device).type != "cuda" or not self._connect_nccl(torch.device(device)):
            raise self._refuse("_start_coalescing without NCCL")
        super()._start_coalescing(device)
        self._bracket = Bracket(self.distlib_group, self.distlib_group.nccl_on(device))

    def _end_coalescing(self, device: torch.device) -> Any:
        bracket, self._bracket = self._bracket, None
        assert bracket is not None, "torch ends only what it has started"
        return bracket.end(functools.partial(super()._end_coalescing, device))

    def _register_on_completion_hook(self, hook: Any) -> None:
        raise self._refuse("on-completion hooks")

    def _enable_collectives_timing(self) -> None:
        raise self._refuse("_enable_collectives_timing; distlib.ledger() counts and times collectives")


def _as_torchs(work: Work) -> Work:
    """Who waits for it knows torch's rules of memory on streams."""
    if isinstance(work, StreamWork):
        work.lets_go = True
    return work


class _Timed:
    """Options of a call that gave only a timeout."""

    def __init__(self, timeout: timedelta | None) -> None:
        self.timeout = timeout


def _options(opts: Any, timeout: timedelta | None) -> Any:
    return opts if hasattr(opts, "timeout") else _Timed(timeout)


def _asynchronous(opts: Any) -> Any:
    return _Timed(getattr(opts, "timeout", None))


def _op(opts: Any, op: Any) -> Any:
    if op is not None:
        return op
    if opts is None:
        return dist.ReduceOp.SUM
    return getattr(opts, "reduceOp", opts)


def _only(what: str, tensors: Any) -> torch.Tensor:
    """The one tensor of a list that c10d's interface wraps it in."""
    if isinstance(tensors, torch.Tensor):
        return tensors
    if len(tensors) != 1:
        raise ValueError(f"{what}: one tensor per call is supported, {len(tensors)} were given")
    return tensors[0]


def _split(name: str, tensor: torch.Tensor, sizes: list[int] | None, ranks: int) -> list[torch.Tensor]:
    """Parts of a tensor along its first dimension, one per rank."""
    rows = tensor.size(0) if tensor.dim() else 1
    if not sizes:
        if rows % ranks:
            raise ValueError(f"all_to_all_single: {name} has {rows} rows, which do not divide among {ranks} ranks")
        sizes = [rows // ranks] * ranks
    if len(sizes) != ranks or sum(sizes) != rows:
        raise ValueError(f"all_to_all_single: {name} splits {sizes} do not cover {rows} rows for {ranks} ranks")
    return list(tensor.split(sizes))


def _hide_from_dynamo() -> None:
    """torch.compile must not trace into these methods: they reach into the core."""
    from torch._C._dynamo import eval_frame

    if not hasattr(eval_frame, "set_code_exec_strategy"):  # before torch 2.8 methods of process groups are not traced
        return
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    for cls in (ProcessGroup, Work, StreamWork):
        for member in vars(cls).values():
            if hasattr(member, "__code__"):
                eval_frame.set_code_exec_strategy(member.__code__, skip)


_hide_from_dynamo()
patch_functional()

"""Lets the tests that torch writes for one GPU per rank run on CPU tensors: what they ask of a device is the CPU.

Most of torch's DistributedDataParallel tests put the model on `cuda:rank` and skip themselves on a machine without
GPUs, though nothing in them is about CUDA. Here a call that names such a device is answered with the CPU:

    model.cuda(rank), tensor.to(rank), torch.ones(2, device=rank)    ->  the same on the CPU
    DistributedDataParallel(model, device_ids=[rank])                ->  without device_ids
    torch.cuda.set_device(rank), torch.cuda.synchronize()            ->  nothing

Tests that do need CUDA (streams, events, memory) fail here on gloo too, and so are not on the list of tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def open_gpu_tests(common: Any) -> None:
    """Before torch's test module is imported: its decorators that count GPUs let every test through."""

    def let_through(*_: object, **__: object) -> Callable[[Any], Any]:
        return lambda test: test

    common.skip_if_no_gpu = lambda test: test
    common.skip_if_lt_x_gpu = common.require_n_gpus_for_nccl_backend = let_through


def name_gpus(module: Any) -> None:
    """After it is imported: torch's table of ranks and GPUs, one each."""
    module.init_multigpu_helper = lambda world, backend: {rank: [rank] for rank in range(world)}


def is_gpu(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    return False


class OnCpu(TorchFunctionMode):
    """While it is on, devices of torch calls are the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "device":  # torch.device(...) itself
            return func(*args, **kwargs)
        if is_gpu(kwargs.get("device")) or type(kwargs.get("device")) is int:
            kwargs["device"] = CPU
        position = {"to": 1, "_parse_to": 0}.get(name)  # tensor.to(rank); what module.to(rank) asks first
        if position is not None and len(args) > position and type(args[position]) is int:
            args = (*args[:position], CPU, *args[position + 1 :])
        return func(*(CPU if is_gpu(a) else a for a in args), **kwargs)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """For the time of one test in a rank that ends with it: patches stay."""
    ddp = torch.nn.parallel.DistributedDataParallel
    made = ddp.__init__

    def init(self: Any, module: Any, device_ids: Any = None, output_device: Any = None, **options: Any) -> None:
        made(self, module, **options)

    ddp.__init__ = init
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_device = lambda: 0
    with OnCpu():
        yield

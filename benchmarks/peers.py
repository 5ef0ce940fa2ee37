"""The contenders that train the same model: one small class each, all with the same AdamW and the same step.

    peer = FSDP2(module)               # wraps its own copy of the model
    peer.step([(inputs, targets)])     # one optimizer step over these micro-batches; peer.loss is their mean loss

The peers communicate over gloo, which must be the default process group's backend. distlib has a group of its own on
the same ranks. Every setting that is not written here is the one that the peer ships with.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distlib

ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
AGREEMENT = 1e-4  # relative: how far the losses of contenders may be apart
Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and next tokens, int64 [batch, length] each
Optimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


def torch_adamw(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **ADAMW, fused=True)


def distlib_adamw(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    from distlib.optim import AdamW

    return AdamW(parameters, **ADAMW)


class Peer:
    """A model and its optimizer on this rank, without communication. `wrap` and `micro_step` make it another peer.

    module: the whole model, with its repeated blocks in `module.blocks`, alike on all ranks. Every rank must call.
    """

    optimizer_of: Optimizer = staticmethod(torch_adamw)

    def __init__(self, module: nn.Module) -> None:
        self.model = self.wrap(module)
        self.optimizer = self.optimizer_of(self.model.parameters())
        self.loss = float("nan")

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """What surrounds forward and backward of a micro-batch."""
        return contextlib.nullcontext()

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over the micro-batches; leaves their mean loss, of this rank, in `loss`."""
        total = 0.0
        for index, (inputs, targets) in enumerate(batches):
            with self.micro_step(index == len(batches) - 1):
                loss = self.loss_of(inputs, targets) / len(batches)
                loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = total

    def loss_of(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())


class NoCommunication(Peer):
    """The plain module, each rank for itself, with distlib's AdamW."""

    optimizer_of = staticmethod(distlib_adamw)


class NoCommunicationShare(Peer):
    """The plain module whose optimizer does only this rank's share of the work, as a sharded one does."""

    @staticmethod
    def optimizer_of(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        rank, size = dist.get_rank(), dist.get_world_size()
        flat = [parameter.detach().view(-1).tensor_split(size)[rank] for parameter in parameters]
        return distlib_adamw([nn.Parameter(piece) for piece in flat])

    def step(self, batches: Sequence[Batch]) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        total = 0.0
        for inputs, targets in batches:
            loss = self.loss_of(inputs, targets) / len(batches)
            loss.backward()
            total += loss.item()
        pieces = (piece for group in self.optimizer.param_groups for piece in group["params"])
        for piece, parameter in zip(pieces, self.model.parameters(), strict=True):
            piece.grad = parameter.grad.view(-1).tensor_split(size)[rank]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.zero_grad()
        self.loss = total


class DDP(Peer):
    """torch's replicated data parallelism."""

    def wrap(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module)

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.model.no_sync()


class FSDP2(Peer):
    """torch's `fully_shard` over all ranks: each block a unit, and the rest one more."""

    def __init__(self, module: nn.Module, partition_size: int | None = None) -> None:
        self.partition_size = partition_size
        super().__init__(module)

    def wrap(self, module: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        _require_gloo("FSDP2")
        size = dist.get_world_size()
        if self.partition_size is None:
            mesh = init_device_mesh("cpu", (size,))
        else:
            shape = (size // self.partition_size, self.partition_size)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for block in module.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh)


class HSDP(FSDP2):
    """FSDP2 over a 2-D mesh, as it ships: replicas all-reduce in every micro-step."""

    def __init__(self, module: nn.Module, partition_size: int) -> None:
        super().__init__(module, partition_size)


class DeferredHSDP(HSDP):
    """The same, told to all-reduce in the last micro-step only."""

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self.model.set_requires_all_reduce(last)
        return contextlib.nullcontext()


class DeepSpeed(Peer):
    """DeepSpeed's ZeRO stage 3 with its CPU Adam, or with torch's AdamW where that one cannot be compiled."""

    def __init__(self, module: nn.Module, cpu_adam: bool = True) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        _require_gloo("DeepSpeed")
        # Newer torch warns at each of its calls, and each warning takes time.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        make = functools.partial(DeepSpeedCPUAdam, **ADAMW) if cpu_adam else torch_adamw
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # `step` scales the loss and says which micro-step is the last
            "zero_optimization": {"stage": 3},
            "gradient_clipping": 0.0,  # it ships with 1.0; the others do not clip
        }
        # DeepSpeed puts its own `linear` in the place of torch's, for the whole process and for good. Here it
        # holds during this peer's steps only.
        plain = F.linear
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=make(module.parameters()), config=config, dist_init_required=False
        )
        self._linear, F.linear = F.linear, plain
        self.loss = float("nan")

    def step(self, batches: Sequence[Batch]) -> None:
        plain, F.linear = F.linear, self._linear
        try:
            total = 0.0
            for index, (inputs, targets) in enumerate(batches):
                self.model.set_gradient_accumulation_boundary(index == len(batches) - 1)
                loss = self.loss_of(inputs, targets) / len(batches)
                self.model.backward(loss, scale_wrt_gas=False)
                self.model.step()  # steps, and clears the gradients, at the boundary only
                total += loss.item()
            self.loss = total
        finally:
            F.linear = plain


class Sharded(Peer):
    """distlib's sharded data parallelism; with partition_size < ranks, MiCS."""

    optimizer_of = staticmethod(distlib_adamw)

    def __init__(self, module: nn.Module, stage: int = 3, partition_size: int | None = None) -> None:
        self.stage, self.partition_size = stage, partition_size
        super().__init__(module)

    def wrap(self, module: nn.Module) -> nn.Module:
        group = distlib_group()
        return distlib.ShardedDataParallel(
            module, stage=self.stage, partition_size=self.partition_size, process_group=group
        )

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.model.no_sync()


# ---- what contenders need ---------------------------------------------------------------------------------


@functools.cache
def distlib_group() -> dist.ProcessGroup | None:
    """All ranks on the backend distlib: the default group (None) where it is on that, else one of their own."""
    return None if dist.get_backend() == "distlib" else dist.new_group(backend="distlib")


def _require_gloo(name: str) -> None:
    if dist.get_backend() != "gloo":
        raise RuntimeError(
            f"{name} is to be measured over gloo, but the default process group is on {dist.get_backend()!r}: "
            f"call init_process_group('gloo') before"
        )


def check_losses(peers: Mapping[str, Peer]) -> None:
    """RuntimeError unless all peers, having done the same steps, have the same loss on this rank."""
    losses = {name: peer.loss for name, peer in peers.items()}
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= AGREEMENT * abs(low):
        shown = ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
        raise RuntimeError(f"rank {dist.get_rank()}: the contenders' losses are more than {AGREEMENT} apart: {shown}")


def deepspeed_peer(argument: str) -> dict[str, Callable[[nn.Module], Peer]]:
    """{"DeepSpeed ZeRO-3": how to build it}, or nothing where `DeepSpeedTrial.argument` said "none"."""
    if argument == "none":
        return {}
    return {"DeepSpeed ZeRO-3": functools.partial(DeepSpeed, cpu_adam=argument == "cpu-adam")}

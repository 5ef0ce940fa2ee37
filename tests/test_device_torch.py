"""torch's own calls, DDP and FSDP2 with tensors of a device, over groups that torch made: ordered by streams, and the
numbers of one process. The device is tests/fake_device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from device_groups import SMALL
from devices import device_here, needs_device_collectives
from ranks import process_group, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distlib import streams

pytestmark = needs_device_collectives


def two_models() -> tuple[nn.Sequential, nn.Sequential]:
    """The same twice: one for the device, one to compare with."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


def train(wrapped: nn.Module, plain: nn.Module, rank: int, n: int, device: torch.device) -> None:
    """Steps of a wrapped model on this rank's data, and of a plain one on that of all."""
    data = [torch.randn(4, 7, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (wrapped, plain)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        wrapped(data[rank].to(device)).square().mean().backward()
        (sum(plain(x).square().mean() for x in data) / n).backward()
        for optimizer in optimizers:
            optimizer.step()


def torch_calls(rank: int, n: int) -> None:
    device = device_here("fake")
    with process_group(rank, n):
        x = torch.full((6,), rank + 1.0, device=device)
        dist.all_reduce(x)
        assert x.tolist() == [3.0] * 6
        work = dist.all_gather_into_tensor(torch.empty(12, device=device), x, async_op=True)
        work.wait()
        out = torch.empty(3, device=device)
        dist.reduce_scatter_tensor(out, x)
        assert out.tolist() == [6.0] * 3
        pieces = [torch.empty(1, device=device) for _ in range(n)]
        dist.all_to_all(pieces, [torch.full((1,), float(rank * 10 + d), device=device) for d in range(n)])
        assert torch.cat(pieces).tolist() == [float(r * 10 + rank) for r in range(n)]
        if rank == 0:  # who sends what is to be trained sends its values
            x = x.requires_grad_()
        requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, out.expand(3).contiguous(), 1 - rank)]
            if rank == 0
            else [dist.P2POp(dist.irecv, y := torch.empty(6, device=device), 0), dist.P2POp(dist.isend, out, 0)]
        )
        for request in requests:
            request.wait()
        x = x.detach()
        if rank == 1:
            assert y.tolist() == x.tolist()
        out = torch.empty(12, device=device)
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        torch.ops._c10d_functional.all_gather_into_tensor_out(x, n, name, out=out)
        torch.ops._c10d_functional.wait_tensor(out)
        assert torch.equal(out[:6], x) and torch.equal(out[6:], x)
        total = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", name))
        assert torch.equal(total, 2 * x)
        many = [torch.full((3,), float(rank), device=device) for _ in range(3)]
        dist.all_reduce_coalesced(many)
        assert torch.cat(many).tolist() == [1.0] * 9
        objects = [None] * n
        dist.all_gather_object(objects, rank)
        assert objects == list(range(n))
        dist.barrier()


def test_torch_calls_with_tensors_of_the_device() -> None:
    run_ranks(2, torch_calls, env=SMALL)


def ddp(rank: int, n: int) -> None:
    device = device_here("fake")
    with process_group(rank, n):
        model, plain = two_models()
        wrapped = DistributedDataParallel(model.to(device))
        train(wrapped, plain, rank, n, device)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a.cpu(), b, atol=1e-6)


def test_ddp_trains_on_the_device_as_one_process() -> None:
    run_ranks(2, ddp, env=SMALL)


def fsdp2(rank: int, n: int) -> None:
    device = device_here("fake")
    module = torch.get_device_module("fake")  # what FSDP2 asks of it besides
    for name, value in {
        "stream": streams.on,
        "Stream": lambda priority=0: streams.new(device),
        "Event": lambda: torch.Event(device),
        "current_stream": lambda of=None: streams.current(device),
    }.items():
        if not hasattr(module, name):
            setattr(module, name, value)
    with process_group(rank, n):
        model, plain = two_models()
        model.to(device)
        mesh = DeviceMesh("fake", list(range(n)))
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        train(model, plain, rank, n, device)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a.full_tensor().cpu(), b, atol=1e-6)  # type: ignore[attr-defined]


def test_fsdp2_trains_on_the_device_as_one_process() -> None:
    run_ranks(2, fsdp2, env=SMALL)

"""`DataParallel` on a device that is not the CPU: the CPU's bits, streams in order, a host that never waits for it.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import fake_device
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from devices import device_here, needs_fake_device
from ranks import process_group, run_ranks
from test_data_parallel import Tiny, tiny, tokens_of
from torch import nn

import distlib
from distlib.comm import group as group_module
from distlib.comm.c10d import C10dChannel
from distlib.comm.group import Group
from distlib.data_parallel.hooks import GradientBucket

pytestmark = needs_fake_device

STEPS, STEADY = 5, 3  # from step STEADY on nothing is new
SMALL = 0.002  # MiB: several buckets


def by_future(bucket: GradientBucket) -> Any:
    """A hook whose future knows streams."""
    group = Group.of()
    work = group.all_reduce(bucket.buffer().div_(group.size), async_op=True)
    assert work is not None
    return work.get_future()


def by_tensor(bucket: GradientBucket) -> torch.Tensor:
    """A hook that gives another tensor than the buffer, of another dtype."""
    half = bucket.buffer().bfloat16()
    Group.of().all_reduce(half, "avg")
    return half


HOOKS = {"future": by_future, "tensor": by_tensor}


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1).float(), batch[1].flatten())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def train(rank: int, device: torch.device, micro_steps: int = 1, hook: str = "", **options: Any) -> Any:
    """Losses, norms and weights; and where the host waited for the device in steady steps."""
    model = distlib.DataParallel(tiny().to(device), comm_hook=HOOKS.get(hook), **{"bucket_mb": SMALL, **options})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    kept, waits = [], []
    for step in range(STEPS):
        batches = [tokens_of(rank, step * micro_steps + i) for i in range(micro_steps)]
        batches = [tuple(t.to(device, non_blocking=True) for t in batch) for batch in batches]
        if step == STEADY and device.type == "fake":
            fake_device.reset()
        for i, batch in enumerate(batches):
            with model.no_sync() if i < micro_steps - 1 else contextlib.nullcontext():
                loss = loss_of(model, batch)
                loss.backward()
            kept.append(loss.detach())
        kept.append(model.clip_grad_norm_(0.5))
        optimizer.step()
        optimizer.zero_grad()
        if step >= STEADY and device.type == "fake":
            waits += map(str, fake_device.host_syncs())
    return [bits(t) for t in kept], {name: bits(t) for name, t in model.state_dict().items()}, waits


def trainings(rank: int, n: int, place: str, records: list[dict[str, Any]]) -> Any:
    device = device_here(place)
    with process_group(rank, n):
        return [train(rank, device, **record) for record in records]


RECORDS: list[dict[str, Any]] = [
    {},
    {"bucket_mb": 25.0},
    {"micro_steps": 2},
    {"static_graph": True, "broadcast_buffers": False},
    {"find_unused_parameters": True},
    {"gradient_dtype": torch.bfloat16},
    {"hook": "future"},
    {"hook": "tensor", "micro_steps": 2},
]


@pytest.mark.parametrize("n", [1, 3])
def test_the_cpus_bits_and_a_host_that_never_waits(n: int) -> None:
    on_cpu, on_device = (
        run_ranks(n, trainings, place, RECORDS, timeout=100, env={"OMP_NUM_THREADS": "1"}) for place in ("cpu", "fake")
    )
    for here, there in zip(on_cpu, on_device, strict=True):
        for record, (losses, weights, _), found in zip(RECORDS, here, there, strict=True):
            assert found[0] == losses, record
            assert found[1] == weights, record
            assert not found[2], (record, found[2])
        assert there[0][:2] == there[1][:2], "the size of buckets shows"


def uneven(rank: int, n: int, place: str) -> Any:
    """Ranks with different numbers of inputs."""
    device = device_here(place)
    with process_group(rank, n):
        model = distlib.DataParallel(tiny().to(device), bucket_mb=SMALL)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with model.join():
            for step in range(3 + 2 * rank):
                batch = tokens_of(rank, step)
                loss_of(model, (batch[0].to(device), batch[1].to(device))).backward()
                optimizer.step()
                optimizer.zero_grad()
        return {name: bits(t) for name, t in model.state_dict().items()}


def test_ranks_may_run_out_of_inputs() -> None:
    on_cpu, on_device = (run_ranks(2, uneven, place) for place in ("cpu", "fake"))
    assert on_device == on_cpu and on_cpu[0] == on_cpu[1]


def unused(rank: int, n: int) -> None:
    """A parameter without gradient on one rank: all ranks hear of it in that backward, and can go on."""
    device = device_here("fake")
    with process_group(rank, n):
        module = tiny().to(device)
        model = distlib.DataParallel(module, bucket_mb=SMALL)
        for step in range(4):
            batch = tuple(t.to(device) for t in tokens_of(rank, step))
            if step % 2 == 0:
                loss_of(model, batch).backward()
                assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
                continue
            if rank == 1:
                module.forward = functools.partial(short, module)
            with pytest.raises(RuntimeError, match=r"received no gradient in this backward: .*\(on rank 1\)"):
                loss_of(model, batch).backward()
            vars(module).pop("forward", None)
            model.zero_grad()


def short(module: Tiny, tokens: torch.Tensor) -> torch.Tensor:
    """The model's forward without its middle."""
    return module.head(module.embed(tokens))


def test_a_gradient_that_is_missing_is_told_in_the_same_backward() -> None:
    run_ranks(2, unused)


class DeviceOnly(C10dChannel):
    """Another backend's group that serves the device only, as NCCL's do: all numbers travel on the device."""

    by_streams = True

    def __init__(self, inner: Any) -> None:
        for name in ("device", "start", "traffic", "aborted", "abort"):
            setattr(self, name, getattr(inner, name))


@contextlib.contextmanager
def device_only(rank: int, n: int, device: torch.device) -> Iterator[dist.ProcessGroup]:
    """Its process group: torch's gloo, by name."""
    with process_group(rank, n):
        world = Group.of()
        world.connect(device)
        pg = dist.new_group(backend="gloo")
        inner = world._on_devices[device.type]
        group_module._foreign[pg] = Group("only", rank, world.ranks, world.topology, DeviceOnly(inner), 20.0)
        yield pg


def told_late(rank: int, n: int, how: str) -> list[int]:
    """Rank 1 has no gradient in one step. Rank 0 hears of it when it looks: in its next forward, or backward."""
    device = device_here("fake")
    with device_only(rank, n, device) as pg:
        module = tiny().to(device)
        model = distlib.DataParallel(module, bucket_mb=SMALL, process_group=pg)
        batches = [tuple(t.to(device) for t in tokens_of(rank, step)) for step in range(6)]
        waits = []
        for batch in batches[:4]:
            fake_device.reset()
            loss = loss_of(model, batch)
            waits.append(len(fake_device.host_syncs()))
            fake_device.reset()
            loss.backward()
            waits.append(len(fake_device.host_syncs()))
            model.zero_grad()
        if how == "backward":
            later = loss_of(model, batches[5])  # a forward before the report is there to be read
        text = "received no gradient in this backward: .*\\(on rank 1\\)"
        if rank == 1:
            module.forward = functools.partial(short, module)
            with pytest.raises(RuntimeError, match=text):
                loss_of(model, batches[4]).backward()
            vars(module).pop("forward")
        else:
            loss_of(model, batches[4]).backward()
            with pytest.raises(RuntimeError, match=text):
                later.backward() if how == "backward" else loss_of(model, batches[5])
        model.zero_grad()
        loss_of(model, batches[5]).backward()  # all go on
        model._reducer.settle()
        return waits[4:]  # of steps in which nothing is new


@pytest.mark.parametrize("how", ["forward", "backward"])
def test_a_report_on_the_device_is_read_when_the_host_comes_back(how: str) -> None:
    """Not at the end of the backward, where the host would wait for all of it."""
    for waits in run_ranks(2, told_late, how):
        assert waits == [1, 0] * 2, waits

"""torch's own wrappers, unchanged, on the backend `distlib`: each trains like one process.

With DISTLIB_TORCH_SUITE=gloo the same runs on gloo, which shows whether a failure is the test's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import process_group, run_ranks, run_ranks_raw
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

STEPS, ROWS, LEARNING_RATE = 4, 6, 0.1
BACKENDS = pytest.mark.parametrize("backend", [os.environ.get("DISTLIB_TORCH_SUITE", "distlib")])
SIZES = pytest.mark.parametrize("n", [2, 4])


def network() -> nn.Sequential:
    """The same weights on every rank and in the oracle. No size divides by 4: shards are uneven."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 9), nn.Tanh(), nn.Linear(9, 3))


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(ROWS, 7, generator=generator), torch.randn(ROWS, 3, generator=generator)


def loss_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    x, y = batch(rank, step)
    return (model(x) - y).square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)


def train(model: nn.Module, rank: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def oracle(n: int, clip: float | None = None) -> dict[str, torch.Tensor]:
    """One process, the mean loss of all ranks' batches."""
    model = network()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(loss_of(model, rank, step) for rank in range(n)) / n).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model.state_dict()


def full(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def check(state: dict[str, Any], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in full(state).items():
        about = f"parameter {name}: {{}}".format
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=about)


# ------------------------------------------------------------------------------------ DistributedDataParallel


def train_ddp(rank: int, n: int, backend: str, options: dict[str, Any]) -> None:
    with process_group(rank, n, backend):
        model = DistributedDataParallel(network(), **options)
        train(model, rank)
        check(model.module.state_dict(), oracle(n))


@BACKENDS
@SIZES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_cap_mb": 0.0001},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
    ],
    ids=lambda options: next(iter(options), "defaults"),
)
def test_ddp_trains_like_one_process(backend: str, n: int, options: dict[str, Any]) -> None:
    run_ranks(n, train_ddp, backend, options)


def train_with_hooks(rank: int, n: int, backend: str) -> None:
    half = default_hooks.fp16_compress_hook
    wrapped = default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)
    with process_group(rank, n, backend):
        for hook, tolerance in ((default_hooks.allreduce_hook, 1e-5), (half, 1e-2), (wrapped, 1e-2)):
            model = DistributedDataParallel(network())
            model.register_comm_hook(None, hook)
            train(model, rank)
            check(model.module.state_dict(), oracle(n), tolerance)
        for builtin, tolerance in (("ALLREDUCE", 1e-5), ("FP16_COMPRESS", 1e-2)):
            model = DistributedDataParallel(network())
            model._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, builtin))
            train(model, rank)
            check(model.module.state_dict(), oracle(n), tolerance)


@BACKENDS
@SIZES
def test_ddp_communication_hooks(backend: str, n: int) -> None:
    run_ranks(n, train_with_hooks, backend)


def train_with_powersgd(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        model = DistributedDataParallel(network())
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=8, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        train(model, rank)
        for parameter in model.parameters():
            mine = parameter.detach().clone()
            dist.broadcast(parameter.detach(), 0)
            torch.testing.assert_close(mine, parameter.detach())


@BACKENDS
def test_ddp_hook_whose_callbacks_wait_for_collectives(backend: str) -> None:
    run_ranks(2, train_with_powersgd, backend)


def accumulate(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        model = DistributedDataParallel(network())
        optimizer = optimizer_of(model)
        for step in range(STEPS):
            with model.no_sync():
                (loss_of(model, rank, 2 * step) / 2).backward()
            (loss_of(model, rank, 2 * step + 1) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = network()
        optimizer = optimizer_of(expected)
        for step in range(STEPS):
            for r, micro in itertools.product(range(n), (2 * step, 2 * step + 1)):
                (loss_of(expected, r, micro) / (2 * n)).backward()
            optimizer.step()
            optimizer.zero_grad()
        check(model.module.state_dict(), expected.state_dict())


@BACKENDS
@SIZES
def test_ddp_accumulates_under_no_sync(backend: str, n: int) -> None:
    run_ranks(n, accumulate, backend)


def train_uneven(rank: int, n: int, backend: str, unused: bool, shrinking: bool) -> None:
    with process_group(rank, n, backend):
        model = DistributedDataParallel(network(), find_unused_parameters=unused)
        optimizer = optimizer_of(model)
        with model.join(divide_by_initial_world_size=not shrinking):
            for step in range(1 + rank):
                optimizer.zero_grad()
                loss_of(model, rank, step).backward()
                optimizer.step()
        expected = network()  # a rank without input adds nothing; the divisor stays n, or shrinks
        optimizer = optimizer_of(expected)
        for step in range(n):
            optimizer.zero_grad()
            losses = [loss_of(expected, r, step) for r in range(n) if step < 1 + r]
            (sum(losses) / (len(losses) if shrinking else n)).backward()
            optimizer.step()
        check(model.module.state_dict(), expected.state_dict())


@BACKENDS
@SIZES
@pytest.mark.parametrize(
    ("unused", "shrinking"), [(False, False), (True, False), (False, True)], ids=["plain", "unused", "shrinking"]
)
def test_ddp_joins_uneven_inputs(backend: str, n: int, unused: bool, shrinking: bool) -> None:
    run_ranks(n, train_uneven, backend, unused, shrinking)


def train_with_sharded_optimizer(rank: int, n: int, backend: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second: only where it is needed

    with process_group(rank, n, backend):
        model = DistributedDataParallel(network())
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9
        )
        train(model, rank, optimizer)
        check(model.module.state_dict(), oracle(n))
        optimizer.consolidate_state_dict()


@BACKENDS
@SIZES
def test_zero_redundancy_optimizer(backend: str, n: int) -> None:
    run_ranks(n, train_with_sharded_optimizer, backend)


def train_until_a_rank_dies(rank: int, n: int, backend: str, hook: bool) -> str:
    group = process_group(rank, n, backend).__enter__()
    model = DistributedDataParallel(network(), process_group=group)
    if hook:
        model.register_comm_hook(group, default_hooks.allreduce_hook)
    loss_of(model, rank, 0).backward()
    if rank == n - 1:
        os._exit(3)
    with pytest.raises(RuntimeError) as raised:
        loss_of(model, rank, 1).backward()
    return str(raised.value)


@BACKENDS
@pytest.mark.parametrize("hook", [False, True])
def test_ddp_raises_when_a_rank_has_died(backend: str, hook: bool) -> None:
    outcomes = run_ranks_raw(3, train_until_a_rank_dies, backend, hook, grace=20)
    assert [outcome.kind for outcome in outcomes] == ["value", "value", "exit"], "\n".join(map(str, outcomes))
    if backend == "distlib":
        assert all("rank 2" in outcome.value for outcome in outcomes[:2])


# ------------------------------------------------------------------------------------------ FSDP2, HSDP, FSDP


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def train_fsdp(rank: int, n: int, backend: str, options: dict[str, Any]) -> None:
    with process_group(rank, n, backend):
        model = shard(network(), **options)
        train(model, rank)
        check(model.state_dict(), oracle(n))


@BACKENDS
@SIZES
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_trains_like_one_process(backend: str, n: int, reshard: bool) -> None:
    run_ranks(n, train_fsdp, backend, {"reshard_after_forward": reshard})


def train_fsdp_in_half(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        for reduce_dtype in (torch.float32, torch.bfloat16):
            model = shard(network(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype))
            train(model, rank)
            check(model.state_dict(), oracle(n), tolerance=5e-2)


@BACKENDS
def test_fsdp2_mixed_precision(backend: str) -> None:
    run_ranks(2, train_fsdp_in_half, backend)


def train_fsdp_clipped(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        model = shard(network())
        model.set_allocate_memory_from_process_group_for_comm(True)
        optimizer = optimizer_of(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        check(model.state_dict(), oracle(n, clip=0.1))


@BACKENDS
@SIZES
def test_fsdp2_clips_and_takes_its_memory_from_the_group(backend: str, n: int) -> None:
    run_ranks(n, train_fsdp_clipped, backend)


def train_hsdp(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("replicate", "shard"))
        model = shard(network(), mesh=mesh)
        train(model, rank)
        check(model.state_dict(), oracle(n))
        assert dist.get_backend(mesh["shard"].get_group()) == dist.get_backend()


@BACKENDS
@pytest.mark.parametrize("n", [2, 4])
def test_hsdp_on_a_two_dimensional_mesh(backend: str, n: int) -> None:
    run_ranks(n, train_hsdp, backend)


def train_fsdp1(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
        train(model, rank)
        with FullyShardedDataParallel.summon_full_params(model):
            check(model.module.state_dict(), oracle(n))


@BACKENDS
def test_fsdp1_trains_like_one_process(backend: str) -> None:
    run_ranks(2, train_fsdp1, backend)


# ---------------------------------------------------------------------------- torch.distributed.checkpoint


def save_checkpoint(rank: int, n: int, backend: str, path: str, asynchronous: bool) -> None:
    with process_group(rank, n, backend):
        model = shard(network())
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, rank, optimizer)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if asynchronous:
            dcp.async_save(state, checkpoint_id=path).result()
        else:
            dcp.save(state, checkpoint_id=path)
        whole = full(model_state)
        if rank == 0:
            torch.save(whole, f"{path}.pt")


def load_checkpoint(rank: int, n: int, backend: str, path: str) -> None:
    with process_group(rank, n, backend):
        model = shard(network())
        optimizer = torch.optim.AdamW(model.parameters())
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        check(model.state_dict(), torch.load(f"{path}.pt"), tolerance=0)
        assert [state["step"] for state in optimizer.state.values()] == [STEPS] * 6


@BACKENDS
@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoint_of_four_ranks_loads_on_two(backend: str, asynchronous: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    run_ranks(4, save_checkpoint, backend, path, asynchronous)
    run_ranks(2, load_checkpoint, backend, path)


def pass_full_state(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        model = shard(network())
        expected = {name: tensor + 1 for name, tensor in network().state_dict().items()}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, dict(expected) if rank == 0 else {}, options=options)
        check(model.state_dict(), expected, tolerance=0)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(model, options=options)
        assert gathered.keys() == (expected.keys() if rank == 0 else {}.keys())


@BACKENDS
def test_full_state_goes_out_from_rank_0_and_back(backend: str) -> None:
    run_ranks(4, pass_full_state, backend)


# ----------------------------------------------------------------------------- torch.distributed.pipelining


def pipeline(rank: int, n: int, backend: str, schedule: Callable[..., Any], stages_per_rank: int) -> None:
    count = n * stages_per_rank
    torch.manual_seed(3)
    layers = [nn.Linear(5, 5) for _ in range(count)]
    x, y = torch.randn(4 * n, 5), torch.randn(4 * n, 5)
    with process_group(rank, n, backend):
        mine = range(rank, count, n)
        stages = [PipelineStage(layers[i], i, count, torch.device("cpu")) for i in mine]
        loss = nn.MSELoss()
        runner = schedule(stages[0] if stages_per_rank == 1 else stages, 2 * n, loss_fn=loss)
        losses: list[torch.Tensor] = []
        inputs = (x,) if rank == 0 else ()
        runner.step(*inputs, **({"target": y, "losses": losses} if rank == n - 1 else {}))
    torch.manual_seed(3)
    oracle_layers = nn.Sequential(*[nn.Linear(5, 5) for _ in range(count)])
    loss(oracle_layers(x), y).backward()
    for i in mine:
        for got, expected in zip(layers[i].parameters(), oracle_layers[i].parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad)
    if rank == n - 1:
        torch.testing.assert_close(torch.stack(losses).mean(), loss(oracle_layers(x), y))


@BACKENDS
@SIZES
@pytest.mark.parametrize(
    ("schedule", "stages_per_rank"),
    [
        (ScheduleGPipe, 1),
        (Schedule1F1B, 1),
        (ScheduleInterleaved1F1B, 2),
        (ScheduleInterleavedZeroBubble, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_pipelines_compute_the_gradients_of_one_process(
    backend: str, n: int, schedule: Callable[..., Any], stages_per_rank: int
) -> None:
    run_ranks(n, pipeline, backend, schedule, stages_per_rank)

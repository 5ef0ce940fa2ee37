"""torch.distributed's own calls, unchanged, on the backend `distlib`: objects, groups, tags, futures, functional ones.

With DISTLIB_TORCH_SUITE=gloo the same runs on gloo, which shows whether a failure is the test's.
"""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as with_gradients
from ranks import process_group, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

BACKENDS = pytest.mark.parametrize("backend", [os.environ.get("DISTLIB_TORCH_SUITE", "distlib")])
SIZES = pytest.mark.parametrize("n", [2, 4])


def of_rank(rank: int, *shape: int) -> torch.Tensor:
    """What a rank contributes: different on each, whole numbers, so that sums are exact."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 100 * rank


def total(n: int, *shape: int) -> torch.Tensor:
    return torch.stack([of_rank(rank, *shape) for rank in range(n)]).sum(0)


# --------------------------------------------------------------------------------------------------- objects


def objects(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        mine = {"rank": rank, "text": "é" * rank, "tensor": of_rank(rank, 3)}
        found: list[dict] = [{}] * n
        dist.all_gather_object(found, mine)
        assert [f["rank"] for f in found] == list(range(n))
        assert torch.equal(found[-1]["tensor"], of_rank(n - 1, 3))

        shared = [rank, f"from {rank}", {rank}]
        dist.broadcast_object_list(shared, src=n - 1)
        assert shared == [n - 1, f"from {n - 1}", {n - 1}]

        gathered = [None] * n if rank == 1 else None
        dist.gather_object(("rank", rank), gathered, dst=1)
        assert gathered == ([("rank", r) for r in range(n)] if rank == 1 else None)

        part: list[object] = [None]
        dist.scatter_object_list(part, [{"for": r} for r in range(n)] if rank == 0 else None, src=0)
        assert part == [{"for": rank}]

        if rank == 0:
            dist.send_object_list(["a", {"b": 1}], dst=1)
        elif rank == 1:
            received: list[object] = [None, None]
            assert dist.recv_object_list(received, src=0) == 0
            assert received == ["a", {"b": 1}]


@BACKENDS
@SIZES
def test_object_collectives(backend: str, n: int) -> None:
    run_ranks(n, objects, backend)


# ---------------------------------------------------------------------------------------------------- groups


def groups(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        halves = [dist.new_group(range(0, n, 2)), dist.new_group(range(1, n, 2), timeout=timedelta(seconds=20))]
        mine = halves[rank % 2]
        assert dist.get_backend(mine) == backend
        members = dist.get_process_group_ranks(mine)
        assert members == list(range(rank % 2, n, 2))
        x = of_rank(rank, 5)
        dist.all_reduce(x, group=mine)
        assert torch.equal(x, sum(of_rank(r, 5) for r in members))
        dist.broadcast(x, src=members[-1], group=mine)
        dist.barrier(mine)

        other = dist.new_group([0, 1], backend="gloo")  # another backend beside it
        if rank < 2:
            y = of_rank(rank, 2)
            dist.all_reduce(y, group=other)
            assert torch.equal(y, total(2, 2))

        pair, pairs = dist.new_subgroups(2)
        assert len(pairs) == n // 2
        z = torch.ones(1)
        dist.all_reduce(z, group=pair)
        assert z.item() == 2
        if rank == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dist.all_reduce(z, group=halves[1])  # not a member: torch warns and does nothing
            assert z.item() == 2
        dist.destroy_process_group(mine)
        dist.all_reduce(z)
        assert z.item() == 2 * n


@BACKENDS
@SIZES
def test_groups_of_some_ranks(backend: str, n: int) -> None:
    run_ranks(n, groups, backend)


def monitor(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        dist.monitored_barrier(timeout=timedelta(seconds=20))
        group = dist.new_group(range(n))
        if rank == n - 1:
            return
        with pytest.raises(RuntimeError, match=f"Rank {n - 1} failed to pass" if rank == 0 else f"Rank {rank}"):
            dist.monitored_barrier(group, timeout=timedelta(seconds=0.5))
        with pytest.raises(RuntimeError):
            dist.monitored_barrier(group, timeout=timedelta(seconds=0.5), wait_all_ranks=True)


@BACKENDS
def test_monitored_barrier_names_the_rank_that_is_missing(backend: str) -> None:
    run_ranks(2, monitor, backend)


# ------------------------------------------------------------------------------------- sends, receives, futures


def messages(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        right, left = (rank + 1) % n, (rank - 1) % n
        sends = [dist.isend(of_rank(rank, 4) + tag, right, tag=tag) for tag in (3, 1, 2)]
        for tag in (1, 2, 3):  # in another order than they were sent
            x = torch.empty(4)
            assert dist.recv(x, left, tag=tag) == left
            assert torch.equal(x, of_rank(left, 4) + tag)
        for work in sends:
            work.wait()

        outgoing, incoming = of_rank(rank, 3), torch.empty(3)
        batch = [dist.P2POp(dist.irecv, incoming, left), dist.P2POp(dist.isend, outgoing, right)]
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        assert torch.equal(incoming, of_rank(left, 3))

        if rank == 0:
            seen = set()
            for _ in range(1, n):
                x = torch.empty(2)
                sender = dist.recv(x)  # from anyone
                assert torch.equal(x, of_rank(sender, 2))
                seen.add(sender)
            assert seen == set(range(1, n))
        else:
            dist.send(of_rank(rank, 2), 0)


@BACKENDS
@SIZES
def test_sends_and_receives_with_tags(backend: str, n: int) -> None:
    run_ranks(n, messages, backend)


def futures(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        x = of_rank(rank, 6)
        work = dist.all_reduce(x, async_op=True)
        future = work.get_future().then(lambda done: done.value()[0] / n)
        assert torch.equal(future.wait(), total(n, 6) / n)
        assert work.wait(timedelta(seconds=10))
        assert work.is_completed() and work.is_success()
        assert torch.equal(work.result()[0], total(n, 6))

        def twice(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            again = dist.all_reduce(done.value()[0], async_op=True)  # a callback that waits for a collective
            return again.get_future().wait()[0]

        y = torch.ones(1)
        assert dist.all_reduce(y, async_op=True).get_future().then(twice).wait().item() == n * n
        works = [dist.all_reduce(torch.full((k,), 1.0), async_op=True) for k in (1, 1000, 100_000)]
        for work in reversed(works):
            work.wait()
        assert all((work.result()[0] == n).all() for work in works)


@BACKENDS
@SIZES
def test_works_and_futures(backend: str, n: int) -> None:
    run_ranks(n, futures, backend)


def exchanges(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        sizes = [[(source + target) % 3 for target in range(n)] for source in range(n)]  # rows; some are none
        whole = [of_rank(source, sum(sizes[source]), 2).split(sizes[source]) for source in range(n)]
        expected = [whole[source][rank] for source in range(n)]
        received = [torch.empty_like(part) for part in expected]
        if backend != "gloo":  # gloo wants equal sizes here
            dist.all_to_all(received, list(whole[rank]))
            assert all(map(torch.equal, received, expected))
        output = torch.empty(sum(len(part) for part in expected), 2)
        taken = [sizes[source][rank] for source in range(n)]
        dist.all_to_all_single(output, torch.cat(whole[rank]), taken, sizes[rank])
        assert torch.equal(output, torch.cat(expected))
        output = torch.empty(2 * n)
        dist.all_to_all_single(output, of_rank(rank, 2 * n))
        assert torch.equal(output, torch.cat([of_rank(s, 2 * n)[2 * rank : 2 * rank + 2] for s in range(n)]))


@BACKENDS
@SIZES
def test_all_to_all(backend: str, n: int) -> None:
    run_ranks(n, exchanges, backend)


# ------------------------------------------------------------- coalesced, functional, differentiable, DTensor


def coalesced(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        tensors = [of_rank(rank, k) for k in (1, 7, 64)]
        with dist._coalescing_manager(async_ops=True) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor)
        manager.wait()
        assert all(torch.equal(t, total(n, t.numel())) for t in tensors)
        outputs = [torch.empty(n * k) for k in (2, 3)]
        with dist._coalescing_manager():
            for output, k in zip(outputs, (2, 3), strict=True):
                dist.all_gather_into_tensor(output, of_rank(rank, k))
        for output, k in zip(outputs, (2, 3), strict=True):
            assert torch.equal(output, torch.cat([of_rank(r, k) for r in range(n)]))
        parts = [torch.empty(k) for k in (2, 3)]
        with dist._coalescing_manager():
            for part in parts:
                dist.reduce_scatter_tensor(part, of_rank(rank, n * part.numel()))
        for part in parts:
            assert torch.equal(part, total(n, n * part.numel()).chunk(n)[rank])


@BACKENDS
def test_coalesced_collectives(backend: str) -> None:
    run_ranks(2, coalesced, backend)


def functionals(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend) as group:
        x = of_rank(rank, n, 2)
        assert torch.equal(functional.all_reduce(x, "sum", group), total(n, n, 2))
        assert torch.equal(functional.all_reduce(x, "avg", group), total(n, n, 2) / n)
        assert torch.equal(functional.all_reduce(x, "max", group), of_rank(n - 1, n, 2))
        everything = torch.cat([of_rank(r, n, 2) for r in range(n)])
        assert torch.equal(functional.all_gather_tensor(x, 0, group), everything)
        mine = functional.reduce_scatter_tensor(x, "sum", 0, group)
        assert torch.equal(mine, total(n, n, 2)[rank : rank + 1])
        assert torch.equal(functional.broadcast(x, 1, group), of_rank(1, n, 2))
        column = functional.all_to_all_single(x, None, None, group)
        assert torch.equal(column, torch.stack([of_rank(r, n, 2)[rank] for r in range(n)]))

        weight = of_rank(rank, 3).requires_grad_()
        (with_gradients.all_reduce(weight) * (rank + 1)).sum().backward()
        assert torch.equal(weight.grad, torch.full((3,), n * (n + 1) / 2))
        weight = of_rank(rank, 3).requires_grad_()
        gathered = torch.stack(list(with_gradients.all_gather(weight)))
        (gathered * torch.arange(1.0, n + 1)[:, None]).sum().backward()
        assert torch.equal(weight.grad, torch.full((3,), float(n * (rank + 1))))


@BACKENDS
@SIZES
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_functional_and_differentiable_collectives(backend: str, n: int) -> None:
    run_ranks(n, functionals, backend)


def compiled(rank: int, n: int, backend: str) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = functional.all_reduce(2 * x, "sum", dist.group.WORLD)
        dist.all_reduce(x)
        return y + x

    with process_group(rank, n, backend):
        result = torch.compile(program, backend="aot_eager")(of_rank(rank, 4))
        assert torch.equal(result, 3 * total(n, 4))


@BACKENDS
def test_collectives_in_compiled_programs(backend: str) -> None:
    run_ranks(2, compiled, backend)


def gathered_into(x: torch.Tensor, out: torch.Tensor, n: int, group: str) -> torch.Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor_out(x, n, group, out=out))


def gathers_into_given_memory(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        everything = torch.cat([of_rank(r, 2, 3) for r in range(n)])
        for each in (dist.group.WORLD, dist.new_group(backend="gloo")):
            room = torch.empty(3 * n, 3)
            result = gathered_into(of_rank(rank, 3, 2).t(), room[: 2 * n], n, each.group_name)
            strided = torch.cat([of_rank(r, 3, 2).t() for r in range(n)])
            assert torch.equal(result, strided) and result.data_ptr() == room.data_ptr()
            program = torch.compile(gathered_into, backend="aot_eager")
            assert torch.equal(program(of_rank(rank, 2, 3), torch.empty(2 * n, 3), n, each.group_name), everything)
        dist.barrier()


@BACKENDS
def test_compiled_programs_gather_into_memory_of_their_own(backend: str) -> None:
    run_ranks(2, gathers_into_given_memory, backend)


def gathers_without_the_other(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend, timeout=2):
        ops = torch.ops._c10d_functional
        if rank == 0:
            out = ops.all_gather_into_tensor_out(of_rank(rank, 2), n, dist.group.WORLD.group_name, out=torch.empty(4))
            with pytest.raises(RuntimeError):
                ops.wait_tensor(out)


@BACKENDS
def test_a_gather_into_given_memory_raises_where_it_is_waited_for(backend: str) -> None:
    run_ranks(2, gathers_without_the_other, backend)


def tensor_parallel(rank: int, n: int, backend: str) -> None:
    with process_group(rank, n, backend):
        mesh = init_device_mesh("cpu", (n,))
        whole = of_rank(0, 7, 6)
        rows = distribute_tensor(whole, mesh, [Shard(0)])
        assert torch.equal(rows.redistribute(mesh, [Replicate()]).to_local(), whole)
        columns = rows.redistribute(mesh, [Shard(1)])
        assert torch.equal(columns.to_local(), (*whole.chunk(n, 1), whole[:, 6:])[rank])
        assert torch.equal(columns.full_tensor(), whole)

        def build() -> nn.Sequential:
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        torch.manual_seed(2)
        x = torch.randn(5, 6)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model, expected = parallelize_module(build(), mesh, plan), build()
        torch.testing.assert_close(model(x), expected(x))
        model(x).square().sum().backward()
        expected(x).square().sum().backward()
        for got, parameter in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(got.grad.full_tensor(), parameter.grad)


@BACKENDS
@SIZES
def test_dtensor_and_tensor_parallel(backend: str, n: int) -> None:
    run_ranks(n, tensor_parallel, backend)

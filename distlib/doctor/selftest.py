"""The self-test: every rank communicates, compares with what must come out, and times an all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

import distlib
from distlib.bench import all_gather_flat, reduce_scatter_flat, ring_exchange, seconds_per_call
from distlib.doctor.facts import SelfTest
from distlib.words import ranks_text

SMALL_BYTES = 4 << 10
_N = 1000  # elements of what is compared


def on_local_rank(timeout: float, large_bytes: int) -> dict[str, object]:
    """What a rank that the doctor started runs: the CPU only, since such ranks may outnumber GPUs."""
    with distlib.init(backend="distlib", timeout=timedelta(seconds=timeout)):
        return measure([torch.device("cpu")], large_bytes).model_dump()


def measure(devices: list[torch.device], large_bytes: int) -> SelfTest:
    """Right and wrong operations on each device, and the speed on the first. Every rank must call.

    Raises what the collectives raise.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    failed: dict[str, list[int]] = {}
    for device in devices:
        for name, test in _TESTS.items():
            label = name if device.type == "cpu" else f"{name} ({device.type})"
            # Tensors of all ranks, so that every rank reports the same.
            verdicts = torch.zeros(size, dtype=torch.int64)
            verdicts[rank] = int(not test(rank, size, device))
            dist.all_reduce(verdicts)
            failed[label] = verdicts.nonzero().flatten().tolist()
    small = torch.zeros(SMALL_BYTES // 4, device=devices[0])
    registered, ordinary = distlib.registered_empty(large_bytes // 4), torch.zeros(large_bytes // 4)
    registered.zero_()
    return SelfTest(
        ranks=size,
        in_job=True,
        right=[name for name, ranks in failed.items() if not ranks],
        wrong=[f"{name} on {ranks_text(ranks)}" for name, ranks in failed.items() if ranks],
        small_bytes=SMALL_BYTES,
        small_seconds=seconds_per_call(lambda: dist.all_reduce(small), 0.1),
        large_bytes=large_bytes,
        registered_seconds=seconds_per_call(lambda: dist.all_reduce(registered), 0.2),
        ordinary_seconds=seconds_per_call(lambda: dist.all_reduce(ordinary), 0.2),
    )


def _all_reduce(rank: int, size: int, device: torch.device) -> bool:
    tensor = torch.arange(_N, dtype=torch.float32, device=device) + rank
    dist.all_reduce(tensor)
    expected = torch.arange(_N, dtype=torch.float32, device=device) * size + size * (size - 1) / 2
    return torch.equal(tensor, expected)


def _all_gather(rank: int, size: int, device: torch.device) -> bool:
    output = torch.empty(size * _N, device=device)
    all_gather_flat(output, torch.full((_N,), float(rank), device=device))
    return torch.equal(output, torch.arange(size, dtype=torch.float32, device=device).repeat_interleave(_N))


def _reduce_scatter(rank: int, size: int, device: torch.device) -> bool:
    output = torch.empty(_N, device=device)
    parts = torch.arange(size, dtype=torch.float32, device=device).repeat_interleave(_N)
    reduce_scatter_flat(output, parts * (rank + 1))
    return torch.equal(output, torch.full((_N,), rank * size * (size + 1) / 2, device=device))


def _broadcast(rank: int, size: int, device: torch.device) -> bool:
    tensor = torch.full((_N,), float(rank), device=device)
    dist.broadcast(tensor, src=size - 1)
    return torch.equal(tensor, torch.full((_N,), float(size - 1), device=device))


def _messages(rank: int, size: int, device: torch.device) -> bool:
    incoming = torch.empty(_N, device=device)
    ring_exchange(incoming, torch.full((_N,), float(rank), device=device))
    return torch.equal(incoming, torch.full((_N,), float((rank - 1) % size), device=device))


_TESTS: dict[str, Callable[[int, int, torch.device], bool]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "send and recv": _messages,
}

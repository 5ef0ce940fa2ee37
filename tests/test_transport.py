"""Messages between pipeline stages: they arrive bit for bit by every way, and slots are safe and do not grow."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any, NamedTuple

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import process_group, run_ranks
from torch import Tensor

import distlib
from distlib import native
from distlib.comm import slots
from distlib.comm.group import Group
from distlib.comm.meeting import Host
from distlib.comm.slots import Slot, layout
from distlib.pipeline.header import BYTES, DATA, Header
from distlib.pipeline.program import Spec
from distlib.pipeline.transport import Transport

NO_CORE = pytest.mark.skipif(native.core() is None, reason=native.why_not())
SLOTS = pytest.param("distlib", {}, id="slots", marks=NO_CORE)
MIXED = pytest.param("distlib", {"DISTLIB_NODES": "2"}, id="two nodes", marks=NO_CORE)
MESSAGES = pytest.param("distlib", {"DISTLIB_CORE": "0"}, id="without the core")
STOCK = pytest.param("gloo", {}, id="stock gloo")
EVERY_WAY = pytest.mark.parametrize(("backend", "env"), [SLOTS, MIXED, MESSAGES, STOCK])

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.uint8, torch.complex64]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (7,), (2, 3, 5), (1000,), (33, 1021), (65, 2, 1024)]


def specs_of(tensors: Any) -> list[Spec]:
    return [Spec.of(tensor) for tensor in tensors]


def values(spec: Spec, seed: int) -> Tensor:
    """Any rank can make any other's."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (spec.nbytes,), generator=generator, dtype=torch.uint8)
    if spec.dtype is torch.bool:
        raw &= 1
    flat = raw.view(spec.dtype) if spec.numel else torch.empty(0, dtype=spec.dtype)
    return flat.view(spec.shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# ---------------------------------------------------------------- what is sent arrives


class Sent(NamedTuple):
    """A message of a random program; `layouts` of its tensors where they are sent."""

    source: int
    target: int
    micro_batch: int
    specs: tuple[Spec, ...]
    layouts: tuple[str, ...]
    seed: int

    @property
    def tensors(self) -> list[Tensor]:
        return [values(spec, self.seed + i) for i, spec in enumerate(self.specs)]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


class Program(NamedTuple):
    """placement and edges of a pipeline, and steps of events ("send", "post" or "take", message), in an order in which
    one process could run them: then ranks that each do their own events cannot block each other."""

    placement: list[int]
    edges: list[tuple[int, int]]
    steps: list[list[tuple[str, Sent]]]


def program(seed: int, ranks: int) -> Program:
    rng = random.Random(seed)
    stages = rng.randint(2, 5)
    placement = [*range(min(ranks, stages)), *(rng.randrange(ranks) for _ in range(stages - ranks))][:stages]
    rng.shuffle(placement)
    all_pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
    edges = rng.sample(all_pairs, rng.randint(1, len(all_pairs)))
    crossing = [(a, b) for a, b in edges if placement[a] != placement[b]]
    steps = []
    for _ in range(rng.randint(1, 4)):
        events: list[tuple[str, Sent]] = []
        pending: list[tuple[str, Sent]] = []
        for micro_batch in range(rng.randint(1, 4)):
            for a, b in crossing:
                for source, target in ((a, b), (b, a)):
                    specs = tuple(Spec(rng.choice(SHAPES), rng.choice(DTYPES), False) for _ in range(rng.randint(1, 3)))
                    layouts = tuple(rng.choice(["plain", "strided", "grad", "registered"]) for _ in specs)
                    message = Sent(source, target, micro_batch, specs, layouts, rng.randrange(1 << 30))
                    events.append(("send", message))
                    events.insert(rng.randrange(len(events)) if rng.random() < 0.3 else len(events), ("post", message))
                    pending.append(("take", message))
                    while pending and rng.random() < 0.4:
                        events.append(pending.pop(rng.randrange(len(pending))))
        rng.shuffle(pending)
        steps.append(_in_order(events) + pending)
    return Program(placement, edges, steps)


def _in_order(events: list[tuple[str, Sent]]) -> list[tuple[str, Sent]]:
    """Posts of a channel in the order of its sends, and before its takes."""
    posts: dict[tuple[int, int], list[Sent]] = {}
    for what, message in events:
        if what == "send":
            posts.setdefault(message[:2], []).append(message)
    return [("post", posts[m[:2]].pop(0)) if what == "post" else (what, m) for what, m in events]


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """The same values as a stage may hold them."""
    if how == "strided" and tensor.dim():
        wide = torch.zeros([*tensor.shape[:-1], 2 * tensor.shape[-1]], dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if how == "registered":
        return distlib.registered_empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
    if how == "grad" and (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return tensor.clone().requires_grad_().clone()
    return tensor


def links(group: Group, source: int, target: int) -> tuple[str, bool]:
    """Between two group ranks: the ledger's link, and whether slots are used."""
    near, core = group.topology.same_host(source, target), native.core() is not None
    if type(group._channel).__name__ == "C10dChannel":
        return "between hosts", False
    return ("same host" if near else "between hosts"), near and core


def random_traffic(rank: int, n: int, backend: str, seeds: list[int]) -> None:
    with process_group(rank, n, backend):
        group = Group.of()
        for seed in seeds:
            run_program(group, program(seed, n), seed)


def run_program(group: Group, p: Program, seed: int) -> None:
    transport = Transport(group, p.placement, p.edges, None)
    distlib.ledger().reset()
    expected: Counter[tuple[str, str]] = Counter()
    held: list[tuple[Tensor, bytes, Sent]] = []
    for step in p.steps:
        for what, message in step:
            source, target, k = message[:3]
            here = p.placement[source if what == "send" else target]
            if group.rank != here:
                continue
            link, by_slots = links(group, p.placement[source], p.placement[target])
            if what == "send":
                tensors = [laid_out(t, how) for t, how in zip(message.tensors, message.layouts, strict=True)]
                transport.send(source, target, k, tensors)
                expected["send", link] += message.nbytes
            elif what == "post":
                transport.post(source, target, k, message.specs)
                expected["recv", link] += message.nbytes if by_slots else 0
            else:
                got = transport.take(source, target, k)
                assert specs_of(got) == list(message.specs), (seed, message)
                for tensor, right in zip(got, message.tensors, strict=True):
                    assert bits(tensor) == bits(right), (seed, message)
                    assert tensor.is_leaf and tensor.is_contiguous() and not tensor._is_view()
                    if tensor.numel() and message.seed % 3 == 0:
                        tensor.zero_()  # it is the receiver's
                        held.append((tensor, bits(tensor), message))
                    elif message.seed % 3 == 1:
                        held.append((tensor, bits(tensor), message))
        transport.finish()
        for tensor, was, message in held:
            assert bits(tensor) == was, (seed, "changed while it was held", message)
        held = held[len(held) // 2 :]
    counted = {(row.op, row.link): row.bytes for row in distlib.ledger().rows if row.op != "control" and row.bytes}
    assert counted == {key: nbytes for key, nbytes in expected.items() if nbytes}, seed
    assert [row.bytes for row in distlib.ledger().rows] == [row.bytes for row in distlib.ledger().expected()]
    control = sum(row.bytes for row in distlib.ledger().rows if row.op == "control")
    assert control % BYTES == 0 and (control > 0 or not counted)
    transport.close()
    for tensor, was, message in held:
        assert bits(tensor) == was, (seed, "changed after close", message)


@pytest.mark.parametrize("n", [2, 3])
@EVERY_WAY
def test_whatever_is_sent_arrives_bit_for_bit_and_is_counted(backend: str, env: dict[str, str], n: int) -> None:
    run_ranks(n, random_traffic, backend, list(range(n * 100, n * 100 + 8)), env=env)


def one_tensor(source: int, k: int) -> Tensor:
    return torch.full((300, 100), 10.0 * source + k)


ONE = [Spec((300, 100), torch.float32, True)]
NUMBERED = [*ONE, Spec((5,), torch.int64, False)]


def takes_in_another_order(rank: int, n: int) -> None:
    with process_group(rank, n):
        transport = Transport(Group.of(), [0, 1], [(0, 1)])
        for k in (2, 0, 1):
            if rank == 0:
                transport.send(0, 1, k, [one_tensor(0, k)])
            else:
                transport.post(0, 1, k, ONE)
        if rank == 1:
            for k in (1, 2, 0):
                assert torch.equal(transport.take(0, 1, k)[0], one_tensor(0, k))
        transport.finish()
        transport.close()


@pytest.mark.parametrize("env", [pytest.param({}, marks=NO_CORE), {"DISTLIB_CORE": "0"}], ids=str)
def test_a_channel_may_be_taken_from_in_another_order_than_posted(env: dict[str, str]) -> None:
    run_ranks(2, takes_in_another_order, env=env)


# ---------------------------------------------------------------- slots


def slot_bytes(specs: list[Spec]) -> int:
    """Bytes of the slot of a message."""
    return -(-layout([spec.nbytes for spec in specs])[1] // 4096) * 4096


def one_f_one_b(transport: Transport, rank: int, n: int, k: int, hold: int) -> None:
    """A step of a chain of n stages with k micro-batches; each stage runs `hold` forwards ahead."""
    kept: dict[int, Tensor] = {}

    def forward(m: int) -> None:
        x = torch.zeros(300, 100)
        if rank > 0:
            transport.post(rank - 1, rank, m, ONE)
            x = transport.take(rank - 1, rank, m)[0]
        x.requires_grad_()
        kept[m] = x
        if rank < n - 1:
            transport.send(rank, rank + 1, m, [x * 2 + m])

    def backward(m: int) -> None:
        x = kept.pop(m)
        y = x * 2 + m
        gradient = torch.ones_like(y)
        if rank < n - 1:
            transport.post(rank + 1, rank, m, ONE)
            gradient = transport.take(rank + 1, rank, m)[0]
        y.backward(gradient)
        assert x.grad is not None and x.grad[0, 0] == 2 ** (n - rank)
        if rank > 0:
            transport.send(rank, rank - 1, m, [x.grad])

    for m in range(k):
        forward(m)
        if m >= hold:
            backward(m - hold)
    for m in range(max(0, k - hold), k):
        backward(m)
    transport.finish()


def fifty_steps(rank: int, n: int) -> None:
    with process_group(rank, n):
        transport = Transport(Group.of(), list(range(n)), [(a, a + 1) for a in range(n - 1)])
        sizes = []
        for _ in range(50):
            one_f_one_b(transport, rank, n, 6, n - rank)
            dist.barrier()
            sizes.append(transport.nbytes)
        slot = slot_bytes(ONE)
        # Forwards ahead of their backwards, gradients ahead of theirs, and one more each that is just being let go of.
        ahead = (n - rank + 2 if rank < n - 1 else 0) + (3 if rank else 0)
        assert slot <= max(sizes) <= ahead * slot, (rank, [size / slot for size in sizes])
        before = Host.here().arena.in_use
        transport.close()
        assert Host.here().arena.in_use == before - sizes[-1], "all slots went back"


@NO_CORE
def test_slots_are_as_many_as_the_schedule_holds_at_once_and_do_not_grow() -> None:
    run_ranks(3, fifty_steps)


def holds(rank: int, n: int) -> list[int]:
    """Rank 1 holds a view of one output for three steps, what autograd saved of another, and a third in a child."""
    sizes = []
    with process_group(rank, n):
        transport = Transport(Group.of(), [0, 1], [(0, 1)])
        view, product = torch.empty(0), torch.empty(0)
        weight = torch.ones(300, 100, requires_grad=True)
        for step in range(6):
            for k in range(2):
                if rank == 0:
                    transport.send(0, 1, k, [one_tensor(step, k), torch.arange(5)])
                    continue
                transport.post(0, 1, k, NUMBERED)
                x, numbers = transport.take(0, 1, k)
                if (step, k) == (1, 0):
                    view = numbers[2:3]
                elif (step, k) == (1, 1):
                    product = x * weight  # autograd holds x
                else:
                    x.add_(1e6)
                    numbers.zero_()
                del x, numbers
            if rank == 1 and step == 2:
                child = os.fork()
                if child == 0:  # drops its copies of what the parent holds
                    del view, product
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
            if rank == 1 and step == 4:
                assert view.item() == 2
                product.sum().backward()
                assert weight.grad is not None and torch.equal(weight.grad, one_tensor(1, 1))
                del view, product
            transport.finish()
            dist.barrier()
            sizes.append(transport.nbytes)
        transport.close()
    return sizes


@NO_CORE
def test_what_a_receiver_holds_never_changes_and_comes_back_when_he_lets_go() -> None:
    sizes = run_ranks(2, holds)[0]
    assert max(sizes) <= 4 * slot_bytes(NUMBERED), "two on their way, two held"
    assert sizes[4] > 2 * slot_bytes(NUMBERED) and sizes[5] == sizes[4], "those that came back are used"


def outlives(rank: int, n: int) -> str:
    with process_group(rank, n):
        transport = Transport(Group.of(), [0, 1], [(0, 1)])
        pids = [0] * n
        dist.all_gather_object(pids, os.getpid())
        if rank == 0:
            transport.send(0, 1, 0, [one_tensor(3, 0)])
            transport.finish()
            transport.close()
            for _ in range(20):  # memory that was given back would be taken again, and filled
                distlib.registered_empty(300, 100).fill_(-1)
            dist.barrier()
        else:
            dist.barrier()
            transport.post(0, 1, 0, ONE)
            x = transport.take(0, 1, 0)[0]
            transport.finish()
            transport.close()
    if rank == 1:
        until = time.monotonic() + 20
        while psutil.pid_exists(pids[0]):  # the sender ends
            assert time.monotonic() < until
            time.sleep(0.01)
        assert torch.equal(x, one_tensor(3, 0))
    return "held"


@NO_CORE
def test_what_was_received_outlives_the_transport_the_group_and_the_sender() -> None:
    assert run_ranks(2, outlives) == ["held", "held"]


# ---------------------------------------------------------------- without a cluster


def test_without_a_cluster_bytes_are_counted_and_tensors_have_their_shapes() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    try:
        distlib.ledger().reset()
        transport = Transport(Group.of(), list(range(64)), [(a, a + 1) for a in range(63)])
        transport.send(3, 4, 0, [one_tensor(0, 0)])
        transport.post(2, 3, 0, ONE)
        assert specs_of(transport.take(2, 3, 0)) == [ONE[0]._replace(requires_grad=False)]
        transport.finish()
        transport.close()
        sent = {row.op: row.bytes for row in distlib.ledger().rows}
        assert sent["send"] == ONE[0].nbytes
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- arithmetic

SPECS = st.lists(
    st.builds(Spec, st.lists(st.integers(0, 9), max_size=4).map(tuple), st.sampled_from(DTYPES), st.booleans()),
    max_size=90,
)


@settings(deadline=None)
@given(SPECS, SPECS, st.integers(0, 1 << 40), st.integers(-1, 1 << 40))
def test_a_header_says_what_it_goes_with(mine: list[Spec], other: list[Spec], k: int, offset: int) -> None:
    header = Header.of(k, mine).in_slot(offset)
    packed = header.pack()
    assert packed.numel() == BYTES and Header.unpack(packed) == header and header.kind == DATA
    alike = [spec[:2] for spec in mine] == [spec[:2] for spec in other]
    assert header.agrees(Header.of(k, other)) == alike
    assert not header.agrees(Header.of(k + 1, mine))


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 40)))
def test_tensors_of_a_slot_lie_apart_each_on_a_cache_line(sizes: list[int]) -> None:
    offsets, end = layout(sizes)
    assert all(offset % 64 == 0 for offset in offsets)
    ends = [64, *(offset + size for offset, size in zip(offsets, sizes, strict=True))]
    assert all(begin >= before for begin, before in zip([*offsets, end], ends, strict=True))


def lent_twice(rank: int, n: int) -> list[bool]:
    slot = Slot(4096)
    slot.lend(None)
    first = slot.lendings
    found = [slot.was_taken(first)]
    slot._state[0] = slots._RETURNED
    found.append(slot.was_taken(first))
    slot.lend(None)  # to another rank, which has not come
    return [*found, slot.was_taken(first), slot.was_taken(slot.lendings)]


@pytest.mark.skipif(native.core() is None, reason="slots are of the core's memory")
def test_a_slot_that_is_lent_again_was_taken_by_the_first() -> None:
    """Else a rank that has taken all that was for it, and left, would be said to have ended before."""
    assert run_ranks(1, lent_twice) == [[False, True, True, False]]

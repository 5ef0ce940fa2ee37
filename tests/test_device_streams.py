"""Collectives of a device's tensors in groups that torch made: ordered by streams, no races, no host that waits.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from types import SimpleNamespace
from typing import Any

import fake_device
import pytest
import torch
import torch.distributed as dist
from device_groups import SMALL
from devices import device_here, needs_device_collectives
from ranks import process_group, run_ranks
from test_device_collectives import KINDS, Case, Player

import distlib
from distlib import streams
from distlib.comm.group import Group
from distlib.comm.watch import Watch

pytestmark = needs_device_collectives


def every_kind(rank: int, n: int) -> None:
    device = device_here("fake")
    with process_group(rank, n):
        group = Group.of()
        assert group.on_device(device) and not group.on_device("meta")
        here = Player(group, torch.device("cpu"))
        there = Player(group, device)
        cases = [Case(kind, torch.bfloat16, numel=3000, async_op=late) for kind in KINDS for late in (False, True)]
        cases += [Case(kind, numel=99, strided=True) for kind in KINDS if kind != "ring"]
        for case in cases:
            assert there.play(case) == here.play(case), case


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_every_kind_has_the_bits_of_the_cpu(nodes: str) -> None:
    run_ranks(4 if nodes == "1" else 2, every_kind, env={**SMALL, "DISTLIB_NODES": nodes})


def host_never_waits(rank: int, n: int) -> int:
    device = device_here("fake")
    with process_group(rank, n):
        group = Group.of()
        x = torch.ones(500, device=device)
        group.all_reduce(x)  # makes the channel
        whole = torch.empty(500 * n, device=device)
        fake_device.reset()
        for _ in range(3):
            works = [group.all_gather(whole, x, async_op=True), group.all_reduce(x, async_op=True)]
            for work in works:
                assert work is not None
                work.wait()
            group.broadcast(x, 0)
        return len(fake_device.host_syncs())


def test_a_steady_step_makes_no_host_wait() -> None:
    assert run_ranks(2, host_never_waits, env=SMALL) == [0, 0]


def reads_too_early(rank: int, n: int) -> str:
    device = device_here("fake")
    with process_group(rank, n):
        x = torch.ones(500, device=device)
        Group.of().all_reduce(x)
        fake_device.lag(1 << 40)  # the host never learns that anything is done
        work = Group.of().all_reduce(x, async_op=True)
        with pytest.raises(RuntimeError) as caught:
            x.add_(1)
        assert work is not None
        work.wait()
        x.sum()
        side = streams.new(device)
        with streams.on(side), pytest.raises(RuntimeError, match="all_reduce"):
            x.sum()  # only the first stream has waited
        with streams.on(side):
            work.wait()
            x.sum()
        fake_device.lag(0)
        return str(caught.value)


def test_a_result_that_is_read_before_the_wait_is_a_race() -> None:
    for text in run_ranks(2, reads_too_early, env=SMALL):
        assert "all_reduce" in text


def lets_go_of_tensors(rank: int, n: int) -> None:
    device = device_here("fake")
    with process_group(rank, n):
        group = Group.of()
        fake_device.lag(3)
        works = []
        for i in range(20):  # their memory is lent again while works are in flight
            x = torch.full((300,), float(i), device=device)
            works.append((group.all_reduce(x, async_op=True), i))
            if i % 3 == 2:
                work, _ = works.pop(0)
                assert work is not None
                work.wait()
            del x
        for work, i in works:
            assert work is not None
            work.wait()
            assert work.result()[0].tolist() == [2.0 * i] * 300


def test_tensors_that_nobody_else_holds_live_until_their_collective_is_done() -> None:
    run_ranks(2, lets_go_of_tensors, env=SMALL)


def messages_without_end(rank: int, n: int) -> int:
    device = device_here("fake")
    made = 0
    new = streams.new

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return new(*args, **kwargs)

    with process_group(rank, n):
        group = Group.of()
        x = torch.ones(5, device=device)
        group.all_reduce(x)
        streams.new = counted
        for _ in range(40):
            group.send(x, 1) if rank == 0 else group.recv(x, 0)
        return made


def test_all_messages_of_a_way_have_one_stream() -> None:
    """torch's pool has 32: a stream more for each message would soon be one of another group."""
    assert run_ranks(2, messages_without_end, env=SMALL) == [1, 1]


class Pooled:
    """A stream of a pool, as torch's are on GPUs."""

    pool = 32

    def __init__(self, made: dict[int, int], device: torch.device, priority: int) -> None:
        made[priority] = made.get(priority, 0) + 1
        self.device, self.stream_id = device, 100 * -priority + made[priority] % self.pool


def test_a_stream_is_not_handed_out_again_while_somebody_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: dict[int, int] = {}
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "Stream", functools.partial(Pooled, made))
    held = [streams.new(gpu, urgent=True) for _ in range(3 * Pooled.pool)]
    assert len({stream.stream_id for stream in held}) == len(held) and not caplog.records
    assert streams.new(gpu, urgent=True).stream_id in {stream.stream_id for stream in held}
    assert "two now share one" in caplog.text
    free = held.pop(40).stream_id
    assert streams.new(gpu, urgent=True).stream_id == free
    assert streams.new(gpu).stream_id == 1


def far_ahead(rank: int, n: int, how: str) -> int:
    """Bytes that are reserved for twenty gathers, one after the other, of a host that never sees one done."""
    device = device_here("fake")
    with process_group(rank, n):
        group = Group.of()
        x = torch.ones(100_000, device=device)
        group.all_reduce(x)
        torch.accelerator.synchronize()
        side = streams.new(device)
        fake_device.lag(1 << 40)
        before = torch.accelerator.memory_reserved()
        for _ in range(20):
            whole = torch.empty(len(x) * n, device=device)
            if how == "group":
                work = group.all_gather(whole, x, async_op=True)
                work.wait()
            elif how == "waits here":
                group.all_gather(whole, x)
            elif how == "torch":
                work = dist.all_gather_into_tensor(whole, x, async_op=True)
                work.wait()
            else:
                work = group.all_gather(whole, x, async_op=True)
                with streams.on(side):  # memory is not this stream's
                    work.wait()
            assert whole.numel()
            del whole
            work = None
        reserved = torch.accelerator.memory_reserved() - before
        fake_device.lag(0)
        return reserved


@pytest.mark.parametrize("how", ["group", "waits here", "torch", "on another stream"])
def test_memory_that_a_stream_waited_for_is_lent_again_before_the_host_sees_it(how: str) -> None:
    """Else a host that is ahead would hold what many gathers brought."""
    each = 2 * 400_000
    for reserved in run_ranks(2, far_ahead, how, env=SMALL):
        assert reserved < 2 * each if how != "on another stream" else reserved >= 20 * each, reserved


def other_device(rank: int, n: int) -> None:
    fake_device.load(2)
    side = streams.new(torch.device("fake", 1))
    with streams.on(side):
        assert streams.current(torch.device("fake", 1)) == side
    assert torch.accelerator.current_device_index() == 0
    assert streams.current(torch.device("fake", 1)) != side


def test_a_stream_of_another_device_leaves_the_current_one() -> None:
    run_ranks(1, other_device)


def test_lasting_pinned_memory_takes_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's cache rounds up to powers of two: of what an optimizer keeps in host memory, up to half for nothing."""
    registered: dict[int, int] = {}

    class Cudart:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            registered[address] = nbytes
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            assert waits, "a copy may be under way"
            return registered.pop(address) * 0

    waits: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None if not code else pytest.fail("told"))
    memory = streams.pinned(1000, torch.float32, torch.device("cuda"), lasting=True)
    memory.fill_(3.0)
    piece = memory[500:].view(torch.uint8)
    assert registered == {memory.data_ptr(): 4000}
    del memory
    assert len(registered) == 1 and piece.view(torch.float32)[499] == 3.0
    del piece
    assert not registered and waits == [torch.device("cuda")]


class Looked:
    """A channel of a device that is not the first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: list[int] = []

    def look(self) -> bool:
        self.seen.append(torch.accelerator.current_device_index())
        return False

    def abort(self, text: str) -> None:
        raise AssertionError(text)


def watched_on(rank: int, n: int) -> None:
    fake_device.load(2)
    looked, watch = Looked(torch.device("fake", 1)), Watch()
    watch.add(looked)
    until = time.monotonic() + 10
    while not looked.seen and time.monotonic() < until:
        time.sleep(0.01)
    assert looked.seen[0] == 1 and torch.accelerator.current_device_index() == 0


def test_the_watch_asks_on_the_groups_own_device() -> None:
    """A thread starts on device 0, and would make a context there: memory of a GPU that is another rank's."""
    run_ranks(1, watched_on)


def test_a_thread_that_asks_does_not_end_a_capture_of_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes, indices = [], []
    driver = SimpleNamespace(cuThreadExchangeStreamCaptureMode=lambda mode: modes.append(mode._obj.value))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    monkeypatch.setattr(torch.accelerator, "set_device_index", indices.append)

    def asks() -> None:
        streams.attend(torch.device("cpu"))
        for index in (2, 3):
            streams.attend(torch.device("cuda", index))

    for _ in range(2):
        thread = threading.Thread(target=asks)
        thread.start()
        thread.join()
    assert modes == [1, 1] and indices == [2, 3, 2, 3]  # once a thread: thread-local
    driver.cuThreadExchangeStreamCaptureMode = lambda mode: 801
    thread = threading.Thread(target=asks)
    thread.start()
    thread.join()
    assert "CUDA graphs cannot be captured" in caplog.text and "801" in caplog.text


def captured(rank: int, n: int) -> None:
    device = device_here("fake")
    with process_group(rank, n):
        group = Group.of()
        x = torch.ones(5, device=device)
        group.all_reduce(x)
        is_captured, streams.is_captured = streams.is_captured, lambda device: True
        for call in (lambda: group.all_reduce(x), lambda: group.send(x, 1 - rank), lambda: group.recv(x, 1 - rank)):
            with pytest.raises(RuntimeError, match="was called while a CUDA graph is captured"):
                call()
        streams.is_captured = is_captured
        group.all_reduce(x)
        assert x.tolist() == [4.0] * 5


def test_a_collective_does_not_go_into_a_graph_and_the_group_goes_on() -> None:
    run_ranks(2, captured, env=SMALL)


def two_devices(rank: int, n: int) -> None:
    device = device_here("fake")
    with process_group(rank, n):
        group = Group.of()
        with pytest.raises(ValueError, match="tensors on cpu and fake"):
            group.all_gather(torch.ones(n, device=device), torch.ones(1))
        x = torch.ones(1, device=device)
        if n > 2:
            with pytest.raises(ValueError, match=r"call group.connect\('fake:0'\) on all ranks first"):
                group.send(x, (rank + 1) % n)
        group.connect(device)
        if rank == 0:
            group.send(x, 1)
        if rank == 1:
            group.recv(x, 0)
        assert group.registered_empty(7, device=device).device == device
        group.barrier()
        distlib.ledger().reset()
        group.all_reduce(x)
        group.all_reduce(torch.ones(1))
        assert {(r.op, r.calls) for r in distlib.ledger().rows} == {("all_reduce", 2)}


@pytest.mark.parametrize("n", [2, 3])
def test_devices_are_not_mixed_and_messages_need_a_way(n: int) -> None:
    run_ranks(n, two_devices, env=SMALL)


def forgets_to_follow(rank: int, n: int, what: str) -> str:
    """A mistake in the channel itself, planted."""
    device = device_here("fake")
    with process_group(rank, n):
        x = torch.ones(500, device=device)
        Group.of().all_reduce(x)
        fake_device.lag(1 << 40)
        if what == "the start":
            streams.follow = lambda stream, other: None
        else:
            streams.wait = lambda stream, event: None
        with pytest.raises(RuntimeError) as caught:
            x.add_(1)
            Group.of().all_reduce(x)
            x.add_(1)
        fake_device.lag(0)
        return str(caught.value)


@pytest.mark.parametrize("what", ["the start", "the wait"])
def test_a_channel_that_orders_nothing_is_found(what: str) -> None:
    for text in run_ranks(2, forgets_to_follow, what, env=SMALL):
        assert "race" in text and "all_reduce" in text


def groups_side_by_side(rank: int, n: int) -> None:
    device = device_here("fake")
    with process_group(rank, n):
        gathers, reductions = Group.of(dist.new_group()), Group.of(dist.new_group())
        x = torch.full((1000,), rank + 1.0, device=device)
        whole = torch.empty(1000 * n, device=device)
        first, second = gathers.all_gather(whole, x, async_op=True), reductions.all_reduce(x.clone(), async_op=True)
        assert first is not None and second is not None
        second.wait()
        first.wait()
        assert torch.equal(second.result()[0], torch.full((1000,), 3.0, device=device))
        assert whole.tolist() == [1.0] * 1000 + [2.0] * 1000


def test_groups_have_channels_of_their_own() -> None:
    run_ranks(2, groups_side_by_side, env=SMALL)

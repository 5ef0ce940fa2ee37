"""The fake device's detector finds each kind of race between streams, and nothing where events order them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import fake_device
import pytest
import torch
from test_fake_device import on_device
from torch import nn

from distlib import streams

pytestmark = [
    pytest.mark.timeout(600),  # the first test may have to compile the device
    pytest.mark.usefixtures("built_fake_device"),
]


class Setting:
    """Two streams, and the waits that a case needs: left out where it is to be racy."""

    def __init__(self, device: torch.device, ordered: bool) -> None:
        self.device, self.ordered = device, ordered
        self.main, self.side = streams.current(device), torch.Stream(device)

    def tensor(self, size: int = 1000) -> torch.Tensor:
        """Written by the main stream, and all streams know it."""
        x = torch.ones(size, device=self.device)
        torch.accelerator.synchronize()
        return x

    def follow(self, stream: torch.Stream, other: torch.Stream) -> None:
        if self.ordered:
            streams.follow(stream, other)


def read_without_waiting(at: Setting) -> None:
    x = at.tensor()
    x.mul_(2)
    at.follow(at.side, at.main)
    with at.side:
        x.sum()


def write_without_waiting(at: Setting) -> None:
    x = at.tensor()
    x.mul_(2)
    at.follow(at.side, at.main)
    with at.side:
        x.add_(1)


def overwrite_what_is_still_read(at: Setting) -> None:
    x = at.tensor()
    with at.side:
        y = x + 1
    at.follow(at.main, at.side)
    x.zero_()
    del y


def use_memory_that_is_fresh_on_another_stream(at: Setting) -> None:
    x = torch.empty(1000, device=at.device)
    at.follow(at.side, at.main)
    with at.side:
        x.zero_()


def free_early_and_lend_again(at: Setting) -> None:
    x = at.tensor()
    with at.side:
        y = x * 3
    if at.ordered:
        x.record_stream(at.side)
    del x
    z = torch.empty(900, device=at.device)
    del y, z


def free_early_but_wait(at: Setting) -> None:
    x = at.tensor()
    with at.side:
        y = x * 3
    del x
    at.follow(at.main, at.side)
    z = torch.empty(1000, device=at.device)
    del y, z


def resize_storage_to_nothing_and_back(at: Setting) -> None:
    x = at.tensor()
    with at.side:
        y = x * 3
    x.untyped_storage().resize_(0)
    at.follow(at.main, at.side)
    x.untyped_storage().resize_(4000)
    del y


def record_the_event_too_early(at: Setting) -> None:
    x = at.tensor()
    early = at.main.record_event()
    x.mul_(2)
    event = at.main.record_event() if at.ordered else early
    at.side.wait_event(event)
    with at.side:
        x.sum()


def wait_on_another_stream(at: Setting) -> None:
    x = at.tensor()
    x.mul_(2)
    third = torch.Stream(at.device)
    streams.follow(at.side if at.ordered else third, at.main)
    with at.side:
        x.sum()


def accumulate_aside_then_read(at: Setting) -> None:
    total, gradient = at.tensor(), at.tensor()
    gradient.mul_(2)
    streams.follow(at.side, at.main)
    with at.side:
        total.add_(gradient)
    at.follow(at.main, at.side)
    total.sum()


def reduce_in_a_hook_then_step(at: Setting) -> None:
    layer = nn.Linear(8, 8, bias=False, device=at.device)

    def reduce(p: nn.Parameter) -> None:
        streams.follow(at.side, streams.current(at.device))
        with streams.on(at.side), torch.no_grad():
            p.grad.mul_(0.5)

    layer.weight.register_post_accumulate_grad_hook(reduce)
    layer(torch.ones(2, 8, device=at.device)).sum().backward()
    at.follow(at.main, at.side)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def launch_a_kernel_without_waiting(at: Setting) -> None:
    x = at.tensor()
    x.mul_(2)
    at.follow(at.side, at.main)
    fake_device.touch(x[10:20], write=False, name="pack", stream=at.side)


def read_pinned_memory_too_early(at: Setting) -> None:
    x, host = at.tensor(), torch.empty(1000, pin_memory=True)
    host.copy_(x, non_blocking=True)
    if at.ordered:
        at.main.record_event().synchronize()
    fake_device.check_host(host)


def overwrite_pinned_memory_that_is_copied(at: Setting) -> None:
    x, host = at.tensor(), torch.ones(1000).pin_memory()
    with at.side:
        x.copy_(host, non_blocking=True)
    if at.ordered:
        at.side.synchronize()
    fake_device.check_host(host, write=True)


def compute_with_pinned_memory_too_early(at: Setting) -> None:
    x, host = at.tensor(), torch.empty(1000, pin_memory=True)
    host.copy_(x, non_blocking=True)
    if at.ordered:
        torch.accelerator.synchronize()
    with fake_device.WatchPinned():
        host[10:20].view(2, 5).sum()


def keep_pinned_memory_that_is_only_read(at: Setting) -> None:
    x, host = at.tensor(), torch.ones(1000).pin_memory()
    x.copy_(host, non_blocking=True)
    with fake_device.WatchPinned():
        host.sum()  # two that read
        if at.ordered:
            torch.accelerator.synchronize()
        host.add_(1)


def fill_pinned_memory_by_two_streams(at: Setting) -> None:
    x, host = at.tensor(), torch.empty(1000, pin_memory=True)
    host.copy_(x, non_blocking=True)
    at.follow(at.side, at.main)
    with at.side:
        host.copy_(x, non_blocking=True)


def ask_an_event_that_has_not_passed(at: Setting) -> None:
    x = at.tensor()
    x.mul_(2)
    event = at.main.record_event()
    fake_device.lag(1)
    while not event.query() and at.ordered:
        continue
    with at.side:
        x.sum()


CASES = [
    read_without_waiting,
    write_without_waiting,
    overwrite_what_is_still_read,
    use_memory_that_is_fresh_on_another_stream,
    free_early_and_lend_again,
    free_early_but_wait,
    resize_storage_to_nothing_and_back,
    record_the_event_too_early,
    wait_on_another_stream,
    accumulate_aside_then_read,
    reduce_in_a_hook_then_step,
    launch_a_kernel_without_waiting,
    read_pinned_memory_too_early,
    overwrite_pinned_memory_that_is_copied,
    compute_with_pinned_memory_too_early,
    keep_pinned_memory_that_is_only_read,
    fill_pinned_memory_by_two_streams,
    ask_an_event_that_has_not_passed,
]


def race_of(device: torch.device, case: Callable[[Setting], None], ordered: bool) -> str | None:
    try:
        case(Setting(device, ordered))
    except RuntimeError as error:
        assert str(error).startswith("race: "), error
        return str(error)
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_race_is_found_and_its_ordered_twin_is_not(case: Callable[[Setting], None]) -> None:
    found = on_device(race_of, case, False)
    assert found is not None and f"in {case.__name__}" in found, found  # with the place of the access
    assert on_device(race_of, case, True) is None


def message(device: torch.device) -> str | None:
    return race_of(device, overwrite_what_is_still_read, False)


def test_a_race_names_operators_streams_shapes_and_the_fix() -> None:
    text = on_device(message)
    assert "aten::zero_ on the default stream of fake:0 writes [1000]" in text
    assert "aten::add on stream 1 of fake:0 read as [1000]" in text
    assert "wait for an event" in text
    assert text.count("in overwrite_what_is_still_read") == 2  # where each of the two was


def disjoint(device: torch.device) -> None:
    at = Setting(device, False)
    x = at.tensor(1000)
    x[:500].zero_()
    with at.side:
        x[500:].fill_(2)
        x[600:700].sum()
    x[400:500].sum()
    streams.follow(at.main, at.side)
    assert x.sum().item() == 1000
    other = at.tensor(1000)
    with at.side:
        other.sum()
    other.mean()  # two that read


def test_two_streams_may_use_two_parts_of_a_tensor_and_both_may_read() -> None:
    on_device(disjoint)


def across_streams(device: torch.device, side: streams.Stream) -> list[torch.Tensor]:
    """Weights after steps with forward on a side stream, backward from the main one: autograd itself orders them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        streams.follow(side, streams.current(device))
        with streams.on(side):
            loss = model(torch.ones(2, 8, device=device)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        streams.follow(streams.current(device), side)
    return [p.detach().cpu() for p in model.parameters()]


def on_a_side_stream(device: torch.device) -> list[torch.Tensor]:
    return across_streams(device, torch.Stream(device))


def test_backward_of_a_side_streams_forward_is_ordered() -> None:
    plain = across_streams(torch.device("cpu"), None)
    assert all(torch.equal(*pair) for pair in zip(on_device(on_a_side_stream), plain, strict=True))


def modes(device: torch.device) -> list[str]:
    at = Setting(device, False)
    fake_device.races("collect")
    read_without_waiting(at)
    write_without_waiting(at)
    found = fake_device.collected()
    assert fake_device.collected() == []
    fake_device.races("off")
    read_without_waiting(at)
    fake_device.races("raise")
    fake_device.reset()
    with pytest.raises(RuntimeError, match="race"):
        read_without_waiting(at)
    with pytest.raises(ValueError, match="raise"):
        fake_device.races("loud")
    return found


def test_races_may_be_collected_or_passed_over() -> None:
    found = on_device(modes)
    assert ["in read_without_waiting" in found[0], "in write_without_waiting" in found[-1]] == [True, True]


# ---- against a plain account of what comes before what --------------------------------------------------------


def first_race(program: list[tuple[Any, ...]]) -> int | None:
    """The first access that conflicts with an earlier one that is not before it. Sets, where the device has clocks.

    Steps: ("access", stream, begin, end, write), ("record", stream, event), ("wait", stream, event), ("host", stream).
    """
    before: dict[int, frozenset[int]] = {}  # by stream: the steps that what it is given now comes after
    events: dict[int, frozenset[int]] = {}
    host: frozenset[int] = frozenset()
    accesses: list[tuple[int, int, int, bool]] = []
    for number, (kind, stream, *rest) in enumerate(program):
        known = before.get(stream, frozenset()) | host
        if kind == "access":
            begin, end, write = rest
            for earlier, b, e, w in accesses:
                if b < end and begin < e and (w or write) and earlier not in known:
                    return number
            accesses.append((number, begin, end, write))
            before[stream] = known | {number}
        elif kind == "record":
            events[rest[0]] = known
        elif kind == "wait":
            before[stream] = known | events.get(rest[0], frozenset())
        else:
            host |= known
    return None


def random_program(seed: int) -> list[tuple[Any, ...]]:
    dice = random.Random(seed)
    waits, writes = dice.choice([4, 12, 40]), dice.choice([0.1, 0.4])
    program: list[tuple[Any, ...]] = []
    for _ in range(50):
        kind = dice.choices(["access", "order", "host"], [4, waits, 0.2])[0]
        stream = dice.randrange(3)
        if kind == "access":
            begin = dice.randrange(30)
            program.append(("access", stream, begin, begin + dice.randrange(1, 6), dice.random() < writes))
        elif kind == "host":
            program.append(("host", stream))
        elif dice.random() < 0.7:
            event = dice.randrange(3)
            program += [("record", stream, event), ("wait", dice.randrange(3), event)]
        else:
            program.append((dice.choice(["record", "wait"]), stream, dice.randrange(3)))
    return program


def runs_programs(device: torch.device, count: int) -> int:
    """How many of them race. Each must raise at the step that the plain account names."""
    racy = 0
    for seed in range(count):
        program = random_program(seed)
        all_streams = [torch.Stream(device) for _ in range(3)]
        events = [torch.Event(device) for _ in range(3)]
        memory = torch.empty(40, dtype=torch.uint8, device=device)
        torch.accelerator.synchronize()
        found = None
        for number, (kind, stream, *rest) in enumerate(program):
            if kind == "access":
                begin, end, write = rest
                try:
                    fake_device.touch(memory[begin:end], write, stream=all_streams[stream])
                except RuntimeError:
                    found = number
                    break
            elif kind == "record":
                events[rest[0]].record(all_streams[stream])
            elif kind == "wait":
                all_streams[stream].wait_event(events[rest[0]])
            else:
                all_streams[stream].synchronize()
        assert found == first_race(program), (seed, program)
        racy += found is not None
        fake_device.reset()
    return racy


def test_random_programs_race_where_a_plain_account_says() -> None:
    racy = on_device(runs_programs, 600)
    assert 100 < racy < 500  # both kinds are among them

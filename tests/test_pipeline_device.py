"""Pipelines on a device that is not the CPU: the CPU's bits, streams in order, by either way of messages.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace
from typing import Any

import fake_device
import pytest
import torch
from devices import device_here, needs_fake_device
from pipeline_models import CASES
from ranks import process_group, run_ranks, run_ranks_raw
from torch import nn
from torch._subclasses import FakeTensor

import distlib
from distlib import reach
from distlib.comm import group as group_module
from distlib.comm.work import CollectiveError, finished
from distlib.optim import global_norm
from distlib.pipeline.direct import DirectTransport
from distlib.pipeline.losses import LossShare
from distlib.pipeline.micro_batches import Whole, divide, moved
from distlib.pipeline.program import Spec

pytestmark = needs_fake_device

ROWS, MICRO, STEPS = 7, 3, 3
Found = dict[str, Any]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def train(device: torch.device, name: str, direct: bool = False, **options: Any) -> Found:
    """Losses, gradients and outputs of some steps. direct: whether messages must go from device to device."""
    case = CASES[name]
    model = distlib.PipelineParallel(
        case.made(),
        microbatches=MICRO,
        loss_fn=case.loss,
        example_inputs=case.batch(ROWS, 0)[0],
        costs="estimated",
        device=device,
        **options,
    )
    assert all(p.device == device for p in model.parameters())
    assert model._runtime._transport.direct == direct
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    found: Found = {"losses": []}
    for step in range(STEPS):
        loss = model.train_step(*(case.batch(ROWS, step) if model.needs_batch else ()))
        assert loss.device == device
        found["losses"].append(bits(loss))
        if step == 0:
            found["gradients"] = {name: bits(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    inputs, target = case.batch(ROWS, 0)
    found["evaluation"] = bits(model.eval_step(inputs, target))
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    outputs = list(output.values()) if isinstance(output, dict) else [output]
    assert all(o.device == device for o in outputs)
    found["outputs"] = [bits(o) for o in outputs]
    found["weights"] = {name: bits(t) for name, t in model.full_state_dict().items()}
    return found


def trained(rank: int, n: int, place: str, records: list[dict[str, Any]], way: str = "") -> list[Found]:
    """way: of messages that must be taken; "staged" does not ask whether there is another."""
    device = device_here(place)
    if way == "staged":
        reach._settle = lambda group, device: "for a test"
    with process_group(rank, n), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [train(device, **record, direct=way == "direct") for record in records]
    heard = any("through host memory" in str(w.message) for w in said)
    assert heard == (way == "staged" and rank == 0), [str(w.message) for w in said]
    return found


def assert_alike(n: int, records: list[dict[str, Any]], way: str) -> None:
    alone = {"OMP_NUM_THREADS": "1"}  # threads that spin would take the cores from the other ranks
    on_cpu = run_ranks(n, trained, "cpu", records, timeout=100, env=alone)
    on_device = run_ranks(n, trained, "fake", records, way, timeout=100, env=alone)
    for here, there in zip(on_cpu, on_device, strict=True):
        for record, expected, found in zip(records, here, there, strict=True):
            for what, value in expected.items():
                assert found[what] == value, (what, record)


RECORDS: list[dict[str, Any]] = [
    {"name": "dropout", "schedule": "zb-h1"},  # states of two generators travel
    {"name": "skips", "schedule": "1f1b"},
    {"name": "tied", "schedule": "interleaved"},
    {"name": "lengths", "schedule": "zb-v"},
    {"name": "skips", "schedule": "1f1b", "shape_header": True},  # what other stages read goes by the hosts
    {"name": "language", "schedule": "1f1b", "shape_header": True},  # tokens that are sliced
]


def test_one_rank_has_the_cpus_bits() -> None:
    assert_alike(1, [{"name": "dropout", "schedule": "zb-v"}, {"name": "tied", "schedule": "interleaved"}], "direct")


def test_messages_from_device_to_device_carry_the_same_bits() -> None:
    assert_alike(2, RECORDS, "direct")
    assert_alike(3, [{"name": "skips", "schedule": "interleaved"}], "direct")  # edges between all ranks


def test_messages_through_host_memory_carry_the_same_bits() -> None:
    assert_alike(2, RECORDS, "staged")


# ------------------------------------------------------------ the order of streams, the host


def steady(rank: int, n: int, way: str) -> list[str]:
    """Where the host waited for the device in steps in which nothing is new; and accounts of a step."""
    device = device_here("fake")
    if way == "staged":
        reach._settle = lambda group, device: "for a test"
    case = CASES["language"]
    with process_group(rank, n), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = distlib.PipelineParallel(
            case.made(), 2, "zb-h1", 4, case.loss, example_inputs=case.batch(8, 0)[0], device=device
        )
        waits = []
        for step in range(4):
            inputs, target = case.batch(8, step)
            fake_device.reset()
            fake_device.lag(3 if step == 3 else 0)  # messages and copies take their time
            model.train_step(inputs.pin_memory(), target.pin_memory())
            waits += [f"step {step}: {wait}" for wait in fake_device.host_syncs() if step > 1]
        fake_device.lag(0)
        _, measured = model.timed_step(inputs, target)
        assert measured.bubble < 1
    return waits


def test_the_host_waits_for_a_device_only_to_send_what_is_there() -> None:
    assert run_ranks(2, steady, "direct", timeout=60) == [[], []]
    for waits in run_ranks(2, steady, "staged", timeout=60):
        assert all("staged.py" in wait or "losses.py" in wait for wait in waits), waits
        assert all(wait.startswith("step 3") for wait in waits), waits
        assert waits, "a device that lags was waited for"


def shared(rank: int, n: int) -> None:
    device = device_here("fake")
    x, mask = torch.randn(6, 2), torch.ones(6, 6)
    batches = moved(divide({"x": x, "mask": Whole(mask)}, x, 3), device)
    assert all(b.kwargs["x"].device == b.target.device == device for b in batches)
    assert len({b.kwargs["mask"].data_ptr() for b in batches}) == 1
    assert moved(batches, torch.device("cpu")) == batches


def test_what_micro_batches_share_goes_to_the_device_once() -> None:
    run_ranks(1, shared)


def misplaced(rank: int, n: int) -> None:
    """A stage that makes a tensor on the CPU is told so, by name, on the rank where it is; the others hear it."""
    device = device_here("fake")
    with pytest.raises(
        RuntimeError, match="stage 0 -> 1, micro-batch 0 .*a tensor on cpu .* make it dense and on fake"
    ):
        with process_group(rank, n):
            model = distlib.PipelineParallel(
                nn.Sequential(nn.Linear(4, 4), ToHost(), nn.Linear(4, 4), ToHost()),
                2,
                "gpipe",
                2,
                nn.functional.mse_loss,
                split=["2"],
                device=device,
            )
            model.train_step(torch.randn(4, 4), torch.randn(4, 4))
    torch.distributed.destroy_process_group()


class ToHost(nn.Module):
    """A module that leaves the device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else x.cpu()


def test_a_tensor_that_left_the_device_is_named() -> None:
    run_ranks(2, misplaced, timeout=60)


def killed(rank: int, n: int) -> str:
    """A rank that ends while the other's device waits for it."""
    device = device_here("fake")
    case = CASES["language"]
    with process_group(rank, n, timeout=20):
        model = distlib.PipelineParallel(
            case.made(), 2, "1f1b", 2, case.loss, example_inputs=case.batch(4, 0)[0], device=device, costs="estimated"
        )
        model.train_step(*case.batch(4, 0))
        if rank == 1:
            os._exit(3)
        with pytest.raises(CollectiveError, match="rank 1"):
            model.train_step(*case.batch(4, 1))
            model.train_step(*case.batch(4, 2))
    return "told"


def test_a_rank_that_ends_is_named() -> None:
    first, second = run_ranks_raw(2, killed, timeout=60)
    assert (first.value, second.kind) == ("told", "exit"), f"{first}"


# ------------------------------------------------------------ norms and decisions over stages


def agreed(rank: int, n: int, place: str) -> list[float]:
    """Norms over all stages, and the loss scale after steps of which one met an infinity on the last stage only. On the
    device no group carries its tensors."""
    device = device_here(place)

    def connect(group: Any, device: torch.device) -> Any:
        raise ValueError(f"no way for tensors on {device}, for a test")

    group_module.connect = connect
    case, found = CASES["tied"], []
    with process_group(rank, n), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = distlib.PipelineParallel(
            case.made(), 2, "1f1b", MICRO, case.loss, example_inputs=case.batch(ROWS, 0)[0], device=device
        )
        assert place == "cpu" or not model._runtime._transport.direct
        for made in (
            torch.optim.SGD(model.parameters(), lr=1e-2),
            distlib.optim.SGD(model.parameters(), lr=1e-2, max_norm=0.3),
        ):
            scaler = distlib.optim.GradScaler(init_scale=1024.0)
            for step in range(3):
                made.zero_grad()
                model.train_step(*case.batch(ROWS, step), loss_scale=float(scaler.scale(torch.ones(()))))
                if step == 1 and rank == n - 1:
                    next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = float("inf")
                if isinstance(made, torch.optim.SGD):
                    scaler.unscale_(made)
                    found += [float(global_norm(model.parameters(), order)) for order in (1.0, 2.0, float("inf"))]
                    model.clip_grad_norm_(0.3)
                scaler.step(made)
                scaler.update()
                found.append(scaler.get_scale())
    return found


def alone() -> list[float]:
    """The same of one process that knows of nothing, in fp32 without a scaler."""
    case, found = CASES["tied"], []
    model = case.made()
    for ours in (False, True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            inputs, target = case.batch(ROWS, step)
            case.loss(model(inputs), target).backward()
            if step != 1:
                for order in (1.0, 2.0, float("inf")) if not ours else ():
                    found.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9, order)))
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
            elif not ours:
                found += [float("inf")] * 3
            found.append(1024.0 if step == 0 else 512.0)
    return found


def test_norms_and_skipped_steps_are_those_of_one_process_where_no_group_carries_the_device() -> None:
    expected = alone()
    for place in ("cpu", "fake"):
        for found in run_ranks(2, agreed, place, timeout=60):
            assert found == pytest.approx(expected, rel=1e-4), place


# ------------------------------------------------------------ tags


class Noting:
    """A group of two that notes the tags of messages, and sends nothing."""

    rank, size, ranks = 0, 2, (0, 1)

    def __init__(self, takes_tags: bool) -> None:
        self.tags: list[int] = []
        self.takes_tags = lambda device: takes_tags

    def send(self, tensor: torch.Tensor, peer: int, tag: int = 0, **_: Any) -> Any:
        self.tags.append(tag)
        return finished([tensor])

    recv = send


@pytest.mark.parametrize("takes_tags", [True, False])
def test_messages_have_tags_only_where_they_are_compared(takes_tags: bool) -> None:
    """NCCL would ignore them, and refuses."""
    group: Any = Noting(takes_tags)
    host: Any = SimpleNamespace(finish=lambda: None, close=lambda: None)
    transport = DirectTransport(host, group, [0, 1], [(0, 1)], 1.0, torch.device("cpu"))
    assert group.tags == [0, 0]
    transport.send(0, 1, 0, [torch.ones(3)])
    transport.post(1, 0, 0, [Spec.of(torch.ones(3))])
    transport.take(1, 0, 0)
    transport.finish()
    assert len(group.tags) == 4 and all(bool(tag) == takes_tags for tag in group.tags[2:])
    for root in (0, 1):
        losses = LossShare(group, root, torch.float32, 1.0, torch.device("cpu"))
        losses.direct = True
        losses.begin()
        if root == 0:
            losses.tell(torch.ones(()))
        assert losses.result().dim() == 0
    assert len(group.tags) > 5 and all(bool(tag) == takes_tags for tag in group.tags[4:])

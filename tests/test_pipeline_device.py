"""Pipelines on a device that is not the CPU: the CPU's bits, streams in order, by either way of messages.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

import os
import warnings
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
from distlib.comm.work import CollectiveError
from distlib.pipeline import reach
from distlib.pipeline.micro_batches import Whole, divide, moved

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
        loss = model.train_step(*case.batch(ROWS, step))
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
